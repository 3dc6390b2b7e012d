"""Softmax and log-softmax over one dimension."""

import warnings

import torch
from torch import Tensor

from torchref._checks import require_integer, require_tensor
from torchref.autograd import Function, autocast, opmath, rounded
from torchref.dispatch import accelerated


class Softmax(torch.nn.Softmax):
    """Drop-in for :class:`torch.nn.Softmax`; see :func:`softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim, _stacklevel=6)


class LogSoftmax(torch.nn.LogSoftmax):
    """Drop-in for :class:`torch.nn.LogSoftmax`; see :func:`log_softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, _stacklevel=6)


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Turn scores into probabilities that sum to 1 along ``dim``.

    .. math::
        y_i = \frac{e^{x_i - m}}{\sum_j e^{x_j - m}}, \quad m = \max_j x_j
        \qquad
        dx_i = y_i \Big(dy_i - \sum_j dy_j\, y_j\Big)

    Args:
        input: floating point, any shape.
        dim: the dimension that sums to 1. None picks it by torch's deprecated rule, with a warning.
        dtype: the type to convert ``input`` to first.

    Returns:
        A tensor of ``input``'s shape with values in [0, 1]. A row with a NaN, a +inf, or nothing
        but -inf is NaN.

    Raises:
        IndexError: ``dim`` is out of range.
        NotImplementedError: ``input`` is not floating point and ``dtype`` is None.

    Example:
        >>> torchref.nn.functional.softmax(torch.tensor([1.0, 1.0]), dim=0)
        tensor([0.5000, 0.5000])

    Source: Bridle, "Probabilistic interpretation of feedforward classification network outputs",
    1990.
    """
    require_tensor("softmax", "input", input)
    if dim is None:
        dim = _implicit_dim("softmax", input.ndim, _stacklevel)
    return SoftmaxFunction.call(_prepared("softmax", input, dim, dtype), dim)


class SoftmaxFunction(Function):
    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return softmax_fwd(x, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return softmax_bwd(dy, y, ctx.dim), None


@accelerated("softmax")
def softmax_fwd(x: Tensor, dim: int) -> Tensor:
    if x.numel() == 0:  # amax has no identity
        return torch.empty_like(x)
    x32 = opmath(x)
    e = (x32 - x32.amax(dim, keepdim=True)).exp()
    return rounded(e / e.sum(dim, keepdim=True), x)


@accelerated("softmax")
def softmax_bwd(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    dy32, y32 = opmath(dy), opmath(y)
    return rounded(y32 * (dy32 - (dy32 * y32).sum(dim, keepdim=True)), y)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    r"""The logarithm of :func:`softmax`, without its underflow.

    .. math::
        y_i = x_i - m - \log \sum_j e^{x_j - m}, \quad m = \max_j x_j
        \qquad
        dx_i = dy_i - e^{y_i} \sum_j dy_j

    Args:
        input: floating point, any shape.
        dim: the dimension to normalize. None picks it by torch's deprecated rule, with a warning.
        dtype: the type to convert ``input`` to first.

    Returns:
        A tensor of ``input``'s shape with values in [-inf, 0].

    Raises:
        IndexError: ``dim`` is out of range.
        NotImplementedError: ``input`` is not floating point and ``dtype`` is None.

    Example:
        >>> torchref.nn.functional.log_softmax(torch.tensor([0.0, 0.0]), dim=0)
        tensor([-0.6931, -0.6931])

    Source: Goodfellow, Bengio and Courville, *Deep Learning*, section 6.2.2.3, 2016.
    """
    require_tensor("log_softmax", "input", input)
    if dim is None:
        dim = _implicit_dim("log_softmax", input.ndim, _stacklevel)
    return LogSoftmaxFunction.call(_prepared("log_softmax", input, dim, dtype), dim)


class LogSoftmaxFunction(Function):
    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return log_softmax_fwd(x, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return log_softmax_bwd(dy, y, ctx.dim), None


@accelerated("softmax")
def log_softmax_fwd(x: Tensor, dim: int) -> Tensor:
    if x.numel() == 0:  # amax has no identity
        return torch.empty_like(x)
    x32 = opmath(x)
    shifted = x32 - x32.amax(dim, keepdim=True)
    return rounded(shifted - shifted.exp().sum(dim, keepdim=True).log(), x)


@accelerated("softmax")
def log_softmax_bwd(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    dy32 = opmath(dy)
    return rounded(dy32 - opmath(y).exp() * dy32.sum(dim, keepdim=True), y)


def _prepared(name: str, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    input = autocast(name, input)[0] if dtype is None else input.to(dtype)
    if not input.is_floating_point():
        raise NotImplementedError(
            f"{name}: expected a floating point `input`, got {input.dtype}; pass `dtype`"
        )
    require_integer(name, "dim", dim)
    limit = max(input.ndim, 1)
    if not -limit <= dim < limit:
        raise IndexError(f"{name}: expected `dim` in [{-limit}, {limit - 1}], got {dim}")
    return input


def _implicit_dim(name: str, ndim: int, stacklevel: int) -> int:
    warnings.warn(
        f"{name}: implicit `dim` is deprecated, pass dim=X",
        stacklevel=stacklevel,
    )
    return 0 if ndim in (0, 1, 3) else 1
