"""Activations: one pointwise formula each, NaN kept, accurate near 0."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchref._checks import require_constant, require_finite, require_floating, require_tensor
from torchref.autograd import (
    Function,
    attached,
    autocast,
    opmath,
    refuse_leaf,
    rounded,
    traces_in_place,
)
from torchref.dispatch import accelerated
from torchref.internals import differentiates_forward

# Klambauer et al., 2017: with these, mean 0 and variance 1 are a fixed point.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


class _FromInput(Function):
    """An activation whose backward reads x, or y where that was written over x."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        x = inputs[0]
        ctx.inplace = output is x
        if ctx.inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.scalars = inputs[1:]


class _FromOutput(Function):
    """An activation whose backward reads y, so that x can be freed."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        if output is inputs[0]:
            ctx.mark_dirty(output)
        ctx.save_for_backward(output)


class ReLU(torch.nn.ReLU):
    """Drop-in for :class:`torch.nn.ReLU`; see :func:`relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Rectified linear unit.

    .. math::
        y = \max(0, x) \qquad dx = dy \cdot [y > 0]

    Args:
        input: any shape, floating point or integer.
        inplace: write the result into ``input``.

    Returns:
        A tensor of ``input``'s shape and type, with values >= 0; NaN stays NaN.

    Raises:
        NotImplementedError: ``input`` is boolean or complex.
        TypeError: ``input`` is no tensor.

    Example:
        >>> torchref.nn.functional.relu(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0., 0., 2.])

    Source: Nair and Hinton, "Rectified linear units improve restricted Boltzmann machines", 2010.
    """
    require_tensor("relu", "input", input)
    if input.dtype == torch.bool:
        raise NotImplementedError("relu: expected a number `input`, got torch.bool")
    if input.is_complex():
        raise NotImplementedError(f"relu: expected a real `input`, got {input.dtype}")
    if differentiates_forward():  # up to torch 2.13 clamp has a slope of 1 at 0
        y = torch.where(input <= 0, 0, input)
        return input.copy_(y) if inplace else y
    if inplace and traces_in_place():
        return input.copy_(relu(input))
    refuse_leaf(input, inplace)
    return ReLUFunction.call(input, inplace)


class ReLUFunction(_FromOutput):
    @staticmethod
    def forward(x: Tensor, inplace: bool) -> Tensor:
        return relu_fwd(x, inplace)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return attached(relu_bwd(dy, y), y), None


@accelerated("activation")
def relu_fwd(x: Tensor, inplace: bool) -> Tensor:
    return x.clamp_min_(0) if inplace else x.clamp_min(0)


@accelerated("activation")
def relu_bwd(dy: Tensor, y: Tensor) -> Tensor:
    return torch.where(y <= 0, 0, dy)  # a NaN in y passes dy, as torch does


class LeakyReLU(torch.nn.LeakyReLU):
    """Drop-in for :class:`torch.nn.LeakyReLU`; see :func:`leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    r"""Rectified linear unit with a slope for negative inputs, so that no unit dies.

    .. math::
        y = \begin{cases} x & x > 0 \\ \alpha x & x \le 0 \end{cases}
        \qquad
        dx = dy \cdot \begin{cases} 1 & x > 0 \\ \alpha & x \le 0 \end{cases}

    Args:
        input: floating point, any shape.
        negative_slope: :math:`\alpha`.
        inplace: write the result into ``input``.

    Returns:
        A tensor of ``input``'s shape and type.

    Raises:
        NotImplementedError: ``input`` is not floating point.
        TypeError: ``input`` is no tensor, or ``negative_slope`` no number.
        RuntimeError: in backward, where ``inplace`` met a negative ``negative_slope``: the output
            no longer tells the sign of the input.

    Example:
        >>> torchref.nn.functional.leaky_relu(torch.tensor([-1.0, 2.0]), 0.1)
        tensor([-0.1000,  2.0000])

    Source: Maas et al., "Rectifier nonlinearities improve neural network acoustic models", 2013.
    """
    require_floating("leaky_relu", input)
    require_finite("leaky_relu", "negative_slope", negative_slope)
    if inplace and traces_in_place():
        return input.copy_(leaky_relu(input.clone(), negative_slope))
    refuse_leaf(input, inplace)
    return LeakyReLUFunction.call(input, negative_slope, inplace)


