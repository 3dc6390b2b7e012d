"""RMSprop: a step divided by a running root mean square of the gradient."""

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
    add_,
    addcdiv_,
    addcmul_,
    advance,
    alike,
    as_real,
    check_capturable,
    foreach_add_,
    is_number,
    on_device,
    runs_foreach,
    store,
    to_scalar,
    unscaled,
    update_each,
    weight,
    workspace,
)


class RMSprop(Optimizer, torch.optim.RMSprop):
    r"""Drop-in for :class:`torch.optim.RMSprop`.

    .. math::
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2 \\
        \theta_t &= \theta_{t-1} - \eta \, \frac{g_t}{\sqrt{v_t} + \epsilon}

    with :math:`g_t` the gradient, negated under ``maximize``, plus :math:`\lambda\theta_{t-1}`.
    Under ``centered``, :math:`v_t - \bar g_t^2` takes :math:`v_t`'s place under the root, where
    :math:`\bar g_t = \alpha \bar g_{t-1} + (1 - \alpha) g_t`. With momentum :math:`\mu` the
    quotient is first added to :math:`b_t = \mu b_{t-1} + g_t / (\sqrt{v_t} + \epsilon)`, and
    :math:`\theta_t = \theta_{t-1} - \eta b_t`.

    The course's constants are ``alpha=0.9, eps=1e-8``. Half-precision parameters are computed in
    float32 and rounded once per step.

    Args:
        params: the tensors to optimize, named or not, or dicts of them with options of their own.
        lr: learning rate :math:`\eta \ge 0`.
        alpha: the share :math:`\alpha` in [0, 1) that the average keeps each step.
        eps: :math:`\epsilon \ge 0`, added to the denominator outside the root.
        weight_decay: :math:`\lambda \ge 0`. The penalty :math:`\lambda' \sum \theta^2` has
            :math:`\lambda = 2 \lambda'`.
        momentum: :math:`\mu \ge 0`.
        centered: divide by the standard deviation instead of the root mean square.
        capturable: keep the step count on the device, for CUDA graphs.
        foreach: work on lists of tensors; None lets torch choose.
        maximize: ascend instead of descend.
        differentiable: let autograd record the step.
        max_norm, ema_decay, ema_bias_correction, state_dtype: as in :class:`Adam`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: a gradient is sparse.

    Example:
        >>> import torch, torchref
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torchref.optim.RMSprop([w], lr=0.1, alpha=0.75)
        >>> (3 * w).sum().backward()
        >>> optimizer.step()  # by lr / sqrt(1 - alpha)
        >>> w.data
        tensor([0.8000])

    Source: Hinton, "Neural networks for machine learning", lecture 6e, 2012; Graves, "Generating
    sequences with recurrent neural networks", section 4.2, 2013 (centered).
    """

    _kernel = "rmsprop_step"
    _state_keys = ("square_avg", "momentum_buffer", "grad_avg", "step", "ema", "ema_step")
    _loaded_options = ("lr", "alpha", "eps", "weight_decay")
    _loaded_states = ("step", "square_avg")

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        max_norm: float | None = None,
        ema_decay: float | None = None,
        ema_bias_correction: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._check_numbers(
            lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum
        )
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        self._add_options(max_norm, ema_decay, ema_bias_correction, state_dtype)

    def _rows(self, group: dict[str, Any]) -> list[Row]:
        lists: list[list[Tensor]] = [[], [], [], [], [], []]
        self._init_group(group, *lists)
        params, grads, square_avgs, momentum_buffers, grad_avgs, steps = lists
        none = [None] * len(params)
        velocities = momentum_buffers if group["momentum"] > 0 else none
        means = grad_avgs if group["centered"] else none
        states = zip(square_avgs, velocities, means, strict=True)
        return list(map(Row, params, grads, states, steps))

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        own = kernel("rmsprop_numbers")(
            float(group["alpha"]), group["eps"], float(group["momentum"]), group["centered"]
        )
        return self._common_numbers(group, float(group["weight_decay"])) + own

    def _formula(self, *args: Any) -> None:
        rmsprop(*args)


