"""The base class of every hand-written gradient, and the arithmetic type of the formulas."""

from typing import Any

import torch
from torch import Tensor

from torchref import dispatch
from torchref.compilation import traces_formula
from torchref.internals import (
    are_transforms_active,
    base_of,
    differentiates_forward,
    is_any_autocast_enabled,
)


class Function(torch.autograd.Function):
    """A :class:`torch.autograd.Function` that works under everything PyTorch users do to models.

    A piece writes ``forward(*args)``, ``setup_context(ctx, args, output)`` and
    ``backward(ctx, *grads)``, and is run by :meth:`call`. From these follow

    - under ``torch.func`` and ``torch.compile`` the Function as written, with a vmap rule;
    - in plain eager a twin in the older ``forward(ctx, *args)`` form, four times cheaper to call;
    - where nothing needs a gradient, ``forward`` alone;
    - under forward-mode AD, ``forward`` alone, whose primitive operations torch differentiates.

    In ``backward`` grad mode is on exactly under ``create_graph=True``. Then autograd records what
    ``backward`` does, so it may use saved inputs and outputs but no other intermediate.
    """

    generate_vmap_rule = True
    _eager: type[torch.autograd.Function]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward, setup_context, backward = cls.forward, cls.setup_context, cls.backward

        def eager_forward(ctx, *args):
            output = forward(*args)
            setup_context(ctx, args, output)
            ctx.backend = dispatch.get_backend()
            return output

        def eager_backward(ctx, *grads):
            with dispatch.kept(ctx.backend):
                return backward(ctx, *grads)

        methods = {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)}
        cls._eager = type(cls.__name__, (torch.autograd.Function,), methods)

    @classmethod
    def call(cls, *args: Any) -> Any:
        """``forward(*args)``, recorded where a gradient is needed."""
        if is_any_autocast_enabled():
            # Inputs are cast by now; the formulas' own operations must not be cast again.
            device = _device_type(args)
            if _has_autocast(device):
                with torch.autocast(device, enabled=False):
                    return cls._call(*args)
        return cls._call(*args)

    @classmethod
    def _call(cls, *args: Any) -> Any:
        if differentiates_forward():
            return cls.forward(*args)
        if torch.compiler.is_compiling() or are_transforms_active():
            return cls.apply(*args)
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            return cls._eager.apply(*args)
        return cls.forward(*args)


def traces_in_place() -> bool:
    """Whether an in-place piece must write its result back with ``copy_`` instead of a Function."""
    return torch.compiler.is_compiling() or are_transforms_active() or differentiates_forward()


def refuse_leaf(input: Tensor, inplace: bool) -> None:
    """Raise, before anything is written, where autograd would refuse after."""
    if inplace and input.requires_grad and torch.is_grad_enabled():
        base = base_of(input)
        if base.is_leaf:
            which = "a view of a leaf" if base is not input else "a leaf"
            raise RuntimeError(
                f"{which} Variable that requires grad is being used in an in-place operation."
            )


def attached(dx: Tensor, x: Tensor) -> Tensor:
    """``dx``, whose own gradient for ``x`` is zero, but is not missing, under ``create_graph``."""
    if not torch.is_grad_enabled():
        return dx
    return torch.where(torch.ones_like(x, dtype=torch.bool), dx, x)


def _device_type(args: tuple[Any, ...]) -> str:
    return next(arg.device.type for arg in args if isinstance(arg, Tensor))


def _has_autocast(device: str) -> bool:
    # Dynamo in torch 2.11 cannot trace torch's answer, and compiles for devices that have it.
    if torch.compiler.is_compiling():
        return device != "meta"
    return torch.amp.is_autocast_available(device)


def opmath(x: Tensor) -> Tensor:
    """``x`` in the type that formulas compute in: float32 for the half types, else its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def summed(x: Tensor) -> Tensor:
    """The sum over the first dimension.

    Inductor's code for a CPU adds one row after the other, so that many rows round often: our
    compiled formulas add 64 at a time first. In eager torch does so itself.
    """
    rows = x.shape[0]
    if not (traces_formula() and x.is_cpu) or rows < 128:
        return x.sum(0)
    whole = rows // 64 * 64
    parts = x[:whole].unflatten(0, (whole // 64, 64)).sum(1)
    return summed(parts) + x[whole:].sum(0)


def rounded(y: Tensor, like: Tensor) -> Tensor:
    """``y`` in the type of ``like``.

    ``y`` itself where it has it: with ``y.to`` as a Function's last operation, which then returns
    an alias, torch.compile in torch 2.11 loses the gradient without a word.
    """
    return y if y.dtype == like.dtype else y.to(like.dtype)


# torch's autocast lists (aten/src/ATen/autocast_mode.h): the pieces that run in float32 under
# autocast on each kind of device. The others keep their input's type.
_FLOAT32 = {
    "cuda": {
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "l1_loss",
        "log_softmax",
        "mse_loss",
        "nll_loss",
        "softmax",
        "softplus",
    },
    "cpu": {
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "l1_loss",
        "mse_loss",
        "nll_loss",
    },
}


def autocast(piece: str, *tensors: Any) -> tuple[Any, ...]:
    """The tensors as torch's autocast would hand them to ``piece``; None stays None."""
    device = tensors[0].device.type
    if not is_any_autocast_enabled() or not _has_autocast(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    if piece == "binary_cross_entropy" and device == "cuda":
        raise RuntimeError(
            "binary_cross_entropy: unsafe under autocast on a GPU, where `input` may have been "
            "rounded to 0 or 1; use binary_cross_entropy_with_logits, on what sigmoid got"
        )
    if piece == "linear":
        dtype = torch.get_autocast_dtype(device)
    elif piece in _FLOAT32.get(device, ()):
        dtype = torch.float32
    else:
        return tensors
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )
