"""Bias, activation and dropout after a matrix product, and the bias gradient with the rest.

x is (rows, cols), contiguous. A tile is ROWS by COLS of it; forward maps one a program. Backward
gives a program COLS columns of one part of the rows: it writes the gradient tile by tile and keeps
the sum of each column, which it leaves as one partial result; they are added up in a fixed order.
The mask comes from Philox as in dropout.py, a row beginning with a counter of its own, so that four
neighbours of one counter are in one row; a ReLU's backward reads it off the output. Moves 2
elements forward and 3 backward for each of x; the bias is read from the cache, once for a tile, and
of partial results there is at most one for 64 rows. Computes in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch, multiprocessors, power_of_2, vector_step
from ._sums import add_up_rows
from .activation import fused

TILE = 2048  # elements of a tile: with 4 warps, 16 a thread


@triton.jit
def _bias_act_dropout_fwd_kernel(
    x_ptr,
    y_ptr,
    bias_ptr,
    seed_ptr,
    threshold,
    scale,
    a,
    b,
    rows,
    steps,
    MATH: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols = steps * STEP
    across = (cols + COLS - 1) // COLS
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS
    col = tl.program_id(0) % across * COLS
    at, inside, c = _tile(row, rows, col, cols, ROWS, COLS)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = MATH(x + _bias(bias_ptr, c, cols), a, b)
    if seed_ptr is not None:
        y *= tl.where(_kept(seed_ptr, row, col, cols, threshold, ROWS, COLS), scale, 0.0)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def _bias_act_dropout_bwd_kernel(
    dy_ptr,
    kept_ptr,
    dx_ptr,
    partial_ptr,
    bias_ptr,
    seed_ptr,
    threshold,
    scale,
    a,
    b,
    rows,
    steps,
    rows_of_part,
    MATH: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols = steps * STEP
    across = (cols + COLS - 1) // COLS
    part = (tl.program_id(0) // across).to(tl.int64)
    col = tl.program_id(0) % across * COLS
    c = col + tl.arange(0, COLS)
    bias = _bias(bias_ptr, c, cols)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    last = tl.minimum((part + 1) * rows_of_part, rows)
    for row in range(part * rows_of_part, last, ROWS):
        at, inside, _ = _tile(row, last, col, cols, ROWS, COLS)
        dx = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.load(kept_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx = MATH(dx, kept + bias, a, b)
        if seed_ptr is not None:
            dx *= tl.where(_kept(seed_ptr, row, col, cols, threshold, ROWS, COLS), scale, 0.0)
        else:
            dx *= scale  # a ReLU's output was 0 where an element was dropped
        if dx_ptr is not None:
            tl.store(dx_ptr + at, dx, mask=inside)
        if partial_ptr is not None:
            sums += tl.where(inside, dx, 0.0)
    if partial_ptr is not None:
        tl.store(partial_ptr + part * cols + c, tl.sum(sums, axis=0), mask=c < cols)


@triton.jit
def _tile(row, last, col, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where the elements of a tile lie, which exist, and its columns."""
    r, c = tl.arange(0, ROWS), col + tl.arange(0, COLS)
    inside = (r < tl.minimum(last - row, ROWS).to(tl.int32))[:, None] & (c < cols)[None, :]
    return (tl.cast(row, tl.int64) + r)[:, None] * cols + c[None, :], inside, c


@triton.jit
def _bias(bias_ptr, c, cols):
    if bias_ptr is not None:
        return tl.load(bias_ptr + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.zeros_like(c).to(tl.float32)[None, :]


@triton.jit
def _kept(seed_ptr, row, col, cols, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of a tile stay: those whose random int32 is >= threshold."""
    quads = (cols + 3) // 4
    r = tl.cast(row, tl.int64) + tl.arange(0, ROWS)
    q = col // 4 + tl.arange(0, COLS // 4)
    counter = r[:, None] * quads + q[None, :]
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), low, high, low * 0, low * 0)
    # joined so that element 4 k + j has the j-th number of counter k
    random = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [ROWS, COLS])
    return random.to(tl.int32, bitcast=True) >= threshold


def bias_act_dropout_fwd(
    x: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    activation: str,
    param: float,
    p: float,
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    value, _, a, b = fused(activation, param)
    rows, cols = x.shape
    height, width = _shape(rows, cols)
    step = vector_step(cols)  # the kernel multiplies, to know that vectors are aligned
    launch(
        _bias_act_dropout_fwd_kernel,
        cdiv(rows, height) * cdiv(cols, width),
        *(x, y, _contiguous(bias), *_drawn(noise, p), a, b, rows, cols // step),
        MATH=value,
        STEP=step,
        ROWS=height,
        COLS=width,
    )
    return y


def bias_act_dropout_bwd(
    dy: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    activation: str,
    param: float,
    p: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    dy, kept = dy.contiguous(), kept.contiguous()
    _, gradient, a, b = fused(activation, param)
    rows, cols = kept.shape
    height, width = _shape(rows, cols)
    across = cdiv(cols, width)
    # As many parts as keep every multiprocessor busy, of 4 tiles and 64 rows or more
    parts = max(1, min(cdiv(8 * multiprocessors(dy), across), rows // max(64, 4 * height)))
    dx = torch.empty_like(kept) if wanted[0] else None
    partial = None
    if wanted[1]:
        partial = torch.empty((parts, cols), dtype=torch.float32, device=dy.device)
    step = vector_step(cols)
    args = (dy, kept, dx, partial, _contiguous(bias), *_drawn(noise, p), a, b, rows, cols // step)
    launch(
        _bias_act_dropout_bwd_kernel,
        parts * across,
        *(*args, cdiv(rows, parts)),
        MATH=gradient,
        STEP=step,
        ROWS=height,
        COLS=width,
    )
    return dx, None if partial is None else add_up_rows(partial)


def _shape(rows: int, cols: int) -> tuple[int, int]:
    """The tile's: as wide as rows are, up to 256."""
    width = power_of_2(cols, 16, 256)
    return TILE // width, width


def _drawn(seed: Tensor | None, p: float) -> tuple[Tensor | None, int, float]:
    """The seed, the threshold of int32, uniform from -2**31 on, and the factor of what stays."""
    assert seed is None or seed.dtype == torch.int64, "a mask of torch's is for the formula"
    return seed, min(round(p * 2**32), 2**32 - 1) - 2**31, 1 / (1 - p)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
