"""Make an optimizer of torch's one of ours, in the middle of a run, and back."""

import functools
import inspect
import weakref
from typing import Any

import torch

from torchref.internals import hook_step
from torchref.optim.adam import Adam, AdamW
from torchref.optim.rmsprop import RMSprop
from torchref.optim.sgd import SGD

OURS: dict[type, type] = {
    torch.optim.SGD: SGD,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def convert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make an optimizer ours, in place, where its class is exactly torch's.

    Only ``__class__`` changes. Groups, options, the state of past steps, hooks and the schedulers
    that hold the optimizer stay, and the next step is ours.

    Args:
        optimizer: a ``torch.optim.SGD``, ``RMSprop``, ``Adam`` or ``AdamW``, or one of ours.

    Returns:
        ``optimizer``.

    Raises:
        TypeError: it is of another class, or something has replaced its ``step``.

    Example:
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
        >>> type(torchref.optim.convert(optimizer))
        <class 'torchref.optim.adam.Adam'>
    """
    return _become("optim.convert", optimizer, OURS)


def revert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Undo :func:`convert`: make an optimizer of ours torch's, in place.

    Args:
        optimizer: one of ours, or of the classes that :func:`convert` takes.

    Returns:
        ``optimizer``.

    Raises:
        TypeError: as :func:`convert`.
        ValueError: it has an option of ours that torch would not follow.

    Example:
        >>> optimizer = torchref.optim.SGD([torch.nn.Parameter(torch.ones(2))])
        >>> type(torchref.optim.revert(optimizer))
        <class 'torch.optim.sgd.SGD'>
    """
    cls = type(optimizer)
    if cls in THEIRS:
        ours, theirs = (inspect.signature(c).parameters.keys() for c in (cls, THEIRS[cls]))
        for group in optimizer.param_groups:
            for option in ours - theirs:
                value = group.get(option)
                if value is not None and value is not False:
                    raise ValueError(f"optim.revert: torch has no {option}={value!r}")
        _counts_on_host(optimizer)
        vars(optimizer).pop("_in_one_launch", None)
    return _become("optim.revert", optimizer, THEIRS)


def _become(
    name: str, optimizer: torch.optim.Optimizer, classes: dict[type, type]
) -> torch.optim.Optimizer:
    cls = type(optimizer)
    if cls in classes.values():
        return optimizer
    if cls not in classes:
        known = ", ".join(f"{c.__module__.split('.')[0]}.optim.{c.__name__}" for c in classes)
        raise TypeError(f"{name}: expected one of {known} as `optimizer`, got {cls}")
    replaced = vars(optimizer).get("step")
    if replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"):
        raise TypeError(f"{name}: something has replaced the optimizer's step: {replaced}")
    optimizer.__class__ = classes[cls]
    hook_step(optimizer)  # as __init__ does: hooks of a class's steps
    if replaced is not None:
        optimizer.step = _watched(optimizer)
    return optimizer


def _watched(optimizer: torch.optim.Optimizer) -> Any:
    """The step as a scheduler wraps it, to warn where it is called before the first step."""
    reference, step = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        held: Any = reference()
        held._opt_called = True
        return step(held, *args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper


def _counts_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Bring counts of steps, which our kernels keep on the device, to where torch has them."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            step, stays = state.get("step"), group.get("capturable") or group.get("fused")
            if isinstance(step, torch.Tensor) and not stays:
                state["step"] = step.cpu()
