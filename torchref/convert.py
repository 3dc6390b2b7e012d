"""Swap the modules of a model for ours in place, and back."""

import contextlib
import fnmatch
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import torchref.nn
from torchref.fuse import Fused, unfuse
from torchref.fuse import fuse as fuse_rows
from torchref.internals import is_compiled, may_be_checkpointed
from torchref.nn import functional


@dataclass(frozen=True)
class Report:
    """What :func:`convert` did, by name in the model; ``print`` shows it as a table.

    Args:
        swapped: the piece that each module, or function kept as an attribute, became.
        left: the class of each module that stayed, and why it did.
        already: how many modules were ours before.
        notes: what else one should know.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, tuple[str, str]] = field(default_factory=dict)
    already: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = Counter((piece, "swapped") for piece in self.swapped.values())
        counts.update((cls, f"left: {why}") for cls, why in self.left.values())
        width = max((len(cls) for cls, _ in counts), default=0)
        lines = [f"{cls:{width}} {count:5}  {what}" for (cls, what), count in counts.items()]
        if not self.swapped:
            lines.insert(0, f"nothing to swap; modules that were ours before: {self.already}")
        return "\n".join([*lines, *self.notes])


def convert(
    model: nn.Module,
    *,
    exclude: Iterable[str | type[nn.Module] | nn.Module] = (),
    functional: bool = False,
    fuse: bool = False,
) -> Report:
    """Make the modules of a model ours, in place, where their class is exactly torch's.

    Only ``__class__`` changes. Parameters, buffers, hooks, ``state_dict`` keys, training flags,
    shared modules and parametrizations stay, and so optimizers and checkpoints made before serve
    after. A lazy module becomes ours when it sees its first batch. A function of torch that a
    module keeps as an attribute, such as ``self.activation = F.relu``, is swapped too. Convert
    before DistributedDataParallel, FSDP or :func:`torch.compile`.

    Args:
        model: the model; it may be converted again, when modules were added.
        exclude: what to leave, with everything in it: names as in ``model.named_modules()`` or
            patterns of them (``"layer4.*"``), classes of modules, or modules.
        functional: whether ``F.relu(x)``, ``torch.relu(x)``, ``x.relu()`` and their kin run ours
            while ``model.forward`` does, in excluded modules too. It costs about a microsecond for
            each function of torch. What :mod:`torch.utils.checkpoint` computes again in backward,
            outside ``forward``, stays torch's, and so does what :func:`torch.compile` traces.

        fuse: whether a batch norm and the activation after it, and a linear layer, its activation
            and dropout, become one module where they stand in a row in an ``nn.Sequential``, have
            one place in the model and no hooks. The first module then returns what the last did;
            the others keep their names and do nothing. Dropout follows the linear layer's training
            flag. ``state_dict`` keys stay.

    Returns:
        What was swapped, and what was left and why.

    Raises:
        TypeError: ``model`` is no module, or wrapped for several devices or compiled; ``exclude``
            is no list, or a flag no bool.
        ValueError: ``exclude`` names a module that is not there.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())
        >>> print(torchref.convert(net))
        ReLU       1  swapped
        Conv2d     1  left: no piece here
        >>> type(net[1])
        <class 'torchref.nn.activation.ReLU'>
    """
    _check("convert", model)
    for name, flag in (("functional", functional), ("fuse", fuse)):
        if not isinstance(flag, bool):
            raise TypeError(f"convert: expected a bool as `{name}`, got {flag!r}")
    excluded = _excluded(model, exclude)
    swapped, left, already, notes = {}, {}, 0, []
    for name, module in model.named_modules():
        cls, piece = type(module), None
        if module not in excluded:
            for attribute, function in _swap_functions(module).items():
                swapped[f"{name}.{attribute}" if name else attribute] = function
            piece = _swap_class(module)
        if piece is not None:
            swapped[name] = piece
        elif _is_ours(module):
            already += 1
        elif why := _why_left(module, module in excluded):
            left[name] = (cls.__name__, why)
    if fuse:
        swapped |= fuse_rows(model)
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        notes.append(_FAST_PATH)
    if functional:
        notes.append("functions called in forward run ours")
        if not isinstance(model, _Routed):
            model.__class__ = _routed(type(model))
    return Report(swapped, left, already, tuple(notes))


def revert(model: nn.Module) -> None:
    """Undo :func:`convert`: make every module of ours torch's, in place.

    Tools that know modules by their exact class, such as torch's quantization, want it so.

    Raises:
        TypeError: as :func:`convert`.
        ValueError: a module has an option of ours that changes what it computes.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.ReLU())
        >>> report = torchref.convert(net)
        >>> torchref.revert(net)
        >>> type(net[0])
        <class 'torch.nn.modules.activation.ReLU'>
    """
    _check("revert", model)
    for name, module in model.named_modules():
        for option in _options(module):
            if (value := vars(module)[option]) != getattr(type(module), option):
                raise ValueError(f"revert: torch has no {option}={value!r}, as {name!r} has")
    for module in model.modules():
        unfuse(module)
        attributes = vars(module)
        for option in _options(module):
            del attributes[option]
        if attributes.get("cls_to_become") in THEIRS:
            del attributes["cls_to_become"]
        for name, function in attributes.pop(REPLACED, {}).items():
            if attributes.get(name) is FUNCTIONS[function]:
                attributes[name] = function
        module.__class__ = _rebased(type(module), _torchs)


# The classes of ours that have the name of the class of torch's that they derive from.
OURS: dict[type, type] = {
    getattr(nn, name): cls
    for name, cls in vars(torchref.nn).items()
    if isinstance(cls, type) and issubclass(cls, getattr(nn, name, ()))
}
OURS[nn.SyncBatchNorm] = torchref.nn.SyncBatchNorm
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def _softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """With the arguments of ``torch.softmax``, where ``F.softmax`` has one more between them."""
    return functional.softmax(input, dim, dtype=dtype)


def _log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return functional.log_softmax(input, dim, dtype=dtype)


FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(nn.functional, name): function
    for name, function in vars(functional).items()
    if isinstance(function, FunctionType) and hasattr(nn.functional, name)
}
# Others of a piece's name, such as torch.batch_norm, take other arguments.
for _owner in (torch, Tensor):
    FUNCTIONS |= {
        _owner.relu: functional.relu,
        _owner.sigmoid: functional.sigmoid,
        _owner.tanh: functional.tanh,
        _owner.softmax: _softmax,
        _owner.log_softmax: _log_softmax,
    }

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
REPLACED = "_torchref_replaced"  # where a module keeps the functions that its attributes were
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
_FAST_PATH = (
    "TransformerEncoderLayer: in eval without gradients, torch's native fast path bypasses its "
    "modules; torch.backends.mha.set_fastpath_enabled(False) turns it off"
)


class _Functional(TorchFunctionMode):
    """Run ours where a function of torch is called that we have."""

    def __init__(self) -> None:
        super().__init__()
        self.records = torch.is_grad_enabled()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in FUNCTIONS and "out" not in kwargs and not self._will_recompute():
            function = FUNCTIONS[func]
            # where torch.fx traces, its Proxy is among the types; plain tensors mostly give none
            return recorded(function, args, kwargs) if types else function(*args, **kwargs)
        return func(*args, **kwargs)

    def _will_recompute(self) -> bool:
        """Whether checkpointing runs this again in backward, where no mode of ours is entered."""
        if torch.compiler.is_compiling():  # of a part of the model: traced once, for both
            return False
        if self.records and not torch.is_grad_enabled():  # as the reentrant kind does
            return True
        return may_be_checkpointed()


def recorded(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``function`` returns; where :mod:`torch.fx` traces, a node that calls it."""
    proxy = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, fx.Proxy)), None)
    if proxy is None:
        return function(*args, **kwargs)
    name = function.__name__.strip("_")  # as the node of torch's function would have
    node = proxy.tracer.create_proxy("call_function", function, args, kwargs, name=name)
    node.node.meta["is_wrapped"] = True  # a pickled graph is traced anew: there it stays one node
    return node


