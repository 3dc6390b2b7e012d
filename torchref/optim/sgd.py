"""Stochastic gradient descent, with momentum."""

# torch._foreach_* is how torch.optim itself works on lists; it has no public name.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _to_scalar, _use_grad_for_differentiable, _view_as_real

from torchref.dispatch import accelerated
from torchref.optim._update import (
    Scalar,
    add,
    add_,
    by_device_and_dtype,
    flat,
    foreach_add_,
    on_device,
    runs_foreach,
    store,
    unscaled,
    workspace,
)


class SGD(torch.optim.SGD):
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
        fused: one pass for each tensor, with GradScaler's scale and overflow check inside it.
        lr_in_velocity: the course's momentum. It is written to the param groups, and so to the
            state_dict, only where it is on: without it the state_dict is torch's to the key. A
            state_dict from torch.optim.SGD carries torch's momentum with it, as it carries its
            other options. torch.optim.SGD accepts a state_dict with the key but ignores it, and
            would multiply the velocity by the learning rate again.

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
    ) -> None:
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
        if lr_in_velocity:
            self.defaults["lr_in_velocity"] = True
            for group in self.param_groups:
                group.setdefault("lr_in_velocity", True)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returns, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            buffers: list[Tensor | None] = []
            has_sparse_grad = self._init_group(group, params, grads, buffers)
            if has_sparse_grad and group["fused"]:
                raise RuntimeError("`_fused_sgd` does not support sparse gradients")  # torch's
            grad_scale = getattr(self, "grad_scale", None)
            found_inf = getattr(self, "found_inf", None)
            sgd(params, grads, buffers, grad_scale, found_inf, group)
            if group["momentum"] != 0:
                for param, buffer in zip(params, buffers, strict=True):
                    self.state[param]["momentum_buffer"] = buffer
        return loss


def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    group: dict[str, Any],
) -> None:
    """One step for a group's tensors; ``buffers`` is empty without momentum.

    A buffer that is None starts here, at its first gradient, undampened, as torch's does.
    """
    starts = [buffer is None for buffer in buffers] or [False] * len(params)
    for i, buffer in enumerate(buffers):
        if buffer is None:  # zeros, so that an overflow in the first step leaves no trace
            buffers[i] = torch.zeros_like(grads[i].detach())
    params, grads, velocities = list(params), list(grads), list(buffers)
    sparse = any(grad.is_sparse for grad in grads)
    if not sparse:
        _view_as_real(params, grads, *([velocities] if velocities else []))
    if not sparse and runs_foreach(params, group, grad_scale, found_inf):
        for start in set(starts):
            lists = [_where(x, starts, start) for x in (params, grads, velocities)]
            for p, g, v in by_device_and_dtype(lists):
                foreach_sgd_update(p, g, v, start, group)
        return
    for i, param in enumerate(params):
        lr, momentum, gain, weight_decay, lr_in_velocity = _hyperparameters(group, starts[i])
        sgd_update(
            *flat(param, grads[i], velocities[i] if velocities else None),
            on_device(grad_scale, param),
            on_device(found_inf, param),
            lr,
            momentum,
            gain,
            weight_decay,
            lr_in_velocity,
            group["nesterov"],
            group["maximize"],
            starts[i] and group["differentiable"],
            group["differentiable"],
        )


@accelerated("multi_tensor")
def sgd_update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
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
        gain: the share of the gradient that enters the velocity.
        detached: autograd sees a velocity without its first gradient, as in torch.
    """
    state = [param, momentum_buffer]
    work = workspace(state, found_inf, differentiable)
    p, v = work
    g = unscaled(grad, grad_scale, found_inf)
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
    group: dict[str, Any],
) -> None:
    """:func:`sgd_update` on lists of tensors of one device and type."""
    lr, momentum, gain, weight_decay, lr_in_velocity = _hyperparameters(group, start)
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
        _to_scalar(group["lr"]),
        group["momentum"],
        1.0 if start else 1.0 - group["dampening"],
        None if group["weight_decay"] == 0 else group["weight_decay"],
        group.get("lr_in_velocity", False),
    )


def _where(tensors: list[Any], starts: list[bool], start: bool) -> list[Any]:
    return [x for x, starts_here in zip(tensors, starts, strict=False) if starts_here == start]