class LeakyReLUFunction(_FromInput):
    @staticmethod
    def forward(x: Tensor, negative_slope: float, inplace: bool) -> Tensor:
        return leaky_relu_fwd(x, negative_slope, inplace)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        negative_slope, inplace = ctx.scalars
        if inplace and negative_slope < 0:
            raise RuntimeError(
                "leaky_relu: `inplace` has no gradient for a negative `negative_slope`, "
                f"got {negative_slope}"
            )
        return attached(leaky_relu_bwd(dy, x, negative_slope), x), None, None


@accelerated("activation")
def leaky_relu_fwd(x: Tensor, negative_slope: float, inplace: bool) -> Tensor:
    x32 = opmath(x)
    return _write(x32.relu() + negative_slope * _below(x32), x, inplace)


@accelerated("activation")
def leaky_relu_bwd(dy: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    """``x`` may also be the output: for a slope >= 0 its sign is the same."""
    above = opmath(x).sign().clamp_min(0)
    return rounded(opmath(dy) * (above + negative_slope * (1 - above)), dy)


class Sigmoid(torch.nn.Sigmoid):
    """Drop-in for :class:`torch.nn.Sigmoid`; see :func:`sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid(input)


def sigmoid(input: Tensor) -> Tensor:
    r"""Logistic sigmoid.

    .. math::
        y = \frac{1}{1 + e^{-x}} \qquad dx = dy \cdot y (1 - y)

    Args:
        input: any shape; integers and booleans become the default floating type.

    Returns:
        A tensor of ``input``'s shape with values in [0, 1].

    Raises:
        NotImplementedError: ``input`` is complex.

    Example:
        >>> torchref.nn.functional.sigmoid(torch.tensor([0.0]))
        tensor([0.5000])

    Source: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors",
    1986.
    """
    return SigmoidFunction.call(_promoted("sigmoid", input))


class SigmoidFunction(_FromOutput):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return sigmoid_fwd(x)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return sigmoid_bwd(dy, y)


@accelerated("activation")
def sigmoid_fwd(x: Tensor) -> Tensor:
    return rounded(_sigmoid(opmath(x)), x)


@accelerated("activation")
def sigmoid_bwd(dy: Tensor, y: Tensor) -> Tensor:
    y32 = opmath(y)
    return rounded(opmath(dy) * y32 * (1 - y32), dy)


class Tanh(torch.nn.Tanh):
    """Drop-in for :class:`torch.nn.Tanh`; see :func:`tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input)


def tanh(input: Tensor) -> Tensor:
    r"""Hyperbolic tangent.

    .. math::
        y = \frac{e^x - e^{-x}}{e^x + e^{-x}} \qquad dx = dy \cdot (1 - y^2)

    Args:
        input: any shape; integers and booleans become the default floating type.

    Returns:
        A tensor of ``input``'s shape with values in [-1, 1].

    Raises:
        NotImplementedError: ``input`` is complex.

    Example:
        >>> torchref.nn.functional.tanh(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7616])

    Source: LeCun et al., "Efficient BackProp", 1998.
    """
    return TanhFunction.call(_promoted("tanh", input))


class TanhFunction(_FromOutput):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return tanh_fwd(x)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return tanh_bwd(dy, y)


@accelerated("activation")
def tanh_fwd(x: Tensor) -> Tensor:
    return rounded(_tanh(opmath(x)), x)


@accelerated("activation")
def tanh_bwd(dy: Tensor, y: Tensor) -> Tensor:
    y32 = opmath(y)
    return rounded(opmath(dy) * (1 - y32 * y32), dy)


class ELU(torch.nn.ELU):
    """Drop-in for :class:`torch.nn.ELU`; see :func:`elu`."""

    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU):
    """Drop-in for :class:`torch.nn.SELU`; see :func:`selu`."""

    def forward(self, input: Tensor) -> Tensor:
        return selu(input, self.inplace)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    r"""Exponential linear unit.

    .. math::
        y = \begin{cases} x & x > 0 \\ \alpha (e^x - 1) & x \le 0 \end{cases}
        \qquad
        dx = dy \cdot \begin{cases} 1 & x > 0 \\ \alpha e^x & x \le 0 \end{cases}

    Args:
        input: floating point, any shape.
        alpha: minus the value at :math:`-\infty`.
        inplace: write the result into ``input``.

    Returns:
        A tensor of ``input``'s shape and type.

    Raises:
        NotImplementedError: ``input`` is not floating point.
        TypeError: ``input`` is no tensor, or ``alpha`` no number.
        RuntimeError: in backward, where ``inplace`` met a negative ``alpha``: the output no longer
            tells the sign of the input.

    Example:
        >>> torchref.nn.functional.elu(torch.tensor([-1.0, 2.0]))
        tensor([-0.6321,  2.0000])

    Source: Clevert, Unterthiner and Hochreiter, "Fast and accurate deep network learning by
    exponential linear units", 2016.
    """
    return _elu("elu", input, alpha, 1.0, inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Scaled exponential linear unit, which keeps mean 0 and variance 1 from layer to layer.

    .. math::
        y = \lambda \begin{cases} x & x > 0 \\ \alpha (e^x - 1) & x \le 0 \end{cases}
        \qquad
        dx = \lambda\, dy \cdot \begin{cases} 1 & x > 0 \\ \alpha e^x & x \le 0 \end{cases}

    with :math:`\alpha = 1.67326...` and :math:`\lambda = 1.05070...`.

    Args:
        input: floating point, any shape.
        inplace: write the result into ``input``.

    Returns:
        A tensor of ``input``'s shape and type.

    Raises:
        NotImplementedError: ``input`` is not floating point.

    Example:
        >>> torchref.nn.functional.selu(torch.tensor([-1.0, 2.0]))
        tensor([-1.1113,  2.1014])

    Source: Klambauer et al., "Self-Normalizing Neural Networks", 2017.
    """
    return _elu("selu", input, SELU_ALPHA, SELU_SCALE, inplace)


def _elu(name: str, input: Tensor, alpha: float, scale: float, inplace: bool) -> Tensor:
    require_floating(name, input)
    require_finite(name, "alpha", alpha)
    if inplace and traces_in_place():
        return input.copy_(ELUFunction.call(input.clone(), alpha, scale, False))
    refuse_leaf(input, inplace)
    return ELUFunction.call(input, alpha, scale, inplace)


class ELUFunction(_FromInput):
    @staticmethod
    def forward(x: Tensor, alpha: float, scale: float, inplace: bool) -> Tensor:
        return elu_fwd(x, alpha, scale, inplace)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        alpha, scale, inplace = ctx.scalars
        if inplace and alpha < 0:
            raise RuntimeError(
                f"elu: `inplace` has no gradient for a negative `alpha`, got {alpha}"
            )
        return elu_bwd(dy, x, alpha, scale, inplace), None, None, None


@accelerated("activation")
def elu_fwd(x: Tensor, alpha: float, scale: float, inplace: bool) -> Tensor:
    x32 = opmath(x)
    return _write(scale * (x32.relu() + alpha * _expm1(_below(x32))), x, inplace)


@accelerated("activation")
def elu_bwd(dy: Tensor, x: Tensor, alpha: float, scale: float, from_output: bool) -> Tensor:
    """``from_output`` says that ``x`` is the output: then scale alpha e^x = y + scale alpha."""
    x32 = opmath(x)
    below = x32.clamp_max(0)
    slope = below + scale * alpha if from_output else scale * alpha * below.exp()
    return rounded(opmath(dy) * torch.where(x32 <= 0, slope, scale), dy)  # a NaN passes dy


class GELU(torch.nn.GELU):
    """Drop-in for :class:`torch.nn.GELU`; see :func:`gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate=self.approximate)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    r"""Gaussian error linear unit: x times the normal distribution function at x.

    .. math::
        y = x\, \Phi(x) \qquad dx = dy \cdot \Big(\Phi(x) + x \frac{e^{-x^2/2}}{\sqrt{2\pi}}\Big)

    or, with ``approximate="tanh"``, with :math:`u = \sqrt{2/\pi}\,(x + 0.044715 x^3)`,

    .. math::
        y = \tfrac{1}{2} x (1 + \tanh u) \qquad
        dx = dy \cdot \tfrac{1}{2} \big(1 + \tanh u + x (1 - \tanh^2 u)\, u'\big)

    Args:
        input: floating point, any shape.
        approximate: ``"none"`` or ``"tanh"``.

    Returns:
        A tensor of ``input``'s shape and type.

    Raises:
        NotImplementedError: ``input`` is not floating point.
        RuntimeError: ``approximate`` is neither.

    Example:
        >>> torchref.nn.functional.gelu(torch.tensor([-1.0, 1.0]))
        tensor([-0.1587,  0.8413])

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016.
    """
    require_floating("gelu", input)
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f'gelu: expected `approximate` "none" or "tanh", got {approximate!r}')
    return GELUFunction.call(input, approximate == "tanh")


