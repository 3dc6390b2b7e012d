"""Softmax cross-entropy from scores, and the negative log-likelihood of log-probabilities."""

import torch
from torch import Tensor

from torchref._checks import require_floating, require_integer, require_share, require_tensor
from torchref.autograd import Function, attached, autocast, opmath, rounded
from torchref.dispatch import accelerated, is_plain, reads_values
from torchref.internals import are_transforms_active, differentiates_forward
from torchref.nn.loss import checked_reduction, require_constant


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for :class:`torch.nn.CrossEntropyLoss`; see :func:`cross_entropy`.

    Adds ``gradient_in_forward``.
    """

    gradient_in_forward = False  # for a module that was torch's when it was made

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        gradient_in_forward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.gradient_in_forward = gradient_in_forward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            gradient_in_forward=self.gradient_in_forward,
        )

    def extra_repr(self) -> str:
        return "gradient_in_forward=True" if self.gradient_in_forward else ""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    gradient_in_forward: bool = False,
) -> Tensor:
    r"""Cross-entropy between scores and classes, the softmax included.

    With probabilities :math:`p = \mathrm{softmax}(x)`, class weights :math:`w` and targets
    :math:`t` (a class index is its one-hot row; smoothing makes :math:`(1-\varepsilon) t +
    \varepsilon / K` of them),

    .. math::
        L_i = -\sum_{k=1}^{K} w_k\, t_{ik} \log p_{ik}
        \qquad
        dx_{ik} = dL_i \Big(p_{ik} \sum_j w_j\, t_{ij} - w_k\, t_{ik}\Big), \quad
        dt_{ik} = -dL_i\, (1 - \varepsilon)\, w_k \log p_{ik}

    which for an index target, without weights, is :math:`dL_i (p_{ik} - [k = t_i])`.

    Args:
        input: scores (logits), floating point, of shape (K,), (N, K) or (N, K, d1, d2, ...).
        target: class indices in [0, K - 1], of ``input``'s shape without K; or probabilities
            (one-hot ones too), of ``input``'s shape and floating point.
        weight: a factor for each class, shape (K,), a constant.
        size_average, reduce: torch's deprecated spelling of ``reduction``.
        ignore_index: the target that is left out of the loss, its mean and the gradient.
        reduction: ``"mean"`` (over the weights of the index targets, or over the rows of
            probability targets), ``"sum"`` or ``"none"``.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        gradient_in_forward: make :math:`dx` along with the loss, while the scores are in the
            cache, and keep it instead of them. For a mean or a sum over index targets,
            and for one backward pass: it hands :math:`dx` over, and a second one raises.

    Returns:
        A 0-dim tensor, or one of ``input``'s shape without K where ``reduction`` is ``"none"``.
        The mean over nothing is NaN. Backward reads ``input`` again: do not change it in between.

    Raises:
        ValueError: the batch sizes differ, or ``reduction`` is none of the three.
        IndexError: a target is out of range. Looked at on the CPU only; a Triton kernel makes the
            loss and the gradient of that row NaN.
        RuntimeError: another wrong shape or type, ``label_smoothing`` outside [0, 1],
            ``ignore_index`` with probability targets, or a ``weight`` that requires a gradient; in
            a second backward pass, or one that is to be differentiated, of
            ``gradient_in_forward``.
        NotImplementedError: ``input`` is not floating point.
        TypeError: ``input`` or ``target`` is no tensor, or ``ignore_index`` no integer.

    Example:
        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> torchref.nn.functional.cross_entropy(scores, torch.tensor([0, 1]))
        tensor(0.4100)

    Source: Goodfellow, Bengio and Courville, *Deep Learning*, section 6.2.2.3, 2016; smoothing:
    Szegedy et al., "Rethinking the Inception architecture", 2016.
    """
    name = "cross_entropy"
    reduction = checked_reduction(name, size_average, reduce, reduction)
    require_share(name, "label_smoothing", label_smoothing, RuntimeError)
    require_floating(name, input)
    require_tensor(name, "target", target)
    # None spares a pass, and scores of -inf the product 0 * inf
    smoothing = float(label_smoothing) if label_smoothing else None
    has_probabilities = target.shape == input.shape and input.ndim > 0
    if gradient_in_forward and (has_probabilities or reduction == "none"):
        what = "probability targets" if has_probabilities else 'reduction "none"'
        raise ValueError(
            f"{name}: `gradient_in_forward` is for a mean or sum over class indices, got {what}"
        )
    if has_probabilities:
        input, target, weight = autocast(name, input, target, weight)
        _check_probabilities(name, input, target, weight, ignore_index)
        dtype = torch.promote_types(input.dtype, target.dtype)
        function, rest = ProbabilityCrossEntropyFunction, (weight, reduction, smoothing)
        return function.call(input.to(dtype), target.to(dtype), *rest)[0]
    input, weight = autocast(name, input, weight)
    target = _checked_indices(name, input, target, weight, ignore_index)
    options = (reduction, ignore_index, smoothing)
    if gradient_in_forward and _may_run_once(input):
        return CrossEntropyOnceFunction.call(input, target, weight, *options)[0]
    return CrossEntropyFunction.call(input, target, weight, *options)[0]


def _may_run_once(input: Tensor) -> bool:
    """Whether a gradient will be asked for, and by autograd itself, which asks when it likes."""
    if are_transforms_active() or differentiates_forward():
        return False
    return torch.is_grad_enabled() and input.requires_grad and input.numel() > 0


class CrossEntropyFunction(Function):
    """Cross-entropy with class indices."""

    @staticmethod
    def forward(
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        smoothing: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return cross_entropy_fwd(x, target, weight, reduction, ignore_index, smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, weight, *ctx.options = inputs
        _, row_max, log_sum, total = output
        ctx.mark_non_differentiable(row_max, log_sum, total)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, target, weight, row_max, log_sum, total)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 6
        x, target, weight, row_max, log_sum, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was saved has no graph
            row_max, log_sum = _log_sum_exp(opmath(x))
        dx = cross_entropy_bwd(dy, x, target, weight, row_max, log_sum, total, *ctx.options)
        return dx, None, None, None, None, None


@accelerated("cross_entropy")
def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    smoothing: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, each row's maximum and log(sum(exp(x - maximum))), and the mean's divisor."""
    x32, dim = opmath(x), _class_dim(x)
    row_max, log_sum = _log_sum_exp(x32)
    kept, index, row_weight = _rows(x32, target, weight, ignore_index)
    # The maximum comes off before the sum goes on: at scores of 300 the sum's digits would be lost.
    picked = x32.gather(dim, index.unsqueeze(dim)).squeeze(dim)
    loss = row_weight * (row_max - picked + log_sum)
    if smoothing is not None:
        below = _weighted(-_log_p(x32, row_max, log_sum), weight).sum(dim)
        loss = (1 - smoothing) * loss + smoothing / x.shape[dim] * below
    loss = torch.where(kept, loss, 0)  # an ignored row may hold a NaN
    loss, total = _reduced(loss, row_weight, reduction)
    return rounded(loss, x), row_max, log_sum, total


