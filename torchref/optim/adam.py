"""Adam and AdamW: a step scaled by running averages of the gradient and of its square."""

# torch._foreach_* is how torch.optim itself works on lists; it has no public name.
# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchref.optim._one_launch import kernel
from torchref.optim._optimizer import Optimizer
from torchref.optim._update import (
    Row,
    Scalar,
    add,
    addcdiv_,
    addcmul_,
    advance,
    alike,
    as_real,
    check_capturable,
    on_device,
    runs_foreach,
    step_number,
    store,
    to_scalar,
    uncount,
    unscaled,
    update_each,
    weight,
    workspace,
)


class Adam(Optimizer, torch.optim.Adam):
    r"""Drop-in for :class:`torch.optim.Adam`.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= \frac{m_t}{1 - \beta_1^t}, \qquad \hat v_t = \frac{v_t}{1 - \beta_2^t} \\
        \theta_t &= \theta_{t-1} - \eta \, \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

    with :math:`g_t` the gradient, negated under ``maximize``, plus :math:`\lambda\theta_{t-1}`.
    Under ``amsgrad`` the largest :math:`v` so far, before its correction, takes :math:`v_t`'s
    place in :math:`\hat v_t`.

    Half-precision parameters are computed in float32 and rounded once per step.

    Args:
        params: the tensors to optimize, named or not, or dicts of them with options of their own.
        lr: learning rate :math:`\eta \ge 0`.
        betas: the shares :math:`\beta_1, \beta_2` in [0, 1) that the averages keep each step.
        eps: :math:`\epsilon \ge 0`, added to the denominator.
        weight_decay: :math:`\lambda \ge 0`. The penalty :math:`\lambda' \sum \theta^2` has
            :math:`\lambda = 2 \lambda'`.
        amsgrad: divide by the largest second moment so far.
        foreach: work on lists of tensors; None lets torch choose.
        maximize: ascend instead of descend.
        capturable: keep the step count on the device, for CUDA graphs.
        differentiable: let autograd record the step.
        fused: one pass over memory, with GradScaler's scale and overflow check inside it; on the
            CPU compiled, which takes some seconds in the first step. On a GPU the step is one
            launch with or without it.
        decoupled_weight_decay: shrink the parameter directly, as :class:`AdamW` does.
        max_norm: scale all gradients together so that their norm, over all groups, is at most this,
            as :func:`clip_grad_norm_` would, but inside the step: the gradients stay as they are.
            The norm before clipping is in ``grad_norm``.
        ema_decay: keep an average of the parameters, which each step moves by 1 - ``ema_decay``
            towards them; the first is its start. See ``ema_parameters`` and ``averaged``.
        ema_bias_correction: let the average weigh all steps as if it had started at zero and been
            corrected for it, as in :class:`ExponentialMovingAverage`.
        state_dtype: ``torch.float32`` keeps the state of half-precision parameters in that type,
            so that its averages do not stall: 0.1% of a value is less than bfloat16 can add to it.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: a gradient is sparse, or the flags exclude each other.

    Example:
        >>> import torch, torchref
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torchref.optim.Adam([w], lr=0.1)
        >>> (3 * w).sum().backward()
        >>> optimizer.step()  # the first step is lr, whatever the gradient's size
        >>> w.data
        tensor([0.9000])

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015; Reddi, Kale and
    Kumar, "On the convergence of Adam and beyond", 2018.
    """

    _kernel = "adam_step"
    _state_keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "ema", "ema_step")
    _loaded_options = ("lr", "betas", "eps", "weight_decay")
    _loaded_states = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        ema_decay: float | None = None,
        ema_bias_correction: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._check_numbers(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._add_options(max_norm, ema_decay, ema_bias_correction, state_dtype)

    def _rows(self, group: dict[str, Any]) -> list[Row]:
        lists: list[list[Tensor]] = [[], [], [], [], [], []]
        self._init_group(group, *lists)
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
        maxima = max_exp_avg_sqs if group["amsgrad"] else [None] * len(params)
        states = zip(exp_avgs, exp_avg_sqs, maxima, strict=True)
        return list(map(Row, params, grads, states, steps))

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = map(float, group["betas"])
        weight_decay, decoupled = float(group["weight_decay"]), group["decoupled_weight_decay"]
        l2, decay = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
        return self._common_numbers(group, l2) + kernel("adam_numbers")(
            beta1, beta2, group["eps"], decay
        )

    def _formula(self, *args: Any) -> None:
        adam(*args)


class AdamW(Adam, torch.optim.AdamW):
    r"""Drop-in for :class:`torch.optim.AdamW`: :class:`Adam` with decoupled weight decay.

    .. math::
        \theta_t = (1 - \eta\lambda)\, \theta_{t-1}
            - \eta \, \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

    The decay enters neither average, so it is not divided by :math:`\sqrt{\hat v_t}`.

    Args:
        params: the tensors to optimize, named or not, or dicts of them with options of their own.
        lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused: as in
            :class:`Adam`.
        weight_decay: :math:`\lambda \ge 0`, 0.01 by default.
        max_norm, ema_decay, ema_bias_correction, state_dtype: as in :class:`Adam`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: a gradient is sparse, or the flags exclude each other.

    Example:
        >>> import torch, torchref
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torchref.optim.AdamW([w], lr=0.1, weight_decay=0.5)
        >>> (0 * w).sum().backward()
        >>> optimizer.step()
        >>> w.data
        tensor([0.9500])

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        ema_decay: float | None = None,
        ema_bias_correction: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._check_numbers(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._add_options(max_norm, ema_decay, ema_bias_correction, state_dtype)


def adam(
    rows: list[Row],
    group: dict[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
) -> None:
    """One step for rows of a group, whose states are exp_avg, exp_avg_sq and max_exp_avg_sq."""
    if group["foreach"] and group["differentiable"]:
        raise AssertionError("_foreach ops don't support autograd")  # torch's
    check_capturable(rows, group)
    rows = as_real(rows)
    steps = [row.step for row in rows]
    advance(steps)
    if runs_foreach(rows, group, grad_scale, found_inf):
        for p, g, m, v, v_max, t in alike(rows):
            foreach_adam_update(p, g, m, v, v_max, t, clip, group)
        return
    arguments = _arguments(rows, group, grad_scale, found_inf, clip)
    update_each(adam_update, rows, arguments, group)
    uncount(steps, found_inf)


def _arguments(
    rows: list[Row],
    group: dict[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
) -> list[tuple[Any, ...]]:
    """What :func:`adam_update` takes for each row after its tensors; one object for equal ones."""
    l2, decay = _weight_decay(group)
    rest = *map(to_scalar, group["betas"]), group["eps"], l2, decay, group["maximize"]
    shared: dict[Any, tuple[Any, ...]] = {}
    arguments = []
    for row in rows:
        assert row.step is not None
        t, device = step_number(row.step), row.param.device
        # counts that are tensors are each their own
        args = None if isinstance(t, Tensor) else shared.get((device, t))
        if args is None:
            flags = (on_device(x, device) for x in (grad_scale, found_inf, clip))
            args = (*flags, *_corrections(t, group), *rest, group["differentiable"])
            if not isinstance(t, Tensor):
                shared[device, t] = args
        arguments.append(args)
    return arguments


def adam_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
    step_size: Scalar,
    correction: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: float,
    l2: Scalar | None,
    decay: Scalar | None,
    maximize: bool,
    differentiable: bool,
) -> None:
    """One tensor's step, in place.

    Args:
        clip: a factor on the gradient.
        step_size: lr / (1 - beta1 ** step).
        correction: sqrt(1 - beta2 ** step).
        l2: the weight decay that is added to the gradient.
        decay: the factor 1 - lr * weight_decay that shrinks the parameter.
    """
    state = [param, exp_avg, exp_avg_sq, max_exp_avg_sq]
    work = workspace(state, found_inf, differentiable)
    p, m, v, v_max = work
    g = unscaled(grad, grad_scale, found_inf, clip)
    if maximize:
        g = -g
    if l2 is not None:
        g = add(g, p, l2)
    if decay is not None:
        p.mul_(decay)
    m.lerp_(g, weight(1 - beta1, m))
    addcmul_(v.mul_(beta2), g, g, 1 - beta2)
    if v_max is not None:
        v = work[3] = torch.maximum(v_max, v)
    denominator = (v.sqrt() / correction).add_(eps)
    addcdiv_(p, m, denominator, -step_size)
    store(state, work, found_inf)


def foreach_adam_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    clip: Tensor | None,
    group: dict[str, Any],
) -> None:
    """:func:`adam_update` on lists of tensors of one device and type."""
    beta1, beta2 = map(to_scalar, group["betas"])
    l2, decay = _weight_decay(group)
    if clip is not None:
        grads = list(torch._foreach_mul(grads, clip.to(grads[0].device)))
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if l2 is not None:
        grads = list(torch._foreach_add(grads, params, alpha=l2))
    if decay is not None:
        torch._foreach_mul_(params, decay)
    torch._foreach_lerp_(exp_avgs, grads, weight(1 - beta1, params[0]))
    torch._foreach_mul_(exp_avg_sqs, beta2)
    if isinstance(beta2, Tensor):
        scaled = torch._foreach_mul(grads, 1 - beta2)
        torch._foreach_addcmul_(exp_avg_sqs, scaled, grads)
    else:
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    if group["amsgrad"]:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
        exp_avg_sqs = max_exp_avg_sqs
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    corrections = [_corrections(step_number(step), group) for step in steps]
    torch._foreach_div_(denominators, [correction for _, correction in corrections])
    torch._foreach_add_(denominators, group["eps"])
    step_sizes = [-step_size for step_size, _ in corrections]
    if isinstance(step_sizes[0], Tensor):  # the scales of addcdiv are numbers
        torch._foreach_div_(denominators, step_sizes)
        torch._foreach_addcdiv_(params, exp_avgs, denominators)
    else:
        torch._foreach_addcdiv_(params, exp_avgs, denominators, step_sizes)


def _corrections(t: Scalar, group: dict[str, Any]) -> tuple[Any, Any]:
    """The step size and the denominator's divisor that undo the averages' start at zero."""
    beta1, beta2 = map(to_scalar, group["betas"])
    return to_scalar(group["lr"]) / (1 - beta1**t), (1 - beta2**t) ** 0.5


def _weight_decay(group: dict[str, Any]) -> tuple[Any, Any]:
    """The part of the weight decay that joins the gradient, and the factor on the parameter."""
    weight_decay = group["weight_decay"]
    if weight_decay == 0:
        return None, None
    if group["decoupled_weight_decay"]:
        return None, 1 - to_scalar(group["lr"]) * weight_decay
    return weight_decay, None