class GELUFunction(_FromInput):
    @staticmethod
    def forward(x: Tensor, approximate: bool) -> Tensor:
        return gelu_fwd(x, approximate)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return gelu_bwd(dy, x, *ctx.scalars), None


@accelerated("activation")
def gelu_fwd(x: Tensor, approximate: bool) -> Tensor:
    x32 = opmath(x)
    if approximate:
        return rounded(0.5 * x32 * (1 + _tanh(_gelu_inner(x32))), x)
    return rounded(0.5 * x32 * (1 + (x32 * math.sqrt(0.5)).erf()), x)


@accelerated("activation")
def gelu_bwd(dy: Tensor, x: Tensor, approximate: bool) -> Tensor:
    dy32, x32 = opmath(dy), opmath(x)
    if approximate:
        t = _tanh(_gelu_inner(x32))
        du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x32 * x32)
        slope = 0.5 * (1 + t + x32 * (1 - t * t) * du)
    else:
        density = (-0.5 * x32 * x32).exp() / math.sqrt(2 * math.pi)
        slope = 0.5 * (1 + (x32 * math.sqrt(0.5)).erf()) + x32 * density
    return rounded(dy32 * slope, dy)


def _gelu_inner(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)


class SiLU(torch.nn.SiLU):
    """Drop-in for :class:`torch.nn.SiLU`; see :func:`silu`."""

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Sigmoid linear unit, also called swish.

    .. math::
        y = x\, \sigma(x) \qquad dx = dy \cdot \sigma(x) \big(1 + x (1 - \sigma(x))\big)

    Args:
        input: floating point, any shape.
        inplace: write the result into ``input``. The gradient needs the input, so where one is
            needed this keeps a copy, as torch does.

    Returns:
        A tensor of ``input``'s shape and type.

    Raises:
        NotImplementedError: ``input`` is not floating point.

    Example:
        >>> torchref.nn.functional.silu(torch.tensor([-1.0, 1.0]))
        tensor([-0.2689,  0.7311])

    Source: Elfwing, Uchibe and Doya, "Sigmoid-weighted linear units", 2018.
    """
    require_floating("silu", input)
    if inplace:
        return input.copy_(SiLUFunction.call(input.clone()))
    return SiLUFunction.call(input)


class SiLUFunction(_FromInput):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return silu_fwd(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return silu_bwd(dy, x)


@accelerated("activation")
def silu_fwd(x: Tensor) -> Tensor:
    x32 = opmath(x)
    return rounded(x32 * _sigmoid(x32), x)


@accelerated("activation")
def silu_bwd(dy: Tensor, x: Tensor) -> Tensor:
    x32 = opmath(x)
    s = _sigmoid(x32)
    return rounded(opmath(dy) * s * (1 + x32 * (1 - s)), dy)


class Softplus(torch.nn.Softplus):
    """Drop-in for :class:`torch.nn.Softplus`; see :func:`softplus`."""

    def forward(self, input: Tensor) -> Tensor:
        return softplus(input, self.beta, self.threshold)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    r"""A smooth ReLU.

    .. math::
        y = \frac{1}{\beta} \log(1 + e^{\beta x}) \qquad dx = dy \cdot \sigma(\beta x)

    and the identity where :math:`\beta x` > ``threshold``.

    Args:
        input: floating point, any shape.
        beta: sharpness.
        threshold: where the identity takes over.

    Returns:
        A tensor of ``input``'s shape and type.

    Raises:
        NotImplementedError: ``input`` is not floating point.
        TypeError: ``input`` is no tensor, or ``beta`` or ``threshold`` no number.

    Example:
        >>> torchref.nn.functional.softplus(torch.tensor([0.0]))
        tensor([0.6931])

    Source: Dugas et al., "Incorporating second-order functional knowledge for better option
    pricing", 2001.
    """
    require_floating("softplus", input)
    require_constant("softplus", "beta", beta)
    require_constant("softplus", "threshold", threshold)
    (input,) = autocast("softplus", input)
    return SoftplusFunction.call(input, float(beta), float(threshold))


class SoftplusFunction(_FromInput):
    @staticmethod
    def forward(x: Tensor, beta: float, threshold: float) -> Tensor:
        return softplus_fwd(x, beta, threshold)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return softplus_bwd(dy, x, *ctx.scalars), None, None


@accelerated("activation")
def softplus_fwd(x: Tensor, beta: float, threshold: float) -> Tensor:
    x32 = opmath(x)
    z = x32 * beta
    below = torch.where(z > threshold, 0, z)  # where it is not used e^z may not overflow
    return rounded(torch.where(z > threshold, x32, below.exp().log1p() / beta), x)


@accelerated("activation")
def softplus_bwd(dy: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    dy32, z = opmath(dy), opmath(x) * beta
    return rounded(torch.where(z > threshold, dy32, dy32 * _sigmoid(z)), dy)


class Fused(NamedTuple):
    """An activation inside a fused piece: its value, and the gradient of x from dy and x."""

    fwd: Callable[[Tensor, float], Tensor]
    bwd: Callable[[Tensor, Tensor, float], Tensor]
    param: float = 0.0  # the default of the one argument that it may have


FUSED = {
    "relu": Fused(lambda x, _: relu_fwd(x, False), lambda dy, x, _: attached(relu_bwd(dy, x), x)),
    "leaky_relu": Fused(
        lambda x, slope: leaky_relu_fwd(x, slope, False),
        lambda dy, x, slope: attached(leaky_relu_bwd(dy, x, slope), x),
        0.01,
    ),
    "sigmoid": Fused(lambda x, _: sigmoid_fwd(x), lambda dy, x, _: sigmoid_bwd(dy, sigmoid_fwd(x))),
    "tanh": Fused(lambda x, _: tanh_fwd(x), lambda dy, x, _: tanh_bwd(dy, tanh_fwd(x))),
    "elu": Fused(
        lambda x, alpha: elu_fwd(x, alpha, 1.0, False),
        lambda dy, x, alpha: elu_bwd(dy, x, alpha, 1.0, False),
        1.0,
    ),
    "selu": Fused(
        lambda x, _: elu_fwd(x, SELU_ALPHA, SELU_SCALE, False),
        lambda dy, x, _: elu_bwd(dy, x, SELU_ALPHA, SELU_SCALE, False),
    ),
    "gelu": Fused(lambda x, _: gelu_fwd(x, False), lambda dy, x, _: gelu_bwd(dy, x, False)),
    "gelu_tanh": Fused(lambda x, _: gelu_fwd(x, True), lambda dy, x, _: gelu_bwd(dy, x, True)),
    "silu": Fused(lambda x, _: silu_fwd(x), lambda dy, x, _: silu_bwd(dy, x)),
}


def checked_activation(piece: str, activation: str, param: float | None) -> float:
    """The argument of an activation that a fused piece is asked for."""
    if activation not in FUSED:
        raise ValueError(
            f"{piece}: expected `activation` to be one of {', '.join(FUSED)}, got {activation!r}"
        )
    default = FUSED[activation].param
    if param is not None and not default:
        raise ValueError(f"{piece}: {activation} has no `param`, got {param}")
    if param is None:
        return default
    require_finite(piece, "param", param)
    return float(param)


def _below(x: Tensor) -> Tensor:
    """min(x, 0), with a slope of 1 at 0: relu has one of 0 there, and their sum that of torch."""
    if differentiates_forward():  # clamp has that slope up to torch 2.13
        return torch.where(x > 0, 0, x)
    return x.clamp_max(0)


def _sigmoid(x: Tensor) -> Tensor:
    # e^-x is kept finite, so that no derivative becomes inf * 0, and what is then left at -inf, the
    # smallest normal number, cut off.
    tiny = torch.finfo(x.dtype).tiny
    e = (-x).clamp_max(-math.log(tiny)).exp()
    return (1 + e).reciprocal().hardshrink(2 * tiny)


def _tanh(x: Tensor) -> Tensor:
    # Products choose, not torch.where, which on a CPU takes ten times as long for random signs.
    sign = 1 - 2 * (x < 0).to(x.dtype)
    a = sign * x
    near = (a < 0.5).to(x.dtype)
    # At 30 tanh is 1 in every type, and e^60 does not overflow.
    t = _expm1((2 * a).clamp_max(60))
    # expm1 keeps the digits near 0, the difference from 1 those of the gradient 1 - y^2.
    return sign * (near * (t / (t + 2)) + (1 - near) * (1 - 2 / (t + 2)))


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1 to the last digits near 0, where Inductor's code for a CPU subtracts."""
    if not (torch.compiler.is_compiling() and x.is_cpu):
        return x.expm1()
    u = x.clamp_min(-80).exp()  # there e^x - 1 is -1 in float32, and below log(0) is ahead
    # Kahan: u has a rounding, which its logarithm shares
    return torch.where(u == 1, x, (u - 1) * (x.clamp_min(-80) / u.log()))


def _write(y: Tensor, x: Tensor, inplace: bool) -> Tensor:
    return x.copy_(y) if inplace else rounded(y, x)


def _promoted(name: str, input: Tensor) -> Tensor:
    require_tensor(name, "input", input)
    if input.is_complex():
        raise NotImplementedError(f"{name}: expected a real `input`, got {input.dtype}")
    return input if input.is_floating_point() else input.to(torch.get_default_dtype())
