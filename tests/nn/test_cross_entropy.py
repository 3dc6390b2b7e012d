import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as theirs
from torch.utils.checkpoint import checkpoint

import torchref.nn as nn
import torchref.nn.functional as ours
from torchref.testing import assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
CPU = pytest.mark.cpu


def logits(*shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    # No larger: where p comes near 1 the gradient p - 1 is small and its rounding error is not,
    # and in float64, torch being its own truth, the bound knows of no error of torch's.
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def indices(x: torch.Tensor, ignored: bool = True) -> torch.Tensor:
    dim = 0 if x.ndim == 1 else 1
    target = torch.randint(0, x.shape[dim], x.shape[:dim] + x.shape[dim + 1 :])
    if ignored and target.numel() > 1:
        target.view(-1)[::3] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(13, 7), (3, 5, 4), (2, 3, 4, 5), (6,)], ids=str)
def test_index_targets(shape, smoothing, weighted, reduction, dtype):
    x = logits(*shape, dtype=dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    weight = torch.rand(classes).to(dtype) if weighted else None
    kwargs = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, indices(x), strides=False, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(13, 7), (3, 5, 4), (6,)], ids=str)
def test_probability_targets(shape, smoothing, weighted, reduction, dtype):
    x = logits(*shape, dtype=dtype)
    dim = 0 if x.ndim == 1 else 1
    target = logits(*shape).softmax(dim).detach().to(dtype).requires_grad_()
    weight = torch.rand(shape[dim]).to(dtype) if weighted else None
    kwargs = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, target, strides=False, **kwargs)


def test_one_hot_targets_equal_their_indices():
    x, target = logits(9, 4), torch.randint(0, 4, (9,))
    one_hot = torch.nn.functional.one_hot(target, 4).float()
    torch.testing.assert_close(ours.cross_entropy(x, one_hot), ours.cross_entropy(x, target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(13, 7), (3, 5, 4), (2, 3, 4, 5), (6,)], ids=str)
def test_nll_loss(shape, weighted, reduction, dtype):
    x = logits(*shape, dtype=dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    weight = torch.rand(classes).to(dtype) if weighted else None
    assert_parity(ours.nll_loss, theirs.nll_loss, x, indices(x), weight=weight, reduction=reduction)


@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize(
    ("x", "target"),
    [
        (torch.full((3, 4), -200.0), [0, 1, 2]),
        (torch.tensor([[300.0, -300.0], [-300.0, 300.0]]), [1, 1]),
        (torch.tensor([[300.0, 299.0, 298.5]] * 5), [0, 1, 2, 0, 1]),
        (torch.tensor([[-float("inf"), 1.0], [0.0, 1.0]]), [1, 1]),
        (torch.tensor([[-float("inf"), 1.0], [0.0, 1.0]]), [0, 1]),
        (torch.randn(3, 4), [-100, -100, -100]),
        (torch.randn(0, 4), []),
        (torch.randn(1, 1), [0]),
    ],
    ids=["low", "apart", "high", "inf", "inf-hit", "all-ignored", "empty", "one"],
)
def test_compulsory_inputs(loss, x, target):
    x = x.clone().requires_grad_()
    target = torch.tensor(target, dtype=torch.long)
    assert_parity(getattr(ours, loss), getattr(theirs, loss), x, target)


def test_nan_in_an_ignored_row_leaves_no_trace():
    """Nor in the gradient, where torch leaves a NaN in that row."""
    x = torch.tensor([[float("nan"), 1.0], [0.0, 1.0]], requires_grad=True)
    loss = ours.cross_entropy(x, torch.tensor([-100, 0]), label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite()
    assert x.grad[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ignore_index", [2, 0, -1, 250])
def test_ignore_index_of_any_value(ignore_index):
    x, target = logits(7, 5), torch.tensor([0, 1, 2, 3, 4, 2, ignore_index])
    for loss in ("cross_entropy", "nll_loss"):
        assert_parity(
            getattr(ours, loss), getattr(theirs, loss), x, target, ignore_index=ignore_index
        )


def test_strided_logits_and_byte_targets():
    nhwc = logits(2, 3, 4, 5).detach().contiguous(memory_format=torch.channels_last)
    x = nhwc.requires_grad_()
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, indices(x), strides=False)
    x = torch.randn(6, 10)[:, ::2].requires_grad_()
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, indices(x), strides=False)
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, indices(x, False).byte())


