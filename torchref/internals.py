"""Every private name of torch's that torchref relies on, and what it does without it.

A name is looked up once, when this module is imported (the compiler's at the first compilation).
Where a release of torch has lost it, its stand-in takes its place, and a warning says so. A
stand-in gives the same numbers by a longer way, or a more careful one: where nothing tells whether
something looks on, formulas run instead of kernels.

Other files use private names of three kinds, which have no stand-in and need none (``SHARED``):

- what torch's public classes share with their subclasses: the methods that these extend, and the
  dictionaries that are in every pickled module;
- marks that schedulers and scalers read and that do nothing where nobody reads them;
- ``torch._foreach_*``, operators on lists: torch's public ``foreach=True`` is made of them.

``torchref.triton_kernels`` imports torch and triton alone. The one name that it needs,
``FakeTensor``, has its stand-in in ``_launch.py``.
"""

import contextlib
import functools
import pkgutil
import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

SHARED = {
    "_init_group",
    "_load_from_state_dict",
    "_check_input_dim",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_opt_called",
    "_wrapped_by_lr_sched",
    "_step_supports_amp_scaling",
}


def found(name: str, stand_in: Any) -> Any:
    """What ``module:name`` stands for, or its stand-in where torch has no such name."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        warnings.warn(
            f"torchref: torch {torch.__version__} has no {name}: done without, which may be slower",
            stacklevel=2,
        )
        return stand_in


def yes(*_: Any) -> bool:
    return True


# What looks on: transforms of torch.func (vmap, grad, jvp), __torch_dispatch__ modes, autocast of
# any device. "Yes" takes the formula, and the longer way through autograd.
are_transforms_active: Callable[[], bool] = found("torch._C:_are_functorch_transforms_active", yes)
count_dispatch_modes: Callable[[], int] = found("torch._C:_len_torch_dispatch_stack", yes)
is_any_autocast_enabled: Callable[[], bool] = found("torch._C:_is_any_autocast_enabled", yes)

# The level of forward-mode AD, -1 outside. Where it is unknown, torch differentiates the formulas.
if found("torch.autograd.forward_ad:_current_level", None) is None:

    def differentiates_forward() -> bool:
        """Whether torch itself must see primitive operations."""
        return True

else:

    def differentiates_forward() -> bool:
        """Whether torch itself must see primitive operations: in forward-mode AD and jit.trace."""
        tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        return tracing or forward_ad._current_level >= 0


def _has_readable_storage(x: Tensor) -> bool:
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


# Whether a tensor has memory at all; what tells one storage from another; whether one stands for
# many, as under `is_grads_batched=True`, torch's vmap of before torch.func; views, and writes.
has_storage: Callable[[Tensor], bool] = found("torch._C:_has_storage", _has_readable_storage)
storage_key: Callable[[Any], int] = (  # of an untyped storage
    torch.UntypedStorage.data_ptr
    if found("torch:UntypedStorage._cdata", None) is None
    else attrgetter("_cdata")
)
is_batched_gradient: Callable[[Tensor], bool] = found(
    "torch._C._functorch:is_legacy_batchedtensor", lambda x: not has_storage(x)
)
if None in (found("torch:Tensor._is_view", None), found("torch:Tensor._base", None)):

    def may_be_view(x: Tensor) -> bool:
        """Whether an in-place operation on ``x`` may write into another tensor."""
        return True

    def base_of(x: Tensor) -> Tensor:
        """``x`` itself: where it is a view of a leaf, autograd refuses once it is written."""
        return x

else:

    def may_be_view(x: Tensor) -> bool:
        """Whether an in-place operation on ``x`` writes into another tensor."""
        return x._is_view()

    def base_of(x: Tensor) -> Tensor:
        """The tensor that ``x`` is a view of, ``x`` itself where it is none."""
        return x._base if x._is_view() and x._base is not None else x


if found("torch:Tensor._version", None) is None:

    def was_written(x: Tensor, before: Tensor) -> bool:
        """Whether a copy of ``before`` has other values by now."""
        return not torch.isclose(x, before, rtol=0.0, atol=0.0, equal_nan=True).all()

else:

    def was_written(x: Tensor, before: Tensor) -> bool:
        """Whether something wrote into a copy of ``before`` since it was made."""
        return x._version > 0


# Backward passes: whether another one will follow; what saves tensors for one, as checkpoints do.
keeps_graph: Callable[[], bool] = found(
    "torch._C._autograd:_get_current_graph_task_keep_graph", yes
)
_saved_tensors_hooks: Callable[[bool], Any] | None = found(
    "torch._C._autograd:_top_saved_tensors_default_hooks", None
)


def may_be_checkpointed() -> bool:
    """Whether ``torch.utils.checkpoint`` will run this part of a forward pass again."""
    if _saved_tensors_hooks is None:
        return True
    hooks = _saved_tensors_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


# The compiler. `torch.compiler.disable` would import Dynamo, which takes seconds.
disable_dynamo: Callable[[Callable[..., Any]], Any] = found(
    "torch:_disable_dynamo", torch.compiler.disable
)


@functools.cache
def inductor() -> Callable[..., Any] | None:
    """Inductor as a function of a graph; without it, torch.compile runs it itself at every call."""
    return found("torch._inductor.compile_fx:compile_fx", None)  # slow to import


def constant_floats() -> contextlib.AbstractContextManager[Any]:
    """Dynamo takes floats in the code for constants; otherwise it makes inputs of some."""
    patch = _dynamo_patch()
    return contextlib.nullcontext() if patch is None else patch(specialize_float=True)


@functools.cache
def _dynamo_patch() -> Callable[..., Any] | None:
    known = found("torch._dynamo.config:specialize_float", None) is not None
    return found("torch._dynamo.config:patch", None) if known else None


# Base classes that torch gives no public name.
if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
    from torch.nn.modules.conv import _ConvNd as AnyConv
    from torch.nn.modules.conv import _ConvTransposeNd as AnyConvTranspose
else:
    TorchBatchNorm = found("torch.nn.modules.batchnorm:_BatchNorm", nn.BatchNorm1d.__base__)
    AnyConvTranspose = found(
        "torch.nn.modules.conv:_ConvTransposeNd",
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
    AnyConv = found(
        "torch.nn.modules.conv:_ConvNd", (nn.Conv1d, nn.Conv2d, nn.Conv3d, AnyConvTranspose)
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called; without the name, it is not seen."""
    return getattr(module, "_compiled_call_impl", None) is not None


