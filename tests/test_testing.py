"""The harness finds what is wrong: mistakes planted in every piece, and each must be caught."""

import pytest
import torch
from pieces import PIECES

import torchref
import torchref.nn.functional as ours
from torchref.testing import assert_parity, measure_parity

DTYPE = torch.float32
BY_NAME = {piece.name: piece for piece in PIECES}


class Planted(torch.autograd.Function):
    """A function with its gradient spoilt."""

    @staticmethod
    def forward(ctx, x, spoil):
        ctx.spoil = spoil
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.spoil(dy), None


def rounded(x):
    return x.bfloat16().to(x.dtype) if x.is_floating_point() else x


def spoilt(values, gradients):
    def f(piece, *inputs, **kwargs):
        inputs = [Planted.apply(x, gradients) if x.requires_grad else x for x in inputs]
        return values(piece.ours(*inputs, **kwargs))

    return f


def same(x):
    return x


def unwritten_end(x):
    """What a grid one program short leaves: memory that nobody wrote."""
    x = x.clone()
    x.reshape(-1)[-1:] = 12345.0
    return x


MISTAKES = {
    "half arithmetic": (rounded, same),
    "half gradient": (same, rounded),
    "sign of the gradient": (same, torch.neg),
    "twice the gradient": (same, lambda dy: 2 * dy),
    "gradient one part in 10^4 off": (same, lambda dy: dy * 1.0001),
    "last element lost": (unwritten_end, same),
    "NaN": (lambda y: y * float("nan"), same),
    "dtype": (torch.Tensor.double, same),
    "no gradient": (lambda y: y.detach(), same),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
def test_planted_mistakes_are_caught(piece, mistake):
    wrong = spoilt(*MISTAKES[mistake])
    inputs = piece.inputs(DTYPE)
    assert_parity(piece.ours, piece.theirs, *inputs)
    with pytest.raises(AssertionError):
        assert_parity(lambda *xs: wrong(piece, *xs), piece.theirs, *inputs)


def test_planted_formulas_are_caught(monkeypatch):
    """Mistakes inside a formula, by the name that a user would call."""
    planted = [
        ("tanh", lambda x: 2 * (2 * x).sigmoid() - 1, torch.tensor([1e-4])),
        ("elu", lambda x: torch.where(x > 0, x, x.exp() - 1), torch.tensor([-1e-4])),
        ("softmax", lambda x, dim: x.exp() / x.exp().sum(dim, True), torch.full((1, 3), 300.0)),
        ("relu", lambda x: torch.where(x > 0, x, 0), torch.tensor([float("nan")])),
    ]
    for name, wrong, x in planted:
        kwargs = {"dim": 1} if name == "softmax" else {}
        assert_parity(getattr(ours, name), getattr(torch.nn.functional, name), x, **kwargs)
        with pytest.raises(AssertionError):
            assert_parity(wrong, getattr(torch.nn.functional, name), x, **kwargs)


def test_an_unstable_variance_is_caught():
    def batch_norm(x):
        mean, square = x.mean(0), (x * x).mean(0)
        return (x - mean) * (square - mean * mean + 1e-5).rsqrt()

    x = torch.randn(64, 3) + 100
    with pytest.raises(AssertionError):
        assert_parity(
            batch_norm, lambda x: torch.nn.functional.batch_norm(x, None, None, training=True), x
        )


def test_buffers_and_parameters_are_compared():
    class Forgetful(torchref.nn.BatchNorm1d):
        def forward(self, input):
            self.num_batches_tracked.sub_(1)
            return super().forward(input)

    with pytest.raises(AssertionError, match="buffer num_batches_tracked"):
        assert_parity(Forgetful(3), torch.nn.BatchNorm1d(3), torch.randn(4, 3))

    class Frozen(torchref.nn.Linear):
        def forward(self, input):
            return ours.linear(input, self.weight.detach(), self.bias)

    with pytest.raises(AssertionError, match="gradient of weight: ours is None"):
        assert_parity(Frozen(3, 3), torch.nn.Linear(3, 3), torch.randn(4, 3))


def test_strides_shapes_and_types_are_compared():
    x = torch.randn(4, 5)
    for wrong, match in [
        (lambda x: (x * 1).t().contiguous().t(), "strides"),
        (lambda x: x[:3], r"shape is torch.Size\(\[3, 5\]\)"),
        (lambda x: x.double(), "dtype"),
    ]:
        with pytest.raises(AssertionError, match=f"output: {match}"):
            assert_parity(wrong, lambda x: x * 1, x)
    assert_parity(lambda x: (x * 1).t().contiguous().t(), lambda x: x * 1, x, strides=False)


def test_the_bound_of_a_type_beside_float64_is_its_own():
    """Rounded to float32 once, as torch's own gradient is, it was held to the error of float64."""
    x = torch.randn(64, requires_grad=True)
    target = torch.randn(64, dtype=torch.float64, requires_grad=True)

    def theirs(x, target):  # torch 2.11 differentiates no mse_loss of two types
        return (x - target).square().mean()

    by_name = {c.name: c.their_error for c in measure_parity(theirs, theirs, x, target)}
    assert by_name["gradient of input 0"] > 1e-10
    assert by_name["gradient of input 1"] < 1e-15


def test_the_message_names_the_worst_element():
    x = torch.zeros(3, 4)
    x[1, 2] = 1.0
    with pytest.raises(AssertionError, match=r"at \[1, 2\]: ours 2.0, theirs 1.0, truth 1.0"):
        assert_parity(lambda x: x * 2, lambda x: x * 1, x)
    x[2, 1] = float("inf")
    with pytest.raises(AssertionError, match=r"output: at \[2, 1\] ours is -inf, theirs inf"):
        assert_parity(lambda x: torch.where(x.isinf(), -x, x), lambda x: x * 1, x)


def test_complex_numbers_are_compared_whole():
    x = torch.randn(5, dtype=torch.complex64, requires_grad=True)
    assert_parity(lambda x: x.exp(), lambda x: x.exp(), x)
    assert_parity(lambda x: x.sum(), lambda x: x.flip(0).sum(), x)
    with pytest.raises(AssertionError, match="output"):
        assert_parity(lambda x: x.conj().resolve_conj(), lambda x: x * 1, x)


def test_what_is_left_in_the_inputs_is_compared():
    x = torch.randn(5)
    with pytest.raises(AssertionError, match="input 0 afterwards"):
        assert_parity(lambda x: (x * 2, x.zero_())[0], lambda x: x * 2, x)
    with pytest.raises(AssertionError, match="input 0 afterwards"):
        assert_parity(ours.relu, torch.nn.functional.relu_, x)


def test_hidden_tensors_and_other_outputs_are_refused():
    with pytest.raises(TypeError, match="one by one"):
        assert_parity(sum, sum, [torch.ones(2), torch.ones(2)])
    with pytest.raises(TypeError, match="got dict"):
        assert_parity(lambda x: {"y": x}, lambda x: {"y": x}, torch.ones(2))


def test_inputs_and_modules_are_left_alone():
    x = torch.randn(4, 3, requires_grad=True)
    module = torchref.nn.BatchNorm1d(3)
    before = copy_of(module)
    assert_parity(module, torch.nn.BatchNorm1d(3), x)
    assert x.grad is None
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before, strict=True))
    state = torch.get_rng_state()
    measure_parity(ours.dropout, torch.nn.functional.dropout, x)
    assert torch.equal(torch.get_rng_state(), state)


def copy_of(module):
    return [t.clone() for t in module.state_dict().values()]


def test_the_bound_does_not_grow_with_the_reduction():
    bounds = []
    for n in (10, 100_000):
        x = torch.ones(n)
        comparison = measure_parity(torch.sum, torch.sum, x / n)[0]
        bounds.append(comparison.bound - 2 * comparison.their_error)
    assert bounds[0] == pytest.approx(bounds[1])
