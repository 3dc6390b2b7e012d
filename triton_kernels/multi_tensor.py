"""The optimizers' steps and the norm of all gradients: every tensor of a model in one launch.

A program works on CHUNK neighbours of one tensor, BLOCK at a time, as ``_tables`` tells it. An
optimizer is two jitted functions: the scalars of a tensor's step, and the update of a block.
Hyperparameters, the count of steps, a learning rate that is a tensor, GradScaler's scale and its
verdict, and the norm that clips are read on the device: nothing is compiled anew from step to step,
and a CUDA graph may hold the launch. All programs must have read a count before it goes up, so they
draw tickets, and the last one counts.

Moves, for each parameter of float32: SGD 12 bytes, with momentum 20; RMSprop 20, and 8 more each
for momentum and centering; Adam 28, and 8 more under AMSGrad. An average of the weights takes 8
more, and clipping 4, for the norm: the step scales the gradients that it reads anyway.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from ._launch import launch
from ._tables import (
    ALIGNED,
    BLOCK,
    GRAD,
    GROUP_SHIFT,
    STARTS,
    Tables,
    field,
    load,
    place,
    store,
)

# Columns after the gradients'.
PARAM = tl.constexpr(3)
LR = tl.constexpr(4)  # a learning rate that is a tensor
STEP = tl.constexpr(5)  # how many steps are done
EMA = tl.constexpr(6)
EMA_STEP = tl.constexpr(7)
STATE = tl.constexpr(8)  # the first of three

# Numbers of a group. The optimizer's own begin at OWN.
N_LR = tl.constexpr(0)
N_SIGN = tl.constexpr(1)
N_L2 = tl.constexpr(2)
N_MAX_NORM = tl.constexpr(3)  # negative for a group that does not clip
N_EMA_GAIN = tl.constexpr(4)
N_EMA_LOG = tl.constexpr(5)
OWN = tl.constexpr(6)

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def common_numbers(
    lr: float,
    maximize: bool,
    weight_decay: float,
    max_norm: float | None,
    ema_decay: float | None,
    ema_bias_correction: bool,
) -> tuple[float, ...]:
    """The numbers that every optimizer's group begins with; ``weight_decay`` joins the gradient.

    What float32 would take digits from, 1 - beta and ln beta, is computed here, in float64.
    """
    decay = ema_decay or 0.0
    return (
        lr,
        -1.0 if maximize else 1.0,
        weight_decay,
        -1.0 if max_norm is None else max_norm,
        1 - decay,
        _log(decay) if ema_bias_correction else -math.inf,
    )


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def sgd_numbers(
    momentum: float, dampening: float, nesterov: bool, lr_in_velocity: bool
) -> tuple[float, ...]:
    return momentum, 1 - dampening, float(nesterov), float(lr_in_velocity)


@triton.jit
def _sgd_scalars(number_ptr, lr, step, starts):
    momentum, gain = tl.load(number_ptr), tl.load(number_ptr + 1)
    gain = tl.where(starts, 1.0, gain)  # a first gradient enters undampened
    nesterov = tl.load(number_ptr + 2) != 0
    lr_in_velocity = tl.load(number_ptr + 3) != 0
    return (
        momentum,
        tl.where(lr_in_velocity, lr, 1.0),
        gain,
        nesterov,
        tl.where(lr_in_velocity, 1.0, lr),
    )


@triton.jit
def _sgd_update(p, g, v, unused2, unused3, scalars):
    """Without momentum v is 0 and comes out as g."""
    momentum, inner_lr, gain, nesterov, outer_lr = scalars
    g = g * inner_lr
    v = momentum * v + gain * g
    p -= outer_lr * tl.where(nesterov, g + momentum * v, v)
    return p, v, unused2, unused3


def rmsprop_numbers(alpha: float, eps: float, momentum: float, centered: bool) -> tuple[float, ...]:
    return alpha, 1 - alpha, eps, momentum, float(centered)


@triton.jit
def _rmsprop_scalars(number_ptr, lr, step, starts):
    alpha, gain = tl.load(number_ptr), tl.load(number_ptr + 1)
    eps, momentum = tl.load(number_ptr + 2), tl.load(number_ptr + 3)
    return lr, alpha, gain, eps, momentum, tl.load(number_ptr + 4) != 0


@triton.jit
def _rmsprop_update(p, g, v, b, mean, scalars):
    """Without momentum b is 0 and comes out as the step."""
    lr, alpha, gain, eps, momentum, centered = scalars
    v = alpha * v + gain * g * g
    mean = tl.where(centered, _lerp(mean, g, gain), 0.0)
    b = momentum * b + g / (tl.sqrt(v - mean * mean) + eps)
    return p - lr * b, v, b, mean


def adam_numbers(beta1: float, beta2: float, eps: float, decay: float) -> tuple[float, ...]:
    """``decay`` is the weight decay that shrinks the parameter directly."""
    return 1 - beta1, _log(beta1), beta2, 1 - beta2, _log(beta2), eps, decay


@triton.jit
def _adam_scalars(number_ptr, lr, step, starts):
    gain1, log_beta1 = tl.load(number_ptr), tl.load(number_ptr + 1)
    beta2, gain2 = tl.load(number_ptr + 2), tl.load(number_ptr + 3)
    log_beta2, eps = tl.load(number_ptr + 4), tl.load(number_ptr + 5)
    step_size = lr / -_expm1(step * log_beta1)
    correction = tl.sqrt(-_expm1(step * log_beta2))
    return gain1, beta2, gain2, 1 - lr * tl.load(number_ptr + 6), step_size, correction, eps


@triton.jit
def _adam_update(p, g, m, v, v_max, scalars):
    """Without AMSGrad v_max is 0 and comes out as v."""
    gain1, beta2, gain2, decay, step_size, correction, eps = scalars
    m = _lerp(m, g, gain1)
    v = beta2 * v + gain2 * g * g
    v_max = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)
    return p * decay - step_size * m / (tl.sqrt(v_max) / correction + eps), m, v, v_max


@triton.jit
def _lerp(x, y, gain):
    """x + gain (y - x), from the nearer end, as torch: at a gain of 1 nothing of x is left."""
    near = gain < 0.5
    return tl.where(near, x, y) + tl.where(near, gain, gain - 1) * (y - x)


@triton.jit
def _step_kernel(
    words_ptr,
    rows_ptr,
    numbers_ptr,
    ticket_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    norm_ptr,
    tensors,
    SCALARS: tl.constexpr,
    UPDATE: tl.constexpr,
    NUMBERS: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    STATES: tl.constexpr,
    COUNTS: tl.constexpr,
    AVERAGES: tl.constexpr,
):
    """STATES: a bit for each of the three that any tensor has; those without it have address 0."""
    if _proceeds(found_inf_ptr):
        tensor, start, end, flags = place(words_ptr, rows_ptr, tensors)
        number_ptr = numbers_ptr + (flags >> GROUP_SHIFT) * NUMBERS
        step = 1 + _count(rows_ptr, STEP, tensors, tensor, COUNTS)
        lr = _learning_rate(rows_ptr, number_ptr, tensors, tensor)
        scalars = SCALARS(number_ptr + OWN, lr, step, (flags & STARTS) != 0)
        ema_step = 1 + _count(rows_ptr, EMA_STEP, tensors, tensor, AVERAGES)
        ema_gain = _ema_gain(number_ptr, ema_step)
        factors = _factors(number_ptr, grad_scale_ptr, norm_ptr)
        at = (  # None for what no tensor of the launch has, 0 for what this one has not
            field(rows_ptr, GRAD, tensors, tensor),
            field(rows_ptr, PARAM, tensors, tensor),
            field(rows_ptr, EMA, tensors, tensor) if AVERAGES else None,
            field(rows_ptr, STATE, tensors, tensor) if STATES & 1 else None,
            field(rows_ptr, STATE + 1, tensors, tensor) if STATES & 2 else None,
            field(rows_ptr, STATE + 2, tensors, tensor) if STATES & 4 else None,
        )
        for first in range(start, end, BLOCK):
            left = end - first
            if (left >= BLOCK) & ((flags & ALIGNED) != 0):
                _block(
                    at, first, left, factors, scalars, ema_gain, UPDATE, PARAM_TYPE, GRAD_TYPE,
                    STATE_TYPE, grad_scale_ptr is not None, True,
                )  # fmt: skip
            else:
                _block(
                    at, first, left, factors, scalars, ema_gain, UPDATE, PARAM_TYPE, GRAD_TYPE,
                    STATE_TYPE, grad_scale_ptr is not None, False,
                )  # fmt: skip
        if COUNTS or AVERAGES:
            _advance(rows_ptr, ticket_ptr, tensors, COUNTS, AVERAGES)


@triton.jit
def _block(
    at,
    first,
    left,
    factors,
    scalars,
    ema_gain,
    UPDATE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    UNSCALES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    grad, param, ema, state1, state2, state3 = at
    scale, clip, sign, l2 = factors
    g = load(grad, first, left, GRAD_TYPE, WHOLE)
    p = load(param, first, left, PARAM_TYPE, WHOLE)
    x = _load_state(state1, first, left, STATE_TYPE, WHOLE)
    y = _load_state(state2, first, left, STATE_TYPE, WHOLE)
    z = _load_state(state3, first, left, STATE_TYPE, WHOLE)
    if UNSCALES:
        g = g / scale
        store(grad, first, left, g, GRAD_TYPE, WHOLE)  # as torch's fused steps do
    g = g * (clip * sign)
    g = tl.where(l2 != 0, g + l2 * p, g)  # an infinite parameter makes no NaN of no decay
    p, x, y, z = UPDATE(p, g, x, y, z, scalars)
    store(param, first, left, p, PARAM_TYPE, WHOLE)
    _store_state(state1, first, left, x, STATE_TYPE, WHOLE)
    _store_state(state2, first, left, y, STATE_TYPE, WHOLE)
    _store_state(state3, first, left, z, STATE_TYPE, WHOLE)
    if ema is not None:
        if ema != 0:
            average = load(ema, first, left, tl.float32, WHOLE)
            average = _lerp(average, p.to(PARAM_TYPE).to(tl.float32), ema_gain)
            store(ema, first, left, average, tl.float32, WHOLE)


@triton.jit
def _load_state(address, first, left, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    x = tl.zeros([BLOCK], tl.float32)
    if address is not None:
        if address != 0:
            x = load(address, first, left, TYPE, WHOLE)
    return x


@triton.jit
def _store_state(address, first, left, x, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    if address is not None:
        if address != 0:
            store(address, first, left, x, TYPE, WHOLE)


@triton.jit
def _proceeds(found_inf_ptr):
    """Whether GradScaler found the gradients finite, or did not look."""
    if found_inf_ptr is None:
        return True
    else:
        return tl.load(found_inf_ptr) == 0


@triton.jit
def _count(rows_ptr, column: tl.constexpr, tensors, tensor, COUNTS: tl.constexpr):
    if COUNTS:
        address = field(rows_ptr, column, tensors, tensor)
        return tl.load(address.to(tl.pointer_type(tl.float32)))
    else:
        return 0.0


@triton.jit
def _learning_rate(rows_ptr, number_ptr, tensors, tensor):
    address = field(rows_ptr, LR, tensors, tensor)
    lr = tl.load(number_ptr + N_LR)
    if address != 0:
        lr = tl.load(address.to(tl.pointer_type(tl.float32)))
    return lr


@triton.jit
def _factors(number_ptr, grad_scale_ptr, norm_ptr):
    """The loss scale, the factors that clip and turn gradients, and the weight decay in them."""
    scale = 1.0
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr)
    clip = 1.0
    if norm_ptr is not None:
        max_norm = tl.load(number_ptr + N_MAX_NORM)
        clip = tl.where(max_norm < 0, 1.0, _clip(tl.load(norm_ptr), max_norm))
    return scale, clip, tl.load(number_ptr + N_SIGN), tl.load(number_ptr + N_L2)


@triton.jit
def _clip(norm, max_norm):
    """The factor that brings a norm to max_norm; NaN for a norm that is NaN, as in torch."""
    factor = max_norm / (norm + 1e-6)
    return tl.where(factor > 1, 1.0, factor)


@triton.jit
def _ema_gain(number_ptr, step):
    """The share of a new value: 1 for the first; corrected for bias, (1 - d) / (1 - d^step)."""
    gain = tl.load(number_ptr + N_EMA_GAIN) / -_expm1(step * tl.load(number_ptr + N_EMA_LOG))
    return tl.where(step == 1, 1.0, gain)


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


@triton.jit
def _advance(rows_ptr, ticket_ptr, tensors, COUNTS: tl.constexpr, AVERAGES: tl.constexpr):
    """The last program to come here adds 1 to all counts."""
    tl.debug_barrier()  # every thread has read its count
    if tl.atomic_add(ticket_ptr, 1) == tl.num_programs(0) - 1:
        for first in range(0, tensors, BLOCK):
            row = first + tl.arange(0, BLOCK)
            if COUNTS:
                _increment(rows_ptr + STEP * tensors, row, tensors)
            if AVERAGES:
                _increment(rows_ptr + EMA_STEP * tensors, row, tensors)
        tl.store(ticket_ptr, 0)


@triton.jit
def _increment(column_ptr, row, tensors):
    address = tl.load(column_ptr + row, mask=row < tensors, other=0)
    count_ptr = address.to(tl.pointer_type(tl.float32))
    count = tl.load(count_ptr, mask=address != 0, other=0.0)
    tl.store(count_ptr, count + 1, mask=address != 0)


def sgd_step(
    tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor | None
) -> None:
    _step(_sgd_scalars, _sgd_update, tables, grad_scale, found_inf, norm)


def rmsprop_step(
    tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor | None
) -> None:
    _step(_rmsprop_scalars, _rmsprop_update, tables, grad_scale, found_inf, norm)


def adam_step(
    tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor | None
) -> None:
    _step(_adam_scalars, _adam_update, tables, grad_scale, found_inf, norm)


def _step(
    scalars: JITFunction[Any],
    update: JITFunction[Any],
    tables: Tables,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
) -> None:
    types, numbers = tables.types, tables.numbers
    assert numbers is not None
    states = types[STATE.value :]
    launch(
        _step_kernel,
        tables.programs,
        tables.words,
        tables.rows,
        numbers,
        tables.ticket,
        grad_scale,
        found_inf,
        norm,
        tables.tensors,
        SCALARS=scalars,
        UPDATE=update,
        NUMBERS=numbers.shape[1],
        PARAM_TYPE=TYPES[types[PARAM.value]],
        GRAD_TYPE=TYPES[types[GRAD.value]],
        STATE_TYPE=next((TYPES[dtype] for dtype in states if dtype), tl.float32),
        STATES=sum(1 << i for i, dtype in enumerate(states) if dtype),
        COUNTS=types[STEP.value] is not None,
        AVERAGES=types[EMA.value] is not None,
    )


def grad_norm(tables: Tables, grad_scale: Tensor | None) -> Tensor:
    """The 2-norm of all gradients as one vector, without their loss scale: a 0-dim float32."""
    partial = torch.empty(tables.programs, dtype=torch.float32, device=tables.device)
    norm = torch.empty((), dtype=torch.float32, device=tables.device)
    dtype = TYPES[tables.types[GRAD.value]]
    args = (tables.words, tables.rows, partial, tables.tensors)
    launch(_squares_kernel, tables.programs, *args, GRAD_TYPE=dtype)
    launch(_norm_kernel, 1, partial, norm, grad_scale, tables.programs)
    return norm


@triton.jit
def _squares_kernel(words_ptr, rows_ptr, partial_ptr, tensors, GRAD_TYPE: tl.constexpr):
    tensor, start, end, flags = place(words_ptr, rows_ptr, tensors)
    grad = field(rows_ptr, GRAD, tensors, tensor)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        left = end - first
        if (left >= BLOCK) & ((flags & ALIGNED) != 0):
            g = load(grad, first, left, GRAD_TYPE, True)
        else:
            g = load(grad, first, left, GRAD_TYPE, False)
        squares += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit
def _norm_kernel(partial_ptr, norm_ptr, grad_scale_ptr, n):
    i = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        squares += tl.load(partial_ptr + first + i, mask=i < n - first, other=0.0)
    norm = tl.sqrt(tl.sum(squares, axis=0))
    if grad_scale_ptr is not None:
        norm = norm / tl.load(grad_scale_ptr)
    tl.store(norm_ptr, norm.to(tl.float32))


def clip_grads(tables: Tables, norm: Tensor, max_norm: float) -> None:
    """Scale the gradients, in place, so that their norm comes to at most ``max_norm``."""
    dtype = TYPES[tables.types[GRAD.value]]
    args = (tables.words, tables.rows, norm, max_norm, tables.tensors)
    launch(_clip_kernel, tables.programs, *args, GRAD_TYPE=dtype)


@triton.jit
def _clip_kernel(words_ptr, rows_ptr, norm_ptr, max_norm, tensors, GRAD_TYPE: tl.constexpr):
    clip = _clip(tl.load(norm_ptr), max_norm)
    if clip != 1:  # also where it is NaN
        tensor, start, end, flags = place(words_ptr, rows_ptr, tensors)
        grad = field(rows_ptr, GRAD, tensors, tensor)
        for first in range(start, end, BLOCK):
            left = end - first
            if (left >= BLOCK) & ((flags & ALIGNED) != 0):
                g = load(grad, first, left, GRAD_TYPE, True)
                store(grad, first, left, g * clip, GRAD_TYPE, True)
            else:
                g = load(grad, first, left, GRAD_TYPE, False)
                store(grad, first, left, g * clip, GRAD_TYPE, False)
