"""Dropout, scaled in training (torch's form) or at inference (the classic form)."""

import torch
from torch import Tensor

from torchref._checks import require_share, require_tensor
from torchref.autograd import Function, opmath, refuse_leaf, rounded, traces_in_place
from torchref.dispatch import accelerated, will_run_kernel
from torchref.internals import may_be_view


class Dropout(torch.nn.Dropout):
    """Drop-in for :class:`torch.nn.Dropout`; see :func:`dropout`.

    Args:
        p: the probability of dropping an element.
        inplace: write the result into ``input``.
        scale_at: ``"training"`` as torch does, or ``"inference"``.
    """

    scale_at = "training"  # for a module that was torch's when it was made

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, scale_at: str = "training"
    ) -> None:
        require_share("Dropout", "p", p)
        super().__init__(p, inplace)
        self.scale_at = _checked_scale_at(scale_at)

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace, scale_at=self.scale_at)

    def extra_repr(self) -> str:
        given = f", scale_at={self.scale_at!r}" if self.scale_at != "training" else ""
        return super().extra_repr() + given


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    scale_at: str = "training",
) -> Tensor:
    r"""Set each element to 0 with probability ``p``, in training.

    With a mask :math:`r_i \sim \mathrm{Bernoulli}(1 - p)`,

    .. math::
        y_i = \frac{r_i x_i}{1 - p} \qquad dx_i = \frac{r_i\, dy_i}{1 - p}

    and nothing at inference; or, with ``scale_at="inference"``, the classic form: :math:`y_i = r_i
    x_i` in training and :math:`y = (1 - p)\, x` at inference. Courses often call the probability of
    *keeping* p; here, as in torch, it is that of dropping.

    The mask comes from torch's default generator on ``input``'s device. On the CPU it is torch's
    own mask bit for bit, and the generator is left where torch leaves it; a Triton kernel draws a
    seed from the generator and the mask from the seed.

    Args:
        input: floating point, any shape.
        p: the probability of dropping an element, in [0, 1].
        training: whether to drop.
        inplace: write the result into ``input``.
        scale_at: where the expected value is restored, ``"training"`` or ``"inference"``.

    Returns:
        A tensor of ``input``'s shape and type; ``input`` itself where there is nothing to do.

    Raises:
        ValueError: ``p`` is outside [0, 1], or ``scale_at`` is neither.
        RuntimeError: ``input`` is not floating point, in training.

    Example:
        >>> x = torch.ones(4)
        >>> torchref.nn.functional.dropout(x, 0.5, training=False)
        tensor([1., 1., 1., 1.])
        >>> torchref.nn.functional.dropout(x, 0.5, training=False, scale_at="inference")
        tensor([0.5000, 0.5000, 0.5000, 0.5000])

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    2014.
    """
    require_share("dropout", "p", p)
    _checked_scale_at(scale_at)
    require_tensor("dropout", "input", input)
    if not training:
        if scale_at == "training":
            return input
        return input.mul_(1 - p) if inplace else input * (1 - p)
    if not input.is_floating_point():
        raise RuntimeError(f"dropout: expected a floating point `input`, got {input.dtype}")
    if p == 0 or input.numel() == 0:
        return input
    if p == 1:  # times 0, so that a NaN stays one
        zero = input.new_zeros(())
        return input.mul_(zero) if inplace else input * zero
    refuse_leaf(input, inplace)
    keep = 1.0 - p if scale_at == "training" else 1.0
    if will_run_kernel("dropout", "seeded_dropout_fwd", input):
        # Drawn out here, so that a compiler sees two draws where there are two calls.
        seed = torch.randint(2**63 - 1, (), device=input.device)
        if inplace and traces_in_place():
            return input.copy_(SeededDropoutFunction.call(input, seed, float(p), keep, False))
        return SeededDropoutFunction.call(input, seed, float(p), keep, inplace)
    # A Function of two results, as this one is, may not write into a view.
    if inplace and (traces_in_place() or may_be_view(input)):
        return input.copy_(DropoutFunction.call(input, float(p), keep, False)[0])
    return DropoutFunction.call(input, float(p), keep, inplace)[0]


