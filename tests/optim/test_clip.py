import inspect
import math

import pytest
import torch
from torch.nn.utils import clip_grad_norm_ as theirs

from torchref.optim import clip_grad_norm_ as ours


def parameters(dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in [(), (1,), (0,), (7,), (3, 5)]:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = (torch.randn(shape, generator=generator) * scale).to(dtype)
        params.append(p)
    params.append(torch.nn.Parameter(torch.zeros(2, dtype=dtype)))  # without a gradient
    return params


def grads(params):
    return [p.grad for p in params if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("max_norm", [0.5, 100.0, 0.0])
@pytest.mark.parametrize("norm_type", [2.0, 1, 3.5, math.inf, "inf", 0.5])
def test_against_torch(norm_type, max_norm, foreach, dtype):
    mine, other = parameters(dtype), parameters(dtype)
    if norm_type in (math.inf, "inf"):  # torch has no largest of no elements
        mine, other = ([p for p in ps if p.numel()] for ps in (mine, other))
    norm = ours(mine, max_norm, norm_type, foreach=foreach)
    expected = theirs(other, max_norm, norm_type, foreach=foreach)
    assert torch.equal(norm, expected)
    assert norm.dtype == expected.dtype
    for a, b in zip(grads(mine), grads(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(dtype, foreach):
    mine, other, truth = (parameters(dtype, 3.0) for _ in range(3))
    for p in truth:
        p.data = p.data.double()
    rounded = [g.double() for g in grads(truth)]
    norm = torch.cat([g.flatten() for g in rounded]).norm()
    actual, torchs = ours(mine, 1.0, foreach=foreach), theirs(other, 1.0, foreach=foreach)
    assert actual.dtype == torchs.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (actual.double() - norm).abs() <= eps * norm
    for a, t in zip(grads(mine), rounded, strict=True):
        torch.testing.assert_close(a.double(), t / norm, rtol=eps, atol=1e-6)


def test_mixed_types():
    def mixed():
        return parameters(torch.float32) + parameters(torch.float64)

    mine, other = mixed(), mixed()
    assert torch.equal(ours(mine, 1.0), theirs(other, 1.0))
    for a, b in zip(grads(mine), grads(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite(bad):
    mine, other = parameters(), parameters()
    mine[3].grad[0] = other[3].grad[0] = bad
    before = [g.clone() for g in grads(mine)]
    messages = []
    for clip, params in ((ours, mine), (theirs, other)):
        with pytest.raises(RuntimeError, match="non-finite") as error:
            clip(params, 1.0, error_if_nonfinite=True)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    for a, b in zip(grads(mine), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    ours(mine, 1.0)
    theirs(other, 1.0)
    for a, b in zip(grads(mine), grads(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_one_tensor_a_generator_and_nothing():
    p = parameters()[3]
    expected = p.grad.norm()
    assert torch.equal(ours(p, 1e6), expected)
    assert torch.equal(ours((q for q in [p]), 1e6), expected)
    assert torch.equal(ours([], 1.0), torch.tensor(0.0))
    assert torch.equal(ours([torch.zeros(1)], 1.0), torch.tensor(0.0))
    with pytest.warns(UserWarning, match="`parameters` is an empty generator") as record:
        ours((q for q in []), 1.0)
    assert record[0].filename == __file__


def test_gradients_with_a_graph():
    p = torch.nn.Parameter(torch.ones(2))
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    assert not ours([p], 1.0).requires_grad


def test_signature():
    mine, other = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [
        (p.name, p.default, p.kind) for p in other.values()
    ]


def test_a_forgotten_epsilon_is_caught(monkeypatch):
    mine, other = parameters(), parameters()
    real = torch.Tensor.__add__
    monkeypatch.setattr(torch.Tensor, "__add__", lambda x, y: x if y == 1e-6 else real(x, y))
    ours(mine, 1.0)
    monkeypatch.undo()
    theirs(other, 1.0)
    assert not torch.equal(mine[3].grad, other[3].grad)
