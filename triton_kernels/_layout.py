"""Where tensors lie in memory: what a kernel may walk through from first to last."""

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def packed(x: Tensor) -> Tensor:
    """``x`` if it is dense, otherwise a copy that is, with its dimensions in the same order."""
    return x if is_dense(x) else torch.empty_like(x).copy_(x)


def written(x: Tensor, y: Tensor) -> Tensor:
    """``x`` with the values of ``y``, which a kernel wrote, perhaps into ``x`` itself."""
    if y is not x:
        return x.copy_(y)
    if not x.is_inference():
        # Autograd does not see what a kernel writes; what it saved of x is stale now.
        torch.autograd.graph.increment_version(x)
    return x


def laid_out_as(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the memory layout of ``x``, which is dense: an upstream gradient may have any."""
    if t.stride() == x.stride() or _strides(t) == _strides(x):
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def _strides(x: Tensor) -> list[int]:
    """Those that mean something."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]
