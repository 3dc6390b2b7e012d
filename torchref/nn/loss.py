"""Losses between numbers: squared, absolute, and binary cross-entropy (probabilities, scores)."""

import warnings
from typing import Any

import torch
from torch import Tensor

from torchref._checks import require_tensor
from torchref.autograd import Function, autocast, opmath, rounded
from torchref.dispatch import accelerated, reads_values


class MSELoss(torch.nn.MSELoss):
    """Drop-in for :class:`torch.nn.MSELoss`; see :func:`mse_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error.

    .. math::
        L = \frac{1}{n} \sum_i (x_i - t_i)^2
        \qquad
        dx_i = dL \cdot \frac{2}{n} (x_i - t_i) = -dt_i

    Courses often write :math:`\tfrac{1}{2}(x - t)^2`, whose gradient lacks the 2; torch's loss, and
    this one, is twice that.

    Args:
        input, target: floating point, of one shape; other shapes are broadcast with a warning.
        size_average, reduce: torch's deprecated spelling of ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: a factor for each element, of ``input``'s shape; the mean divides by its sum.

    Returns:
        A 0-dim tensor, or one of the broadcast shape where ``reduction`` is ``"none"``. The mean
        over nothing is NaN.

    Raises:
        ValueError: ``reduction`` is none of the three, or ``weight`` has another shape.
        NotImplementedError: neither tensor is floating point.

    Example:
        >>> torchref.nn.functional.mse_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)

    Source: the method of least squares; Goodfellow, Bengio and Courville, *Deep Learning*, 5.1.4.
    """
    return _distance(
        "mse_loss", MSELossFunction, input, target, size_average, reduce, reduction, weight
    )


class MSELossFunction(Function):
    @staticmethod
    def forward(x: Tensor, target: Tensor, reduction: str) -> Tensor:
        return mse_loss_fwd(x, target, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, ctx.reduction = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx, dy):
        x, target = ctx.saved_tensors
        return _pair(ctx, mse_loss_bwd(dy, x, target, ctx.reduction))


