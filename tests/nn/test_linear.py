import pytest
import torch
import torch.nn.functional as theirs

import torchref.nn as nn
import torchref.nn.functional as ours
from torchref.testing import assert_parity


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(13, 7), (7,), (2, 3, 7), (0, 7), (1, 7)], ids=str)
def test_values_and_gradients(shape, bias, dtype):
    pair = [m.Linear(7, 5, bias).to(dtype) for m in (nn, torch.nn)]
    assert_parity(*pair, torch.randn(shape).to(dtype).requires_grad_())


def test_one_neuron():
    for shape in ((4, 7), (7,), (2, 3, 7)):
        x, weight = torch.randn(shape, requires_grad=True), torch.randn(7, requires_grad=True)
        assert_parity(ours.linear, theirs.linear, x, weight)


def test_layouts_and_upstream_gradients():
    for x in (torch.randn(7, 13).t(), torch.randn(13, 14)[:, ::2], torch.randn(7).expand(13, 7)):
        for upstream in (torch.ones(()).expand(13, 5), torch.randn(5, 13).t()):
            pair = nn.Linear(7, 5), torch.nn.Linear(7, 5)
            assert_parity(*pair, x.requires_grad_(), upstream=upstream)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (2, 5, 3)], ids=str)
def test_the_output_can_be_changed_in_place(shape):
    """It is no view: nothing is more common than a ReLU(inplace=True) after it."""
    for then in (torch.nn.ReLU(inplace=True), nn.ReLU(inplace=True), nn.Dropout(inplace=True)):
        pair = [torch.nn.Sequential(m.Linear(3, 4), then) for m in (nn, torch.nn)]
        assert_parity(*pair, torch.randn(shape, requires_grad=True))


def test_complex():
    pair = [m.Linear(7, 5, dtype=torch.complex64) for m in (nn, torch.nn)]
    assert_parity(*pair, torch.randn(4, 7, dtype=torch.complex64, requires_grad=True))


def test_what_needs_no_gradient_may_change_before_backward():
    for frozen in ("x", "weight"):
        x, weight = torch.randn(4, 3) * 1, torch.randn(2, 3) * 1
        (weight if frozen == "x" else x).requires_grad_()
        h, w = x * 1, weight * 1
        y = ours.linear(h, w)
        (w if frozen == "x" else h).detach().add_(1)
        (h if frozen == "weight" else w).add_(1)
        y.sum().backward()


def test_sparse_input():
    x, weight = torch.eye(4).to_sparse(), torch.randn(3, 4, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)
    for b in (bias, None):
        results = []
        for library in (ours, theirs):
            y = library.linear(x, weight, b)
            results.append((y, torch.autograd.grad(y.sum(), weight)))
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")  # torch's own
def test_no_features():
    assert_parity(nn.Linear(0, 3), torch.nn.Linear(0, 3), torch.empty(4, 0, requires_grad=True))
    assert_parity(nn.Linear(3, 0), torch.nn.Linear(3, 0), torch.empty(4, 3, requires_grad=True))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_bias_for_all_neurons(shape):
    x, weight = torch.randn(4, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert_parity(ours.linear, theirs.linear, x, weight, torch.randn(shape, requires_grad=True))


def test_errors():
    weight = torch.randn(5, 7)
    for args, match in [
        ((torch.randn(4, 6), weight), r"`input` of shape \(\.\.\., 7\).*got \(4, 6\)"),
        ((torch.tensor(1.0), weight), r"got \(\)"),
        ((torch.randn(7), torch.randn(2, 5, 7)), "2D `weight`"),
        ((torch.randn(4, 7), weight[0], torch.tensor(1.0)), "2D `weight`"),
        ((torch.randn(4, 7).double(), weight), "dtype"),
        ((torch.randn(4, 7), weight, torch.randn(4)), r"`bias` of shape \(5,\).*got \(4,\)"),
    ]:
        with pytest.raises(RuntimeError, match=match):
            ours.linear(*args)
        with pytest.raises(RuntimeError):
            theirs.linear(*args)
