import itertools

import pytest
import torch
import torch.nn.functional as theirs

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
