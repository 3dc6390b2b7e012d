"""Batch normalization: a reduction for each channel, then a pointwise pass, forward and backward.

A dense x lies in memory as (outer, channels, inner): inner = 1 for channels_last and (N, C), inner
= H * W for NCHW. Two kinds of tile walk through it, ROWS by COLS neighbours:

- rows of inner values, each of one channel;
- COLUMNS: rows of channels * inner values, a column of one channel (where inner is small).

The reductions give a program one channel or COLS columns and every PARTS-th of its tiles. It
writes one partial result for each column; a second kernel merges a channel's in an order that is
always the same, so results repeat bit by bit. Where there is one partial the first kernel finishes.
The programs of the pointwise kernels map one tile each, last tile first: that one is still in L2.

Moves 3 elements forward (x twice, y) and 5 backward (x and dy twice, dx), evaluation 2 and 2. A
residual and an activation join the pointwise pass: the residual is 1 element more forward and 2
more backward, where the reduction reads what was kept (the residual, or the output of a ReLU) and
writes the residual's gradient, which is then all that the second pass needs of the upstream one.
Without a residual the activation moves nothing: what it saw is computed from x again, which
evaluation then reads backward too (3). SyncBatchNorm takes the passes one by one: x for the
statistics (1), the evaluation's forward (2) and its sums (2), and dy and x for dx (3).
Computes in float32. Offsets have 64 bits; only the rows of the first kind and the columns of the
second must be fewer than 2**31, as they are in any memory of today.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FakeTensor, cdiv, launch, multiprocessors, power_of_2, vector_step
from ._layout import laid_out_as, packed, written
from .activation import fused

# Elements of a reduction's step: two or more loads of 128 bits a thread, of x or x and dy, within
# 64 registers, so that a multiprocessor holds 8 programs of 4 warps.
STATS_TILE = 2048
SUMS_TILE = 1024
PROGRAMS = 8
MAP_BYTES = 8192  # of one tensor a program of a pointwise kernel: four loads of 128 bits a thread
SHARE_BYTES = 32768  # the least of x that is worth a program and a partial result
MAX_PARTIALS = 4096  # of one channel: one program merges them, all in registers


@triton.jit
def _batch_norm_stats_kernel(
    x_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    momentum_ptr,
    eps,
    correction,
    outer,
    channels,
    steps,
    groups,
    parts,
    tiles,
    COLUMNS: tl.constexpr,
    FINAL: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    width = tl.cast(steps, tl.int64) * STEP
    at, inside, n = _reduced_tile(part, group, outer, channels, width, COLUMNS, ROWS, COLS)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # Deviations are from the mean of the first tile: E[x^2] - E[x]^2 would lose all digits at a
    # large mean, and a first value alone may be an outlier.
    pivot = _total(x, COLUMNS) / n
    deviation = tl.where(inside, x - pivot, 0.0)
    total, squares = _folded(deviation, ROWS, COLS), _folded(deviation * deviation, ROWS, COLS)
    for tile in range(part + parts, tiles, parts):
        at, inside, more = _reduced_tile(tile, group, outer, channels, width, COLUMNS, ROWS, COLS)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, x - pivot, 0.0)
        total += _folded(deviation, ROWS, COLS)
        squares += _folded(deviation * deviation, ROWS, COLS)
        n += more
    shift = _total(total, COLUMNS) / n
    mean = pivot + shift
    m2 = _total(squares, COLUMNS) - shift * shift * n
    m2 = tl.where(m2 < 0, 0.0, m2)  # not a maximum: that may drop a NaN
    column, columns = _reduced_columns(group, groups, width, COLUMNS, COLS)
    known = column < columns
    if FINAL:
        _store_stats(
            mean,
            m2 / n,
            column,
            known,
            mean_ptr,
            rstd_ptr,
            running_mean_ptr,
            running_var_ptr,
            momentum,
            momentum_ptr,
            eps,
            correction,
        )
    else:
        partial_ptr += column * parts + part
        size = columns * parts
        # In two numbers, whose sum would be rounded: a large mean would lose its last digits.
        tl.store(partial_ptr, pivot, mask=known)
        tl.store(partial_ptr + size, shift, mask=known)
        tl.store(partial_ptr + 2 * size, m2, mask=known)
        tl.store(partial_ptr + 3 * size, tl.zeros_like(mean) + n, mask=known)


@triton.jit
def _batch_norm_merge_stats_kernel(
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    momentum_ptr,
    eps,
    correction,
    partials,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64)
    size = tl.num_programs(0).to(tl.int64) * partials
    partial_ptr += channel * partials
    i = tl.arange(0, BLOCK)
    inside = i < partials
    # Means are merged as distances from the first of them, which are small.
    first = tl.load(partial_ptr) + tl.load(partial_ptr + size)
    shift = tl.load(partial_ptr + i, mask=inside, other=0.0) - first
    shift += tl.load(partial_ptr + size + i, mask=inside, other=0.0)
    m2 = tl.load(partial_ptr + 2 * size + i, mask=inside, other=0.0)
    n = tl.load(partial_ptr + 3 * size + i, mask=inside, other=0.0)
    total = tl.sum(n, axis=0)
    mean = tl.sum(n * shift, axis=0) / total
    m2 += n * (shift - mean) * (shift - mean)
    _store_stats(
        first + mean,
        tl.sum(m2, axis=0) / total,
        channel,
        channel >= 0,
        mean_ptr,
        rstd_ptr,
        running_mean_ptr,
        running_var_ptr,
        momentum,
        momentum_ptr,
        eps,
        correction,
    )


@triton.jit
def _store_stats(
    mean,
    var,
    channel,
    known,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    momentum_ptr,
    eps,
    correction,
):
    tl.store(mean_ptr + channel, mean, mask=known)
    tl.store(rstd_ptr + channel, tl.rsqrt(var + eps), mask=known)
    _move(running_mean_ptr, channel, known, mean, momentum, momentum_ptr)
    _move(running_var_ptr, channel, known, var * correction, momentum, momentum_ptr)


@triton.jit
def _move(running_ptr, channel, known, batch, momentum, momentum_ptr):
    if running_ptr is not None:
        if momentum_ptr is not None:
            momentum = tl.load(momentum_ptr).to(tl.float32)
        running = _load(running_ptr, channel, known)
        tl.store(running_ptr + channel, (1 - momentum) * running + momentum * batch, mask=known)


@triton.jit
def _batch_norm_apply_kernel(
    x_ptr,
    y_ptr,
    residual_ptr,
    a,
    b,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    spread_ptr,
    eps,
    rows,
    channels,
    inner,
    steps,
    MATH: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVAL: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    at, inside, channel, known = _mapped_tile(
        rows, channels, inner, steps, COLUMNS, STEP, ROWS, COLS
    )
    mean, scale, shift = _coefficients(
        mean_ptr, spread_ptr, weight_ptr, bias_ptr, channel, known, eps, EVAL
    )
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = _affine(x, mean, scale, shift, bias_ptr, residual_ptr, at, inside)
    if MATH is not None:
        y = MATH(y, a, b)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def _coefficients(mean_ptr, spread_ptr, weight_ptr, bias_ptr, channel, known, eps, EVAL):
    """Mean, scale and shift of each channel."""
    mean = _load(mean_ptr, channel, known)
    scale = _scale(_rstd(spread_ptr, channel, known, eps, EVAL), weight_ptr, channel, known)
    shift = tl.zeros_like(mean)
    if bias_ptr is not None:
        shift = _load(bias_ptr, channel, known)
    return mean, scale, shift


@triton.jit
def _scale(scale, weight_ptr, channel, known):
    if weight_ptr is not None:
        scale *= _load(weight_ptr, channel, known)
    return scale


@triton.jit
def _affine(x, mean, scale, shift, bias_ptr, residual_ptr, at, inside):
    # not folded to x * scale + shift: that cancels at a large mean
    u = (x - mean) * scale
    if bias_ptr is not None:  # a sum with 0 costs registers: no compiler may leave it out
        u += shift
    if residual_ptr is not None:
        u += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return u


@triton.jit
def _before_activation(
    dy,
    x,
    mean,
    scale,
    shift,
    bias_ptr,
    kept_ptr,
    at,
    inside,
    a,
    b,
    MATH: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
):
    """The gradient of what the activation saw, which is computed again or, of a ReLU, kept."""
    if FROM_OUTPUT:
        u = tl.load(kept_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:
        u = _affine(x, mean, scale, shift, bias_ptr, kept_ptr, at, inside)
    return MATH(dy, u, a, b)


@triton.jit
def _batch_norm_sums_kernel(
    dy_ptr,
    x_ptr,
    partial_ptr,
    dbias_ptr,
    dscale_ptr,
    dweight_ptr,
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    kept_ptr,
    dresidual_ptr,
    a,
    b,
    outer,
    channels,
    inner,
    steps,
    groups,
    parts,
    tiles,
    MATH: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVAL: tl.constexpr,
    FINAL: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    width = tl.cast(steps, tl.int64) * STEP
    column, columns = _reduced_columns(group, groups, width, COLUMNS, COLS)
    known = column < columns
    channel = column // inner if COLUMNS else column
    if MATH is not None:
        mean, scale, shift = _coefficients(
            mean_ptr, spread_ptr, weight_ptr, bias_ptr, channel, known, eps, EVAL
        )
        mean, scale, shift = mean[None, :], scale[None, :], shift[None, :]
    else:
        mean = _load(mean_ptr, channel, known)[None, :]
        scale, shift = mean, mean  # nothing reads them
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    dscale = dbias
    for tile in range(part, tiles, parts):
        at, inside, _ = _reduced_tile(tile, group, outer, channels, width, COLUMNS, ROWS, COLS)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = dy  # where there is none nothing reads it
        if x_ptr is not None:
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if MATH is not None:
            dy = _before_activation(
                dy, x, mean, scale, shift, bias_ptr, kept_ptr, at, inside, a, b, MATH, FROM_OUTPUT
            )
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, dy, mask=inside)
        dbias += dy
        if dscale_ptr is not None:
            dscale += dy * (x - mean)  # 1 / deviation waits for the sum
    if FINAL:
        tl.store(dbias_ptr + channel, _total(dbias, COLUMNS), mask=known)
    else:
        partial_ptr += column * parts + part
        tl.store(partial_ptr, _total(dbias, COLUMNS), mask=known)
    if dscale_ptr is not None:
        ds = _total(dscale, COLUMNS) * _rstd(spread_ptr, channel, known, eps, EVAL)
        if FINAL:
            _store_dscale(ds, channel, known, dscale_ptr, dweight_ptr)
        else:
            tl.store(partial_ptr + columns * parts, ds, mask=known)


@triton.jit
def _batch_norm_merge_sums_kernel(
    partial_ptr, dbias_ptr, dscale_ptr, dweight_ptr, partials, BLOCK: tl.constexpr
):
    channel = tl.program_id(0).to(tl.int64)
    partial_ptr += channel * partials
    i = tl.arange(0, BLOCK)
    inside = i < partials
    db = tl.load(partial_ptr + i, mask=inside, other=0.0)
    tl.store(dbias_ptr + channel, tl.sum(db, axis=0))
    if dscale_ptr is not None:
        partial_ptr += tl.num_programs(0).to(tl.int64) * partials
        ds = tl.load(partial_ptr + i, mask=inside, other=0.0)
        _store_dscale(tl.sum(ds, axis=0), channel, channel >= 0, dscale_ptr, dweight_ptr)


@triton.jit
def _store_dscale(ds, channel, known, dscale_ptr, dweight_ptr):
    tl.store(dscale_ptr + channel, ds, mask=known)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channel, ds, mask=known)


@triton.jit
def _batch_norm_dx_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    kept_ptr,
    dresidual_ptr,
    a,
    b,
    dbias_ptr,
    dscale_ptr,
    share,
    rows,
    channels,
    inner,
    steps,
    MATH: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVAL: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    at, inside, channel, known = _mapped_tile(
        rows, channels, inner, steps, COLUMNS, STEP, ROWS, COLS
    )
    dx = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MATH is not None:
        mean, scale, shift = _coefficients(
            mean_ptr, spread_ptr, weight_ptr, bias_ptr, channel, known, eps, EVAL
        )
    x = dx  # where there is none nothing reads it
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MATH is not None:
        dx = _before_activation(
            dx, x, mean, scale, shift, bias_ptr, kept_ptr, at, inside, a, b, MATH, FROM_OUTPUT
        )
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, dx, mask=inside)
    rstd = _rstd(spread_ptr, channel, known, eps, EVAL)
    if not EVAL:  # the statistics depend on x too
        if MATH is None:
            mean = _load(mean_ptr, channel, known)
        dx -= _load(dbias_ptr, channel, known) * share
        dx -= (x - mean) * (_load(dscale_ptr, channel, known) * share * rstd)
    if MATH is None:  # loaded late, the weight takes fewer registers
        scale = _scale(rstd, weight_ptr, channel, known)
    tl.store(dx_ptr + at, dx * scale, mask=inside)


@triton.jit
def _reduced_tile(tile, group, outer, channels, width, COLUMNS, ROWS, COLS):
    """Where the elements of a group's tile lie, which exist, and how many of a column's do."""
    if COLUMNS:
        row = tl.cast(tile, tl.int64) * ROWS
        col = tl.cast(group, tl.int64) * COLS
        first = row * width + col
        stride = width
    else:
        across = tl.cdiv(width, COLS).to(tl.int32)
        row = tl.cast(tile // across, tl.int64) * ROWS
        col = tl.cast(tile % across, tl.int64) * COLS
        stride = width * channels
        first = row * stride + group * width + col
    down = tl.minimum(outer - row, ROWS).to(tl.int32)
    right = tl.minimum(width - col, COLS).to(tl.int32)
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    n = down if COLUMNS else down * right
    return first + r * stride + c, (r < down) & (c < right), n.to(tl.float32)


@triton.jit
def _reduced_columns(group, groups, width, COLUMNS, COLS):
    """The columns that a group reduces to, and how many there are in all."""
    if COLUMNS:
        column = tl.cast(group, tl.int64) * COLS + tl.arange(0, COLS)
        columns = width
    else:
        column = tl.cast(group, tl.int64) + tl.arange(0, 1)
        columns = tl.cast(groups, tl.int64)
    return column, columns


@triton.jit
def _folded(x, ROWS, COLS):
    """Half of the rows added to the other half: within a thread, and saves it registers."""
    if ROWS > 1:
        x = tl.sum(tl.reshape(x, [2, ROWS // 2, COLS]), axis=0)
    return x


@triton.jit
def _total(x, COLUMNS):
    """The sum over a tile's values of each column."""
    x = tl.sum(x, axis=0)
    if not COLUMNS:
        x = tl.sum(x, axis=0, keep_dims=True)
    return x


