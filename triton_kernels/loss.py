"""Losses between numbers: one pass that takes the mathematics as a function (see activation.py).

Each program maps BLOCK neighbours in memory. Moves 2 elements forward, and 3 where nothing is
reduced; 3 backward (2 and an element of dy where nothing was reduced), and one more for each of
weight and pos_weight. A reduced loss leaves a partial sum a program, added up by one more launch in
a fixed order.

A loss is a function of x, target and pos_weight p; its derivatives are too. Without pos_weight p is
1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, divisor, launch
from ._layout import laid_out_as, packed
from ._sums import total

BYTES = 4096  # of one tensor a program: with 4 warps, two loads of 128 bits a thread


@triton.jit
def _loss_fwd_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    pos_weight_ptr,
    loss_ptr,
    n,
    MATH: tl.constexpr,
    REDUCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # without a mask: one that n does not align forbids vector loads
        loss = _weighted(x_ptr, target_ptr, weight_ptr, pos_weight_ptr, i, None, MATH)
        if not REDUCED:
            tl.store(loss_ptr + i, loss)
    else:
        inside = tl.arange(0, BLOCK) < n - start
        loss = _weighted(x_ptr, target_ptr, weight_ptr, pos_weight_ptr, i, inside, MATH)
        loss = tl.where(inside, loss, 0.0)
        if not REDUCED:
            tl.store(loss_ptr + i, loss, mask=inside)
    if REDUCED:
        tl.store(loss_ptr + program, tl.sum(loss, axis=0))


@triton.jit
def _loss_bwd_kernel(
    dy_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    pos_weight_ptr,
    d_ptr,
    n,
    divisor,
    MATH: tl.constexpr,
    REDUCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        slope = _weighted(x_ptr, target_ptr, weight_ptr, pos_weight_ptr, i, None, MATH)
        dy = tl.load(dy_ptr) if REDUCED else tl.load(dy_ptr + i)
        tl.store(d_ptr + i, dy.to(tl.float32) / divisor * slope)
    else:
        inside = tl.arange(0, BLOCK) < n - start
        slope = _weighted(x_ptr, target_ptr, weight_ptr, pos_weight_ptr, i, inside, MATH)
        dy = tl.load(dy_ptr) if REDUCED else tl.load(dy_ptr + i, mask=inside, other=0.0)
        tl.store(d_ptr + i, dy.to(tl.float32) / divisor * slope, mask=inside)


@triton.jit
def _weighted(x_ptr, target_ptr, weight_ptr, pos_weight_ptr, i, inside, MATH: tl.constexpr):
    x, target = _load(x_ptr, i, inside), _load(target_ptr, i, inside)
    y = MATH(x, target, 1.0 if pos_weight_ptr is None else _load(pos_weight_ptr, i, inside))
    return y if weight_ptr is None else y * _load(weight_ptr, i, inside)


@triton.jit
def _load(ptr, i, inside):
    if inside is None:
        return tl.load(ptr + i).to(tl.float32)
    else:
        return tl.load(ptr + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _squared(x, target, p):
    return (x - target) * (x - target)


@triton.jit
def _squared_grad(x, target, p):
    return 2 * (x - target)


def mse_loss_fwd(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return _forward(_squared, x, target, None, None, reduction)


def mse_loss_bwd(dy: Tensor, x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return _backward(_squared_grad, dy, x, target, None, None, reduction)


@triton.jit
def _absolute(x, target, p):
    return tl.abs(x - target)


@triton.jit
def _absolute_grad(x, target, p):
    d = x - target
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))  # 0 for a NaN, as in torch


def l1_loss_fwd(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return _forward(_absolute, x, target, None, None, reduction)


def l1_loss_bwd(dy: Tensor, x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return _backward(_absolute_grad, dy, x, target, None, None, reduction)


@triton.jit
def _bce(x, target, p):
    return (target - 1) * _clamped(_log1m(x)) - target * _clamped(tl.log(x))


@triton.jit
def _bce_grad(x, target, p):
    rest = (1 - x) * x
    return (x - target) / tl.where(rest < 1e-12, 1e-12, rest)  # not a maximum: a NaN stays one


@triton.jit
def _bce_target_grad(x, target, p):
    return _log1m(x) - tl.log(x)


@triton.jit
def _clamped(log):
    return tl.where(log < -100, -100.0, log)


@triton.jit
def _log1m(x):
    """log(1 - x) for x in [0, 1], with the digits that 1 - x rounds away put back."""
    w = 1 - x
    return tl.where(w == 1, -x, tl.log(w) * tl.where(w == 0, 1.0, x / (1 - w)))


def bce_loss_fwd(x: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return _forward(_bce, x, target, weight, None, reduction)


def bce_loss_bwd(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    return _backward(_bce_grad, dy, x, target, weight, None, reduction)


def bce_loss_target_bwd(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    return _backward(_bce_target_grad, dy, x, target, weight, None, reduction)


@triton.jit
def _bce_with_logits(x, target, p):
    return (1 - target) * x + (1 + (p - 1) * target) * _softplus_of_minus(x)


@triton.jit
def _bce_with_logits_grad(x, target, p):
    return (1 + (p - 1) * target) / (1 + tl.exp(-x)) - p * target


@triton.jit
def _bce_with_logits_target_grad(x, target, p):
    # without a weight p is 1; not (p - 1) log(1 + e^-x) - x, which is inf - inf at -inf
    return tl.where(p == 1, -x, p * _softplus_of_minus(x) - _softplus_of_minus(-x))


@triton.jit
def _softplus_of_minus(x):
    """log(1 + e^-x) without overflow, and with the digits of a small e^-x."""
    u = tl.exp(-tl.abs(x))
    w = 1 + u
    log1p = tl.where(w == 1, u, tl.log(w) * (u / (w - 1)))
    return tl.where(x < 0, -x, 0.0) + log1p


def bce_with_logits_loss_fwd(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    return _forward(_bce_with_logits, x, target, weight, pos_weight, reduction)


def bce_with_logits_loss_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    return _backward(_bce_with_logits_grad, dy, x, target, weight, pos_weight, reduction)


def bce_with_logits_loss_target_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    return _backward(_bce_with_logits_target_grad, dy, x, target, weight, pos_weight, reduction)


def _forward(
    math,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    x = packed(x)
    operands = _laid_out(x, target, weight, pos_weight)
    n, block = x.numel(), BYTES // x.element_size()
    programs = cdiv(n, block)
    if reduction == "none":
        loss = torch.empty_like(x)
    else:
        loss = torch.empty(programs, dtype=torch.float32, device=x.device)
    flags = {"MATH": math, "REDUCED": reduction != "none", "BLOCK": block}
    launch(_loss_fwd_kernel, programs, x, *operands, loss, n, **flags)
    return loss if reduction == "none" else total(loss, x, divisor(n, reduction))


def _backward(
    math,
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    x = packed(x)
    operands = _laid_out(x, target, weight, pos_weight)
    if reduction == "none":
        dy = laid_out_as(dy, x)
    d = torch.empty_like(x)
    n, block = x.numel(), BYTES // x.element_size()
    flags = {"MATH": math, "REDUCED": reduction != "none", "BLOCK": block}
    scalars = (n, divisor(n, reduction))
    launch(_loss_bwd_kernel, cdiv(n, block), dy, x, *operands, d, *scalars, **flags)
    return d


def _laid_out(x: Tensor, *operands: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else laid_out_as(t, x) for t in operands]
