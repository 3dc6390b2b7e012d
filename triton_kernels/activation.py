"""Activations: one pair of pointwise kernels that take the mathematics as a function.

Each program maps BLOCK neighbours in memory, whatever the shape and the order of dimensions. Moves
2 elements forward and 3 backward for each element of x. Computes in float32.

An activation is a function of x and one of (dy, saved), with two scalars a and b for its arguments.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from ._layout import laid_out_as, packed, written

BYTES = 4096  # of one tensor a program: with 4 warps, two loads of 128 bits a thread


@triton.jit
def _activation_fwd_kernel(x_ptr, y_ptr, n, a, b, MATH: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    x_ptr, y_ptr = x_ptr + start, y_ptr + start
    if start + BLOCK <= n:  # without a mask: one that n does not align forbids vector loads
        x = tl.load(x_ptr + i).to(tl.float32)
        tl.store(y_ptr + i, MATH(x, a, b))
    else:
        inside = i < n - start
        x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + i, MATH(x, a, b), mask=inside)


@triton.jit
def _activation_bwd_kernel(
    dy_ptr, saved_ptr, dx_ptr, n, a, b, MATH: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    dy_ptr, saved_ptr, dx_ptr = dy_ptr + start, saved_ptr + start, dx_ptr + start
    if start + BLOCK <= n:
        dy = tl.load(dy_ptr + i).to(tl.float32)
        saved = tl.load(saved_ptr + i).to(tl.float32)
        tl.store(dx_ptr + i, MATH(dy, saved, a, b))
    else:
        inside = i < n - start
        dy = tl.load(dy_ptr + i, mask=inside, other=0.0).to(tl.float32)
        saved = tl.load(saved_ptr + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + i, MATH(dy, saved, a, b), mask=inside)


@triton.jit
def _relu(x, a, b):
    return tl.where(x <= 0, 0.0, x)  # not a maximum: that may drop a NaN


@triton.jit
def _relu_grad(dy, y, a, b):
    return tl.where(y <= 0, 0.0, dy)


def relu_fwd(x: Tensor, inplace: bool) -> Tensor:
    return _forward(_relu, x, inplace=inplace)


def relu_bwd(dy: Tensor, y: Tensor) -> Tensor:
    return _backward(_relu_grad, dy, y)


@triton.jit
def _leaky_relu(x, negative_slope, b):
    return tl.where(x > 0, x, x * negative_slope)


@triton.jit
def _leaky_relu_grad(dy, x, negative_slope, b):
    return tl.where(x > 0, dy, dy * negative_slope)


def leaky_relu_fwd(x: Tensor, negative_slope: float, inplace: bool) -> Tensor:
    return _forward(_leaky_relu, x, negative_slope, inplace=inplace)


def leaky_relu_bwd(dy: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    return _backward(_leaky_relu_grad, dy, x, negative_slope)


@triton.jit
def _sigmoid(x, a, b):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _sigmoid_grad(dy, y, a, b):
    return dy * y * (1 - y)


def sigmoid_fwd(x: Tensor) -> Tensor:
    return _forward(_sigmoid, x)


def sigmoid_bwd(dy: Tensor, y: Tensor) -> Tensor:
    return _backward(_sigmoid_grad, dy, y)


@triton.jit
def _tanh(x, a, b):
    # Near 0 an odd polynomial keeps the digits that a difference of exponentials loses
    # (Moshier's Cephes, tanhf.c); its error is below 2 units in the last place.
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)  # the difference from 1 keeps those of 1 - y^2
    return tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def _tanh_grad(dy, y, a, b):
    return dy * (1 - y * y)


def tanh_fwd(x: Tensor) -> Tensor:
    return _forward(_tanh, x)


def tanh_bwd(dy: Tensor, y: Tensor) -> Tensor:
    return _backward(_tanh_grad, dy, y)


@triton.jit
def _elu(x, alpha, scale):
    below = tl.where(x > 0, 0.0, x)  # where it is not used e^x may not overflow; keeps a NaN
    return tl.where(x > 0, x, alpha * _expm1(below)) * scale


@triton.jit
def _elu_grad(dy, x, alpha, scale):
    slope = scale * alpha * tl.exp(tl.where(x < 0, x, 0.0))
    return dy * tl.where(x <= 0, slope, scale)


@triton.jit
def _elu_grad_from_output(dy, y, alpha, scale):
    return dy * tl.where(y <= 0, y + scale * alpha, scale)


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0."""
    p = 1 / 5040
    p = p * x + 1 / 720
    p = p * x + 1 / 120
    p = p * x + 1 / 24
    p = p * x + 1 / 6
    p = p * x + 1 / 2
    # Taylor's: from -0.35 on what it leaves out is below a quarter of a rounding
    return tl.where(x > -0.35, x + x * x * p, tl.exp(x) - 1)


def elu_fwd(x: Tensor, alpha: float, scale: float, inplace: bool) -> Tensor:
    return _forward(_elu, x, alpha, scale, inplace=inplace)