@triton.jit
def _mapped_tile(rows, channels, inner, steps, COLUMNS, STEP, ROWS, COLS):
    """Where the elements of this program's tile lie, which exist, their channels, which exist."""
    width = tl.cast(steps, tl.int64) * STEP
    across = tl.cdiv(width, COLS).to(tl.int32)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.cast(tile // across, tl.int64) * ROWS
    col = tl.cast(tile % across, tl.int64) * COLS
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLS)[None, :]
    in_rows = r < tl.minimum(rows - row, ROWS).to(tl.int32)
    in_cols = c < tl.minimum(width - col, COLS).to(tl.int32)
    if COLUMNS:
        channel = (col.to(tl.int32) + c) // inner  # not in 64 bits, where a division is slow
        known = in_cols
    else:
        channel = (row.to(tl.int32) + r) % channels
        known = in_rows
    return row * width + col + r * width + c, in_rows & in_cols, channel, known


@triton.jit
def _load(ptr, channel, known):
    return tl.load(ptr + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _rstd(spread_ptr, channel, known, eps, EVAL):
    """1 / deviation, from the running variance in evaluation."""
    spread = _load(spread_ptr, channel, known)
    return tl.rsqrt(spread + eps) if EVAL else spread


def batch_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    unbiased: bool,
    residual: Tensor | None = None,
    activation: str | None = None,
    param: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    x = packed(x)
    moved = _contiguous(running_mean), _contiguous(running_var)
    n = x.numel() // x.shape[1]
    correction = n / (n - 1) if unbiased else 1.0
    mean, rstd = _statistics(x, *moved, momentum, eps, correction)
    for running, new in zip((running_mean, running_var), moved, strict=True):
        if running is not None and new is not None:
            written(running, new)
    then = (residual, activation, param)
    return _apply(x, weight, bias, mean, rstd, eps, False, *then), mean, rstd


def batch_norm_stats_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    x = packed(x)
    mean, var = torch.zeros(2, x.shape[1], device=x.device)
    _statistics(x, mean, var, 1.0, 1.0, 1.0)  # as running ones that the batch's replace
    return mean, var


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    correction: float,
) -> tuple[Tensor, Tensor]:
    """The mean and 1 / deviation; moves the running ones."""
    mean, rstd = _per_channel(x), _per_channel(x)
    share = (0.0, momentum) if isinstance(momentum, Tensor) else (float(momentum), None)
    results = (mean, rstd, running_mean, running_var, *share, eps, correction)
    plan = _reduction(x, STATS_TILE)
    partial = plan.partial_results(4, x)
    sizes = (plan.outer, plan.channels, plan.steps, plan.groups, plan.parts, plan.tiles)
    launch(
        _batch_norm_stats_kernel,
        plan.groups * plan.parts,
        *(x, partial, *results, *sizes),
        COLUMNS=plan.columns,
        FINAL=partial is None,
        STEP=plan.step,
        ROWS=plan.tile_rows,
        COLS=plan.tile_cols,
    )
    if partial is not None:
        args = (partial, *results, plan.partials)
        block = power_of_2(plan.partials, 32, MAX_PARTIALS)
        launch(_batch_norm_merge_stats_kernel, plan.channels, *args, BLOCK=block)
    return mean, rstd