def test_byte_targets_are_numbers():
    x = torch.randn(3, 300)
    target = torch.tensor([156, 15, 255], dtype=torch.uint8)  # 156 is -100 as a byte
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, target.long())
    expected = theirs.cross_entropy(x, target.long())
    torch.testing.assert_close(ours.cross_entropy(x, target), expected)


def test_legacy_reduction_arguments():
    x, target = logits(4, 3), torch.tensor([0, 1, 2, 0])
    for legacy in ({"size_average": False}, {"reduce": False}):
        with pytest.warns(UserWarning, match="size_average"):
            assert_parity(ours.cross_entropy, theirs.cross_entropy, x, target, **legacy)


def test_logits_survive_and_backward_repeats():
    x = logits(5, 4)
    before = x.detach().clone()
    loss = ours.cross_entropy(x, torch.tensor([0, 1, 2, 3, 0]))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss + x.square().sum(), x)
    assert torch.equal(x, before)
    torch.testing.assert_close(second, first + 2 * x.detach())


def test_fp16_gradients_survive_the_loss_scale():
    """The upstream gradient is applied in float32 and rounded once."""
    x = logits(64, 1000, dtype=torch.float16, scale=8.0)
    target = torch.randint(0, 1000, (64,))
    zeros = []
    for dtype, f in [(torch.float16, ours), (torch.float64, theirs)]:
        y = x.detach().to(dtype).requires_grad_()
        (f.cross_entropy(y, target) * 32768.0).backward()
        zeros.append((y.grad.half() == 0).float().mean().item())
    assert zeros[0] == pytest.approx(zeros[1], abs=0.01)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        # on a GPU torch's own answer is a device-side assertion, which ends the process
        pytest.param(((3, 4), [0, 1, 4]), {}, IndexError, r"\[0, 3\] or -100, got 4", marks=CPU),
        pytest.param(((3, 4), [0, 1, -1]), {}, IndexError, "got -1", marks=CPU),
        (((3, 4), [0, 1]), {}, ValueError, r"`target` of shape \(3,\).*got \(2,\)"),
        (((3, 4, 2), [0, 1, 2]), {}, RuntimeError, r"`target` of shape \(3, 2\)"),
        (((3, 4), [0, 1, 2]), {"weight": torch.ones(3)}, RuntimeError, r"`weight` of shape \(4,\)"),
        (((3, 4), [0, 1, 2]), {"weight": torch.ones(4).double()}, RuntimeError, "`weight` of type"),
        (((3, 4), [0, 1, 2]), {"reduction": "max"}, ValueError, "`reduction`.*'max'"),
    ],
)
def test_errors_of_both_losses(args, kwargs, error, message):
    x, target = torch.randn(args[0]), torch.tensor(args[1])
    for name in ("cross_entropy", "nll_loss"):
        with pytest.raises(error, match=f"{name}: .*{message}"):
            getattr(ours, name)(x, target, **kwargs)
        with pytest.raises(error):
            getattr(theirs, name)(x, target, **kwargs)


