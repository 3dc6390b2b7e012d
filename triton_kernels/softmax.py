"""Softmax and log-softmax over one dimension; a program takes one tile of rows (see _rows.py).

A row that fits a tile stays in registers: 2 elements move forward for each of x, 3 backward. A
wider one is read twice, the second time mostly from the cache: programs in flight hold one tile of
rows each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._layout import laid_out_as, packed
from ._rows import columns_left, row_sizes, rows_along, tile_offsets, tile_rows, tiles_down

# Beyond, registers spill: a thread of 1024 has 64 of them.
WIDEST_FWD = 32768
WIDEST_BWD = 16384


@triton.jit
def _softmax_fwd_kernel(
    x_ptr,
    y_ptr,
    rows,
    cols,
    inner,
    LOG: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols, inner = row_sizes(cols, inner, STRIDED, STEP)
    _, start, inside = tile_rows(tl.program_id(0), rows, cols, inner, STRIDED, ROWS)
    col = tl.arange(0, COLS)
    offset = tile_offsets(start, col, inner, STRIDED)
    mask = inside[:, None] & columns_left(cols, 0, COLS)[None, :]
    # -inf is the identity of max and becomes 0 under exp, so padding adds nothing
    x = tl.load(x_ptr + offset, mask=mask, other=-float("inf")).to(tl.float32)
    shifted = x - tl.max(x, axis=1)[:, None]
    e = tl.exp(shifted)
    total = tl.sum(e, axis=1)[:, None]
    tl.store(y_ptr + offset, shifted - tl.log(total) if LOG else e / total, mask=mask)


@triton.jit
def _softmax_online_fwd_kernel(
    x_ptr,
    y_ptr,
    rows,
    cols,
    inner,
    LOG: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Maximum and sum in one pass, a pair for each place in the tile, joined at the end."""
    cols, inner = row_sizes(cols, inner, STRIDED, STEP)
    _, start, inside = tile_rows(tl.program_id(0), rows, cols, inner, STRIDED, ROWS)
    col = tl.arange(0, COLS)
    offset = tile_offsets(start, col, inner, STRIDED)
    m = tl.full([ROWS, COLS], -float("inf"), tl.float32)
    s = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, cols, COLS):
        mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]
        x = tl.load(
            x_ptr + offset + first * inner,
            mask=mask,
            other=-float("inf"),  # the identity, as above
            eviction_policy="evict_last",
        ).to(tl.float32)
        m, s = online(m, s, x)
    row_max = tl.max(m, axis=1)[:, None]
    total = tl.sum(s * tl.exp(m - row_max), axis=1)[:, None]
    for first in range(0, cols, COLS):
        mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]
        here = offset + first * inner
        x = tl.load(x_ptr + here, mask=mask, other=0.0, eviction_policy="evict_first")
        shifted = x.to(tl.float32) - row_max
        y = shifted - tl.log(total) if LOG else tl.exp(shifted) / total
        tl.store(y_ptr + here, y, mask=mask, eviction_policy="evict_first")


@triton.jit
def online(m, s, x):
    """The running maximum, and the sum of e^(x - maximum), with ``x`` taken in."""
    new = tl.maximum(m, x)
    # Where all was -inf so far, nothing minus nothing would be NaN. A NaN in x makes s one.
    shift = tl.where(new == -float("inf"), 0.0, new)
    return new, s * tl.exp(m - shift) + tl.exp(x - shift)


@triton.jit
def _softmax_bwd_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    rows,
    cols,
    inner,
    LOG: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols, inner = row_sizes(cols, inner, STRIDED, STEP)
    _, start, inside = tile_rows(tl.program_id(0), rows, cols, inner, STRIDED, ROWS)
    col = tl.arange(0, COLS)
    offset = tile_offsets(start, col, inner, STRIDED)
    mask = inside[:, None] & columns_left(cols, 0, COLS)[None, :]
    dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(dy if LOG else dy * y, axis=1)[:, None]
    dx = dy - tl.exp(y) * total if LOG else y * (dy - total)
    tl.store(dx_ptr + offset, dx, mask=mask)


@triton.jit
def _softmax_online_bwd_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    rows,
    cols,
    inner,
    LOG: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols, inner = row_sizes(cols, inner, STRIDED, STEP)
    _, start, inside = tile_rows(tl.program_id(0), rows, cols, inner, STRIDED, ROWS)
    col = tl.arange(0, COLS)
    offset = tile_offsets(start, col, inner, STRIDED)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, cols, COLS):
        mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]
        here = offset + first * inner
        dy = tl.load(dy_ptr + here, mask=mask, other=0.0, eviction_policy="evict_last")
        dy = dy.to(tl.float32)
        if not LOG:
            y = tl.load(y_ptr + here, mask=mask, other=0.0, eviction_policy="evict_last")
            dy *= y.to(tl.float32)
        sums += dy
    total = tl.sum(sums, axis=1)[:, None]
    for first in range(0, cols, COLS):
        mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]
        here = offset + first * inner
        dy = tl.load(dy_ptr + here, mask=mask, other=0.0, eviction_policy="evict_first")
        y = tl.load(y_ptr + here, mask=mask, other=0.0, eviction_policy="evict_first")
        dy, y = dy.to(tl.float32), y.to(tl.float32)
        dx = dy - tl.exp(y) * total if LOG else y * (dy - total)
        tl.store(dx_ptr + here, dx, mask=mask, eviction_policy="evict_first")


def softmax_fwd(x: Tensor, dim: int) -> Tensor:
    return _forward(x, dim, log=False)


def softmax_bwd(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    return _backward(dy, y, dim, log=False)


def log_softmax_fwd(x: Tensor, dim: int) -> Tensor:
    return _forward(x, dim, log=True)


def log_softmax_bwd(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    return _backward(dy, y, dim, log=True)


def _forward(x: Tensor, dim: int, log: bool) -> Tensor:
    x = packed(x)
    y = torch.empty_like(x)
    kernels = _softmax_fwd_kernel, _softmax_online_fwd_kernel
    _launch_rows(kernels, (x, y), dim, log, WIDEST_FWD)
    return y


def _backward(dy: Tensor, y: Tensor, dim: int, log: bool) -> Tensor:
    y = packed(y)
    dy = laid_out_as(dy, y)
    dx = torch.empty_like(y)
    kernels = _softmax_bwd_kernel, _softmax_online_bwd_kernel
    _launch_rows(kernels, (dy, y, dx), dim, log, WIDEST_BWD)
    return dx


def _launch_rows(kernels, tensors: tuple[Tensor, ...], dim: int, log: bool, widest: int) -> None:
    view = rows_along(tensors[0], dim)
    cut = tiles_down(view, widest)
    launch(
        kernels[0 if cut.whole else 1],
        cut.programs,
        *tensors,
        *view.arguments(),
        LOG=log,
        STRIDED=view.strided,
        STEP=view.step,
        ROWS=cut.ROWS,
        COLS=cut.COLS,
        num_warps=cut.num_warps,
    )
