import pytest
import torch
import torch.nn.functional as theirs

import torchref.nn as nn
import torchref.nn.functional as ours
from torchref.testing import assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
NAN = float("nan")
BCE, LOGITS = "binary_cross_entropy", "binary_cross_entropy_with_logits"


def pair(name: str, *shape: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x, target = torch.randn(shape) * 3, torch.randn(shape)
    if name == BCE:
        x = x.sigmoid()
    if name in (BCE, LOGITS):
        target = target.sigmoid()
    return x.to(dtype).requires_grad_(), target.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(13, 7), (1,), (), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", BCE, LOGITS])
def test_values_and_gradients(name, shape, reduction, dtype):
    x, target = pair(name, *shape, dtype=dtype)
    assert_parity(getattr(ours, name), getattr(theirs, name), x, target, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", BCE, LOGITS])
def test_empty(name, reduction):
    x = torch.empty(0, 3, requires_grad=True)
    f, g = getattr(ours, name), getattr(theirs, name)
    assert_parity(f, g, x, torch.empty(0, 3), reduction=reduction)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
def test_nan_and_infinities(name):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0], requires_grad=True)
    f, g = getattr(ours, name), getattr(theirs, name)
    assert_parity(f, g, x, torch.ones(4), reduction="none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", BCE, LOGITS])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_layouts(layout, name, reduction):
    x, target = pair(name, 2, 3, 4, 6)
    with torch.no_grad():
        x = {
            "channels_last": x.contiguous(memory_format=torch.channels_last),
            "transposed": x.transpose(1, 3),
            "strided": x[..., ::2],
        }[layout].detach()
        target = target.transpose(1, 3) if layout == "transposed" else target[..., : x.shape[-1]]
    inputs = x.requires_grad_(), target.detach().requires_grad_()
    # torch's gradient of a target in another layout than x's takes x's
    assert_parity(
        getattr(ours, name), getattr(theirs, name), *inputs, reduction=reduction, strides=False
    )


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weighted_distances(name, reduction):
    x, target = pair(name, 6, 4)
    weight = torch.rand(6, 4, requires_grad=True)
    f, g = getattr(ours, name), getattr(theirs, name)
    assert_parity(f, g, x, target, reduction=reduction, weight=weight)
    with pytest.raises(ValueError, match=rf"{name}: .*`weight`.*\(6, 4\), got \(4,\)"):
        f(x, target, weight=torch.rand(4))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
def test_broadcast_warns_at_the_caller(name):
    x, target = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    with pytest.warns(UserWarning, match="broadcast"):
        assert_parity(getattr(ours, name), getattr(theirs, name), x, target)
    with pytest.warns(UserWarning, match="seldom meant") as caught:
        getattr(ours, name)(x, target)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
def test_types_promote(name):
    f, g = getattr(ours, name), getattr(theirs, name)
    x = torch.randn(3, requires_grad=True)
    for target in (torch.randn(3).double(), torch.randn(3).bfloat16(), torch.tensor([1, 2, 3])):
        assert_parity(f, g, x.detach(), target)
        # torch 2.11 has no gradient there
        gradients = [torch.autograd.grad(f(x, t), x)[0] for t in (target, target.float())]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bce_weights(reduction):
    x, target = pair(BCE, 6, 4)
    for weight in (torch.rand(6, 4), torch.rand(4)):
        kwargs = {"weight": weight, "reduction": reduction}
        assert_parity(ours.binary_cross_entropy, theirs.binary_cross_entropy, x, target, **kwargs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, torch.rand(6, 4), torch.rand(4)], ids=["-", "w", "wc"])
@pytest.mark.parametrize("pos_weight", [None, torch.rand(4) * 3], ids=["-", "p"])
def test_bce_with_logits_weights(weight, pos_weight, reduction):
    x, target = pair(LOGITS, 6, 4)
    kwargs = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
    assert_parity(getattr(ours, LOGITS), getattr(theirs, LOGITS), x, target, **kwargs)


def test_extreme_scores_and_probabilities():
    x = torch.tensor([300.0, -300.0, 0.0, 1e-8], requires_grad=True)
    for target in (torch.zeros(4), torch.ones(4), torch.full((4,), 0.5)):
        assert_parity(getattr(ours, LOGITS), getattr(theirs, LOGITS), x, target, reduction="none")
    p = torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    target = torch.tensor([0.0, 1.0, 1.0, 0.0])  # the last two are clamped at -100
    assert_parity(getattr(ours, BCE), getattr(theirs, BCE), p, target, reduction="none")