def test_errors_of_cross_entropy():
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    learnt = torch.ones(4, requires_grad=True)
    for error, match, args, kwargs in [
        (
            RuntimeError,
            r"`label_smoothing` in \[0, 1\], got 1.5",
            (target,),
            {"label_smoothing": 1.5},
        ),
        (RuntimeError, "`ignore_index`.*got 2", (torch.rand(3, 4),), {"ignore_index": 2}),
        (RuntimeError, "probabilities.*int64", (torch.zeros(3, 4).long(),), {}),
        (RuntimeError, "int32", (target.int(),), {}),
        (RuntimeError, "no gradient for `weight`", (target,), {"weight": learnt}),
    ]:
        with pytest.raises(error, match=f"cross_entropy: .*{match}"):
            ours.cross_entropy(x, *args, **kwargs)
        with pytest.raises(error):
            theirs.cross_entropy(x, *args, **kwargs)
    with pytest.raises(NotImplementedError, match="int64"):
        ours.cross_entropy(x.long(), target)


def test_modules():
    x, target = logits(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    weight = torch.rand(4)
    for reduction, ignore_index in itertools.product(REDUCTIONS, (-100, 1)):
        options = {"ignore_index": ignore_index, "reduction": reduction}
        pairs = [
            [
                library.CrossEntropyLoss(weight, label_smoothing=0.2, **options)
                for library in (nn, torch.nn)
            ],
            [library.NLLLoss(weight, **options) for library in (nn, torch.nn)],
        ]
        for pair in pairs:
            assert_parity(*pair, x, target)


once = partial(ours.cross_entropy, gradient_in_forward=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(13, 7), (3, 5, 4), (2, 3, 4, 5), (6,)], ids=str)
def test_gradient_in_forward(shape, smoothing, weighted, reduction, dtype):
    x = logits(*shape, dtype=dtype)
    weight = torch.rand(shape[min(len(shape) - 1, 1)]).to(dtype) if weighted else None
    kwargs = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    assert_parity(once, theirs.cross_entropy, x, indices(x), strides=False, **kwargs)


@pytest.mark.parametrize(
    ("x", "target"),
    [
        (torch.full((3, 4), -200.0), [0, 1, 2]),
        (torch.tensor([[300.0, 299.0, 298.5]] * 5), [0, 1, 2, 0, 1]),
        (torch.tensor([[-float("inf"), 1.0], [0.0, 1.0]]), [1, 1]),
        (torch.tensor([[-float("inf"), 1.0], [0.0, 1.0]]), [0, 1]),
        (torch.randn(3, 4), [-100, -100, -100]),
        (torch.randn(0, 4), []),
        (torch.randn(1, 1), [0]),
    ],
    ids=["low", "high", "inf", "inf-hit", "all-ignored", "empty", "one"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_in_forward_of_compulsory_inputs(x, target, dtype):
    x = x.to(dtype).requires_grad_()
    target = torch.tensor(target, dtype=torch.long)
    for reduction in ("mean", "sum"):
        assert_parity(once, theirs.cross_entropy, x, target, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [2, 0, -1, 250])
def test_gradient_in_forward_with_ignore_index_of_any_value(ignore_index):
    x, target = logits(7, 5), torch.tensor([0, 1, 2, 3, 4, 2, ignore_index])
    assert_parity(once, theirs.cross_entropy, x, target, ignore_index=ignore_index)


def test_gradient_in_forward_of_any_layout():
    for x in (
        logits(2, 3, 4, 5).detach().contiguous(memory_format=torch.channels_last),
        torch.randn(6, 10)[:, ::2],
        torch.randn(5, 6).t(),
        torch.randn(1 + 6 * 5)[1:].view(6, 5),
    ):
        x = x.requires_grad_()
        assert_parity(once, theirs.cross_entropy, x, indices(x), strides=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [3.0, -0.5, 0.0])
def test_gradient_in_forward_times_an_upstream_gradient(factor, dtype):
    x = logits(13, 7, dtype=dtype)
    pair = [lambda *args, f=f: f(*args) * factor for f in (once, theirs.cross_entropy)]
    assert_parity(*pair, x, indices(x))


def small_gradients(f, weight: float | None, dtype=torch.float16):
    """Of which most are too small for float16 before the loss scale, and not after."""
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(64, 500, generator=generator, device="cpu").mul(8).half()
    target = torch.randint(0, 500, (64,), generator=generator, device="cpu")
    x, target = (t.to(torch.get_default_device()) for t in (x, target))
    x = x.to(dtype).requires_grad_()
    weights = None if weight is None else torch.linspace(0.1, weight, 500).half().to(dtype)
    (f(x, target, weights) * 32768.0).backward()
    return x.grad.double()


@pytest.mark.parametrize("weight", [None, 1e-4, 1.0, 3e4])
def test_gradient_in_forward_lives_through_a_loss_scale(weight):
    """Rounded to float16 before it, one in four would be lost, and large ones infinite."""
    truth = small_gradients(theirs.cross_entropy, weight, torch.float64)
    mine = small_gradients(once, weight)
    zeros = [(grad.half() == 0).double().mean().item() for grad in (mine, truth)]
    assert zeros[0] == pytest.approx(zeros[1], abs=0.005)
    # rounded twice, in forward and after the upstream gradient
    torch.testing.assert_close(mine, truth, rtol=2.0**-10, atol=2.0**-24)


def test_gradient_in_forward_under_autocast():
    x, target, grads = logits(13, 7, dtype=torch.float16), torch.randint(0, 7, (13,)), []
    for f in (once, theirs.cross_entropy):
        with torch.autocast(x.device.type, torch.float16):
            loss = f(x, target)
        assert loss.dtype == torch.float32
        grads.append(torch.autograd.grad(loss * 65536.0, x)[0])
    torch.testing.assert_close(*grads)


def test_gradient_in_forward_leaves_an_ignored_nan_and_its_input():
    for smoothing in (0.0, 0.1):
        x = torch.tensor([[float("nan"), 1.0], [0.0, 1.0]], requires_grad=True)
        before = x.detach().clone()
        loss = once(x, torch.tensor([-100, 0]), label_smoothing=smoothing)
        (loss * 3).backward()
        assert loss.isfinite()
        assert x.grad[0].tolist() == [0.0, 0.0]
        assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))