def batch_norm_eval_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    param: float = 0.0,
) -> Tensor:
    statistics = _contiguous(running_mean), _contiguous(running_var)
    then = (residual, activation, param)
    return _apply(packed(x), weight, bias, *statistics, eps, True, *then)


def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: tuple[bool, bool, bool, bool],
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    activation: str | None = None,
    param: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    then = (bias, kept, activation, param)
    return _backward(dy, x, weight, mean, rstd, 0.0, False, wanted, *then)


def batch_norm_eval_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool, bool],
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    activation: str | None = None,
    param: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    then = (bias, kept, activation, param)
    return _backward(dy, x, weight, running_mean, running_var, eps, True, wanted, *then)


def batch_norm_dx_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dbias: Tensor,
    dscale: Tensor,
) -> Tensor:
    x = packed(x)
    dx = torch.empty_like(x)
    channels = (*map(_contiguous, (mean, rstd, weight)), None, 0.0)
    then = _Then(None, None, 0.0, 0.0)
    sums = (dbias.contiguous(), dscale.contiguous(), 1.0)
    args = (laid_out_as(dy, x), x, dx, *channels, *then.arguments(None), *sums)
    _map(_batch_norm_dx_kernel, x, args, False, **then.constexprs)
    return dx


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    eps: float,
    evaluates: bool,
    residual: Tensor | None,
    activation: str | None,
    param: float,
) -> Tensor:
    y = torch.empty_like(x)
    math, _, a, b = fused(activation, param)
    residual = None if residual is None else laid_out_as(residual, x)
    parameters = _contiguous(weight), _contiguous(bias), mean, spread, eps
    args = (x, y, residual, a, b, *parameters)
    _map(_batch_norm_apply_kernel, x, args, evaluates, MATH=math)
    return y


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    eps: float,
    evaluates: bool,
    wanted: tuple[bool, bool, bool, bool],
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str | None,
    param: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    x = packed(x)
    dy = laid_out_as(dy, x)
    then = _then(x, kept, activation, param)
    channels = (*map(_contiguous, (mean, spread, weight, bias)), eps)
    wants_dx, wants_dweight, wants_dbias = wanted[0], wanted[1] and weight is not None, wanted[2]
    sums_for_dx = wants_dx and not evaluates
    sums = sums_for_dx or wants_dweight or wants_dbias or not wants_dx
    # The first pass over dy writes the residual's gradient, which is dy to the second.
    passes_on = kept is not None and sums and wants_dx
    dresidual = torch.empty_like(x) if wanted[3] or passes_on else None
    dx = dweight = dbias = dscale = None
    if sums:
        if sums_for_dx or wants_dweight:
            dscale = _per_channel(x)
        if weight is not None and wanted[1]:
            dweight = _per_channel(x, weight.dtype) if weight.dtype != torch.float32 else dscale
        dbias = _per_channel(x)
        results = (dbias, dscale, None if dweight is dscale else dweight)
        _sum(dy, x, results, channels, then, dresidual, evaluates)
    if wants_dx:
        dx = torch.empty_like(x)
        written_here = dresidual
        if passes_on and dresidual is not None:
            dy, then, written_here = dresidual, _Then(None, None, 0.0, 0.0), None
            channels = (*channels[:3], None, eps)  # compiled as it is without what followed
        share = x.shape[1] / x.numel()
        source = x if not evaluates or then.reads_x else None
        args = (dy, source, dx, *channels, *then.arguments(written_here), dbias, dscale, share)
        _map(_batch_norm_dx_kernel, x, args, evaluates, **then.constexprs)
    dresidual = dresidual if wanted[3] else None
    return dx, dweight, dbias if wants_dbias else None, dresidual


class _Then(NamedTuple):
    """What follows the normalization, as backward kernels take it."""

    kept: Tensor | None
    math: Any
    a: float
    b: float
    from_output: bool = False

    @property
    def reads_x(self) -> bool:
        return self.math is not None and not self.from_output

    @property
    def constexprs(self) -> dict[str, Any]:
        return {"MATH": self.math, "FROM_OUTPUT": self.from_output}

    def arguments(self, dresidual: Tensor | None) -> tuple[Any, ...]:
        return self.kept, dresidual, self.a, self.b


def _then(x: Tensor, kept: Tensor | None, activation: str | None, param: float) -> _Then:
    kept = None if kept is None else laid_out_as(kept, x)
    _, gradient, a, b = fused(activation, param)
    return _Then(kept, gradient, a, b, activation == "relu" and kept is not None)


def _sum(
    dy: Tensor,
    x: Tensor,
    results: tuple[Tensor | None, ...],
    channels: tuple[Any, ...],
    then: _Then,
    dresidual: Tensor | None,
    evaluates: bool,
) -> None:
    """Write the sums of dy, and of dy times normalized x where ``dscale`` is given."""
    plan = _reduction(x, SUMS_TILE)
    partial = plan.partial_results(2, x)
    sizes = (plan.outer, plan.channels, plan.inner, plan.steps)
    launch(
        _batch_norm_sums_kernel,
        plan.groups * plan.parts,
        *(dy, x if results[1] is not None or then.reads_x else None, partial, *results),
        *(*channels, *then.arguments(dresidual), *sizes, plan.groups, plan.parts, plan.tiles),
        **then.constexprs,
        COLUMNS=plan.columns,
        EVAL=evaluates,
        FINAL=partial is None,
        STEP=plan.step,
        ROWS=plan.tile_rows,
        COLS=plan.tile_cols,
    )
    if partial is not None:
        args = (partial, *results, plan.partials)
        block = power_of_2(plan.partials, 32, MAX_PARTIALS)
        launch(_batch_norm_merge_sums_kernel, plan.channels, *args, BLOCK=block)


