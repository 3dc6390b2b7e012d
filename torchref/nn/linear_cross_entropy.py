"""Cross-entropy of a linear layer's scores, of which only some rows exist at a time."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchref._checks import require_share, require_tensor
from torchref.autograd import Function, autocast, opmath, rounded
from torchref.dispatch import accelerated
from torchref.internals import (
    are_transforms_active,
    differentiates_forward,
    is_batched_gradient,
    keeps_graph,
)
from torchref.nn.cross_entropy import (
    _checked_indices,
    cross_entropy,
    cross_entropy_fwd,
    losses_and_gradient,
    mean_divisor,
)
from torchref.nn.linear import linear, linear_fwd
from torchref.nn.loss import checked_reduction

# Bytes of scores at a time: 2048 rows of a vocabulary of 128 thousand in bfloat16.
BUDGET = 2**29


class _Before213(torch.nn.Module):
    """What torch has since 2.13, for the torch before it."""

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss: expected `weight` of shape ({num_classes},), "
                f"got {tuple(weight.shape)}"
            )
        require_share("LinearCrossEntropyLoss", "label_smoothing", label_smoothing, RuntimeError)
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, out_features
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.options = label_smoothing, options
        scores = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, scores, bias=bias, device=device, dtype=dtype)


_Base: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _Before213)


class LinearCrossEntropyLoss(_Base):
    """Drop-in for :class:`torch.nn.LinearCrossEntropyLoss`; see :func:`linear_cross_entropy`.

    A linear layer and the cross-entropy of its scores. Torch has it since 2.13; here it is there
    before, too.

    Args:
        in_features: size of an input row.
        num_classes: :math:`K`.
        out_features: sizes (d1, d2, ...) of a loss of several dimensions.
        bias: whether the layer has one.
        reduction, weight, ignore_index, label_smoothing, options: as in
            :func:`linear_cross_entropy`.

    Example:
        >>> loss = torchref.nn.LinearCrossEntropyLoss(5, 10)
        >>> loss(torch.randn(3, 5), torch.tensor([1, 0, 9])).shape
        torch.Size([])
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    r"""The cross-entropy of ``linear(input, linear_weight, linear_bias)`` and class indices.

    .. math::
        z = x W^T + b, \quad L = \mathrm{cross\_entropy}(z, t) \qquad
        dx = dz\, W, \quad dW = dz^T x, \quad db = \sum_{rows} dz

    with :math:`dz` as in :func:`cross_entropy`. The scores :math:`z` of a language model are larger
    than everything else in it. Here they exist for some rows at a time, as many as fit into 512
    MiB: forward makes the gradients of these rows along with their losses, backward multiplies
    them by the gradient of the loss. It may do so as often as it likes.

    A mean or a sum takes the three matrix products of an ordinary forward and backward pass;
    ``reduction="none"`` takes a fourth, because each row waits for a gradient of its own. Scores
    that fit whole, probability targets, which are as large as the scores, losses of several
    dimensions and :mod:`torch.func` take ``linear`` and ``cross_entropy``.

    Args:
        input: shape (F,) or (N, F).
        linear_weight: shape (K, F), or (K, d1, ..., F) for a loss of several dimensions.
        target: class indices, shape () or (N,) or (N, d1, ...), or probabilities, with K after N.
        linear_bias: ``linear_weight``'s shape without F.
        weight: a factor for each class, shape (K,), a constant.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in :func:`cross_entropy`.
        ignore_index: the index target that does not count; None stands for -100.
        label_smoothing: in [0, 1].
        options: torch's ``LinearCrossEntropyOptions``, or anything with a ``batch_chunk_size``, the
            number of rows at a time. What else torch's says is about its own implementation.

    Returns:
        A 0-dim tensor, or one of ``target``'s shape where ``reduction`` is ``"none"``.

    Raises:
        As :func:`linear` and :func:`cross_entropy`.

    Example:
        >>> x, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> torchref.nn.functional.linear_cross_entropy(x, w, torch.tensor([0]))
        tensor(0.1269)

    Source: Wijmans et al., "Cut your losses in large-vocabulary language models", 2024; Hsu et
    al., "Liger kernel", 2024.
    """
    name = "linear_cross_entropy"
    _check_shapes(name, input, linear_weight, linear_bias)
    index = -100 if ignore_index is None else ignore_index
    plain = input.ndim == 2 and linear_weight.ndim == 2 and target.ndim == 1
    if plain and not (are_transforms_active() or differentiates_forward()):
        rows = getattr(options, "batch_chunk_size", None)
        if rows is None:
            rows = _rows_within(BUDGET, linear_weight)
        elif rows < 1:
            raise ValueError(f"{name}: expected `batch_chunk_size` of 1 or more, got {rows}")
        if input.shape[0] > rows:
            rest = (weight, checked_reduction(name, None, None, reduction), index, label_smoothing)
            return _in_chunks(name, input, linear_weight, linear_bias, target, *rest, rows)
    classes, *sizes, _ = linear_weight.shape
    flat = linear_weight.flatten(0, -2)
    scores = linear(input, flat, None if linear_bias is None else linear_bias.reshape(-1))
    return cross_entropy(
        scores.reshape(*input.shape[:-1], classes, *sizes),
        target,
        weight,
        ignore_index=index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _check_shapes(
    name: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> None:
    require_tensor(name, "input", input)
    if input.ndim not in (1, 2):
        raise RuntimeError(f"{name}: expected 1D or 2D `input`, got shape {tuple(input.shape)}")
    if linear_weight.ndim < 2 or (linear_weight.ndim > 2 and input.ndim == 1):
        raise RuntimeError(
            f"{name}: expected `linear_weight` of two dimensions, or more for 2D `input`, "
            f"got shape {tuple(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"{name}: expected `linear_bias` of shape {tuple(linear_weight.shape[:-1])}, "
            f"got {tuple(linear_bias.shape)}"
        )


def _rows_within(budget: int, linear_weight: Tensor) -> int:
    """How many rows of scores fit, of many a multiple of 128, which suits matrix products."""
    rows = budget // max(1, linear_weight.shape[0] * linear_weight.element_size())
    return max(1, rows - rows % 128 if rows > 128 else rows)


def _in_chunks(
    name: str,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    rows: int,
) -> Tensor:
    require_share(name, "label_smoothing", label_smoothing, RuntimeError)
    if x.shape[1] != w.shape[1]:
        raise RuntimeError(
            f"{name}: expected `input` of shape (N, {w.shape[1]}) for `linear_weight` of shape "
            f"{tuple(w.shape)}, got {tuple(x.shape)}"
        )
    x, w, b = autocast("linear", x, w, b)
    one, weight = autocast("cross_entropy", x.new_empty(()), weight)
    target = _checked_indices(name, one.expand(len(x), len(w)), target, weight, ignore_index)
    smoothing = float(label_smoothing) if label_smoothing else None
    options = (reduction, ignore_index, smoothing, rows)
    if reduction == "none":
        loss = RowLossesFunction.call(x, w, b, target, weight, *options)
    else:
        wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, w, b)]
        loss = LinearCrossEntropyFunction.call(x, w, b, target, weight, *options, *wants)[0]
    return rounded(loss, one)