def test_gradient_in_forward_where_none_is_wanted(monkeypatch):
    """Nor made: the plain loss runs."""
    monkeypatch.setattr("torchref.nn.cross_entropy.CrossEntropyOnceFunction", None)
    x, target = logits(5, 4), torch.tensor([0, 1, 2, 3, 0])
    expected = theirs.cross_entropy(x, target)
    torch.testing.assert_close(once(x.detach(), target), expected)
    with torch.no_grad():
        torch.testing.assert_close(once(x, target), expected)
    with pytest.raises(AttributeError, match="call"):
        once(x, target)


def test_gradient_in_forward_is_for_one_backward_pass():
    x, target = logits(5, 4), torch.tensor([0, 1, 2, 3, 0])
    loss = once(x, target)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    with pytest.raises(RuntimeError, match="^cross_entropy: .*backward runs once"):
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="^cross_entropy: .*backward runs once"):
        torch.autograd.grad(loss, x)
    assert torch.equal(x.grad, first)
    loss = once(x, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    with pytest.raises(RuntimeError, match="^cross_entropy: .*no second derivative"):
        torch.autograd.grad(once(x, target), x, create_graph=True)


def test_gradient_in_forward_of_two_losses_on_one_input():
    targets, grads = (torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 2, -100, 0, 1])), []
    base = torch.randn(5, 4)
    for f in (once, theirs.cross_entropy):
        x = base.clone().requires_grad_()
        losses = [f(x * 1, t) for t in targets] + [f(x, t) for t in targets] + [x.square().sum()]
        sum(losses).backward(retain_graph=True)
        again = f(x, targets[0])  # adds to the gradient that the first ones handed over
        again.backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_gradient_in_forward_of_some_of_several_losses():
    """One whose gradient nobody asks for, and one of which a half is."""
    x, target, grads = logits(5, 4), torch.tensor([0, 1, 2, 3, 0]), []
    for f in (once, theirs.cross_entropy):
        a, b = f(x, target), f(x * 2, target)
        grads.append(torch.autograd.grad(b / 2, x)[0])
        assert a.requires_grad
    torch.testing.assert_close(*grads)


