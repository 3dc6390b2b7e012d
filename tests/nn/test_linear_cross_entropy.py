import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as theirs

import torchref
import torchref.nn.functional as ours
from torchref.nn import linear_cross_entropy as module
from torchref.testing import assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
FIVE = SimpleNamespace(batch_chunk_size=5)  # three chunks of 13 rows, the last one not full


def inputs(dtype=torch.float64, rows=13, classes=11, features=7):
    shapes = [(rows, features), (classes, features), (classes,)]
    x, w, b = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    target = torch.randint(0, classes, (rows,))
    target[::4] = -100
    return x, w, b, target


def composed(x, w, b, target, **kwargs):
    """What torch computes, before 2.13 and since."""
    kwargs.pop("options", None)
    return theirs.cross_entropy(theirs.linear(x, w, b), target, **kwargs)


def in_chunks(x, w, b, target, **kwargs):
    return ours.linear_cross_entropy(x, w, target, linear_bias=b, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_in_chunks(bias, smoothing, weighted, reduction, dtype):
    x, w, b, target = inputs(dtype)
    weight = torch.rand(11).to(dtype) if weighted else None
    kwargs = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    args = (x, w, b if bias else None, target)
    assert_parity(in_chunks, composed, *args, options=FIVE, **kwargs)


@pytest.mark.parametrize("rows", [1, 5, 12, 13, 14])
def test_chunks_of_any_size(rows):
    options = SimpleNamespace(batch_chunk_size=rows)
    assert_parity(in_chunks, composed, *inputs(torch.float32), options=options)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_features(rows):
    assert_parity(in_chunks, composed, *inputs(torch.float32, rows=rows, features=0))


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_some_want_gradients(reduction, wants):
    tensors = [t.detach().requires_grad_(want) for t, want in zip(inputs(), wants, strict=False)]
    target = torch.randint(0, 11, (13,))
    assert_parity(in_chunks, composed, *tensors, target, options=FIVE, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_and_other_uses_of_the_input(reduction):
    """Gradients made in forward, and consumed there, would be wrong the second time."""
    x, w, b, target = inputs()
    losses = [f(x, w, b, target, options=FIVE, reduction=reduction) for f in (in_chunks, composed)]
    grads = []
    for loss in losses:
        dy = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        for scale in (1.0, -3.0):
            grad = torch.autograd.grad(loss, (x, w, b), dy * scale, retain_graph=True)
            grads.append([g.clone() for g in grad])
    for first, second in zip(grads[:2], grads[2:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_differentiated_twice(reduction):
    x, w, b, target = inputs(rows=4, classes=3, features=2)
    options = SimpleNamespace(batch_chunk_size=3)

    def f(x, w, b):
        return in_chunks(x, w, b, target, options=options, reduction=reduction)

    assert torch.autograd.gradcheck(f, (x, w, b))
    assert torch.autograd.gradgradcheck(f, (x, w, b))


def test_tied_weights():
    """An embedding that is the output layer too: both gradients add up in one tensor."""
    results = []
    for loss in (in_chunks, composed):
        torch.manual_seed(3)
        table = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
        tokens = torch.randint(0, 11, (13,))
        loss(table[tokens] * 2, table, None, tokens.roll(-1), options=FIVE).backward()
        results.append(table.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("target", [[-100] * 13, [5] * 13])
def test_all_ignored_and_all_of_one_class(target):
    x, w, b, _ = inputs(torch.float32)
    args = (x, w, b, torch.tensor(target))
    assert_parity(in_chunks, composed, *args, options=FIVE)
    assert_parity(in_chunks, composed, *args, options=FIVE, reduction="sum")


def test_an_ignored_row_may_hold_a_nan():
    x, w, b, target = (t.detach() for t in inputs())
    x[0], target[0] = torch.nan, -100
    w.requires_grad_()
    loss = in_chunks(x[:, :], w, b, target, options=FIVE)
    assert loss.isfinite()


@pytest.mark.cpu  # only there the target is looked at
def test_a_target_out_of_range():
    x, w, b, target = inputs()
    target[7] = 11
    with pytest.raises(IndexError, match=r"linear_cross_entropy: expected every `target`.*got 11"):
        in_chunks(x, w, b, target, options=FIVE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction, dtype):
    x, w, b, target = inputs(torch.float32)
    weight = torch.rand(11)
    device = x.device.type
    losses, grads = [], []
    for f in (in_chunks, composed):
        with torch.autocast(device, dtype):
            loss = f(x, w, b, target, weight=weight, reduction=reduction, options=FIVE)
        losses.append(loss)
        grads.append(torch.autograd.grad(loss.sum(), (x, w, b)))
    assert losses[0].dtype == losses[1].dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*losses, rtol=4 * eps, atol=4 * eps)  # the scores are rounded
    for a, c in zip(*grads, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).abs().max() <= 4 * eps * c.abs().max()


def test_float16_gradients_pass_the_largest_number_on_the_way():
    """The sum over rows before the mean's division is 80,000."""
    x = torch.full((2000, 1), 40.0, dtype=torch.float16)
    w = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(2000, dtype=torch.long)
    options = SimpleNamespace(batch_chunk_size=256)
    ours.linear_cross_entropy(x, w, target, options=options).backward()
    torch.testing.assert_close(w.grad, torch.tensor([[-20.0], [20.0]], dtype=torch.float16))


def test_float16_gradients_live_through_a_loss_scale():
    """Rounded to float16 before the scale of 65536, gradients of 1e-8 would be 0."""
    x = torch.full((4000, 1), 2.0**-10, dtype=torch.float16)
    w = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    target = torch.arange(4000) % 2000 == 0
    options = SimpleNamespace(batch_chunk_size=512)
    loss = ours.linear_cross_entropy(x, w, target.long(), options=options, reduction="mean")
    loss.backward(torch.tensor(32768.0, dtype=torch.float16))
    truth = 2.0**-10 * (0.5 - 2 / 4000) * 32768
    torch.testing.assert_close(w.grad[1, 0].item(), truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scores_are_never_whole(reduction, monkeypatch):
    seen = []
    linear = module.linear_fwd

    def watched(x, w, b):
        seen.append(len(x))
        return linear(x, w, b)

    monkeypatch.setattr(module, "linear_fwd", watched)
    monkeypatch.setattr(module, "linear", None)  # nor the path that makes them whole
    x, w, b, target = inputs()
    in_chunks(x, w, b, target, options=FIVE, reduction=reduction).sum().backward()
    assert seen == [5, 5, 3] * (2 if reduction == "none" else 1)


def test_saved_memory_does_not_grow_with_rows_times_classes():
    """Of 200 x 1000 scores nothing is kept; only the gradients of 200 x 4 inputs and so on."""
    x, w, b, target = inputs(torch.float32, rows=200, classes=1000, features=4)
    kept = []
    options = SimpleNamespace(batch_chunk_size=64)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        in_chunks(x, w, b, target, options=options)
    assert sum(kept) < 3 * (x.numel() + w.numel() + b.numel() + target.numel())


def test_as_many_rows_as_fit():
    vocabulary = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    assert module._rows_within(module.BUDGET, vocabulary) == 2048
    assert module._rows_within(module.BUDGET, vocabulary.float()) == 1024
    assert module._rows_within(100, vocabulary) == 1
    assert module._rows_within(2**20, torch.empty(1000, 4)) == 256


def test_scores_that_fit_are_made_whole(monkeypatch):
    monkeypatch.setattr(module, "_in_chunks", None)
    assert_parity(in_chunks, composed, *inputs(torch.float32))


@pytest.mark.parametrize("sizes", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_module(probabilities, bias, sizes):
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("torch has it since 2.13")
    kwargs = {"out_features": sizes, "bias": bias, "label_smoothing": 0.1, "weight": torch.rand(6)}
    torch.manual_seed(0)
    pair = [library.nn.LinearCrossEntropyLoss(4, 6, **kwargs) for library in (torchref, torch)]
    pair[0].load_state_dict(pair[1].state_dict())
    x = torch.randn(5, 4)
    target = torch.randint(0, 6, (5, *sizes))
    if probabilities:
        target = torch.randn(5, 6, *sizes).softmax(1)
    results = []
    for loss in pair:
        y = loss(x, target)
        y.backward()
        results.append((y.detach(), loss.linear.weight.grad))
    torch.testing.assert_close(*results)


def test_one_row_without_a_batch():
    x, w, b, _ = inputs(torch.float32)
    args = (x[0].detach().requires_grad_(), w, b, torch.tensor(3))
    assert_parity(in_chunks, composed, *args)


def test_torch_func():
    x, w, b, target = (t.detach() for t in inputs())

    def loss(f, x):
        return f(x, w, b, target, options=FIVE)

    grads = [torch.func.grad(lambda x, f=f: loss(f, x))(x) for f in (in_chunks, composed)]
    torch.testing.assert_close(*grads)
    many = torch.stack([x, 2 * x])
    batched = [torch.func.vmap(lambda x, f=f: loss(f, x))(many) for f in (in_chunks, composed)]
    torch.testing.assert_close(*batched)


def test_a_loss_scale_beyond_float16():
    """Rounded first, 70,000 is infinite, and 0 * inf is NaN."""
    x, w, _, target = inputs(torch.float32)
    grads = []
    for f in (in_chunks, composed):
        with torch.autocast(x.device.type, torch.float16):
            losses = f(x * 0.01, w * 0.05, None, target, reduction="none", options=FIVE)
        grads.append(torch.autograd.grad((losses * 70000).sum(), (x, w)))
        assert all(g.isfinite().all() for g in grads[-1])
    for a, c in zip(*grads, strict=True):
        assert (a - c).abs().max() <= 4 * torch.finfo(torch.float16).eps * c.abs().max()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_inside_another_autocast(reduction):
    x, w, b, target = inputs(torch.float32)
    losses = [f(x, w, b, target, reduction=reduction, options=FIVE) for f in (in_chunks, composed)]
    with torch.autocast(x.device.type, torch.bfloat16):
        grads = torch.autograd.grad(losses[0].sum(), (x, w, b))
    torch.testing.assert_close(grads, torch.autograd.grad(losses[1].sum(), (x, w, b)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batched_backward(reduction):
    x, w, b, target = inputs()
    jacobians = [
        torch.autograd.functional.jacobian(
            lambda x, f=f: f(x, w, b, target, reduction=reduction, options=FIVE),
            x.detach(),
            vectorize=True,
        )
        for f in (in_chunks, composed)
    ]
    torch.testing.assert_close(*jacobians)


def test_many_chunks_of_bfloat16_keep_their_digits():
    x = (torch.randn(1024, 8) + 1).bfloat16()
    w = torch.randn(5, 8).bfloat16().requires_grad_()
    target = torch.randint(0, 5, (1024,))
    options = SimpleNamespace(batch_chunk_size=4)
    assert_parity(in_chunks, composed, x, w, None, target, options=options)


def test_forward_mode():
    x, w, b, target = (t.detach() for t in inputs())
    tangent = torch.ones_like(x)
    results = []
    for f in (in_chunks, composed):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            loss = f(dual, w, b, target, options=FIVE)
            results.append(torch.autograd.forward_ad.unpack_dual(loss).tangent)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_under_torch_compile(reduction):
    x, w, b, target = inputs(torch.float32)

    def f(x, w, b):
        return in_chunks(x, w, b, target, options=FIVE, reduction=reduction)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    losses = [compiled(x, w, b), f(x, w, b)]
    grads = [torch.autograd.grad(loss.sum(), (x, w, b)) for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "none "}, ValueError, "reduction"),
        ({"label_smoothing": 1.5}, RuntimeError, r"`label_smoothing` in \[0, 1\], got 1.5"),
        ({"weight": torch.ones(3)}, RuntimeError, r"`weight` of shape \(11,\), got \(3,\)"),
    ],
)
def test_wrong_options(change, error, message):
    with pytest.raises(error, match=message):
        in_chunks(*inputs(torch.float32), options=FIVE, **change)


def test_wrong_shapes():
    x, w, b, target = inputs(torch.float32)
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"`batch_chunk_size` of 1 or more, got {rows}"):
            in_chunks(x, w, b, target, options=SimpleNamespace(batch_chunk_size=rows))
    with pytest.raises(RuntimeError, match=r"expected `linear_bias` of shape \(11,\)"):
        in_chunks(x, w, b[:1], target, options=FIVE)
    with pytest.raises(RuntimeError, match=r"expected `input` of shape \(N, 7\)"):
        in_chunks(x[:, :3], w, b, target, options=FIVE)
    with pytest.raises(ValueError, match="linear_cross_entropy: expected `target` of shape"):
        in_chunks(x, w, b, target[:4], options=FIVE)
    with pytest.raises(RuntimeError, match=r"weight.*\(6,\)"):
        torchref.nn.LinearCrossEntropyLoss(4, 6, weight=torch.ones(3))
    with pytest.raises(RuntimeError, match="label_smoothing"):
        torchref.nn.LinearCrossEntropyLoss(4, 6, label_smoothing=2.0)


def _unsummed(self, part, dscores):
    self.dw.zero_()  # the gradient of the last chunk alone
    take(self, part, dscores)


def _unscaled(d, scale, like, again):
    return d.to(like.dtype)


take = module._Gradients.take


@pytest.mark.parametrize(
    ("name", "mistake"), [("_Gradients.take", _unsummed), ("_scaled", _unscaled)]
)
def test_planted_mistakes_are_caught(name, mistake, monkeypatch):
    monkeypatch.setattr(f"torchref.nn.linear_cross_entropy.{name}", mistake)
    with pytest.raises(AssertionError):
        assert_parity(in_chunks, composed, *inputs(torch.float32), options=FIVE)


def allocated(f):
    """The most memory that ``f`` holds at a time, beyond what was there."""
    options = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True}
    with torch.profiler.profile(**options, acc_events=True) as profile:  # torch 2.11 warns without
        f()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes), default=0)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_backward_pass_needs_no_second_gradient_of_the_weights(dtype, monkeypatch):
    monkeypatch.setattr(module, "BUDGET", 2**12)  # also what a scaling in bfloat16 takes at a time
    x, w, _, _ = inputs(dtype, rows=8, classes=512, features=64)
    loss = ours.linear_cross_entropy(x, w, torch.arange(8))
    size = w.numel() * w.element_size()
    kept = allocated(lambda: torch.autograd.grad(loss, w, 3 * loss.detach(), retain_graph=True))
    passed = allocated(lambda: torch.autograd.grad(loss, w, 3 * loss.detach()))
    assert kept > size
    assert passed < size / 4


def test_a_backward_pass_repeats_until_the_last():
    x, w, b, target = inputs()
    loss = in_chunks(x, w, b, target, options=FIVE)
    first = torch.autograd.grad(loss, (x, w, b), torch.tensor(3.0).double(), retain_graph=True)
    kept = [g.clone() for g in first]
    last = torch.autograd.grad(loss, (x, w, b), torch.tensor(3.0).double())
    torch.testing.assert_close(last, first, rtol=0, atol=0)
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)