def elu_bwd(dy: Tensor, x: Tensor, alpha: float, scale: float, from_output: bool) -> Tensor:
    return _backward(_elu_grad_from_output if from_output else _elu_grad, dy, x, alpha, scale)


@triton.jit
def _gelu(x, a, b):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_grad(dy, x, a, b):
    density = tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return dy * (0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density)


@triton.jit
def _gelu_tanh(x, a, b):
    return 0.5 * x * (1 + _tanh(_gelu_inner(x), a, b))


@triton.jit
def _gelu_tanh_grad(dy, x, a, b):
    t = _tanh(_gelu_inner(x), a, b)
    du = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return dy * 0.5 * (1 + t + x * (1 - t * t) * du)


@triton.jit
def _gelu_inner(x):
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)


def gelu_fwd(x: Tensor, approximate: bool) -> Tensor:
    return _forward(_gelu_tanh if approximate else _gelu, x)


def gelu_bwd(dy: Tensor, x: Tensor, approximate: bool) -> Tensor:
    return _backward(_gelu_tanh_grad if approximate else _gelu_grad, dy, x)


@triton.jit
def _silu(x, a, b):
    return x / (1 + tl.exp(-x))


@triton.jit
def _silu_grad(dy, x, a, b):
    s = 1 / (1 + tl.exp(-x))
    return dy * s * (1 + x * (1 - s))


def silu_fwd(x: Tensor) -> Tensor:
    return _forward(_silu, x)


def silu_bwd(dy: Tensor, x: Tensor) -> Tensor:
    return _backward(_silu_grad, dy, x)


@triton.jit
def _softplus(x, beta, threshold):
    z = x * beta
    # log(1 + e^z) = max(z, 0) + log(1 + e^-|z|), which does not overflow
    y = tl.where(z > 0, z, 0.0) + _log1p(tl.exp(-tl.abs(z)))
    return tl.where(z > threshold, x, y / beta)


@triton.jit
def _softplus_grad(dy, x, beta, threshold):
    z = x * beta
    return tl.where(z > threshold, dy, dy / (1 + tl.exp(-z)))


@triton.jit
def _log1p(u):
    """log(1 + u) for u >= 0, with the digits that 1 + u rounds away put back."""
    w = 1 + u
    return tl.where(w == 1, u, tl.log(w) * (u / (w - 1)))


def softplus_fwd(x: Tensor, beta: float, threshold: float) -> Tensor:
    return _forward(_softplus, x, beta, threshold)


def softplus_bwd(dy: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    return _backward(_softplus_grad, dy, x, beta, threshold)


@triton.jit
def _sigmoid_grad_from_input(dy, x, a, b):
    return _sigmoid_grad(dy, _sigmoid(x, a, b), a, b)


@triton.jit
def _tanh_grad_from_input(dy, x, a, b):
    return _tanh_grad(dy, _tanh(x, a, b), a, b)


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)
# For fused pieces: the value, the gradient from dy and x, and what fills a and b, None being the
# activation's own argument.
FUSED = {
    "relu": (_relu, _relu_grad, 0.0, 0.0),
    "leaky_relu": (_leaky_relu, _leaky_relu_grad, None, 0.0),
    "sigmoid": (_sigmoid, _sigmoid_grad_from_input, 0.0, 0.0),
    "tanh": (_tanh, _tanh_grad_from_input, 0.0, 0.0),
    "elu": (_elu, _elu_grad, None, 1.0),
    "selu": (_elu, _elu_grad, *SELU),
    "gelu": (_gelu, _gelu_grad, 0.0, 0.0),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_grad, 0.0, 0.0),
    "silu": (_silu, _silu_grad, 0.0, 0.0),
}


class Fused(NamedTuple):
    """An activation as the kernel of a fused piece takes it."""

    value: Any
    gradient: Any
    a: float
    b: float


def fused(activation: str | None, param: float) -> Fused:
    if activation is None:
        return Fused(None, None, 0.0, 0.0)
    value, gradient, a, b = FUSED[activation]
    return Fused(value, gradient, param if a is None else a, b)


def _forward(math, x: Tensor, a: float = 0.0, b: float = 0.0, inplace: bool = False) -> Tensor:
    source = packed(x)
    y = source if inplace else torch.empty_like(source)
    n, block = x.numel(), BYTES // x.element_size()
    launch(_activation_fwd_kernel, cdiv(n, block), source, y, n, a, b, MATH=math, BLOCK=block)
    return written(x, y) if inplace else y


def _backward(math, dy: Tensor, saved: Tensor, a: float = 0.0, b: float = 0.0) -> Tensor:
    saved = packed(saved)
    dy = laid_out_as(dy, saved)
    dx = torch.empty_like(saved, dtype=dy.dtype)
    n, block = dy.numel(), BYTES // dy.element_size()
    args = (dy, saved, dx, n, a, b)
    launch(_activation_bwd_kernel, cdiv(n, block), *args, MATH=math, BLOCK=block)
    return dx
