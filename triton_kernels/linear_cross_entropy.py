"""The losses of rows of scores, which become their own gradient: cross-entropy in place.

The scores are a private chunk, contiguous, (rows, K); the kernel is that of the cross-entropy that
makes its gradient in forward. Moves 3 elements for each score, 1 without the gradient; of the 3
the second reading finds up to 16,384 columns in the cache.
"""

from torch import Tensor

from .cross_entropy import losses_and_gradient


def losses_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float | None,
    gradient: bool,
) -> Tensor:
    assert x.is_contiguous(), "the scores are a chunk of our own"
    dx = x if gradient else None
    return losses_and_gradient(x, target, weight, ignore_index, smoothing, dx, None)
