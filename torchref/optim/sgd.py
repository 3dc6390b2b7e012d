"""Stochastic gradient descent, with momentum."""

# torch._foreach_* is how torch.optim itself works on lists; it has no public name.
# pyright: reportPrivateImportUsage=false

import itertools
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
    alike,
    as_real,
    foreach_add_,
    on_device,
    runs_foreach,
    store,
    to_scalar,
    unscaled,
    update_each,
    workspace,
)


class SGD(Optimizer, torch.optim.SGD):
    r"""Drop-in for :class:`torch.optim.SGD`, with the course's momentum on request.

    .. math::
        v_t &= \gamma v_{t-1} + (1 - \tau)\, g_t, \qquad v_1 = g_1 \\
        \theta_t &= \theta_{t-1} - \eta v_t

    with :math:`g_t` the gradient, negated under ``maximize``, plus :math:`\lambda\theta_{t-1}`.
    Under ``nesterov``, :math:`g_t + \gamma v_t` takes :math:`v_t`'s place in the second line.

    With ``lr_in_velocity`` the learning rate enters the velocity, as in the course:

    .. math::
        v_t &= \gamma v_{t-1} + \eta_t g_t \\
        \theta_t &= \theta_{t-1} - v_t

    While :math:`\eta` is constant both take the same steps. When a schedule changes it, torch's
    form rescales the steps already in flight and the course's form does not.

    Half-precision parameters are computed in float32 and rounded once per step.

    Args:
        params: the tensors to optimize, named or not, or dicts of them with options of their own.
        lr: learning rate :math:`\eta \ge 0`.
        momentum: :math:`\gamma \ge 0`, the share of the velocity kept each step.
        dampening: :math:`\tau`, the share of the gradient kept out of the velocity.
        weight_decay: :math:`\lambda \ge 0`. The penalty :math:`\lambda' \sum \theta^2` has
            :math:`\lambda = 2 \lambda'`.
        nesterov: look ahead by the velocity; needs momentum and no dampening.
        maximize: ascend instead of descend.
        foreach: work on lists of tensors; None lets torch choose.
        differentiable: let autograd record the step.
        fused: one pass over memory, with GradScaler's scale and overflow check inside it; on the
            CPU compiled, which takes some seconds in the first step. On a GPU the step is one
            launch with or without it.
        lr_in_velocity: the course's momentum. It is written to the param groups, and so to the
            state_dict, only where it is on: without it the state_dict is torch's to the key. A
            state_dict from torch.optim.SGD carries torch's momentum with it, as it carries its
            other options. torch.optim.SGD accepts a state_dict with the key but ignores it, and
            would multiply the velocity by the learning rate again.
        max_norm, ema_decay, ema_bias_correction, state_dtype: as in :class:`Adam`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: the flags exclude each other, or a gradient is sparse under ``fused``.

    Example:
        >>> import torch, torchref
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torchref.optim.SGD([w], lr=0.1, momentum=0.5)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     (2 * w).sum().backward()
        ...     optimizer.step()  # by 0.1 * 2, then by 0.1 * (0.5 * 2 + 2)
        >>> w.data
        tensor([0.5000])

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964;
    Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Scalar = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        lr_in_velocity: bool = False,
        max_norm: float | None = None,
        ema_decay: float | None = None,
        ema_bias_correction: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._check_numbers(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay
        )
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._add_options(
            max_norm,
            ema_decay,
            ema_bias_correction,
            state_dtype,
            lr_in_velocity=lr_in_velocity or None,
        )

    _kernel = "sgd_step"
    _state_keys = ("momentum_buffer", "ema", "ema_step")
    _loaded_options = ("lr", "momentum", "dampening", "weight_decay")

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        if options.get("nesterov") and (options["momentum"] == 0 or options["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")  # torch's

    def _rows(self, group: dict[str, Any]) -> list[Row]:
        """A buffer that is None starts here, at its first gradient, undampened, as torch's does."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)
        if has_sparse_grad and group["fused"]:
            raise RuntimeError("`_fused_sgd` does not support sparse gradients")  # torch's
        if not buffers:
            return list(map(Row, params, grads, itertools.repeat((None,))))
        rows = []
        for param, grad, buffer in zip(params, grads, buffers, strict=True):
            starts = buffer is None
            if buffer is None:  # zeros: after an overflow in the first step, the next is dampened
                buffer = self.state[param]["momentum_buffer"] = torch.zeros_like(grad.detach())
            rows.append(Row(param, grad, (buffer,), starts=starts))
        return rows

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        dampening = dampening if momentum else 0.0
        lr_in_velocity = group.get("lr_in_velocity", False)
        own = kernel("sgd_numbers")(momentum, dampening, group["nesterov"], lr_in_velocity)
        return self._common_numbers(group, float(group["weight_decay"])) + own

    def _formula(self, *args: Any) -> None:
        sgd(*args)


