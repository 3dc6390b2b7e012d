"""Sums over all elements or down the columns, in two steps and always in the same order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch, multiprocessors, power_of_2, vector_step

BLOCK_ROWS = 32


def total(partial: Tensor, like: Tensor, divisor: float = 1.0) -> Tensor:
    """The sum of a vector of float32, over ``divisor``, as a 0-dim tensor of ``like``'s type."""
    y = torch.empty((), dtype=like.dtype, device=like.device)
    launch(_total_kernel, 1, partial, y, partial.numel(), divisor, BLOCK=1024)
    return y


@triton.jit
def _total_kernel(x_ptr, y_ptr, n, divisor, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)  # terms of either sign may leave little
    for first in range(0, n, BLOCK):
        sums += tl.load(x_ptr + first + i, mask=i < n - first, other=0.0)
    tl.store(y_ptr, (tl.sum(sums, axis=0) / divisor).to(tl.float32))


def column_sums(x: Tensor) -> Tensor:
    """The sum of each column of a contiguous matrix, in its type: (rows, cols) -> (cols,)."""
    rows, cols = x.shape
    width = power_of_2(cols, 16, 128)
    across = cdiv(cols, width)
    # As many parts as keep every multiprocessor busy, of 64 rows or more
    parts = max(1, min(cdiv(8 * multiprocessors(x), across), rows // 64))
    if parts == 1:
        return _column_sums(x, 1, width, x.dtype)[0]
    return _column_sums(_column_sums(x, parts, width, torch.float32), 1, width, x.dtype)[0]


def add_up_rows(partial: Tensor) -> Tensor:
    """The sum of each column of a few rows of partial results."""
    if partial.shape[0] == 1:
        return partial[0]
    return _column_sums(partial, 1, power_of_2(partial.shape[1], 16, 128), partial.dtype)[0]


def _column_sums(x: Tensor, parts: int, width: int, dtype: torch.dtype) -> Tensor:
    rows, cols = x.shape
    y = torch.empty((parts, cols), dtype=dtype, device=x.device)
    programs = parts * cdiv(cols, width)
    step = vector_step(cols)  # the kernel multiplies, to know that vectors are aligned
    args = (x, y, rows, cols // step, cdiv(rows, parts))
    launch(_column_sums_kernel, programs, *args, STEP=step, ROWS=BLOCK_ROWS, COLS=width)
    return y


@triton.jit
def _column_sums_kernel(
    x_ptr,
    y_ptr,
    rows,
    steps,
    rows_of_part,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program sums COLS columns of one part of the rows into one row of y."""
    cols = steps * STEP
    across = (cols + COLS - 1) // COLS
    part = (tl.program_id(0) // across).to(tl.int64)
    col = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    row = tl.arange(0, ROWS)
    first = part * rows_of_part
    last = tl.minimum(first + rows_of_part, rows)
    sums = tl.zeros([ROWS, COLS], tl.float32)
    offset = row[:, None] * cols + col[None, :]
    for start in range(first, last, ROWS):
        mask = (row < last - start)[:, None] & (col < cols)[None, :]
        sums += tl.load(x_ptr + start * cols + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + part * cols + col, tl.sum(sums, axis=0), mask=col < cols)