def _map(kernel, x: Tensor, args: tuple, evaluates: bool, **math: Any) -> None:
    columns, outer, channels, inner = _seen_as(x)
    rows, width = (outer, channels * inner) if columns else (outer * channels, inner)
    elements = MAP_BYTES // x.element_size()
    step = vector_step(width)
    if step * x.element_size() < 8:  # one address for each element would fill the registers
        elements //= 4
    cols = power_of_2(width, 1, 64) if columns else _tile_cols(width, 1, min(2048, elements))
    tile_rows = elements // cols
    launch(
        kernel,
        cdiv(rows, tile_rows) * cdiv(width, cols),
        *(*args, rows, channels, inner, width // step),
        **math,
        COLUMNS=columns,
        EVAL=evaluates,
        STEP=step,
        ROWS=tile_rows,
        COLS=cols,
    )


class _Reduction(NamedTuple):
    """How the programs of a reduction share x: ``parts`` to each of ``groups``."""

    columns: bool
    outer: int
    channels: int
    inner: int
    step: int  # the greatest power of 2 up to 16 that divides the width of a row of tiles:
    steps: int  # the kernel multiplies both, to know that vectors are aligned
    groups: int
    parts: int
    tiles: int  # of a group
    tile_rows: int
    tile_cols: int

    @property
    def partials(self) -> int:
        """How many of one channel."""
        return self.parts * (self.inner if self.columns else 1)

    def partial_results(self, quantities: int, x: Tensor) -> Tensor | None:
        """Memory for them, or None where each program has all of its channels."""
        if self.partials == 1:
            return None
        return torch.empty(
            quantities * self.channels * self.partials, dtype=torch.float32, device=x.device
        )


def _reduction(x: Tensor, tile: int) -> _Reduction:
    columns, outer, channels, inner = _seen_as(x)
    width = channels * inner if columns else inner
    if columns:
        cols = power_of_2(width, 1, 64)
    else:
        cols = _tile_cols(width, tile // power_of_2(outer, 1, tile), tile)
    rows = min(tile // cols, power_of_2(outer, 1, tile))
    across = cdiv(width, cols)
    down = cdiv(outer, rows)
    groups, tiles = (across, down) if columns else (channels, across * down)
    share = outer * channels * inner * x.element_size() // (groups * SHARE_BYTES)
    # Rounded down: one program more than fit at once would take as long as all the others.
    parts = min(PROGRAMS * multiprocessors(x) // groups, share, tiles)
    parts = max(1, min(parts, MAX_PARTIALS // inner if columns else MAX_PARTIALS))
    step = vector_step(width)
    sizes = (step, width // step, groups, parts, tiles, rows, cols)
    return _Reduction(columns, outer, channels, inner, *sizes)


def _seen_as(x: Tensor) -> tuple[bool, int, int, int]:
    """Whether tiles span channels, and (outer, channels, inner)."""
    if isinstance(x, FakeTensor):  # nothing is launched, and no size is to be fixed
        return False, 1, 1, 1
    n, channels = x.numel(), x.shape[1]
    if channels == 1:
        return False, 1, 1, n
    inner = x.stride(1)
    outer = n // (channels * inner)
    # Short rows waste most of each memory transaction. With columns one in `outer` of the elements
    # read becomes a partial result.
    columns = inner == 1 or (inner < 64 and outer >= 64)
    return columns, outer, channels, inner


def _tile_cols(width: int, least: int, most: int) -> int:
    """The widest tile that pads rows little, by a sixteenth, or else the one that pads least."""
    widest = power_of_2(width, 1, most)
    least = max(least, 128)
    widths = [widest >> i for i in range(5) if i == 0 or widest >> i >= least]
    return min(widths, key=lambda cols: max(cdiv(width, cols) * cols, width * 17 // 16))


def _per_channel(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(x.shape[1], dtype=dtype, device=x.device)


def _contiguous(t):
    return t if t is None else t.contiguous()
