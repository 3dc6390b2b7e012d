"""Cross-entropy from scores, and the negative log-likelihood; tiles of rows as in softmax.py.

Scores are (N, K, d1, ...) in memory of any dense order, the class dimension wherever it lies:
nothing is transposed. Forward reads the scores once (and probability targets once) and keeps two
float32 numbers a row; backward reads and writes a tile at a time, with no reduction left to do.
Each program leaves one partial loss and one partial divisor, summed in a fixed order by one more.

Asked to make the gradient in forward, a program has its rows' sums at hand and reads the scores
once more: 3 elements, of which up to 16,384 columns the second reading finds its own in the cache.
Backward moves nothing where the upstream gradient is 1, else 2; in float16 always 2.

A target that is ignored forms no address. Nor does one out of range: its loss and its gradient
are NaN, because a kernel cannot raise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, divisor, launch, power_of_2
from ._layout import is_dense, laid_out_as
from ._rows import (
    columns_left,
    row_sizes,
    rows_along,
    tile_offsets,
    tile_rows,
    tiles_across,
    tiles_down,
)
from ._sums import total as add_up
from .softmax import WIDEST_BWD, WIDEST_FWD, online

BYTES = 4096  # of one tensor a program of a pointwise kernel


@triton.jit
def _cross_entropy_fwd_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    row_max_ptr,
    log_sum_ptr,
    mass_ptr,
    total_ptr,
    partial_ptr,
    rows,
    cols,
    inner,
    ignore_index,
    smoothing,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    REDUCED: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    cols, inner = row_sizes(cols, inner, STRIDED, STEP)
    tile = tl.program_id(0)
    row, start, inside = tile_rows(tile, rows, cols, inner, STRIDED, ROWS)
    row_max, log_sum, spread, mass = _row_sums(
        x_ptr,
        target_ptr,
        weight_ptr,
        start,
        inside,
        cols,
        inner,
        smoothing,
        PROBABILITIES,
        SMOOTHED,
        WHOLE,
        STRIDED,
        ROWS,
        COLS,
    )
    tl.store(row_max_ptr + row, row_max, mask=inside)
    tl.store(log_sum_ptr + row, log_sum, mask=inside)
    if PROBABILITIES:
        tl.store(mass_ptr + row, mass, mask=inside)
        loss = spread
        row_weight = inside.to(tl.float32)
    else:
        target, kept, valid = _targets(target_ptr, row, inside, cols, ignore_index)
        picked = tl.load(x_ptr + start + target * inner, mask=valid, other=float("nan"))
        row_weight = _row_weights(weight_ptr, target, kept, valid)
        loss = row_weight * (row_max - picked.to(tl.float32) + log_sum)
        if SMOOTHED:
            loss = (1 - smoothing) * loss + spread
        loss = tl.where(kept, loss, 0.0)  # an ignored row may hold a NaN
    _store_loss(loss_ptr, total_ptr, partial_ptr, tile, row, inside, loss, row_weight, REDUCED)


@triton.jit
def _row_sums(
    x_ptr,
    target_ptr,
    weight_ptr,
    start,
    inside,
    cols,
    inner,
    smoothing,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Of each row: maximum, log(sum(exp(x - maximum))), sum(-c log p) and sum(c).

    c are the classes' coefficients in the loss, but for the one of an index target.
    """
    col = tl.arange(0, COLS)
    if WHOLE:
        offset = tile_offsets(start, col, inner, STRIDED)
        mask = inside[:, None] & columns_left(cols, 0, COLS)[None, :]
        # -inf is the identity of max and becomes 0 under exp, so padding adds nothing
        x = tl.load(x_ptr + offset, mask=mask, other=-float("inf")).to(tl.float32)
        row_max = tl.max(x, axis=1)
        log_sum = tl.log(tl.sum(tl.exp(x - row_max[:, None]), axis=1))
        c = _coefficients(
            target_ptr, weight_ptr, offset, 0, mask, cols, smoothing, PROBABILITIES, SMOOTHED, COLS
        )
        log_p = x - row_max[:, None] - log_sum[:, None]
        spread = tl.where(mask, -c * log_p, 0.0)  # padding would be 0 * inf
        return row_max, log_sum, tl.sum(spread, axis=1), tl.sum(c, axis=1)
    else:
        first_x = tl.load(x_ptr + start, mask=inside, other=0.0).to(tl.float32)
        pivot = tl.where(tl.abs(first_x) < float("inf"), first_x, 0.0)
        offset = tile_offsets(start, col, inner, STRIDED)
        m = tl.full([ROWS, COLS], -float("inf"), tl.float32)
        s = tl.zeros([ROWS, COLS], tl.float32)
        products = tl.zeros([ROWS, COLS], tl.float32)
        coefficients = tl.zeros([ROWS, COLS], tl.float32)
        for first in range(0, cols, COLS):
            mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]
            here = offset + first * inner
            x = tl.load(x_ptr + here, mask=mask, other=-float("inf")).to(tl.float32)
            m, s = online(m, s, x)
            if PROBABILITIES or SMOOTHED:
                c = _coefficients(
                    target_ptr,
                    weight_ptr,
                    here,
                    first,
                    mask,
                    cols,
                    smoothing,
                    PROBABILITIES,
                    SMOOTHED,
                    COLS,
                )
                products += tl.where(mask, c * (x - pivot[:, None]), 0.0)
                coefficients += c
        row_max = tl.max(m, axis=1)
        log_sum = tl.log(tl.sum(s * tl.exp(m - row_max[:, None]), axis=1))
        mass = tl.sum(coefficients, axis=1)
        # -c (x - m - log_sum) added up, of which only x - pivot was known on the way
        spread = (row_max - pivot + log_sum) * mass - tl.sum(products, axis=1)
        return row_max, log_sum, spread, mass


