"""The losses of rows of scores, which become their own gradient: cross-entropy in place.

The scores are a private chunk, contiguous, (rows, K). A program takes whole rows as in softmax.py:
it reads them for maximum and sum, and again to write each element's gradient in its place. Moves 3
elements for each score, 1 without the gradient, of which up to 16,384 columns come from registers
or cache the second time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._rows import columns_left, row_sizes, rows_along, tile_offsets, tile_rows, tiles_down
from .cross_entropy import _contiguous, _row_sums, _row_weights, _targets, _weights
from .softmax import WIDEST_BWD


@triton.jit
def _losses_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    loss_ptr,
    rows,
    cols,
    ignore_index,
    smoothing,
    GRADIENT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WHOLE: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols, inner = row_sizes(cols, 1, False, STEP)
    row, start, inside = tile_rows(tl.program_id(0), rows, cols, inner, False, ROWS)
    row_max, log_sum, spread, _ = _row_sums(
        x_ptr, target_ptr, weight_ptr, start, inside, cols, inner, smoothing, False, SMOOTHED,
        WHOLE, False, ROWS, COLS,
    )  # fmt: skip
    target, kept, valid = _targets(target_ptr, row, inside, cols, ignore_index)
    picked = tl.load(x_ptr + start + target, mask=valid, other=float("nan")).to(tl.float32)
    row_weight = _row_weights(weight_ptr, target, kept, valid)
    loss = row_weight * (row_max - picked + log_sum)
    if SMOOTHED:
        loss = (1 - smoothing) * loss + spread
    loss = tl.where(kept, loss, 0.0)  # an ignored row may hold a NaN
    tl.store(loss_ptr + row, loss, mask=inside)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the scores that it picked
        col = tl.arange(0, COLS)
        for first in range(0, cols, COLS):
            mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]
            here = x_ptr + tile_offsets(start, col, inner, False) + first
            x = tl.load(here, mask=mask, other=0.0).to(tl.float32)
            p = tl.exp(x - row_max[:, None] - log_sum[:, None])
            place = tl.where((target >= first) & (target < first + COLS), target - first, -1)
            hit = (col[None, :] == place.to(tl.int32)[:, None]).to(tl.float32)
            dx = row_weight[:, None] * (p - hit)
            if SMOOTHED:
                if weight_ptr is None:
                    smooth = p * cols - 1
                else:
                    smooth = p * tl.load(weight_sum_ptr) - _weights(weight_ptr, first, cols, COLS)
                dx = (1 - smoothing) * dx + smoothing / cols * smooth
            dx = tl.where(valid[:, None], dx, tl.where(kept, float("nan"), 0.0)[:, None])
            tl.store(here, dx, mask=mask)


def losses_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float | None,
    gradient: bool,
) -> Tensor:
    assert x.is_contiguous(), "the scores are a chunk of our own"
    view = rows_along(x, 1)
    cut = tiles_down(view, WIDEST_BWD, loop_warps=8)
    loss = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    weight = _contiguous(weight)
    smoothed = smoothing is not None
    weight_sum = weight.sum(dtype=torch.float32) if smoothed and weight is not None else None
    rows, cols, _ = view.arguments()
    launch(
        _losses_kernel,
        cut.programs,
        x,
        target.contiguous(),
        weight,
        weight_sum,
        loss,
        rows,
        cols,
        ignore_index,
        smoothing or 0.0,
        GRADIENT=gradient,
        SMOOTHED=smoothed,
        WHOLE=cut.whole,
        STEP=view.step,
        ROWS=cut.ROWS,
        COLS=cut.COLS,
        num_warps=cut.num_warps,
    )
    return loss
