"""Make one module of several in a row, in place, and several again."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

import torchref.nn as ours

# An activation's class to its name and argument in the fused modules.
_ACTIVATIONS: dict[type, Callable[[Any], tuple[str, float | None]]] = {
    ours.ReLU: lambda m: ("relu", None),
    ours.LeakyReLU: lambda m: ("leaky_relu", m.negative_slope),
    ours.Sigmoid: lambda m: ("sigmoid", None),
    ours.Tanh: lambda m: ("tanh", None),
    ours.ELU: lambda m: ("elu", m.alpha),
    ours.SELU: lambda m: ("selu", None),
    ours.GELU: lambda m: ("gelu" if m.approximate == "none" else "gelu_tanh", None),
    ours.SiLU: lambda m: ("silu", None),
}
_FUSED: dict[type, type] = {
    ours.BatchNorm1d: ours.BatchNormAct1d,
    ours.BatchNorm2d: ours.BatchNormAct2d,
    ours.BatchNorm3d: ours.BatchNormAct3d,
    ours.Linear: ours.LinearActDropout,
}
_WAS = "_torchref_was"  # where a module keeps the class that it had
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fused(nn.Identity):
    """The place of a module that the one before it does the work of."""

    def extra_repr(self) -> str:
        return f"{vars(self)[_WAS].__name__}, done by the module before"


def fuse(model: nn.Module) -> dict[str, str]:
    """Fuse what stands in a row in the model's ``nn.Sequential``.

    A batch norm and the activation after it; a linear layer, the activation after it and the
    dropout after that. Each module must be ours, in one place only and without hooks, because what
    it returns may then be another's.

    Returns:
        What the first module of each row became, by its name in the model.
    """
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    made = {}
    for name, parent in model.named_modules():
        if type(parent) is not nn.Sequential:
            continue
        children = list(parent.named_children())
        for i, (child, module) in enumerate(children):
            row = [module, *(m for _, m in children[i + 1 : i + 3])]
            row = row[: _length(row)]
            if len(row) > 1 and all(places[id(m)] == 1 and not _hooked(m) for m in row):
                made[f"{name}.{child}" if name else child] = _fuse(row)
    return made


def unfuse(module: nn.Module) -> None:
    """Give a module that :func:`fuse` changed its class back."""
    attributes = vars(module)
    if _WAS in attributes:
        was = attributes.pop(_WAS)
        synchronizes = type(module) is ours.SyncBatchNormAct  # by convert_sync_batchnorm, later
        module.__class__ = ours.SyncBatchNorm if synchronizes else was
        if was in _FUSED:
            for option in ("activation", "param", "p"):
                attributes.pop(option, None)


def _length(row: list[nn.Module]) -> int:
    """How many modules from the first on fuse."""
    if type(row[0]) not in _FUSED or len(row) == 1 or type(row[1]) not in _ACTIVATIONS:
        return 1
    drops = type(row[0]) is ours.Linear and len(row) == 3 and type(row[2]) is ours.Dropout
    return 3 if drops and row[2].scale_at == "training" else 2


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _fuse(row: list[nn.Module]) -> str:
    first, act, *rest = row
    activation, param = _ACTIVATIONS[type(act)](act)
    options: dict[str, Any] = {"activation": activation, "param": param}
    if type(first) is ours.Linear:
        options["p"] = rest[0].p if rest else 0.0
    becomes = _FUSED[type(first)]
    vars(first).update(options)
    for module, cls in zip(row, (becomes, Fused, Fused), strict=False):
        vars(module)[_WAS] = type(module)
        module.__class__ = cls
    return becomes.__name__