class _Routed(nn.Module):
    """A model whose forward runs in :class:`_Functional`; made by :func:`_routed`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_routed, (type(self).__bases__[1],), self.__getstate__()


@functools.cache
def _routed(cls: type[nn.Module]) -> type[nn.Module]:
    # A class, not hooks or an attribute of the instance: DataParallel and copies keep it whole.
    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        # Dynamo cannot trace all methods of tensors in a mode, and Inductor fuses torch's as well.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _Functional():
            return cls.forward(self, *args, **kwargs)

    return type(cls.__name__, (_Routed, cls), {"forward": forward, "__module__": cls.__module__})


def _new_routed(cls: type[nn.Module]) -> nn.Module:
    routed = _routed(cls)
    return routed.__new__(routed)


def _swap_class(module: nn.Module) -> str | None:
    """Make a module ours; returns the name of what it is or will be, None where there is none."""
    becomes = getattr(module, "cls_to_become", None)  # of a lazy module
    if becomes in OURS:
        vars(module)["cls_to_become"] = OURS[becomes]
        return f"{becomes.__name__} (lazy)"
    ours = _rebased(type(module), _ours)
    if ours is type(module):
        return None
    module.__class__ = ours
    return ours.__name__


def _swap_functions(module: nn.Module) -> dict[str, str]:
    """Make ours what of torch's functions a module keeps; returns their names by attribute."""
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, FunctionType | BuiltinFunctionType | MethodDescriptorType)
        if value in FUNCTIONS
    }
    if found:
        vars(module).setdefault(REPLACED, {}).update(found)
        vars(module).update({name: FUNCTIONS[value] for name, value in found.items()})
    return {name: FUNCTIONS[value].__name__ for name, value in found.items()}