class DropoutFunction(Function):
    """Dropout with a mask drawn by torch, which is kept for backward."""

    @staticmethod
    def forward(x: Tensor, p: float, keep: float, inplace: bool) -> tuple[Tensor, Tensor]:
        mask = drawn_mask(x, p)  # out here, so that a compiled formula draws what torch draws
        return dropout_fwd(x, mask, keep, inplace), mask

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, ctx.keep, inplace = inputs
        _, mask = output
        if inplace:
            ctx.mark_dirty(x)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None
        (mask,) = ctx.saved_tensors
        return dropout_bwd(dy, mask, ctx.keep), None, None, None


@accelerated(None)
def dropout_fwd(x: Tensor, mask: Tensor, keep: float, inplace: bool) -> Tensor:
    y = opmath(x) * (mask.to(opmath(x).dtype) / keep)
    return x.copy_(y) if inplace else rounded(y, x)


@accelerated(None)
def dropout_bwd(dy: Tensor, mask: Tensor, keep: float) -> Tensor:
    dy32 = opmath(dy)
    return rounded(dy32 * (mask.to(dy32.dtype) / keep), dy)


class SeededDropoutFunction(Function):
    """Dropout with a mask that follows from a seed, made in forward and again in backward."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor, p: float, keep: float, inplace: bool) -> Tensor:
        return seeded_dropout_fwd(x, seed, p, keep, inplace)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, seed, ctx.p, ctx.keep, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.strides = _dense_strides(output)
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        dx = seeded_dropout_bwd(dy, seed, ctx.p, ctx.keep, ctx.strides)
        return dx, None, None, None, None


@accelerated("dropout")
def seeded_dropout_fwd(x: Tensor, seed: Tensor, p: float, keep: float, inplace: bool) -> Tensor:
    """``seed`` is 0-dim and int64; elements are numbered as they lie in memory, without gaps."""
    x32 = opmath(x)
    y = x32 * (mask_of(seed, x.shape, _dense_strides(x), p).to(x32.dtype) / keep)
    return x.copy_(y) if inplace else rounded(y, x)


@accelerated("dropout")
def seeded_dropout_bwd(
    dy: Tensor, seed: Tensor, p: float, keep: float, strides: tuple[int, ...]
) -> Tensor:
    """``strides`` are those that the elements were numbered by."""
    dy32 = opmath(dy)
    return rounded(dy32 * (mask_of(seed, dy.shape, strides, p).to(dy32.dtype) / keep), dy)


def drawn_mask(x: Tensor, p: float) -> Tensor:
    if torch.compiler.is_compiling():  # a counter-based generator, which Inductor can fuse
        return torch.rand_like(x, dtype=torch.float32) >= p
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)


def mask_of(seed: Tensor, shape: torch.Size, strides: tuple[int, ...], p: float) -> Tensor:
    """Which elements stay: those whose random int32, of the element's number, is not below p."""
    number = torch.zeros((), dtype=torch.int64, device=seed.device)
    for size, stride in zip(shape, strides, strict=True):
        number = number.unsqueeze(-1) + torch.arange(size, device=seed.device) * stride
    four = torch.stack(_philox(number // 4, seed))  # one call serves four elements
    random = four.gather(0, (number % 4).unsqueeze(0)).squeeze(0)
    # p as a threshold among the numbers from 0 to 2**32 - 1, half of them negative as int32
    threshold = min(round(p * 2**32), 2**32 - 1)
    return (random ^ 2**31) >= threshold


def _philox(counter: Tensor, seed: Tensor) -> list[Tensor]:
    """Philox 4x32 in ten rounds (Salmon et al., 2011): four numbers of 32 bits for each counter."""
    low = 0xFFFFFFFF
    zero = torch.zeros_like(counter)
    c, k = [counter & low, counter >> 32, zero, zero], [seed & low, seed >> 32 & low]
    for _ in range(10):
        # A product has 64 bits and wraps to the same ones in int64.
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32 & low) ^ c[1] ^ k[0], b & low, (a >> 32 & low) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def _dense_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of ``x`` in memory without gaps."""
    return x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


def _checked_scale_at(scale_at: str) -> str:
    if scale_at not in ("training", "inference"):
        raise ValueError(
            f'dropout: expected `scale_at` "training" or "inference", got {scale_at!r}'
        )
    return scale_at
