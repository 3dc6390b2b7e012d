"""Adam and AdamW: a step scaled by running averages of the gradient and of its square."""

# torch._foreach_* is how torch.optim itself works on lists; it has no public name.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _to_scalar, _use_grad_for_differentiable, _view_as_real

from torchref.dispatch import accelerated
from torchref.optim._update import (
    Scalar,
    add,
    addcdiv_,
    addcmul_,
    advance,
    by_device_and_dtype,
    check_capturable,
    flat,
    on_device,
    runs_foreach,
    step_number,
    store,
    uncount,
    unscaled,
    weight,
    workspace,
)


class Adam(torch.optim.Adam):
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
        fused: one pass for each tensor, with GradScaler's scale and overflow check inside it.
        decoupled_weight_decay: shrink the parameter directly, as :class:`AdamW` does.

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

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returns, or None.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[], [], [], [], [], []]
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
            grad_scale = getattr(self, "grad_scale", None)
            found_inf = getattr(self, "found_inf", None)
            adam(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                max_exp_avg_sqs,
                steps,
                grad_scale,
                found_inf,
                group,
            )
        return loss


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


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    group: dict[str, Any],
) -> None:
    """One step for a group's tensors; ``max_exp_avg_sqs`` is empty without amsgrad."""
    if group["foreach"] and group["differentiable"]:
        raise AssertionError("_foreach ops don't support autograd")  # torch's
    check_capturable(params, steps, group)
    state = [exp_avgs, exp_avg_sqs] + ([max_exp_avg_sqs] if group["amsgrad"] else [])
    _view_as_real(params, grads, *state)
    advance(steps)
    if runs_foreach(params, group, grad_scale, found_inf):
        lists = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps]
        for p, g, m, v, v_max, t in by_device_and_dtype(lists):
            foreach_adam_update(p, g, m, v, v_max, t, group)
        return
    beta1, beta2 = map(_to_scalar, group["betas"])
    l2, decay = _weight_decay(group)
    for i, param in enumerate(params):
        max_exp_avg_sq = max_exp_avg_sqs[i] if group["amsgrad"] else None
        adam_update(
            *flat(param, grads[i], exp_avgs[i], exp_avg_sqs[i], max_exp_avg_sq),
            on_device(grad_scale, param),
            on_device(found_inf, param),
            *_corrections(steps[i], group),
            beta1,
            beta2,
            group["eps"],
            l2,
            decay,
            group["maximize"],
            group["differentiable"],
        )
    uncount(steps, found_inf)


@accelerated("multi_tensor")
def adam_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
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
        step_size: lr / (1 - beta1 ** step).
        correction: sqrt(1 - beta2 ** step).
        l2: the weight decay that is added to the gradient.
        decay: the factor 1 - lr * weight_decay that shrinks the parameter.
    """
    state = [param, exp_avg, exp_avg_sq, max_exp_avg_sq]
    work = workspace(state, found_inf, differentiable)
    p, m, v, v_max = work
    g = unscaled(grad, grad_scale, found_inf)
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
    group: dict[str, Any],
) -> None:
    """:func:`adam_update` on lists of tensors of one device and type."""
    beta1, beta2 = map(_to_scalar, group["betas"])
    l2, decay = _weight_decay(group)
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
    corrections = [_corrections(step, group) for step in steps]
    torch._foreach_div_(denominators, [correction for _, correction in corrections])
    torch._foreach_add_(denominators, group["eps"])
    step_sizes = [-step_size for step_size, _ in corrections]
    if isinstance(step_sizes[0], Tensor):  # the scales of addcdiv are numbers
        torch._foreach_div_(denominators, step_sizes)
        torch._foreach_addcdiv_(params, exp_avgs, denominators)
    else:
        torch._foreach_addcdiv_(params, exp_avgs, denominators, step_sizes)


def _corrections(step: Tensor, group: dict[str, Any]) -> tuple[Any, Any]:
    """The step size and the denominator's divisor that undo the averages' start at zero."""
    t = step_number(step)
    beta1, beta2 = map(_to_scalar, group["betas"])
    return _to_scalar(group["lr"]) / (1 - beta1**t), (1 - beta2**t) ** 0.5


def _weight_decay(group: dict[str, Any]) -> tuple[Any, Any]:
    """The part of the weight decay that joins the gradient, and the factor on the parameter."""
    weight_decay = group["weight_decay"]
    if weight_decay == 0:
        return None, None
    if group["decoupled_weight_decay"]:
        return None, 1 - _to_scalar(group["lr"]) * weight_decay
    return weight_decay, None