class LinearCrossEntropyFunction(Function):
    """A mean or a sum: forward makes the gradients, of a sum, and backward scales them."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        smoothing: float | None,
        rows: int,
        *wants: bool,
    ) -> tuple[Tensor, ...]:
        """The loss, the gradients that are wanted, or empty tensors, and the mean's divisor."""
        grads = _Gradients(x, w, b, wants, rows)
        loss = torch.zeros((), dtype=opmath(x).dtype, device=x.device)
        for part, scores, t in _chunks(x, w, b, target, rows):
            losses = losses_fwd(scores, t, weight, ignore_index, smoothing, any(wants))
            loss = loss + losses.sum()
            grads.take(part, scores)
        if reduction == "sum":
            return loss, *grads.tensors(), torch.ones_like(loss)
        total = mean_divisor(target, weight, ignore_index, loss)
        # Of no rows the mean is NaN, and the gradient 0.
        nothing = (target == ignore_index).all()
        return loss / total, *grads.tensors(), torch.where(nothing, torch.inf, total)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[5:9]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], *output[1:])

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 12
        x, w, b, target, weight, dx, dw, db, total = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        if _needs_operations(dy):  # what was saved has no graph
            return *_composed_bwd(dy, (x, w, b), target, weight, ctx.options, wants), *(None,) * 9
        scale = opmath(dy) / total
        pairs = zip((dx, dw, db), (x, w, b), wants, strict=True)
        again = torch.compiler.is_compiling() or keeps_graph()
        grads = (_scaled(d, scale, like, again) if want else None for d, like, want in pairs)
        return *grads, *(None,) * 9


