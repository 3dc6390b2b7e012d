"""Dropout: a mask from a counter-based generator, made again in backward and never stored.

Each program maps BLOCK neighbours in memory. An element's number there is its counter: one call of
Philox serves four neighbours. The seed is drawn on the device by torch's generator, in a launch of
its own, so that manual_seed, checkpointing and CUDA graphs see what they know. Moves 2 elements
forward and 2 backward for each of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch
from ._layout import packed, written

BYTES = 4096  # of one tensor a program: with 4 warps, two loads of 128 bits a thread


@triton.jit
def _dropout_kernel(x_ptr, seed_ptr, y_ptr, n, threshold, scale, BLOCK: tl.constexpr):
    """Forward on x, backward on dy."""
    program = tl.program_id(0).to(tl.int64)
    kept = _kept(tl.load(seed_ptr), program, threshold, BLOCK)
    i = tl.arange(0, BLOCK)
    start = program * BLOCK
    x_ptr, y_ptr = x_ptr + start, y_ptr + start
    # Dropped elements are multiplied by 0, so that a NaN stays one, as in torch.
    factor = tl.where(kept, scale, 0.0)
    if start + BLOCK <= n:  # without a mask: one that n does not align forbids vector loads
        x = tl.load(x_ptr + i).to(tl.float32)
        tl.store(y_ptr + i, x * factor)
    else:
        inside = i < n - start
        x = tl.load(x_ptr + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + i, x * factor, mask=inside)


@triton.jit
def _kept(seed, program, threshold, BLOCK: tl.constexpr):
    """Which elements of the program's block stay: those whose random int32 is >= threshold."""
    counter = program * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, high, low * 0, low * 0)
    # joined so that element 4 k + j has the j-th number of counter k
    r = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [BLOCK])
    return r.to(tl.int32, bitcast=True) >= threshold


def seeded_dropout_fwd(x: Tensor, seed: Tensor, p: float, keep: float, inplace: bool) -> Tensor:
    source = packed(x)
    y = source if inplace else torch.empty_like(source)
    _launch_dropout(source, seed, y, p, keep)
    return written(x, y) if inplace else y


def seeded_dropout_bwd(
    dy: Tensor, seed: Tensor, p: float, keep: float, strides: tuple[int, ...]
) -> Tensor:
    if dy.stride() != tuple(strides):
        dy = torch.empty_strided(dy.shape, strides, dtype=dy.dtype, device=dy.device).copy_(dy)
    dx = torch.empty_like(dy)
    _launch_dropout(dy, seed, dx, p, keep)
    return dx


def _launch_dropout(x: Tensor, seed: Tensor, y: Tensor, p: float, keep: float) -> None:
    n, block = x.numel(), BYTES // x.element_size()
    threshold = min(round(p * 2**32), 2**32 - 1) - 2**31  # of int32, uniform from -2**31 on
    launch(_dropout_kernel, cdiv(n, block), x, seed, y, n, threshold, 1 / keep, BLOCK=block)