def local_part(x: Any) -> Tensor:
    """What this process has of a DTensor."""
    if (part := getattr(x, "_local_tensor", None)) is not None:
        return part
    with torch.no_grad():
        return x.to_local()


# Optimizers.


def _step_with_grad_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return wrapper


def _grouped(lists: list[list[Any]], *_: Any) -> dict[Any, tuple[list[list[Any]], list[int]]]:
    places: dict[Any, list[int]] = {}
    for place, x in enumerate(lists[0]):
        places.setdefault((x.device, x.dtype), []).append(place)
    return {
        key: ([[column[i] for i in found] if column else [] for column in lists], found)
        for key, found in places.items()
    }


# A step in the grad mode that `differentiable` asks for; torch's refusal to capture a graph without
# `capturable`, and the devices that have graphs; hooks of a class's steps; tensors by device and
# type; where torch works on lists of tensors: without the names only where asked to.
step_with_grad_mode: Callable[..., Any] = found(
    "torch.optim.optimizer:_use_grad_for_differentiable", _step_with_grad_mode
)
check_graph_capture: Callable[[Any], None] = found(
    "torch.optim:Optimizer._accelerator_graph_capture_health_check", lambda optimizer: None
)
devices_of_graphs: Callable[[], list[str]] = found(
    "torch.optim.optimizer:_get_capturable_supported_devices", lambda: ["cuda", "xpu"]
)
hook_step: Callable[[Any], None] = found(
    "torch.optim:Optimizer._patch_step_function", lambda optimizer: None
)
grouped_by_device_and_dtype: Callable[[Any], dict[Any, Any]] = found(
    "torch.optim:Optimizer._group_tensors_by_device_and_dtype", _grouped
)
default_to_fused_or_foreach: Callable[..., tuple[bool, bool]] = found(
    "torch.optim.optimizer:_default_to_fused_or_foreach", lambda *_, **__: (False, False)
)
device_takes_lists: Callable[[torch.device], bool] = found(
    "torch.utils._foreach_utils:_device_has_foreach_support",
    lambda device: device.type in ("cpu", "cuda"),
)
are_worth_lists: Callable[[list[Tensor], torch.device], bool] = found(
    "torch.utils._foreach_utils:_has_foreach_support", lambda *_: False
)

# Nested arguments.


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    return [tree]


def _mapped(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return type(tree)((key, _mapped(kind, function, x)) for key, x in tree.items())
    if isinstance(tree, list | tuple):
        branches = [_mapped(kind, function, x) for x in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    return tree


tree_leaves: Callable[[Any], list[Any]] = found("torch.utils._pytree:tree_leaves", _leaves)
tree_map_only: Callable[..., Any] = found("torch.utils._pytree:tree_map_only", _mapped)
