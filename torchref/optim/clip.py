"""Gradient clipping by the norm of all gradients together."""

# torch._foreach_* is how torch.optim itself works on lists; it has no public name.
# pyright: reportPrivateImportUsage=false

import math
import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from torchref.internals import are_worth_lists, device_takes_lists
from torchref.optim._one_launch import GradsInOneLaunch
from torchref.optim._update import by_device_and_dtype, clip_factor


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale gradients down, in place, so that their norm as one vector is at most ``max_norm``.

    .. math::
        g \leftarrow g \cdot \min\Big(1, \frac{c}{\lVert g \rVert_p + 10^{-6}}\Big)

    Norms of half-precision gradients are accumulated in float32. The host waits for the device
    only under ``error_if_nonfinite``.

    Args:
        parameters: the tensors whose ``.grad`` is scaled, or one such tensor.
        max_norm: :math:`c`, the largest norm to leave as it is.
        norm_type: :math:`p`, which may be ``inf``.
        error_if_nonfinite: raise where the norm is NaN or infinite, and leave the gradients be.
            Otherwise they are scaled by it: an infinite norm makes them 0 or NaN.
        foreach: work on lists of tensors; None does so where torch can.

    Returns:
        The norm before clipping, a tensor of no dimensions in the gradients' type.

    Raises:
        ValueError: ``max_norm`` is negative, or it or ``norm_type`` is NaN.
        TypeError: ``parameters`` is a module.
        RuntimeError: the norm is not finite under ``error_if_nonfinite``, or ``foreach=True`` on a
            device without such operations.

    Example:
        >>> import torch, torchref
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> torchref.optim.clip_grad_norm_([w], max_norm=1.0)
        tensor(5.)
        >>> w.grad
        tensor([0.6000, 0.8000])

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
    2013.
    """
    max_norm, norm_type = float(max_norm), float(norm_type)
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm_: expected `max_norm` >= 0, got {max_norm}")
    if math.isnan(norm_type):
        raise ValueError(f"clip_grad_norm_: expected a number `norm_type`, got {norm_type}")
    grads = [x.grad for x in _listed(parameters) if x.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    parts = _parts(grads, norm_type, foreach)
    norm = _norm(parts, norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from "
            "`parameters` is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, "
            "set `error_if_nonfinite=False`"
        )
    for part in parts:
        part.clip_(norm, max_norm)
    return norm.to(_norm_dtype(grads))


def total_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector, on the first one's device."""
    return _norm(_parts(grads, 2.0, None), 2.0)


class _Part:
    """Gradients of one device and type."""

    def __init__(self, grads: list[Tensor], norm_type: float, foreach: bool | None) -> None:
        self.grads, self.norm_type, self.foreach = grads, norm_type, foreach
        self.launch = GradsInOneLaunch.of(grads) if norm_type == 2 else None

    def norms(self) -> list[Tensor]:
        """The norm of all, or the norm of each."""
        if self.launch is not None:
            return [self.launch.norm()]
        half = self.grads[0].dtype in (torch.float16, torch.bfloat16)
        wide = torch.float32 if half else None
        if _in_lists(self.grads, self.foreach):
            return list(torch._foreach_norm(self.grads, self.norm_type, dtype=wide))
        return [torch.linalg.vector_norm(g, self.norm_type, dtype=wide) for g in self.grads]

    def clip_(self, norm: Tensor, max_norm: float) -> None:
        norm = norm.to(self.grads[0].device)
        if self.launch is not None:
            self.launch.clip_(norm, max_norm)
            return
        scale = clip_factor(norm, max_norm)
        if _in_lists(self.grads, self.foreach):
            torch._foreach_mul_(self.grads, scale)
        else:
            for g in self.grads:
                g.mul_(scale)


def _parts(grads: list[Tensor], norm_type: float, foreach: bool | None) -> list[_Part]:
    return [_Part(part, norm_type, foreach) for part in by_device_and_dtype(grads)]


def _norm(parts: list[_Part], norm_type: float) -> Tensor:
    device = parts[0].grads[0].device
    norms = [norm.to(device) for part in parts for norm in part.norms()]
    if len(parts) == 1 and parts[0].launch is not None:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _in_lists(grads: list[Tensor], foreach: bool | None) -> bool:
    device = grads[0].device
    if foreach and not device_takes_lists(device):
        raise RuntimeError(
            f"foreach=True was passed, but can't use the foreach API on {device.type} tensors"
        )
    return are_worth_lists(grads, device) if foreach is None else foreach


def _norm_dtype(grads: list[Tensor]) -> torch.dtype:
    """The real type that the norm of all gradients has in torch."""
    dtype = grads[0].dtype
    for g in grads[1:]:
        dtype = torch.promote_types(dtype, g.dtype)
    return dtype.to_real()


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, torch.nn.Module):
        raise TypeError(
            "clip_grad_norm_: expected tensors as `parameters`, such as model.parameters(), got "
            f"{type(parameters).__name__}"
        )
    listed = list(parameters)
    if not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4
        )
    return listed
