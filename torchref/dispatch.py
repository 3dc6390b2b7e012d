"""Which implementation of a piece runs: its formula, its compiled formula or its Triton kernel.

==============  ==================================================================================
``auto``        the kernel for CUDA and ROCm tensors where the piece has one, otherwise the formula
``reference``   the formula, always
``compiled``    the formula through :func:`torch.compile`, once per piece, for any shape
``triton``      the kernel; an error that says why where it cannot run
==============  ==================================================================================

``auto`` compiles nothing, not even a formula that a CPU has computed a thousand times: compiled
code rounds in other places, so the bits of a run would depend on how often a piece had run before,
and would change when it resumes. See docs/cpu.md for what compiling brings.

The choice is process-wide, like ``torch.backends``': ``TORCHREF_BACKEND`` at import,
:func:`set_backend` later, :func:`backend` for a block. A backward pass runs what its forward pass
ran, in whatever thread autograd calls it.

A kernel takes plain tensors with storage outside tracing, transforms and dispatch modes, where
autograd is not recording, of the types float32, float16 and bfloat16 and with something in them.
Everything else takes the formula, under ``triton`` too. So does code under :func:`torch.compile`,
where Inductor does the fusing, unless ``triton`` was asked for: then the graph holds one opaque
operation of ours, ``torch.ops.torchref.<name>``, for each kernel call.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from torchref.compilation import Compiled
from torchref.internals import (
    are_transforms_active,
    count_dispatch_modes,
    differentiates_forward,
    has_storage,
)

BACKENDS = ("auto", "reference", "compiled", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

F = TypeVar("F", bound=Callable[..., Any])


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class _Process:
    choice = _checked(os.environ.get("TORCHREF_BACKEND", "auto"), "TORCHREF_BACKEND")

    def __init__(self) -> None:
        self.blocks: list[list[str]] = []  # what is chosen outside, then in each open block


class _Thread(threading.local):
    choice: str | None = None  # what forward chose, while its backward runs in this thread


_process = _Process()
_thread = _Thread()


def get_backend() -> str:
    """The name of the backend in force: ``auto``, ``reference``, ``compiled`` or ``triton``."""
    return _thread.choice or _process.choice


def set_backend(name: str) -> None:
    """Choose the implementation that every piece runs from now on, in the whole process.

    Args:
        name: ``auto``, ``reference``, ``compiled`` or ``triton``.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: ``triton`` cannot run here; the message says why.

    Example:
        >>> import torchref
        >>> torchref.set_backend("reference")
        >>> torchref.get_backend()
        'reference'
        >>> torchref.set_backend("auto")
    """
    _choose(name)
    if _process.blocks:
        _process.blocks[-1][0] = name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run a block under another backend; see :func:`set_backend`.

    Example:
        >>> with torchref.backend("reference"):
        ...     y = torchref.nn.functional.relu(torch.tensor([-1.0, 2.0]))
        >>> y
        tensor([0., 2.])
    """
    outside, block = _process.choice, [name]
    _choose(name)
    _process.blocks = [*(_process.blocks or [[outside]]), block]
    try:
        yield
    finally:  # those of several threads may end in another order than they began
        left = [other for other in _process.blocks if other is not block]
        _process.choice = left[-1][0]
        _process.blocks = left if len(left) > 1 else []


def _choose(name: str) -> None:
    _checked(name, "set_backend")
    if name == "triton" and (reason := why_no_kernels()):
        raise RuntimeError(f"set_backend: the triton backend cannot run here: {reason}")
    _process.choice = name


class kept:
    """Make a backward pass run under the backend that its forward pass chose."""

    __slots__ = ("before", "choice")

    def __init__(self, choice: str) -> None:
        self.choice = choice

    def __enter__(self) -> None:
        self.before = _thread.choice
        _thread.choice = self.choice

    def __exit__(self, *exc: object) -> None:
        _thread.choice = self.before


def accelerated(module: str | None, mutates: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Let a formula's kernel, or its compiled form, run in its place where the backend says so.

    The kernel has the formula's name and signature, in ``torchref.triton_kernels.<module>``; with
    None there is none and never will be. The first argument's device and type decide. Arguments are
    positional; ``mutates`` names those that are written to even where ``inplace`` is not asked for.
    """

    def decorate(formula: F) -> F:
        name = formula.__name__
        compiled = Compiled(formula)
        opaque = formula if module is None else _opaque_operation(formula, module, mutates)

        @functools.wraps(formula)
        def piece(*args):
            if torch.compiler.is_compiling():  # first: Dynamo cannot trace the checks below
                return opaque(*args) if _process.choice == "triton" else formula(*args)
            choice = _thread.choice or _process.choice
            if choice == "reference" or (choice == "auto" and not args[0].is_cuda):
                return formula(*args)
            if not runs_opaque_code(args):
                return formula(*args)
            if choice == "compiled":
                return compiled(*args)
            if module is None:
                return formula(*args)
            kernel = find_kernel(module, name)
            if choice == "triton" and (reason := _why_not(name, kernel, args[0])):
                raise RuntimeError(f"{name}: the triton backend cannot run it: {reason}")
            if kernel is None or not kernel_takes(args):
                return formula(*args)
            return kernel(*args)

        return piece  # type: ignore[return-value]

    return decorate


def kernel_for(module: str, name: str, x: Tensor) -> Callable[..., Any] | None:
    """The kernel that the backend in force would run for tensors where ``x`` is.

    None where a formula is to run. The tensors have yet to be such as the kernel takes.
    """
    choice = get_backend()
    if choice in ("reference", "compiled") or (choice == "auto" and not x.is_cuda):
        return None
    kernel = find_kernel(module, name)
    if choice == "triton" and (reason := _why_not(name, kernel, x)):
        raise RuntimeError(f"{name}: the triton backend cannot run it: {reason}")
    return None if x.is_cuda and not _serves(x.device.index) else kernel


def will_run_kernel(module: str, name: str, x: Tensor) -> bool:
    """Whether a Function's forward, where autograd does not record, will run a kernel on ``x``."""
    if torch.compiler.is_compiling():
        return _process.choice == "triton"
    choice = _thread.choice or _process.choice
    if choice in ("reference", "compiled") or (choice == "auto" and not x.is_cuda):
        return False
    return is_plain((x,)) and find_kernel(module, name) is not None and kernel_takes((x,))


def kernel_takes(args: tuple[Any, ...]) -> bool:
    """Whether kernels are written for such arguments.

    Float64 and integers are for the formula, a mask that torch drew, and what torch refuses,
    tensors on two devices.
    """
    x = args[0]
    if x.dtype not in KERNEL_DTYPES or (x.is_cuda and not _serves(x.device.index)):
        return False
    for arg in args:
        if isinstance(arg, Tensor):
            if not arg.numel() or arg.device != x.device:
                return False
            if arg.dtype == torch.float64 and arg.ndim:  # running statistics keep their digits
                return False
            if arg.dtype == torch.bool:
                return False
    return True


def is_plain(args: tuple[Any, ...]) -> bool:
    """Whether the tensors hold plain memory, with nothing between us and torch looking on."""
    if count_dispatch_modes() or are_transforms_active():
        return False
    return not differentiates_forward() and all(
        type(arg) in (Tensor, Parameter)
        and has_storage(arg)
        and not (arg.is_neg() or arg.is_conj())  # views whose memory is not their value
        for arg in args
        if isinstance(arg, Tensor)
    )


def runs_opaque_code(args: tuple[Any, ...]) -> bool:
    """Whether code that torch cannot see into may compute on these arguments."""
    return is_plain(args) and not (
        torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    )


def reads_values(*tensors: Tensor) -> bool:
    """Whether a check may look at values: on the CPU, where that costs no synchronization."""
    if torch.compiler.is_compiling() or any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    return is_plain(tensors)


@functools.cache
def find_kernel(module: str, name: str) -> Callable[..., Any] | None:
    """The launcher ``name`` in ``torchref.triton_kernels.<module>``, or None if there is none."""
    path = f"torchref.triton_kernels.{module}"
    if importlib.util.find_spec("triton") is None:
        _say_no_kernels(str(why_no_kernels()))
        return None
    if importlib.util.find_spec(path) is None:
        return None
    return getattr(importlib.import_module(path), name, None)


def why_no_kernels() -> str | None:
    """Why no Triton kernel can run on this machine, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (`pip install triton`, Linux only)"
    if interprets():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return _why_not_on(torch.cuda.current_device())


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which also takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(name: str, kernel: Callable[..., Any] | None, x: Tensor) -> str | None:
    if kernel is None:
        return why_no_kernels() or f"{name} has no kernel yet"
    if not (x.is_cuda or interprets()):
        return why_no_kernels() or f"expected tensors on a CUDA or ROCm device, got {x.device}"
    return None


def _why_not_on(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        name = torch.cuda.get_device_name(index)
        return f"{name} is older than Triton's oldest NVIDIA GPU, compute capability 8.0"
    return None


@functools.cache
def _serves(index: int) -> bool:
    """Whether kernels run on a GPU; where they do not, that is said once."""
    reason = _why_not_on(index)
    if reason is not None:
        _say_no_kernels(reason)
    return reason is None


@functools.cache
def _say_no_kernels(reason: str) -> None:
    warnings.warn(f"torchref: formulas run instead of Triton kernels: {reason}", stacklevel=2)


def explain() -> str:
    """One line: the backend in force, what it would run on this machine, and why."""
    choice = get_backend()
    if choice == "auto":
        reason = why_no_kernels()
        return f"auto: {'Triton kernels on the GPU' if reason is None else f'formulas ({reason})'}"
    if choice == "triton":
        return f"triton: {why_no_kernels() or 'Triton kernels'}"
    return f"{choice}: asked for by TORCHREF_BACKEND or set_backend"


# One operation for each kernel, so that a graph can hold the call.
_library = torch.library.Library("torchref", "FRAGMENT")
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    float | Tensor: "Tensor",
    int: "int",
    bool: "bool",
    str: "str",
    str | None: "str?",
    tuple[bool, bool]: "bool[]",
    tuple[bool, bool, bool, bool]: "bool[]",
    tuple[int, ...]: "SymInt[]",
}


def _opaque_operation(
    formula: Callable[..., Any], module: str, mutates: tuple[str, ...]
) -> Callable[..., Any]:
    """The kernel of a formula as an operation that torch.compile does not look into.

    Under tracing the launcher runs on fake tensors: it allocates its outputs and launches nothing.
    """
    name = formula.__name__
    parameters = inspect.signature(formula).parameters.values()
    returned = inspect.signature(formula).return_annotation
    if returned is None:  # an optimizer's update, for Inductor to fuse with its neighbours
        return formula
    arguments = []
    for parameter in parameters:
        kind = _SCHEMA_TYPES[parameter.annotation]
        if parameter.name in mutates:
            kind = kind.replace("Tensor", f"Tensor({parameter.name[-1]}!)")
        arguments.append(f"{kind} {parameter.name}")
    count = 1 if returned is Tensor else len(returned.__args__)
    returns = ", ".join(["Tensor"] * count)
    _library.define(f"{name}({', '.join(arguments)}) -> ({returns})")

    def run(*args: Any) -> Any:
        kernel = find_kernel(module, name)
        if reason := _why_not(name, kernel, args[0]):
            raise RuntimeError(f"{name}: the triton backend cannot run it: {reason}")
        assert kernel is not None
        return kernel(*args) if kernel_takes(args) else formula(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchref::{name}", run, lib=_library)
    operation = getattr(torch.ops.torchref, name).default
    on_device = [parameter.annotation == float | Tensor for parameter in parameters]

    def opaque(*args):
        x = args[0]
        return operation(
            *[
                torch.full((), arg, dtype=torch.float64, device=x.device)
                if moved and not isinstance(arg, Tensor)
                else arg
                for arg, moved in zip(args, on_device, strict=True)
            ]
        )

    return opaque
