"""What the optimizers share: the choice of implementation, and in-place arithmetic.

An update computes in its state tensors. It computes in copies, written back at the end, where
autograd saves values that the next operation would overwrite, where an overflow may yet undo the
step, and for half types, which are computed in float32 and rounded once.
"""

# torch._foreach_* is how torch.optim itself works on lists; it has no public name.
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVarTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _default_to_fused_or_foreach,
    _get_capturable_supported_devices,
)

from torchref.autograd import opmath
from torchref.dispatch import get_backend

# A hyperparameter: a number, or a tensor of one element where torch allows it.
Scalar = float | Tensor

Tensors = Sequence[Tensor | None]

Ts = TypeVarTuple("Ts")


def runs_foreach(
    params: list[Tensor],
    group: dict[str, Any],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> bool:
    """Whether an update takes whole lists of tensors (``torch._foreach_*``) or one at a time.

    Torch's choice, with three exceptions that go one at a time: half types, whose float32 copies
    would otherwise exist for all parameters at once; a step that GradScaler may yet undo; and the
    backends that bring their own pass over a tensor.
    """
    foreach, differentiable = group["foreach"], group["differentiable"]
    if foreach is None and group.get("fused") is None:
        _, foreach = _default_to_fused_or_foreach(params, differentiable, use_fused=False)
        if isinstance(group["lr"], Tensor) and not group.get("capturable"):
            foreach = False  # as torch: lists take their scale from the host
    if not foreach or differentiable or grad_scale is not None or found_inf is not None:
        return False
    if any(param.dtype in (torch.float16, torch.bfloat16) for param in params):
        return False
    # Dynamo cannot trace the look at the backend, and needs none: it compiles the formula anyway.
    return torch.compiler.is_compiling() or get_backend() in ("auto", "reference")


def by_device_and_dtype(lists: list[list[Any]]) -> list[list[list[Any]]]:
    """The lists, split so that in each part all tensors share device and type."""
    groups = Optimizer._group_tensors_by_device_and_dtype(cast(Any, lists))
    return [cast(list[list[Any]], part) for part, _ in groups.values()]


def check_capturable(params: list[Tensor], steps: list[Tensor], group: dict[str, Any]) -> None:
    """Raise torch's error where ``capturable=True`` meets tensors no graph can capture."""
    if torch.compiler.is_compiling() or not group["capturable"]:
        return
    devices = _get_capturable_supported_devices()
    for param, step in zip(params, steps, strict=True):
        if param.device.type != step.device.type or param.device.type not in devices:
            raise AssertionError(
                "If capturable=True, params and state_steps must be on supported devices: "
                f"{devices}."
            )


def advance(steps: list[Tensor]) -> None:
    """Count one step."""
    if steps and steps[0].is_cpu and not torch.compiler.is_compiling():
        # A tensor, or the list operation would wrap the number once for each step.
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    elif steps:
        torch._foreach_add_(steps, 1)


def uncount(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Take the count back where the gradients overflowed."""
    if found_inf is not None:
        for step in steps:
            step.sub_((found_inf > 0).to(step))


def step_number(step: Tensor) -> Scalar:
    """The step as a number where that costs no host sync, else a float64 tensor.

    In float32, 1 - 0.999 ** step loses four digits.
    """
    if step.is_cpu and not torch.compiler.is_compiling():
        return step.item()
    return step.double()


def on_device(flag: Tensor | None, param: Tensor) -> Tensor | None:
    return None if flag is None else flag.to(param.device, non_blocking=True)


def flat(*tensors: *Ts) -> tuple[*Ts]:
    """1-D aliases for the compiled backend, so that one compilation serves tensors of every rank.

    Tensors that are not laid out alike, or have no plain storage, stay as they are.
    """
    if torch.compiler.is_compiling() or get_backend() != "compiled":
        return tensors
    given = [x for x in tensors if isinstance(x, Tensor)]
    if not all(map(_is_plain, given)) or not _laid_out_alike(given):
        return tensors
    # Not views: Dynamo would guard on the rank of a view's base.
    aliases = tuple(_alias(x) if isinstance(x, Tensor) else x for x in tensors)
    torch.autograd.graph.increment_version(given)
    return cast(tuple[*Ts], aliases)


def _is_plain(x: Tensor) -> bool:
    lazy = x.is_neg() or x.is_conj() or x.is_inference()
    return type(x) in (Tensor, Parameter) and x.layout == torch.strided and not lazy


def _laid_out_alike(tensors: list[Tensor]) -> bool:
    if all(x.is_contiguous() for x in tensors):
        return True
    first = tensors[0]
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    dense = first.permute(order).is_contiguous()
    return dense and all(x.stride() == first.stride() for x in tensors)


def _alias(x: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=x.dtype, device=x.device)
    return empty.set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))


def workspace(state: Tensors, found_inf: Tensor | None, differentiable: bool) -> list[Any]:
    """What the update computes in: the state itself, or copies; see the module's docstring."""
    copies = differentiable or found_inf is not None
    return [
        None if x is None else opmath(x).clone() if copies and opmath(x) is x else opmath(x)
        for x in state
    ]


def store(state: Tensors, work: Tensors, found_inf: Tensor | None) -> None:
    """Write copies back to the state, except where the gradients overflowed."""
    for x, new in zip(state, work, strict=True):
        if x is not None and new is not None and new is not x:
            x.copy_(new if found_inf is None else torch.where(found_inf > 0, x, new))


def unscaled(grad: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """The gradient without its loss scale, which torch's fused updates also store in ``grad``."""
    g = opmath(grad)
    if grad_scale is not None:
        g = g / grad_scale
        store([grad], [g], found_inf)
    return g


def add(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """``x + scale * y``; ``y`` may change in place afterwards."""
    return x.add(y, alpha=scale) if is_number(scale) else x + y.clone() * scale


def add_(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """``x += scale * y``."""
    return x.add_(y, alpha=scale) if is_number(scale) else x.add_(y * scale)


def foreach_add_(x: list[Tensor], y: list[Tensor], scale: Scalar) -> None:
    """``x += scale * y`` on lists."""
    if is_number(scale):
        torch._foreach_add_(x, y, alpha=scale)
    else:
        torch._foreach_add_(x, torch._foreach_mul(y, cast(Tensor, scale)))


def addcmul_(x: Tensor, a: Tensor, b: Tensor, scale: Scalar) -> Tensor:
    """``x += scale * a * b``."""
    if is_number(scale):
        return x.addcmul_(a, b, value=scale)
    return x.add_(a * scale * b)


def addcdiv_(x: Tensor, a: Tensor, b: Tensor, scale: Scalar) -> Tensor:
    """``x += scale * a / b``."""
    if is_number(scale):
        return x.addcdiv_(a, b, value=scale)
    return x.add_(a * scale / b)


def weight(scale: Scalar, x: Tensor) -> Any:
    """``scale`` as :meth:`torch.Tensor.lerp_` on ``x`` takes it: a number, or a tensor like x."""
    return scale.to(x.device, x.dtype) if isinstance(scale, Tensor) else scale


def is_number(scale: Scalar) -> TypeGuard[float]:
    """Whether torch may read the scale on the host: free, and neither traced nor differentiated."""
    return not isinstance(scale, Tensor) or (
        scale.is_cpu and not scale.requires_grad and not torch.compiler.is_compiling()
    )