def sgd(
    rows: list[Row],
    group: dict[str, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
) -> None:
    """One step for rows of a group, whose state is the momentum's buffer."""
    sparse = any(row.grad.is_sparse for row in rows)
    if not sparse:
        rows = as_real(rows)
    for start in {row.starts for row in rows}:
        part = [row for row in rows if row.starts == start]
        if not sparse and runs_foreach(rows, group, grad_scale, found_inf):
            for p, g, v, _ in alike(part):
                foreach_sgd_update(p, g, v, start, clip, group)
            continue
        lr, momentum, gain, weight_decay, lr_in_velocity = _hyperparameters(group, start)
        arguments = {
            device: (
                *(on_device(x, device) for x in (grad_scale, found_inf, clip)),
                lr,
                momentum,
                gain,
                weight_decay,
                lr_in_velocity,
                group["nesterov"],
                group["maximize"],
                start and group["differentiable"],
                group["differentiable"],
            )
            for device in {row.param.device for row in part}
        }
        update_each(sgd_update, part, [arguments[row.param.device] for row in part], group)


def sgd_update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
    lr: Scalar,
    momentum: float,
    gain: float,
    weight_decay: Scalar | None,
    lr_in_velocity: bool,
    nesterov: bool,
    maximize: bool,
    detached: bool,
    differentiable: bool,
) -> None:
    """One tensor's step, in place.

    Args:
        clip: a factor on the gradient.
        gain: the share of the gradient that enters the velocity.
        detached: autograd sees a velocity without its first gradient, as in torch.
    """
    state = [param, momentum_buffer]
    work = workspace(state, found_inf, differentiable)
    p, v = work
    g = unscaled(grad, grad_scale, found_inf, clip)
    if maximize:
        g = -g
    if weight_decay is not None:
        g = add(g, p, weight_decay)
    if lr_in_velocity:
        g, lr = g * lr, 1.0
    if v is not None:
        add_(v.mul_(momentum), g.detach() if detached else g, gain)
        g = add(g, v, momentum) if nesterov else v
    add_(p, g, -lr)
    store(state, work, found_inf)


def foreach_sgd_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    start: bool,
    clip: Tensor | None,
    group: dict[str, Any],
) -> None:
    """:func:`sgd_update` on lists of tensors of one device and type."""
    lr, momentum, gain, weight_decay, lr_in_velocity = _hyperparameters(group, start)
    if clip is not None:
        grads = list(torch._foreach_mul(grads, clip.to(grads[0].device)))
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if weight_decay is not None:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    if lr_in_velocity:
        grads, lr = list(torch._foreach_mul(grads, lr)), 1.0
    if buffers:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=gain)
        nesterov = group["nesterov"]
        grads = list(torch._foreach_add(grads, buffers, alpha=momentum)) if nesterov else buffers
    foreach_add_(params, grads, -lr)


def _hyperparameters(group: dict[str, Any], start: bool) -> tuple[Any, ...]:
    """Learning rate, momentum, gain, weight decay and where the learning rate enters."""
    return (
        to_scalar(group["lr"]),
        group["momentum"],
        1.0 if start else 1.0 - group["dampening"],
        None if group["weight_decay"] == 0 else group["weight_decay"],
        group.get("lr_in_velocity", False),
    )