def test_gradient_in_forward_batched():
    x, target = logits(5, 4), torch.tensor([0, 1, 2, 3, 0])
    dy, grads = torch.tensor([1.0, -2.0, 0.5]), []
    for f in (once, theirs.cross_entropy):
        grads.append(torch.autograd.grad(f(x, target), x, dy, is_grads_batched=True)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_in_forward_compiled_and_transformed(reduction):
    x, target = logits(5, 4), torch.tensor([0, 1, -100, 3, 0])

    def f(loss, x):
        return loss(x, target, reduction=reduction) * 3

    (expected,) = torch.autograd.grad(f(theirs.cross_entropy, x), x)
    torch._dynamo.reset()
    compiled = torch.compile(partial(f, once), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
    plain = x.detach()
    torch.testing.assert_close(torch.func.grad(partial(f, once))(plain), expected)
    many = torch.func.vmap(torch.func.grad(partial(f, once)))(torch.stack([plain, plain]))
    torch.testing.assert_close(many, torch.stack([expected, expected]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(plain, torch.ones_like(plain) + plain)
        tangent = torch.autograd.forward_ad.unpack_dual(f(once, dual)).tangent
    torch.testing.assert_close(tangent, (expected * (1 + plain)).sum())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_in_forward_inside_a_checkpoint(use_reentrant):
    x, target, grads = logits(5, 4), torch.tensor([0, 1, 2, 3, 0]), []
    for f in (once, theirs.cross_entropy):
        y = x.detach().clone().requires_grad_()
        checkpoint(lambda y, f=f: f(y * 2, target), y, use_reentrant=use_reentrant).backward()
        grads.append(y.grad)
    torch.testing.assert_close(*grads)


def test_gradient_in_forward_is_kept_in_place_of_the_scores():
    x, target, kept = logits(5, 4), torch.tensor([0, 1, 2, 3, 0]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = once(x, target)
    assert [t.numel() for t in kept] == [20, 1]
    assert kept[0].data_ptr() != x.data_ptr()
    x.data.zero_()  # the scores are free to change
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.data_ptr() == kept[0].data_ptr()  # handed over, not copied


def test_errors_of_gradient_in_forward():
    x, target = logits(3, 4), torch.tensor([0, 1, 2])
    for args, kwargs, match in [
        ((torch.rand(3, 4),), {}, "probability targets"),
        ((target,), {"reduction": "none"}, 'reduction "none"'),
    ]:
        with pytest.raises(ValueError, match=f"^cross_entropy: `gradient_in_forward`.*{match}"):
            once(x, *args, **kwargs)
        with pytest.raises(ValueError, match="^cross_entropy: `gradient_in_forward`"):
            nn.CrossEntropyLoss(gradient_in_forward=True, **kwargs)(x, *args)


def test_modules_with_gradient_in_forward():
    x, target, weight = logits(6, 4), torch.tensor([0, 1, 2, 3, 1, 0]), torch.rand(4)
    options = {"ignore_index": 1, "label_smoothing": 0.2, "reduction": "sum"}
    mine = nn.CrossEntropyLoss(weight, gradient_in_forward=True, **options)
    torchs = torch.nn.CrossEntropyLoss(weight, **options)
    assert_parity(mine, torchs, x, target)
    assert list(mine.state_dict()) == list(torchs.state_dict()) == ["weight"]
    torchs.load_state_dict(mine.state_dict())
    assert repr(mine) == repr(torchs)[:-1] + "gradient_in_forward=True)"
    assert repr(nn.CrossEntropyLoss()) == "CrossEntropyLoss()"
    for copied in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
        assert copied.gradient_in_forward
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(copied(x, target), x, create_graph=True)
    torchs.__class__ = nn.CrossEntropyLoss
    assert not torchs.gradient_in_forward
    assert_parity(torchs, torch.nn.CrossEntropyLoss(weight, **options), x, target)