class RowLossesFunction(Function):
    """A loss for each row: backward makes the scores again."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        smoothing: float | None,
        rows: int,
    ) -> Tensor:
        losses = [
            losses_fwd(scores, t, weight, ignore_index, smoothing, False)
            for _, scores, t in _chunks(x, w, b, target, rows)
        ]
        return torch.cat(losses)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[5:9]
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx, dy):
        x, w, b, target, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        if _needs_operations(dy):
            return *_composed_bwd(dy, (x, w, b), target, weight, ctx.options, wants), *(None,) * 6
        _, ignore_index, smoothing, rows = ctx.options
        grads = _Gradients(x, w, b, wants, rows)
        with torch.autocast(x.device.type, enabled=False):  # which here may be another's
            for i, (part, scores, t) in enumerate(_chunks(x, w, b, target, rows)):
                losses_fwd(scores, t, weight, ignore_index, smoothing, True)
                # in float32: a loss scale may pass float16's largest number
                scores.copy_(opmath(scores) * opmath(dy[i * rows : (i + 1) * rows, None]))
                grads.take(part, scores)
        pairs = zip(grads.tensors(), (x, w, b), wants, strict=True)
        return *(rounded(d, like) if want else None for d, like, want in pairs), *(None,) * 6


class _Gradients:
    """The gradients of a linear layer, from those of its scores, chunk by chunk."""

    def __init__(
        self, x: Tensor, w: Tensor, b: Tensor | None, wants: tuple[bool, ...], rows: int
    ) -> None:
        self.w = w
        self.wants = wants
        # Sums may pass float16's largest number, and lose bfloat16's digits over many chunks.
        wide = opmath(w).dtype if w.dtype == torch.float16 or len(x) > 8 * rows else w.dtype
        self.dx: list[Tensor] = []
        self.dw = torch.zeros_like(w, dtype=wide) if wants[1] else w.new_empty(0)
        self.db = w.new_empty(0)
        if wants[2] and b is not None:
            self.db = torch.zeros_like(b, dtype=opmath(b).dtype)

    def take(self, part: Tensor, dscores: Tensor) -> None:
        """The gradients of a sum over rows ``part`` of the input, whose scores' are ``dscores``."""
        wants_x, wants_w, wants_b = self.wants
        if wants_x:
            self.dx.append(dscores @ self.w)
        if wants_w and self.dw.dtype == part.dtype:
            self.dw.addmm_(dscores.t(), part)
        elif wants_w and part.is_cuda:
            self.dw += torch.mm(dscores.t(), part, out_dtype=self.dw.dtype)
        elif wants_w:
            self.dw += opmath(dscores).t() @ opmath(part)
        if wants_b:
            self.db += dscores.sum(0, dtype=self.db.dtype)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self.dx) if self.dx else self.w.new_empty(0), self.dw, self.db


@accelerated("linear_cross_entropy", mutates=("x",))
def losses_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float | None,
    gradient: bool,
) -> Tensor:
    """The loss of each row of scores, which become the gradient of the losses' sum if asked to."""
    if not gradient:
        return cross_entropy_fwd(opmath(x), target, weight, "none", ignore_index, smoothing)[0]
    losses, dx = losses_and_gradient(x, target, weight, ignore_index, smoothing)
    x.copy_(dx)
    return losses


def _chunks(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of the input, their scores and their targets, some at a time."""
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        yield part, linear_fwd(part, w, b), target[start : start + rows]


def _scaled(d: Tensor, scale: Tensor, like: Tensor, again: bool) -> Tensor:
    """``d * scale`` in the type of ``like``, in float32 on the way, some rows at a time.

    In the memory of ``d`` where it is not needed ``again``: a gradient of the weights for a large
    vocabulary is larger than all of the rest.
    """
    if d.dtype not in (torch.float16, torch.bfloat16):
        return rounded(d * scale if again else d.mul_(scale), like)
    y = d if not again and d.dtype == like.dtype else torch.empty_like(d, dtype=like.dtype)
    rows = max(1, BUDGET // 8 // max(1, d[:1].numel() * 4))
    for here, there in zip(y.split(rows), d.split(rows), strict=True):
        here.copy_(opmath(there) * scale)
    return y


def _needs_operations(dy: Tensor) -> bool:
    """Whether torch must see a backward pass: to differentiate it again, or of many at once."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the look at the tensor
        return torch.is_grad_enabled()
    return torch.is_grad_enabled() or is_batched_gradient(dy)


def _composed_bwd(
    dy: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    weight: Tensor | None,
    options: tuple[str, int, float | None, int],
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients as autograd makes them of the whole scores, to be differentiated again."""
    reduction, ignore_index, smoothing, _ = options
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = cross_entropy(
            linear(*inputs),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing or 0.0,
        )
    wanted = [x for x, want in zip(inputs, wants, strict=True) if want and x is not None]
    grads = iter(torch.autograd.grad(loss, wanted, rounded(dy, loss), create_graph=create_graph))
    return tuple(next(grads) if want else None for want in wants)