def test_the_gradient_of_a_target_is_infinite_where_its_score_is():
    """With (p - 1) log(1 + e^-x) - x it is inf - inf for a p below 1."""
    x = torch.tensor([-float("inf"), float("inf"), -300.0, 0.0])
    target, p = torch.full((4,), 0.5, requires_grad=True), torch.tensor(0.5)
    kwargs = {"pos_weight": p, "reduction": "none"}
    assert_parity(getattr(ours, LOGITS), getattr(theirs, LOGITS), x, target, **kwargs)


def test_bce_clamps_where_torch_does_in_float64():
    """At torch's 1e-12 in float32, which is 4e-9 less."""
    p = torch.tensor([0.0, 1.0, 1e-13], dtype=torch.float64, requires_grad=True)
    target = torch.full((3,), 0.5, dtype=torch.float64)
    assert_parity(getattr(ours, BCE), getattr(theirs, BCE), p, target)


def test_forward_mode_at_certain_probabilities():
    p, target = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    for library in (ours, theirs):
        f = lambda p, library=library: library.binary_cross_entropy(p, target)  # noqa: E731
        assert torch.func.jvp(f, (p,), (torch.ones(2),))[1] == 0


def test_the_courses_half_squared_error():
    """The course's single neuron: L = (y - yhat)^2 / 2 with yhat = sigmoid(wx + b)."""
    x, y = torch.tensor(2.0), torch.tensor(1.0)
    w, b = torch.tensor(0.5, requires_grad=True), torch.tensor(-0.5, requires_grad=True)
    yhat = ours.sigmoid(w * x + b)
    (ours.mse_loss(yhat, y) / 2).backward()
    slope = (yhat - y) * yhat * (1 - yhat)
    torch.testing.assert_close(w.grad, (slope * x).detach())
    torch.testing.assert_close(b.grad, slope.detach())


@pytest.mark.cpu  # on a GPU ours does not look, and torch's assertion ends the process
def test_values_outside_0_and_1():
    p = torch.rand(3)
    for which, args in (("input", (p + 1, p)), ("target", (p, p - 1)), ("input", (p * NAN, p))):
        with pytest.raises(RuntimeError, match=f"{BCE}: .*`{which}` between 0 and 1"):
            ours.binary_cross_entropy(*args)
        with pytest.raises(RuntimeError):
            theirs.binary_cross_entropy(*args)


def test_errors():
    p = torch.rand(3)
    learnt = torch.rand(3, requires_grad=True)
    for name, args, kwargs, error, match in [
        ("mse_loss", (p, p), {"reduction": "max"}, ValueError, "`reduction`.*'max'"),
        ("mse_loss", (p.long(), p.long()), {}, NotImplementedError, "int64"),
        (BCE, (p, p[:2]), {}, ValueError, r"`target`.*\(3,\), got \(2,\)"),
        (BCE, (p, p.double()), {}, RuntimeError, "one type"),
        (BCE, (p, p), {"weight": learnt}, RuntimeError, "no gradient for `weight`"),
        (LOGITS, (p, p[:2]), {}, ValueError, r"`target`.*\(3,\), got \(2,\)"),
        (LOGITS, (p, p.long()), {}, RuntimeError, "int64"),
        (LOGITS, (p, p), {"pos_weight": learnt}, RuntimeError, "no gradient for `pos_weight`"),
    ]:
        with pytest.raises(error, match=f"{name}: .*{match}"):
            getattr(ours, name)(*args, **kwargs)
        with pytest.raises(error):
            getattr(theirs, name)(*args, **kwargs)


def test_modules():
    x, target = pair(LOGITS, 6, 4)
    weight = torch.rand(4)
    for reduction in REDUCTIONS:
        for name in ("MSELoss", "L1Loss"):
            modules = [getattr(m, name)(reduction=reduction) for m in (nn, torch.nn)]
            assert_parity(*modules, x, target)
        modules = [
            m.BCEWithLogitsLoss(weight, None, None, reduction, weight) for m in (nn, torch.nn)
        ]
        assert_parity(*modules, x, target)
        modules = [m.BCELoss(weight, reduction=reduction) for m in (nn, torch.nn)]
        assert_parity(*modules, x.detach().sigmoid(), target)