@accelerated("loss")
def mse_loss_fwd(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    difference = opmath(x) - opmath(target)
    return rounded(reduced(difference * difference, reduction), x)


@accelerated("loss")
def mse_loss_bwd(dy: Tensor, x: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The gradient for ``x``; the target's is its negative."""
    difference = opmath(x) - opmath(target)
    return rounded(spread(dy, x, reduction) * 2 * difference, x)


class L1Loss(torch.nn.L1Loss):
    """Drop-in for :class:`torch.nn.L1Loss`; see :func:`l1_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return l1_loss(input, target, reduction=self.reduction)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean absolute error.

    .. math::
        L = \frac{1}{n} \sum_i |x_i - t_i|
        \qquad
        dx_i = dL \cdot \frac{1}{n} \operatorname{sign}(x_i - t_i) = -dt_i

    Args:
        input, target: floating point, of one shape; other shapes are broadcast with a warning.
        size_average, reduce: torch's deprecated spelling of ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: a factor for each element, of ``input``'s shape; the mean divides by its sum.

    Returns:
        A 0-dim tensor, or one of the broadcast shape where ``reduction`` is ``"none"``. The mean
        over nothing is NaN.

    Raises:
        ValueError: ``reduction`` is none of the three, or ``weight`` has another shape.
        NotImplementedError: neither tensor is floating point.

    Example:
        >>> torchref.nn.functional.l1_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(1.)

    Source: least absolute deviations; Goodfellow, Bengio and Courville, *Deep Learning*, 6.2.1.2.
    """
    return _distance(
        "l1_loss", L1LossFunction, input, target, size_average, reduce, reduction, weight
    )


class L1LossFunction(Function):
    @staticmethod
    def forward(x: Tensor, target: Tensor, reduction: str) -> Tensor:
        return l1_loss_fwd(x, target, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, ctx.reduction = inputs
        ctx.save_for_backward(x, target)

    @staticmethod
    def backward(ctx, dy):
        x, target = ctx.saved_tensors
        return _pair(ctx, l1_loss_bwd(dy, x, target, ctx.reduction))


@accelerated("loss")
def l1_loss_fwd(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return rounded(reduced((opmath(x) - opmath(target)).abs(), reduction), x)


@accelerated("loss")
def l1_loss_bwd(dy: Tensor, x: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The gradient for ``x``; the target's is its negative."""
    sign = (opmath(x) - opmath(target)).sign()
    return rounded(spread(dy, x, reduction) * sign, x)


class BCELoss(torch.nn.BCELoss):
    """Drop-in for :class:`torch.nn.BCELoss`; see :func:`binary_cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy between probabilities and targets in [0, 1].

    .. math::
        L_i = -w_i \big(t_i \log x_i + (1 - t_i) \log(1 - x_i)\big)
        \qquad
        dx_i = dL_i \cdot w_i \frac{x_i - t_i}{x_i (1 - x_i)}, \quad
        dt_i = dL_i \cdot w_i \log\frac{1 - x_i}{x_i}

    with the logarithms clamped at -100 and the denominator at 1e-12, as torch does. From scores,
    :func:`binary_cross_entropy_with_logits` is the accurate form.

    Args:
        input: probabilities in [0, 1], floating point.
        target: of ``input``'s shape and type, in [0, 1].
        weight: a factor for each element, broadcast to ``target``'s shape; a constant.
        size_average, reduce: torch's deprecated spelling of ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A 0-dim tensor, or one of ``input``'s shape where ``reduction`` is ``"none"``.

    Raises:
        ValueError: ``target`` has another shape, or ``reduction`` is none of the three.
        RuntimeError: ``target`` has another type, ``weight`` requires a gradient, or a value lies
            outside [0, 1]. The last is looked at on the CPU only: on a GPU it would cost a
            synchronization.
            On a GPU also under autocast, as in torch.

    Example:
        >>> torchref.nn.functional.binary_cross_entropy(torch.tensor([0.5]), torch.tensor([1.0]))
        tensor(0.6931)

    Source: Goodfellow, Bengio and Courville, *Deep Learning*, section 6.2.2.2, 2016.
    """
    name = "binary_cross_entropy"
    reduction = checked_reduction(name, size_average, reduce, reduction)
    require_tensor(name, "input", input)
    require_tensor(name, "target", target)
    input, target, weight = autocast(name, input, target, weight)
    if target.shape != input.shape:
        raise ValueError(
            f"{name}: expected `target` of `input`'s shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if target.dtype != input.dtype or not input.is_floating_point():
        raise RuntimeError(
            f"{name}: expected floating point `input` and `target` of one type, "
            f"got {input.dtype} and {target.dtype}"
        )
    require_constant(name, "weight", weight)
    if reads_values(input, target):
        for which, tensor in (("input", input), ("target", target)):
            inside = (tensor >= 0) & (tensor <= 1)
            if not inside.all():
                raise RuntimeError(
                    f"{name}: expected every `{which}` between 0 and 1, "
                    f"got {tensor[~inside][0].item()}"
                )
    if weight is not None:
        weight = _expanded(name, "weight", weight.to(input.dtype), input)
    return BCELossFunction.call(input, target, weight, reduction)


_LEAST = 9.999999960041972e-13  # torch's 1e-12, a float32 in every type


class BCELossFunction(Function):
    @staticmethod
    def forward(x: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
        return bce_loss_fwd(x, target, weight, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, weight, ctx.reduction = inputs
        ctx.save_for_backward(x, target, weight)

    @staticmethod
    def backward(ctx, dy):
        wants_x, wants_target = ctx.needs_input_grad[:2]
        x, target, weight = ctx.saved_tensors
        saved = (x, target, weight, ctx.reduction)
        dx = bce_loss_bwd(dy, *saved) if wants_x else None
        dtarget = bce_loss_target_bwd(dy, *saved) if wants_target else None
        return dx, dtarget, None, None


@accelerated("loss")
def bce_loss_fwd(x: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    x32, t32 = opmath(x), opmath(target)
    loss = (t32 - 1) * _log_of_rest(x32) - t32 * _clamped_log(x32)
    return rounded(reduced(_weighted(loss, weight), reduction), x)


@accelerated("loss")
def bce_loss_bwd(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    x32 = opmath(x)
    slope = (x32 - opmath(target)) / ((1 - x32) * x32).clamp_min(_LEAST)
    return rounded(spread(dy, x, reduction) * _weighted(slope, weight), x)


@accelerated("loss")
def bce_loss_target_bwd(
    dy: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    x32 = opmath(x)
    slope = (-x32).log1p() - x32.log()
    return rounded(spread(dy, x, reduction) * _weighted(slope, weight), target)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """Drop-in for :class:`torch.nn.BCEWithLogitsLoss`.

    See :func:`binary_cross_entropy_with_logits`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy between scores and targets in [0, 1], the sigmoid included.

    .. math::
        L_i = w_i \big(p_i t_i \log(1 + e^{-x_i}) + (1 - t_i) \log(1 + e^{x_i})\big)
        \qquad
        dx_i = dL_i \cdot w_i \big((1 + (p_i - 1) t_i)\,\sigma(x_i) - p_i t_i\big)

    and :math:`dt_i = dL_i \cdot w_i (p_i \log(1 + e^{-x_i}) - \log(1 + e^{x_i}))`.

    Args:
        input: scores, floating point, any value.
        target: of ``input``'s shape, in [0, 1].
        weight: :math:`w`, broadcast to ``input``'s shape; a constant.
        size_average, reduce: torch's deprecated spelling of ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        pos_weight: :math:`p`, the weight of the positive class, broadcast; a constant.

    Returns:
        A 0-dim tensor, or one of ``input``'s shape where ``reduction`` is ``"none"``.

    Raises:
        ValueError: ``target`` has another shape, or ``reduction`` is none of the three.
        RuntimeError: a tensor is not floating point, or a weight requires a gradient.

    Example:
        >>> score, target = torch.tensor([0.0]), torch.tensor([1.0])
        >>> torchref.nn.functional.binary_cross_entropy_with_logits(score, target)
        tensor(0.6931)

    Source: Goodfellow, Bengio and Courville, *Deep Learning*, section 6.2.2.2, 2016.
    """
    name = "binary_cross_entropy_with_logits"
    reduction = checked_reduction(name, size_average, reduce, reduction)
    require_tensor(name, "input", input)
    require_tensor(name, "target", target)
    input, target, weight, pos_weight = autocast(name, input, target, weight, pos_weight)
    if target.shape != input.shape:
        raise ValueError(
            f"{name}: expected `target` of `input`'s shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if not (input.is_floating_point() and target.is_floating_point()):
        raise RuntimeError(
            f"{name}: expected floating point `input` and `target`, "
            f"got {input.dtype} and {target.dtype}"
        )
    require_constant(name, "weight", weight)
    require_constant(name, "pos_weight", pos_weight)
    input, target = _promoted(input, target)
    weight = _expanded(name, "weight", weight, input)
    pos_weight = _expanded(name, "pos_weight", pos_weight, input)
    return BCEWithLogitsLossFunction.call(input, target, weight, pos_weight, reduction)


class BCEWithLogitsLossFunction(Function):
    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
    ) -> Tensor:
        return bce_with_logits_loss_fwd(x, target, weight, pos_weight, reduction)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.reduction = inputs[-1]
        ctx.save_for_backward(*inputs[:-1])

    @staticmethod
    def backward(ctx, dy):
        wants_x, wants_target = ctx.needs_input_grad[:2]
        x, target, weight, pos_weight = ctx.saved_tensors
        saved = (x, target, weight, pos_weight, ctx.reduction)
        dx = bce_with_logits_loss_bwd(dy, *saved) if wants_x else None
        dtarget = bce_with_logits_loss_target_bwd(dy, *saved) if wants_target else None
        return dx, dtarget, None, None, None


@accelerated("loss")
def bce_with_logits_loss_fwd(
    x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    x32, t32 = opmath(x), opmath(target)
    positive = _positive_weight(t32, pos_weight)  # 1 + (p - 1) t
    loss = (1 - t32) * x32 + positive * _softplus_of_minus(x32)
    return rounded(reduced(_weighted(loss, weight), reduction), x)


@accelerated("loss")
def bce_with_logits_loss_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    x32, t32 = opmath(x), opmath(target)
    e = torch.where(x32 < 0, x32, -x32).exp()
    sigmoid = torch.where(x32 < 0, e, 1) / (1 + e)
    if pos_weight is None:
        slope = sigmoid - t32
    else:
        slope = _positive_weight(t32, pos_weight) * sigmoid - opmath(pos_weight) * t32
    return rounded(spread(dy, x, reduction) * _weighted(slope, weight), x)


@accelerated("loss")
def bce_with_logits_loss_target_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    x32 = opmath(x)
    if pos_weight is None:
        slope = -x32
    else:  # not (p - 1) log(1 + e^-x) - x, which is inf - inf at -inf
        slope = opmath(pos_weight) * _softplus_of_minus(x32) - _softplus_of_minus(-x32)
    return rounded(spread(dy, x, reduction) * _weighted(slope, weight), target)


def _clamped_log(x: Tensor) -> Tensor:
    zero = x == 0  # kept apart: there the derivative would be inf * 0
    return torch.where(zero, -100, torch.where(zero, 1, x).log().clamp_min(-100))


def _log_of_rest(x: Tensor) -> Tensor:
    """log(1 - x), clamped."""
    one = x == 1
    return torch.where(one, -100, torch.where(one, 0, -x).log1p().clamp_min(-100))


def _positive_weight(target: Tensor, pos_weight: Tensor | None) -> Tensor:
    if pos_weight is None:
        return torch.ones_like(target)
    return 1 + (opmath(pos_weight) - 1) * target


def _softplus_of_minus(x: Tensor) -> Tensor:
    """log(1 + e^-x) without overflow, differentiable at 0."""
    minus_abs = torch.where(x < 0, x, -x)
    return torch.where(x < 0, -x, 0) + minus_abs.exp().log1p()


def _distance(
    name: str,
    function: type[Function],
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    weight: Tensor | None,
) -> Tensor:
    """The common path of the losses that depend on ``input - target``."""
    reduction = checked_reduction(name, size_average, reduce, reduction)
    require_tensor(name, "input", input)
    require_tensor(name, "target", target)
    input, target = autocast(name, input, target)
    if not (input.is_floating_point() or target.is_floating_point()):
        raise NotImplementedError(
            f"{name}: expected a floating point `input`, got {input.dtype} and {target.dtype}"
        )
    if target.shape != input.shape:
        warnings.warn(
            f"{name}: `target` of shape {tuple(target.shape)} is broadcast with `input` of shape "
            f"{tuple(input.shape)}; this is seldom meant",
            stacklevel=3,
        )
    if weight is not None and weight.shape != input.shape:
        raise ValueError(
            f"{name}: expected `weight` of `input`'s shape {tuple(input.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    input, target = torch.broadcast_tensors(*_promoted(input, target))
    if weight is None:
        return function.call(input, target, reduction)
    losses = function.call(input, target, "none") * weight
    if reduction == "mean":
        return losses.sum() / weight.sum()
    return losses.sum() if reduction == "sum" else losses


def _expanded(name: str, argument: str, w: Tensor | None, input: Tensor) -> Tensor | None:
    if w is None:
        return None
    try:
        return w.expand(input.shape)
    except RuntimeError as error:
        raise RuntimeError(
            f"{name}: expected a `{argument}` that broadcasts to `input`'s shape "
            f"{tuple(input.shape)}, got {tuple(w.shape)}"
        ) from error


def _promoted(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(input.dtype, target.dtype)
    return input.to(dtype), target.to(dtype)


def _pair(ctx: Any, dx: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    wants_x, wants_target = ctx.needs_input_grad[:2]
    return (dx if wants_x else None), (-dx if wants_target else None), None


def _weighted(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss if weight is None else loss * opmath(weight)


def reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def spread(dy: Tensor, x: Tensor, reduction: str) -> Tensor:
    """The upstream gradient as it reaches each element of ``x``, in the arithmetic type."""
    dy = opmath(dy)
    return dy / x.numel() if reduction == "mean" else dy


def checked_reduction(
    name: str, size_average: bool | None, reduce: bool | None, reduction: str
) -> str:
    if size_average is not None or reduce is not None:
        return _older_reduction(size_average, reduce)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{name}: expected `reduction` "mean", "sum" or "none", got {reduction!r}')
    return reduction


def _older_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """What the two arguments ask for that ``reduction`` took the place of, with torch's warning."""
    averages = size_average is None or size_average
    reduction = "none" if reduce is not None and not reduce else "mean" if averages else "sum"
    warnings.warn(
        "size_average and reduce args will be deprecated, please use "
        f"reduction='{reduction}' instead.",
        stacklevel=2,
    )
    return reduction


def require_constant(name: str, argument: str, tensor: Tensor | None) -> None:
    if tensor is None:
        return
    require_tensor(name, argument, tensor)
    # torch refuses these gradients too; dropping one without a word would be wrong.
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: no gradient for `{argument}`; detach it")