@accelerated("cross_entropy")
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
    x32, dim = opmath(x), _class_dim(x)
    kept, index, row_weight = _rows(x32, target, weight, ignore_index)
    p = _log_p(x32, row_max, log_sum).exp()
    dx = row_weight.unsqueeze(dim) * (p - _one_hot(index, x).to(p.dtype))
    if smoothing is not None:
        ones = torch.ones_like(p)
        smooth = p * _weighted(ones, weight).sum(dim, keepdim=True) - _weighted(ones, weight)
        dx = (1 - smoothing) * dx + smoothing / x.shape[dim] * smooth
    # The upstream gradient goes on in float32: rounded first, fp16 gradients would vanish.
    dx = dx * _row_gradient(dy, total, reduction, dim)
    return rounded(torch.where(kept.unsqueeze(dim), dx, 0), x)


class CrossEntropyOnceFunction(Function):
    """Cross-entropy with class indices, whose forward makes the gradient that backward returns."""

    @staticmethod
    def forward(
        x: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        smoothing: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the gradient, and what it still has to be divided by."""
        total = opmath(x).new_ones(())
        if reduction == "mean":
            total = mean_divisor(target, weight, ignore_index, total)
        now, later = total, torch.ones_like(total)
        if x.dtype == torch.float16:
            # Its smallest number is above what a loss scale may still raise: as large as fits.
            largest = later if weight is None else opmath(weight).abs().amax()
            now = largest / 2**15
            later = total / now
        loss, dx = cross_entropy_once_fwd(x, target, weight, now, ignore_index, smoothing)
        # of no rows the gradient is 0, and stays it
        return rounded(loss / total, x), dx, torch.where(later == 0, 1, later)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, dx, later = output
        ctx.mark_non_differentiable(dx, later)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dx, later)
        ctx.spent = False

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 6
        dx, later = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy: `gradient_in_forward` has no second derivative")
        factor = opmath(dy) / later
        if torch.compiler.is_compiling() or not is_plain((factor,)):
            return rounded(opmath(dx) * factor, dx), None, None, None, None, None
        if ctx.spent:
            raise RuntimeError(
                "cross_entropy: with `gradient_in_forward` backward runs once: the gradient that "
                "forward made is handed over; leave it out to run backward again"
            )
        ctx.spent = True
        cross_entropy_once_bwd(dx, factor)
        return dx, None, None, None, None, None


@accelerated("cross_entropy")
def cross_entropy_once_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    ignore_index: int,
    smoothing: float | None,
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses in float32, and its gradient over ``total``."""
    losses, dx = losses_and_gradient(x, target, weight, ignore_index, smoothing, total)
    return losses.sum(), rounded(dx, x)


@accelerated("cross_entropy", mutates=("dx",))
def cross_entropy_once_bwd(dx: Tensor, factor: Tensor) -> None:
    """``dx`` times the upstream gradient, in place; spared where that is 1."""
    if not reads_values(factor) or factor != 1:
        dx.copy_(opmath(dx) * factor)


def losses_and_gradient(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float | None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, and the gradient of their sum, over ``total`` if given, in float32."""
    x32, rows = opmath(x), (target, weight)
    options = (ignore_index, smoothing)
    losses, row_max, log_sum, _ = cross_entropy_fwd(x32, *rows, "none", *options)
    one = losses.new_ones(())
    saved = (row_max, log_sum, one if total is None else total, "mean")
    return losses, cross_entropy_bwd(one, x32, *rows, *saved, *options)


class ProbabilityCrossEntropyFunction(Function):
    """Cross-entropy with a probability for each class."""

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return probability_cross_entropy_fwd(x, target, weight, reduction, smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, weight, *ctx.options = inputs
        _, row_max, log_sum, mass = output
        ctx.mark_non_differentiable(row_max, log_sum, mass)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, target, weight, row_max, log_sum, mass)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 5
        x, target, weight, row_max, log_sum, mass = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was saved has no graph
            row_max, log_sum = _log_sum_exp(opmath(x))
            mass = _mass(target, weight, ctx.options[1])
        wants_x, wants_target = ctx.needs_input_grad[:2]
        saved = (x, target, weight, row_max, log_sum)
        dx = dtarget = None
        if wants_x:
            dx = probability_cross_entropy_bwd(dy, *saved, mass, *ctx.options)
        if wants_target:
            dtarget = probability_cross_entropy_target_bwd(dy, *saved, *ctx.options)
        return dx, dtarget, None, None, None


@accelerated("cross_entropy")
def probability_cross_entropy_fwd(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; of each row its maximum, log(sum(exp(x - maximum))) and sum of weighted targets."""
    x32, dim = opmath(x), _class_dim(x)
    row_max, log_sum = _log_sum_exp(x32)
    wt = _weighted(_smoothed(target, smoothing, dim), weight)
    loss = -(wt * _log_p(x32, row_max, log_sum)).sum(dim)
    if reduction == "mean":
        loss = loss.sum() / loss.numel()
    elif reduction == "sum":
        loss = loss.sum()
    return rounded(loss, x), row_max, log_sum, wt.sum(dim)


@accelerated("cross_entropy")
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
    x32, dim = opmath(x), _class_dim(x)
    wt = _weighted(_smoothed(target, smoothing, dim), weight)
    dx = _log_p(x32, row_max, log_sum).exp() * mass.unsqueeze(dim) - wt
    return rounded(dx * _row_gradient(dy, row_max.numel(), reduction, dim), x)


@accelerated("cross_entropy")
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
    dtarget = -_weighted(_log_p(opmath(x), row_max, log_sum), weight)
    if smoothing is not None:
        dtarget = (1 - smoothing) * dtarget
    dtarget = dtarget * _row_gradient(dy, row_max.numel(), reduction, _class_dim(x))
    return rounded(dtarget, target)


class NLLLoss(torch.nn.NLLLoss):
    """Drop-in for :class:`torch.nn.NLLLoss`; see :func:`nll_loss`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of class indices, from log-probabilities.

    .. math::
        L_i = -w_{t_i}\, x_{i t_i} \qquad dx_{ik} = -dL_i\, w_k\, [k = t_i]

    Args:
        input: log-probabilities, floating point, of shape (K,), (N, K) or (N, K, d1, d2, ...).
        target: class indices in [0, K - 1], of ``input``'s shape without K.
        weight: a factor for each class, shape (K,), a constant.
        size_average, reduce: torch's deprecated spelling of ``reduction``.
        ignore_index: the target that is left out of the loss, its mean and the gradient.
        reduction: ``"mean"`` (over the weights of the targets), ``"sum"`` or ``"none"``.

    Returns:
        A 0-dim tensor, or one of ``target``'s shape where ``reduction`` is ``"none"``. The mean
        over nothing is NaN.

    Raises:
        As :func:`cross_entropy`.

    Example:
        >>> log_p = torch.tensor([[0.9, 0.1]]).log()
        >>> torchref.nn.functional.nll_loss(log_p, torch.tensor([1]))
        tensor(2.3026)

    Source: Bishop, *Pattern Recognition and Machine Learning*, section 4.3.4, 2006.
    """
    name = "nll_loss"
    reduction = checked_reduction(name, size_average, reduce, reduction)
    require_floating(name, input)
    require_tensor(name, "target", target)
    input, weight = autocast(name, input, weight)
    target = _checked_indices(name, input, target, weight, ignore_index)
    return NLLLossFunction.call(input, target, weight, reduction, ignore_index)[0]


class NLLLossFunction(Function):
    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        return nll_loss_fwd(x, target, weight, reduction, ignore_index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, weight, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, target, weight, output[1])

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 5
        x, target, weight, total = ctx.saved_tensors
        dx = nll_loss_bwd(dy, x, target, weight, total, *ctx.options)
        return attached(dx, x), None, None, None, None


@accelerated("cross_entropy")
def nll_loss_fwd(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss, and the mean's divisor or 0."""
    x32, dim = opmath(x), _class_dim(x)
    kept, index, row_weight = _rows(x32, target, weight, ignore_index)
    picked = x32.gather(dim, index.unsqueeze(dim)).squeeze(dim)
    loss = torch.where(kept, -row_weight * picked, 0)
    loss, total = _reduced(loss, row_weight, reduction)
    return rounded(loss, x), total


@accelerated("cross_entropy")
def nll_loss_bwd(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    dim = _class_dim(x)
    kept, index, row_weight = _rows(opmath(x), target, weight, ignore_index)
    hit = -row_weight.unsqueeze(dim) * _row_gradient(dy, total, reduction, dim)
    hit = torch.where(kept.unsqueeze(dim), hit, 0)
    return rounded(torch.zeros_like(opmath(x)).scatter(dim, index.unsqueeze(dim), hit), x)


def _class_dim(x: Tensor) -> int:
    return 0 if x.ndim == 1 else 1


def _log_sum_exp(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum m, a constant to autograd, and log(sum(exp(x - m)))."""
    dim = _class_dim(x)
    row_max = x.detach().amax(dim, keepdim=True)
    return row_max.squeeze(dim), (x - row_max).exp().sum(dim).log()


def _log_p(x: Tensor, row_max: Tensor, log_sum: Tensor) -> Tensor:
    dim = _class_dim(x)
    return x - row_max.unsqueeze(dim) - log_sum.unsqueeze(dim)


def _rows(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: whether it counts, a class that exists even where it does not, its weight."""
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    if weight is None:
        return kept, index, kept.to(x.dtype)
    return kept, index, torch.where(kept, opmath(weight)[index], 0)


def _reduced(loss: Tensor, row_weight: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The reduced loss, and what a mean divided by; 0 where nothing was divided."""
    if reduction == "mean":
        total = row_weight.sum()
        return loss.sum() / total, total
    return (loss.sum() if reduction == "sum" else loss), row_weight.new_zeros(())


def mean_divisor(target: Tensor, weight: Tensor | None, ignore_index: int, like: Tensor) -> Tensor:
    """The weights of the rows that count, added up."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum().to(like.dtype)
    return torch.where(kept, opmath(weight)[torch.where(kept, target, 0)], 0).sum().to(like.dtype)


def _one_hot(index: Tensor, x: Tensor) -> Tensor:
    dim = _class_dim(x)
    classes = torch.arange(x.shape[dim], device=x.device)
    return index.unsqueeze(dim) == classes.reshape(-1, *[1] * (x.ndim - dim - 1))


def _weighted(t: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return t
    return t * opmath(weight).reshape(-1, *[1] * (t.ndim - _class_dim(t) - 1))


def _smoothed(target: Tensor, smoothing: float | None, dim: int) -> Tensor:
    t = opmath(target)
    return t if smoothing is None else (1 - smoothing) * t + smoothing / t.shape[dim]


def _mass(target: Tensor, weight: Tensor | None, smoothing: float | None) -> Tensor:
    dim = _class_dim(target)
    return _weighted(_smoothed(target, smoothing, dim), weight).sum(dim)


def _row_gradient(dy: Tensor, total: Tensor | int, reduction: str, dim: int) -> Tensor:
    dy32 = opmath(dy)
    if reduction == "none":
        return dy32.unsqueeze(dim)
    return dy32 / total if reduction == "mean" else dy32


def _check_weight(name: str, classes: int, input: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        return
    require_constant(name, "weight", weight)
    if weight.shape != (classes,):
        raise RuntimeError(
            f"{name}: expected `weight` of shape ({classes},), got {tuple(weight.shape)}"
        )
    if weight.dtype != input.dtype:
        raise RuntimeError(f"{name}: expected `weight` of type {input.dtype}, got {weight.dtype}")


def _check_probabilities(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            f"{name}: expected floating point probabilities in a `target` of `input`'s shape, "
            f"got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"{name}: `ignore_index` has no meaning for probability targets, got {ignore_index}"
        )
    _check_weight(name, input.shape[_class_dim(input)], input, weight)


def _checked_indices(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> Tensor:
    require_integer(name, "ignore_index", ignore_index)
    if input.ndim == 0:
        raise ValueError(f"{name}: expected `input` with a class dimension, got a 0-dim tensor")
    dim = _class_dim(input)
    expected = input.shape[:dim] + input.shape[dim + 1 :]
    if target.shape != expected:
        differs = input.ndim > 1 and target.ndim > 0 and target.shape[0] != input.shape[0]
        raise (ValueError if differs else RuntimeError)(
            f"{name}: expected `target` of shape {tuple(expected)} for `input` of shape "
            f"{tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"{name}: expected `target` of type torch.int64 or torch.uint8, got {target.dtype}"
        )
    target = target.long()  # compared as bytes, -100 would be class 156
    classes = input.shape[dim]
    _check_weight(name, classes, input, weight)
    if reads_values(input, target):
        bad = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
        if bad.numel():
            raise IndexError(
                f"{name}: expected every `target` in [0, {classes - 1}] or {ignore_index}, "
                f"got {int(bad[0])}"
            )
    return target
