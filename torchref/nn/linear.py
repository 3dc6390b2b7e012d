"""The linear layer."""

import math

import torch
from torch import Tensor

from torchref._checks import require_tensor
from torchref.autograd import Function, autocast, opmath, rounded, summed
from torchref.dispatch import accelerated


class Linear(torch.nn.Linear):
    """Drop-in for :class:`torch.nn.Linear`; see :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""The weighted sums of a layer of neurons.

    .. math::
        z = x W^T + b \qquad dx = dz\, W, \quad dW = dz^T x, \quad db = \sum_{rows} dz

    Args:
        input: floating point, shape (..., in_features).
        weight: shape (out_features, in_features), or (in_features,) for one neuron without bias.
        bias: shape (out_features,), or None.

    Returns:
        A tensor of shape (..., out_features), or (...) for one neuron.

    Raises:
        RuntimeError: the shapes, types or devices do not fit.
        TypeError: ``input`` is no tensor.

    Example:
        >>> x, w, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.5])
        >>> torchref.nn.functional.linear(x, w, b)
        tensor([11.5000])

    Source: Rosenblatt, "The perceptron", 1958; the gradient: Rumelhart, Hinton and Williams, 1986.
    """
    require_tensor("linear", "input", input)
    require_tensor("linear", "weight", weight)
    input, weight, bias = autocast("linear", input, weight, bias)
    if weight.ndim == 1 and bias is None:
        return linear(input, weight.unsqueeze(0)).squeeze(-1)
    if weight.ndim != 2:
        raise RuntimeError(
            f"linear: expected 2D `weight` (1D without bias), got shape {tuple(weight.shape)}"
        )
    if input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"linear: expected `input` of shape (..., {weight.shape[1]}) for `weight` of shape "
            f"{tuple(weight.shape)}, got {tuple(input.shape)}"
        )
    if weight.device != input.device:  # a product with a meta tensor on the CPU is left unwritten
        raise RuntimeError(
            f"linear: expected `weight` on `input`'s device {input.device}, got {weight.device}"
        )
    if bias is not None and (bias.ndim > 1 or bias.numel() not in (1, weight.shape[0])):
        raise RuntimeError(
            f"linear: expected `bias` of shape ({weight.shape[0]},) for `weight` of shape "
            f"{tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    # The Function sees rows and returns them: a reshape inside it would make its result a view,
    # which nothing could then change in place.
    rows = input if input.ndim == 2 else _rows(input)
    y = LinearFunction.call(rows, weight, bias)
    return y if input.ndim == 2 else y.reshape(*input.shape[:-1], weight.shape[0])


class LinearFunction(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_fwd(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        wants_x, wants_weight, _ = ctx.needs_input_grad  # the other of the two may then change
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = dy @ weight.conj() if wants_x else None
        dweight = dy.t() @ x.conj() if wants_weight else None
        dbias = linear_bias_bwd(dy) if wants_bias else None
        return dx, dweight, dbias


# The products stay the library's (cuBLAS, MKL): no kernel of ours would beat them.
def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x @ weight.t()
    return torch.addmm(bias, x, weight.t())  # one rounding for half types


@accelerated("linear")
def linear_bias_bwd(dy: Tensor) -> Tensor:
    return rounded(summed(opmath(dy)), dy)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 would not do for no features