@triton.jit
def _coefficients(
    target_ptr,
    weight_ptr,
    offset,
    first,
    mask,
    cols,
    smoothing,
    PROBABILITIES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    COLS: tl.constexpr,
):
    """w ((1 - smoothing) t + smoothing / K) of a tile, with t = 0 for index targets."""
    if PROBABILITIES:
        c = tl.load(target_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if SMOOTHED:
            c = (1 - smoothing) * c + smoothing / cols
    else:
        c = mask.to(tl.float32) * (smoothing / cols)
    if weight_ptr is not None:
        c *= _weights(weight_ptr, first, cols, COLS)
    return tl.where(mask, c, 0.0)


@triton.jit
def _weights(weight_ptr, first, cols, COLS: tl.constexpr):
    """The class weights of the columns from ``first`` on, as a row of the tile."""
    col = tl.arange(0, COLS)
    weight = tl.load(weight_ptr + first + col, mask=columns_left(cols, first, COLS), other=0.0)
    return weight.to(tl.float32)[None, :]


@triton.jit
def _targets(target_ptr, row, inside, cols, ignore_index):
    """Class indices, which of them count, and which exist."""
    target = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    kept = inside & (target != ignore_index)
    return target, kept, kept & (target >= 0) & (target < cols)


@triton.jit
def _row_weights(weight_ptr, target, kept, valid):
    if weight_ptr is None:
        return kept.to(tl.float32)
    else:
        return tl.load(weight_ptr + target, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _store_loss(
    loss_ptr, total_ptr, partial_ptr, tile, row, inside, loss, row_weight, REDUCED: tl.constexpr
):
    if REDUCED:
        partial = partial_ptr + 2 * tile.to(tl.int64)
        # float64: terms of either sign may leave little, and there are few of them
        tl.store(partial, tl.sum(tl.where(inside, loss, 0.0).to(tl.float64), axis=0))
        tl.store(partial + 1, tl.sum(row_weight.to(tl.float64), axis=0))
    else:
        tl.store(loss_ptr + row, loss, mask=inside)
        tl.store(total_ptr, 0.0, mask=tile == 0)


@triton.jit
def _total_loss_kernel(
    partial_ptr, loss_ptr, total_ptr, n, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the partial losses and divisors added up, always in the same order."""
    i = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        mask = i < n - first
        here = partial_ptr + 2 * (first + i)
        losses += tl.load(here, mask=mask, other=0.0)
        weights += tl.load(here + 1, mask=mask, other=0.0)
    loss, total = tl.sum(losses, axis=0), tl.sum(weights, axis=0)
    if MEAN:
        tl.store(loss_ptr, (loss / total).to(tl.float32))
        tl.store(total_ptr, total.to(tl.float32))
    else:
        tl.store(loss_ptr, loss.to(tl.float32))
        tl.store(total_ptr, 0.0)


@triton.jit
def _cross_entropy_bwd_kernel(
    dy_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    row_max_ptr,
    log_sum_ptr,
    total_ptr,
    weight_sum_ptr,
    dx_ptr,
    rows,
    cols,
    inner,
    ignore_index,
    smoothing,
    SCORES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    REDUCED: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Index targets: of scores, or (not SCORES) of log-probabilities, which are not read."""
    cols, inner = row_sizes(cols, inner, STRIDED, STEP)
    row, inside, first, offset, mask = _tile(rows, cols, inner, STRIDED, ROWS, COLS)
    col = tl.arange(0, COLS)
    target, kept, valid = _targets(target_ptr, row, inside, cols, ignore_index)
    row_weight = _row_weights(weight_ptr, target, kept, valid)[:, None]
    place = tl.where((target >= first) & (target < first + COLS), target - first, -1)
    hit = (col[None, :] == place.to(tl.int32)[:, None]).to(tl.float32)
    if SCORES:
        p = tl.exp(_log_p(x_ptr, row_max_ptr, log_sum_ptr, row, inside, offset, mask))
        dx = row_weight * (p - hit)
        if SMOOTHED:
            if weight_ptr is None:
                smooth = p * cols - 1
            else:
                smooth = p * tl.load(weight_sum_ptr) - _weights(weight_ptr, first, cols, COLS)
            dx = (1 - smoothing) * dx + smoothing / cols * smooth
    else:
        dx = -row_weight * hit
    # The upstream gradient goes on in float32: rounded first, fp16 gradients would vanish.
    dx *= _row_gradient(dy_ptr, row, inside, REDUCED)
    if total_ptr is not None:
        dx /= tl.load(total_ptr)
    dx = tl.where(valid[:, None], dx, tl.where(kept, float("nan"), 0.0)[:, None])
    tl.store(dx_ptr + offset, dx, mask=mask)


@triton.jit
def _probability_cross_entropy_bwd_kernel(
    dy_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    row_max_ptr,
    log_sum_ptr,
    mass_ptr,
    d_ptr,
    rows,
    cols,
    inner,
    divisor,
    smoothing,
    OF_TARGET: tl.constexpr,
    SMOOTHED: tl.constexpr,
    REDUCED: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The gradient of the scores, or of the targets."""
    cols, inner = row_sizes(cols, inner, STRIDED, STEP)
    row, inside, first, offset, mask = _tile(rows, cols, inner, STRIDED, ROWS, COLS)
    log_p = _log_p(x_ptr, row_max_ptr, log_sum_ptr, row, inside, offset, mask)
    if OF_TARGET:
        d = -log_p * (1 - smoothing)
        if weight_ptr is not None:
            d *= _weights(weight_ptr, first, cols, COLS)
    else:
        c = _coefficients(
            target_ptr, weight_ptr, offset, first, mask, cols, smoothing, True, SMOOTHED, COLS
        )
        mass = tl.load(mass_ptr + row, mask=inside, other=0.0)
        d = tl.exp(log_p) * mass[:, None] - c
    d *= _row_gradient(dy_ptr, row, inside, REDUCED) / divisor
    tl.store(d_ptr + offset, d, mask=mask)


@triton.jit
def _tile(rows, cols, inner, STRIDED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows, which exist, the first column, offsets and mask of the tile that is this program's."""
    across = (cols + COLS - 1) // COLS
    program = tl.program_id(0)
    row, start, inside = tile_rows(program // across, rows, cols, inner, STRIDED, ROWS)
    first = (program % across).to(tl.int64) * COLS
    col = tl.arange(0, COLS)
    mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]
    return row, inside, first, tile_offsets(start, col, inner, STRIDED) + first * inner, mask


@triton.jit
def _log_p(x_ptr, row_max_ptr, log_sum_ptr, row, inside, offset, mask):
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    row_max = tl.load(row_max_ptr + row, mask=inside, other=0.0)
    log_sum = tl.load(log_sum_ptr + row, mask=inside, other=0.0)
    # The maximum comes off first: at scores of 300 the sum's digits would be lost.
    return x - row_max[:, None] - log_sum[:, None]


@triton.jit
def _row_gradient(dy_ptr, row, inside, REDUCED: tl.constexpr):
    """The upstream gradient of each row, or the one of them all."""
    if REDUCED:
        return tl.load(dy_ptr).to(tl.float32)
    else:
        return tl.load(dy_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _nll_loss_fwd_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    total_ptr,
    partial_ptr,
    rows,
    cols,
    inner,
    ignore_index,
    REDUCED: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    start = row // inner * inner * cols + row % inner
    target, kept, valid = _targets(target_ptr, row, inside, cols, ignore_index)
    picked = tl.load(x_ptr + start + target * inner, mask=valid, other=float("nan"))
    row_weight = _row_weights(weight_ptr, target, kept, valid)
    loss = tl.where(kept, -row_weight * picked.to(tl.float32), 0.0)
    _store_loss(loss_ptr, total_ptr, partial_ptr, tile, row, inside, loss, row_weight, REDUCED)


@triton.jit
def _losses_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    total_ptr,
    loss_ptr,
    dx_ptr,
    rows,
    cols,
    inner,
    ignore_index,
    smoothing,
    SMOOTHED: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDED: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The loss of each row, and its gradient over the total; dx may be x itself."""
    cols, inner = row_sizes(cols, inner, STRIDED, STEP)
    row, start, inside = tile_rows(tl.program_id(0), rows, cols, inner, STRIDED, ROWS)
    row_max, log_sum, spread, _ = _row_sums(
        x_ptr, target_ptr, weight_ptr, start, inside, cols, inner, smoothing, False, SMOOTHED,
        WHOLE, STRIDED, ROWS, COLS,
    )  # fmt: skip
    target, kept, valid = _targets(target_ptr, row, inside, cols, ignore_index)
    picked = tl.load(x_ptr + start + target * inner, mask=valid, other=float("nan")).to(tl.float32)
    row_weight = _row_weights(weight_ptr, target, kept, valid)
    loss = row_weight * (row_max - picked + log_sum)
    if SMOOTHED:
        loss = (1 - smoothing) * loss + spread
    loss = tl.where(kept, loss, 0.0)  # an ignored row may hold a NaN
    tl.store(loss_ptr + row, loss, mask=inside)
    if dx_ptr is not None:
        tl.debug_barrier()  # every thread has read the scores that it picked
        col = tl.arange(0, COLS)
        for first in range(0, cols, COLS):
            mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]
            here = tile_offsets(start, col, inner, STRIDED) + first * inner
            x = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
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
            if total_ptr is not None:
                dx /= tl.load(total_ptr)
            dx = tl.where(valid[:, None], dx, tl.where(kept, float("nan"), 0.0)[:, None])
            tl.store(dx_ptr + here, dx, mask=mask)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        i = tl.arange(0, BLOCK)
        x_ptr += start
        if start + BLOCK <= n:  # without a mask: one that n does not align forbids vector loads
            tl.store(x_ptr + i, tl.load(x_ptr + i).to(tl.float32) * factor)
        else:
            inside = i < n - start
            x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
            tl.store(x_ptr + i, x * factor, mask=inside)


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    smoothing: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _in_order(x)
    loss, row_max, log_sum, _, total = _forward(
        x, target.contiguous(), weight, reduction, ignore_index, smoothing, probabilities=False
    )
    return loss, row_max, log_sum, total


def cross_entropy_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    total: Tensor,
    reduction: str,
    ignore_index: int,
    smoothing: float | None,
) -> Tensor:
    x = _in_order(x)
    weight = _contiguous(weight)
    weight_sum = None
    if smoothing is not None and weight is not None:
        weight_sum = weight.sum(dtype=torch.float32)
    divisor = total if reduction == "mean" else None
    saved = (target.contiguous(), weight, row_max, log_sum, divisor, weight_sum)
    scalars = (ignore_index, smoothing or 0.0)
    flags = {"SCORES": True, "SMOOTHED": smoothing is not None}
    return _backward(_cross_entropy_bwd_kernel, dy, x, saved, scalars, reduction, flags)


def cross_entropy_once_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    ignore_index: int,
    smoothing: float | None,
) -> tuple[Tensor, Tensor]:
    x = _in_order(x)
    dx = torch.empty_like(x)
    losses = losses_and_gradient(x, target, weight, ignore_index, smoothing, dx, total)
    return add_up(losses.view(-1), losses), dx


def cross_entropy_once_bwd(dx: Tensor, factor: Tensor) -> None:
    block = BYTES // dx.element_size()
    launch(_scale_kernel, cdiv(dx.numel(), block), dx, factor, dx.numel(), BLOCK=block)


def losses_and_gradient(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float | None,
    dx: Tensor | None,
    total: Tensor | None,
) -> Tensor:
    """The loss of each row; into ``dx``, if given, the gradient of their sum over ``total``."""
    view = rows_along(x, _class_dim(x))
    cut = tiles_down(view, WIDEST_BWD, loop_warps=8)
    loss = torch.empty(_without_classes(x), dtype=torch.float32, device=x.device)
    weight = _contiguous(weight)
    smoothed = smoothing is not None
    weight_sum = weight.sum(dtype=torch.float32) if smoothed and weight is not None else None
    launch(
        _losses_kernel,
        cut.programs,
        x,
        target.contiguous(),
        weight,
        weight_sum,
        total,
        loss,
        dx,
        *view.arguments(),
        ignore_index,
        smoothing or 0.0,
        SMOOTHED=smoothed,
        WHOLE=cut.whole,
        STRIDED=view.strided,
        STEP=view.step,
        ROWS=cut.ROWS,
        COLS=cut.COLS,
        num_warps=cut.num_warps,
    )
    return loss


def probability_cross_entropy_fwd(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _in_order(x)
    target = laid_out_as(target, x)
    loss, row_max, log_sum, mass, _ = _forward(
        x, target, weight, reduction, 0, smoothing, probabilities=True
    )
    return loss, row_max, log_sum, mass


def probability_cross_entropy_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    mass: Tensor,
    reduction: str,
    smoothing: float | None,
) -> Tensor:
    x = _in_order(x)
    saved = (laid_out_as(target, x), _contiguous(weight), row_max, log_sum, mass)
    scalars = (divisor(row_max.numel(), reduction), smoothing or 0.0)
    flags = {"OF_TARGET": False, "SMOOTHED": smoothing is not None}
    kernel = _probability_cross_entropy_bwd_kernel
    return _backward(kernel, dy, x, saved, scalars, reduction, flags)


def probability_cross_entropy_target_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    reduction: str,
    smoothing: float | None,
) -> Tensor:
    x = _in_order(x)
    saved = (None, _contiguous(weight), row_max, log_sum, None)
    scalars = (divisor(row_max.numel(), reduction), smoothing or 0.0)
    flags = {"OF_TARGET": True, "SMOOTHED": smoothing is not None}
    kernel = _probability_cross_entropy_bwd_kernel
    return _backward(kernel, dy, x, saved, scalars, reduction, flags)


def nll_loss_fwd(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> tuple[Tensor, Tensor]:
    x = _in_order(x)
    view = rows_along(x, _class_dim(x))
    height = power_of_2(view.rows, 16, 512)
    programs = cdiv(view.rows, height)
    loss, total, partial = _loss_tensors(x, reduction, programs)
    args = (target.contiguous(), _contiguous(weight), loss, total, partial, *view, ignore_index)
    launch(_nll_loss_fwd_kernel, programs, x, *args, REDUCED=partial is not None, ROWS=height)
    _add_up(partial, loss, total, reduction)
    return loss, total


def nll_loss_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    x = _in_order(x)
    divisor = total if reduction == "mean" else None
    saved = (target.contiguous(), _contiguous(weight), None, None, divisor, None)
    flags = {"SCORES": False, "SMOOTHED": False}
    kernel = _cross_entropy_bwd_kernel
    return _backward(kernel, dy, x, saved, (ignore_index, 0.0), reduction, flags)


def _forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    smoothing: float | None,
    probabilities: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    view = rows_along(x, _class_dim(x))
    if probabilities or smoothing is not None:  # two more accumulators
        cut = tiles_down(view, WIDEST_BWD, loop_warps=8)
    else:
        cut = tiles_down(view, WIDEST_FWD)
    shape = _without_classes(x)
    row_max, log_sum, mass = (
        torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(3)
    )
    loss, total, partial = _loss_tensors(x, reduction, cut.programs)
    launch(
        _cross_entropy_fwd_kernel,
        cut.programs,
        x,
        target,
        _contiguous(weight),
        loss,
        row_max,
        log_sum,
        mass,
        total,
        partial,
        *view.arguments(),
        ignore_index,
        smoothing or 0.0,
        PROBABILITIES=probabilities,
        SMOOTHED=smoothing is not None,
        REDUCED=partial is not None,
        WHOLE=cut.whole,
        STRIDED=view.strided,
        STEP=view.step,
        ROWS=cut.ROWS,
        COLS=cut.COLS,
        num_warps=cut.num_warps,
    )
    _add_up(partial, loss, total, reduction)
    return loss, row_max, log_sum, mass, total


def _add_up(partial: Tensor | None, loss: Tensor, total: Tensor, reduction: str) -> None:
    if partial is not None:
        args = (partial, loss, total, partial.shape[0])
        launch(_total_loss_kernel, 1, *args, MEAN=reduction == "mean", BLOCK=1024)


def _backward(
    kernel,
    dy: Tensor,
    x: Tensor,
    saved: tuple[Tensor | None, ...],
    scalars: tuple[float, ...],
    reduction: str,
    flags: dict[str, bool],
) -> Tensor:
    dx = torch.empty_like(x)
    view = rows_along(x, _class_dim(x))
    cut = tiles_across(view)
    launch(
        kernel,
        cut.programs,
        dy.contiguous(),
        x,
        *saved,
        dx,
        *view.arguments(),
        *scalars,
        **flags,
        REDUCED=reduction != "none",
        STRIDED=view.strided,
        STEP=view.step,
        ROWS=cut.ROWS,
        COLS=cut.COLS,
    )
    return dx


def _loss_tensors(x: Tensor, reduction: str, programs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, the mean's divisor, and the partial sums of both where there is a reduction."""
    shape = _without_classes(x) if reduction == "none" else []
    loss = torch.empty(shape, dtype=x.dtype, device=x.device)
    total = torch.empty((), dtype=torch.float32, device=x.device)
    if reduction == "none":
        return loss, total, None
    return loss, total, torch.empty((programs, 2), dtype=torch.float64, device=x.device)


def _in_order(x: Tensor) -> Tensor:
    """``x``, dense, with its rows in memory in the order of the targets."""
    dim = _class_dim(x)
    strides = [s for d, s in enumerate(x.stride()) if d != dim and x.shape[d] != 1]
    return x if strides == sorted(strides, reverse=True) and is_dense(x) else x.contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _class_dim(x: Tensor) -> int:
    return 0 if x.ndim == 1 else 1


def _without_classes(x: Tensor) -> list[int]:
    return [size for d, size in enumerate(x.shape) if d != _class_dim(x)]
