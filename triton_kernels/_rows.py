"""The rows along one dimension of a dense tensor, whatever its place in memory.

A dense tensor is [outer, cols, inner] in memory, ``inner`` being the dimension's stride. It has
outer * inner rows of ``cols`` elements, ``inner`` apart. A tile is ROWS rows by COLS columns: where
inner is 1 a row is a stretch of memory, otherwise (STRIDED) neighbouring rows are neighbours in
memory, so that loads are coalesced both ways and nothing is transposed.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, power_of_2, vector_step

LOOP_COLS = 256  # columns a warp in a step along a row too wide for registers


class Rows(NamedTuple):
    rows: int
    cols: int
    inner: int

    @property
    def strided(self) -> bool:
        return self.inner != 1

    @property
    def step(self) -> int:
        return vector_step(self.inner if self.strided else self.cols)

    def arguments(self) -> tuple[int, int, int]:
        """For a kernel, which multiplies what is contiguous by ``step``: see ``row_sizes``."""
        if self.strided:
            return self.rows, self.cols, self.inner // self.step
        return self.rows, self.cols // self.step, self.inner


def rows_along(x: Tensor, dim: int) -> Rows:
    """``x`` is dense."""
    cols = x.shape[dim] if x.ndim else 1
    inner = x.stride(dim) if cols != 1 else 1
    return Rows(x.numel() // cols, cols, inner)


class Tiles(NamedTuple):
    """How a kernel cuts the rows: its grid, its constexprs and its warps."""

    programs: int
    whole: bool  # a tile holds its rows from end to end
    ROWS: int
    COLS: int
    num_warps: int


def tiles_down(x: Rows, widest: int, loop_warps: int = 32) -> Tiles:
    """A program for each tile of rows: whole rows up to ``widest``, beyond that a loop along.

    Fewer warps in a loop leave each thread more registers.
    """
    if x.inner == 1 and x.cols > widest:
        return Tiles(x.rows, False, 1, LOOP_COLS * loop_warps, loop_warps)
    height, width = _shape(x, widest)
    warps = min(32, max(4, height * width // 512))
    return Tiles(_down(x, height), width >= x.cols, height, width, warps)


def tiles_across(x: Rows) -> Tiles:
    """A program for each tile, for kernels that need no whole rows."""
    height, width = _shape(x, 2048)
    return Tiles(_down(x, height) * cdiv(x.cols, width), False, height, width, 4)


def _shape(x: Rows, widest: int) -> tuple[int, int]:
    if x.inner == 1:
        width = power_of_2(x.cols, 16, widest)
        return max(1, 2048 // width), width
    height = power_of_2(x.inner, 16, 64)
    width = power_of_2(x.cols, 1, 4096 // height)
    return height, width if width >= x.cols else 2048 // height  # a loop has accumulators too


def _down(x: Rows, height: int) -> int:
    return cdiv(x.rows, height) if x.inner == 1 else x.rows // x.inner * cdiv(x.inner, height)


@triton.jit
def row_sizes(cols, inner, STRIDED: tl.constexpr, STEP: tl.constexpr):
    """The sizes of ``Rows.arguments``, so that the compiler knows that vectors are aligned.

    The JIT knows it of multiples of 16 alone, and 1000 classes are none. In 64 bits: the counter of
    a loop along a row may step past 2**31.
    """
    if STRIDED:
        return tl.cast(cols, tl.int64), tl.cast(inner, tl.int64) * STEP
    else:
        return tl.cast(cols, tl.int64) * STEP, inner


@triton.jit
def columns_left(cols, first, COLS: tl.constexpr):
    """Which columns of the tile from ``first`` on exist."""
    # compared in 32 bits, which saves registers
    return tl.arange(0, COLS) < tl.minimum(cols - first, COLS).to(tl.int32)


@triton.jit
def tile_rows(tile, rows, cols, inner, STRIDED: tl.constexpr, ROWS: tl.constexpr):
    """The rows of a tile, the offsets of their first elements, and whether they exist."""
    tile = tile.to(tl.int64)  # rows * cols may pass 2**31
    i = tl.arange(0, ROWS)
    if STRIDED:
        blocks = (inner + ROWS - 1) // ROWS
        outer, first = tile // blocks, tile % blocks * ROWS
        return outer * inner + first + i, outer * inner * cols + first + i, i < inner - first
    else:
        row = tile * ROWS + i
        return row, row * cols, row < rows


@triton.jit
def tile_offsets(start, col, inner, STRIDED: tl.constexpr):
    if STRIDED:
        return start[:, None] + (col.to(tl.int64) * inner)[None, :]
    else:
        return start[:, None] + col[None, :]