def rmsprop(
    rows: list[Row],
    group: dict[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
) -> None:
    """One step for rows of a group, whose states are square_avg, momentum_buffer and grad_avg."""
    if group["foreach"] and group["differentiable"]:
        raise AssertionError("_foreach ops don't support autograd")  # torch's
    check_capturable(rows, group)
    rows = as_real(rows)
    advance([row.step for row in rows])
    if runs_foreach(rows, group, grad_scale, found_inf):
        for p, g, v, b, mean, _ in alike(rows):
            foreach_rmsprop_update(p, g, v, b, mean, clip, group)
        return
    devices = {row.param.device: () for row in rows}
    arguments = {
        device: (
            on_device(clip, device),
            to_scalar(group["lr"]),
            group["alpha"],
            group["eps"],
            group["weight_decay"] or None,
            group["momentum"] or None,
            group["maximize"],
            group["differentiable"],
        )
        for device in devices
    }
    update_each(rmsprop_update, rows, [arguments[row.param.device] for row in rows], group)


def rmsprop_update(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor | None,
    grad_avg: Tensor | None,
    clip: Tensor | None,
    lr: Scalar,
    alpha: Scalar,
    eps: float,
    weight_decay: float | None,
    momentum: float | None,
    maximize: bool,
    differentiable: bool,
) -> None:
    """One tensor's step, in place; ``clip`` is a factor on the gradient."""
    state = [param, square_avg, momentum_buffer, grad_avg]
    work = workspace(state, None, differentiable)
    p, v, b, mean = work
    g = unscaled(grad, None, None, clip)
    if maximize:
        g = -g
    if weight_decay is not None:
        g = add(g, p, weight_decay)
    addcmul_(v.mul_(alpha), g, g, 1 - alpha)
    if mean is None:
        denominator = v.sqrt()
    else:
        mean.lerp_(g, weight(1 - alpha, mean))
        denominator = v.addcmul(mean, mean, value=-1).sqrt_()
    # a square root's gradient needs its result
    denominator = denominator + eps if differentiable else denominator.add_(eps)
    if b is None:
        addcdiv_(p, g, denominator, -lr)
    else:
        b.mul_(momentum).addcdiv_(g, denominator)
        add_(p, b, -lr)
    store(state, work, None)


def foreach_rmsprop_update(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    grad_avgs: list[Tensor],
    clip: Tensor | None,
    group: dict[str, Any],
) -> None:
    """:func:`rmsprop_update` on lists of tensors of one device and type."""
    lr, alpha = to_scalar(group["lr"]), group["alpha"]
    if clip is not None:
        grads = list(torch._foreach_mul(grads, clip.to(grads[0].device)))
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if group["weight_decay"] != 0:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    torch._foreach_mul_(square_avgs, alpha)
    torch._foreach_addcmul_(square_avgs, grads, grads, value=1 - alpha)
    if group["centered"]:
        torch._foreach_lerp_(grad_avgs, grads, 1 - alpha)
        denominators = torch._foreach_addcmul(square_avgs, grad_avgs, grad_avgs, value=-1)
        torch._foreach_sqrt_(denominators)
    else:
        denominators = torch._foreach_sqrt(square_avgs)
    torch._foreach_add_(denominators, group["eps"])
    if group["momentum"] > 0:
        torch._foreach_mul_(momentum_buffers, group["momentum"])
        torch._foreach_addcdiv_(momentum_buffers, grads, denominators)
        foreach_add_(params, momentum_buffers, -lr)
    elif is_number(lr):
        torch._foreach_addcdiv_(params, grads, denominators, value=-lr)
    else:
        torch._foreach_div_(denominators, -lr)
        torch._foreach_addcdiv_(params, grads, denominators)