def _rebased(cls: type, change: Callable[[type], type]) -> type:
    """``change(cls)``; a class that parametrize derived for one module is derived anew."""
    first = cls.__bases__[0]
    derived = (
        cls.__module__ == parametrize.__name__ and cls.__name__ == f"Parametrized{first.__name__}"
    )
    if not derived:
        return change(cls)
    base = _rebased(first, change)
    if base is first:
        return cls
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), body)


def _ours(cls: type) -> type:
    return OURS.get(cls, cls)


def _torchs(cls: type) -> type:
    if _Routed in cls.__bases__:
        return _rebased(cls.__bases__[1], _torchs)
    return THEIRS.get(cls, cls)


def _is_ours(module: nn.Module) -> bool:
    becomes = getattr(module, "cls_to_become", None)
    ours = any(cls in THEIRS or cls is Fused for cls in type(module).__mro__)
    return ours or becomes in THEIRS


def _why_left(module: nn.Module, excluded: bool) -> str | None:
    base = next((cls for cls in type(module).__mro__ if cls in OURS), None)
    if base is not None:
        return "excluded" if excluded else f"a subclass of {base.__name__}"
    holds_others = isinstance(module, _CONTAINERS) or any(module.children())
    return None if holds_others else "no piece here"


def _options(module: nn.Module) -> list[str]:
    """The attributes of a module of ours that torch's class does not know."""
    cls = type(module)
    theirs = _rebased(cls, _torchs)
    return [name for name in vars(module) if hasattr(cls, name) and not hasattr(theirs, name)]


def _excluded(
    model: nn.Module, exclude: Iterable[str | type[nn.Module] | nn.Module]
) -> set[nn.Module]:
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise TypeError(f"convert: expected a list as `exclude`, got {exclude!r}")
    named = list(model.named_modules(remove_duplicate=False))
    excluded = set()
    for item in exclude:
        if isinstance(item, str):
            found = [module for name, module in named if fnmatch.fnmatchcase(name, item)]
        elif isinstance(item, type):
            found = [module for _, module in named if isinstance(module, item)]
        else:
            found = [module for _, module in named if module is item]
        if not found and not isinstance(item, type):  # none of a class is as good as excluded
            raise ValueError(f"convert: expected modules of the model in `exclude`, got {item!r}")
        excluded.update(inner for module in found for inner in module.modules())
    return excluded


def _check(name: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module as `model`, got {type(model)}")
    for module in model.modules():
        names = {
            cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")
        }
        if names & _WRAPPERS:
            raise TypeError(f"{name}: {type(module).__name__} wraps the model; {name} it before")
        if "OptimizedModule" in names or is_compiled(module):
            raise TypeError(f"{name}: torch.compile holds the model; {name} it before")
