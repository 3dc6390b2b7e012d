import itertools

import pytest
import torch
import torch.nn.functional as theirs

import torchref.nn as nn
import torchref.nn.functional as ours
from torchref.testing import assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [("BatchNorm1d", (7, 5)), ("BatchNorm1d", (3, 5, 11)), ("BatchNorm2d", (2, 5, 3, 7))]
SHAPES += [("BatchNorm3d", (2, 5, 3, 2, 3))]


def modules(name: str, *args, **kwargs) -> list[torch.nn.Module]:
    """Ours and theirs, with running statistics and parameters that are not the identity."""
    made = [getattr(library, name)(*args, **kwargs) for library in (nn, torch.nn)]
    for key, tensor in made[1].state_dict().items():
        if key != "num_batches_tracked":
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return made


def batch(shape: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(shape) * 2 + 1).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_values_gradients_and_buffers(name, shape, training, dtype):
    pair = [m.to(dtype).train(training) for m in modules(name, 5)]
    assert_parity(*pair, batch(shape, dtype))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"track_running_stats": False},
        {"affine": False},
        {"affine": False, "track_running_stats": False},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_arguments(kwargs, training):
    pair = [m.train(training) for m in modules("BatchNorm2d", 5, **kwargs)]
    assert_parity(*pair, batch((2, 5, 3, 7)))


def test_without_bias():
    try:
        pair = modules("BatchNorm2d", 5, bias=False)
    except TypeError:
        pytest.skip("torch before 2.13 has no `bias` argument")
    assert_parity(*pair, batch((2, 5, 3, 7)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_over_many_batches(momentum):
    pair = [m.double() for m in modules("BatchNorm1d", 3, momentum=momentum)]
    pair[0].load_state_dict(pair[1].state_dict())
    for _ in range(20):
        x = torch.randn(8, 3, dtype=torch.float64)
        for m in pair:
            m(x)
    assert pair[0].num_batches_tracked == 20
    for mine, torchs in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3, 5, 12)[..., ::2],
        torch.randn(4, 3, 6, 5).transpose(2, 3),
        torch.randn(1, 3, 1, 2),
    ],
    ids=["channels_last", "strided", "transposed", "two-values"],
)
def test_layouts(x, training):
    # torch makes a strided or transposed result contiguous, ours keeps the order of dimensions
    pair = [m.train(training) for m in modules("BatchNorm2d", 3)]
    known = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    assert_parity(*pair, x.requires_grad_(), strides=known)


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_upstream_gradients_of_any_layout(layout):
    one = torch.ones(())
    upstream = one.expand(4, 3, 5, 5) if layout == "expanded" else torch.randn(4, 3, 5, 5).mT
    x = batch((4, 3, 5, 5)).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_parity(*modules("BatchNorm2d", 3), x, upstream=upstream)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0), (1, 3, 0)], ids=str)
def test_an_empty_batch_leaves_the_statistics(shape, training):
    pair = [m.train(training) for m in modules("BatchNorm1d", 3)]
    assert_parity(*pair, torch.empty(shape, requires_grad=True))


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(mean):
    """E[x^2] - E[x]^2 would lose everything at 1e4."""
    assert_parity(*modules("BatchNorm1d", 3), (torch.randn(1000, 3) + mean).requires_grad_())


def test_half_input_with_float_parameters():
    x = batch((6, 3, 4, 4), torch.bfloat16)
    for training in (True, False):
        y = [m.train(training)(x) for m in modules("BatchNorm2d", 3)]
        assert y[0].dtype == y[1].dtype == torch.bfloat16


def test_statistics_are_kept_in_float32():
    x = (torch.randn(512, 2) * 0.01 + 3).bfloat16()
    running = torch.zeros(2), torch.ones(2)
    ours.batch_norm(x, *running, training=True, momentum=1.0)
    expected = x.double()
    torch.testing.assert_close(running[0].double(), expected.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(running[1].double(), expected.var(0), rtol=1e-4, atol=0)


def test_the_courses_running_variance():
    """The biased batch variance, and the share that is kept: alpha = 0.9."""
    m = nn.BatchNorm1d(3, momentum=1 - 0.9, unbiased_running_var=False)
    x = torch.randn(10, 3)
    m(x)
    torch.testing.assert_close(m.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(m.running_var, 0.9 + 0.1 * x.var(0, correction=0))
    assert "unbiased_running_var=False" in repr(m)
    torchs = torch.nn.BatchNorm1d(3)
    torchs.__class__ = nn.BatchNorm1d  # a module made by torch has torch's rule
    assert torchs.unbiased_running_var


def test_output_mask():
    for wants in itertools.product([True, False], repeat=3):
        if any(wants):
            x, weight, bias = batch((6, 3)), torch.rand(3), torch.rand(3)
            tensors = [
                t.detach().requires_grad_(w) for t, w in zip((x, weight, bias), wants, strict=True)
            ]
            for training in (True, False):
                y = ours.batch_norm(
                    tensors[0], torch.zeros(3), torch.ones(3), *tensors[1:], training
                )
                y.sum().backward()
            assert [t.grad is not None for t in tensors] == list(wants)


def test_eval_gradient_uses_the_running_statistics():
    m = nn.BatchNorm1d(2).eval()
    m.running_var.fill_(4.0)
    x = batch((5, 2))
    m(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5, 2), (4 + 1e-5) ** -0.5))


def test_errors():
    x = torch.randn(4, 3)
    zeros, ones = torch.zeros(3), torch.ones(3)
    for args, kwargs, error, match in [
        ((x[:1], None, None), {"training": True}, ValueError, r"more than 1 value.*\(1, 3\)"),
        ((x, zeros, ones, ones[:2]), {}, RuntimeError, r"`weight` of shape \(3,\), got \(2,\)"),
        ((x, zeros[:2], ones), {}, RuntimeError, r"`running_mean` of shape \(3,\)"),
        ((x, None, None), {}, RuntimeError, "`running_mean` at inference"),
        ((x, zeros, None), {"training": True}, ValueError, "both `running_mean` and"),
        ((x, zeros, ones), {"eps": -1.0}, ValueError, "`eps`, got -1.0"),
        ((x, zeros, ones), {"eps": 0.0, "training": True}, ValueError, "`eps`, got 0.0"),
    ]:
        with pytest.raises(error, match=f"batch_norm: .*{match}"):
            ours.batch_norm(*args, **kwargs)
        with pytest.raises(error):
            theirs.batch_norm(*args, **kwargs)
    with pytest.raises(NotImplementedError, match="int64"):
        ours.batch_norm(x.long(), zeros, ones)
    with pytest.raises(ValueError, match=r"BatchNorm2d: expected 4D `input`, got shape \(8, 32\)"):
        nn.BatchNorm2d(32)(torch.randn(8, 32))
    with pytest.raises(ValueError, match="BatchNorm1d: expected 2D or 3D `input`"):
        nn.BatchNorm1d(3)(torch.randn(2, 3, 4, 4))
