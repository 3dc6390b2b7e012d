import pytest
import torch
import torch.nn.functional as theirs

import torchref.nn as nn
import torchref.nn.functional as ours
from torchref.testing import assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ["softmax", "log_softmax"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "dim"), [((13, 257), 1), ((7, 5, 3), 1), ((5, 3), 0), ((4,), -1), ((3, 1), 1)]
)
def test_values_and_gradients(name, shape, dim, dtype):
    x = (torch.randn(shape) * 3).to(dtype).requires_grad_()
    assert_parity(getattr(ours, name), getattr(theirs, name), x, dim=dim)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([[300.0, -300.0, 299.0], [-300.0, -300.0, -300.0]]),
        torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [1.0, 2.0]]),
        torch.full((2, 3), -float("inf")),
        torch.tensor([[-float("inf"), 0.0, 1.0]]),
        torch.empty(0, 4),
        torch.empty(4, 0),
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 1).expand(4, 5),
        torch.randn(3, 8)[:, ::2],
    ],
    ids=["large", "nan", "all-inf", "inf", "no-rows", "no-columns", "nhwc", "expanded", "strided"],
)
def test_compulsory_inputs(name, x):
    finite = bool(x.isfinite().all())
    nhwc = x.ndim == 4  # ours keeps channels_last, torch's output is always contiguous
    x.requires_grad_(finite)
    assert_parity(getattr(ours, name), getattr(theirs, name), x, dim=1, strides=not nhwc)
    if nhwc:
        assert getattr(ours, name)(x, dim=1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
def test_zero_dim_and_dtype(name):
    assert_parity(getattr(ours, name), getattr(theirs, name), torch.tensor(2.0), dim=0)
    x = torch.randn(3, 4).bfloat16()
    assert_parity(getattr(ours, name), getattr(theirs, name), x, dim=1, dtype=torch.float32)
    integers = torch.arange(4)
    y = getattr(ours, name)(integers, 0, dtype=torch.float32)
    torch.testing.assert_close(y, getattr(theirs, name)(integers, 0, dtype=torch.float32))


def test_errors():
    with pytest.raises(IndexError, match=r"softmax: expected `dim` in \[-2, 1\], got 2"):
        ours.softmax(torch.randn(2, 3), 2)
    with pytest.raises(NotImplementedError, match=r"log_softmax: .*int64; pass `dtype`"):
        ours.log_softmax(torch.arange(3), 0)


@pytest.mark.parametrize("ndim", [0, 1, 2, 3, 4])
def test_implicit_dim_is_torchs_and_warns_at_the_caller(ndim):
    x = torch.randn([3] * ndim)
    for module in ("Softmax", "LogSoftmax"):
        with pytest.warns(UserWarning, match="implicit") as caught:
            y = getattr(nn, module)()(x)
        with pytest.warns(UserWarning, match="Implicit"):
            expected = getattr(torch.nn, module)()(x)
        torch.testing.assert_close(y, expected)
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="softmax") as caught:
        ours.softmax(x)
    assert caught[0].filename == __file__


def test_prediction_needs_no_softmax():
    x = torch.randn(100, 7)
    assert torch.equal(x.argmax(1), ours.softmax(x, 1).argmax(1))
    y = ours.softmax(torch.tensor([4.2, 1.1, -3.5]), 0)  # the course's scores
    assert y.tolist() == pytest.approx([0.956, 0.043, 0.0004], abs=1e-3)
