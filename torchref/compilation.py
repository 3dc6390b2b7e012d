"""Formulas through Inductor, torch.compile's code generator: what the ``compiled`` backend runs.

A formula compiles once for each kind of arguments, with their sizes left open. At every call
Dynamo then asks whether the compilation still holds, which takes longer than the arithmetic of a
small tensor. So only the first call with arguments of certain sizes goes through Dynamo; later
ones go straight to the code that it chose.
"""

import contextlib
import functools
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from torchref.internals import constant_floats, inductor, storage_key

REPLAYS = 256  # that a formula remembers, before it begins anew
VARIANTS = 128  # compilations of a formula; torch keeps some 0.5 MB of each until the process ends
LARGE = 2**15  # elements, from which on code is for many threads


class Compiled:
    """A formula through :func:`torch.compile`, one compilation for each kind of arguments."""

    def __init__(self, formula: Callable[..., Any]) -> None:
        self.formula = formula
        self.replays: dict[Any, _Replay] = {}

    def __call__(self, *args: Any) -> Any:
        signature = _signature(args)
        known = self.replays.get(signature)
        if known is not None:
            return known(args)
        large = any(arg.numel() >= LARGE for arg in args if isinstance(arg, Tensor))
        variant, _ = compiled_variant(self.formula, tuple(map(kind, args)), large)
        if variant is self.formula:
            return variant(*args)
        given = tuple(map(traced, args))
        # One grad mode for all: autograd is not recording here, or the formula would have run. And
        # floats in the code, such as pi, are constants: those that vary are arguments.
        with torch.no_grad(), constant_floats(), _recording() as calls:
            output = variant(*given)
        replay = _replay(calls, given, output)
        if signature is not None and replay is not None:
            if len(self.replays) >= REPLAYS:
                self.replays.clear()
            self.replays[signature] = replay
        return _results(output, args)


def compiled_variant(
    formula: Callable[..., Any], key: tuple[Any, ...], large: bool = True
) -> tuple[Callable[..., Any], bool]:
    """The compilation of a formula for arguments of one :func:`kind`, and whether it is new.

    It takes the arguments as :func:`traced` makes them. Inductor leaves sizes open, but looks at
    the first ones to choose between one thread and many, in a process or, with its cache, ever; so
    ``large`` and small arguments have code of their own.

    Dynamo gives up after eight recompilations of one code object and would then run eager without
    a word. So each kind of arguments (dtype, rank, memory layout, sizes of 0 and 1) compiles a
    clone of the code with sizes symbolic, floats travel as 0-dim tensors, and ``fullgraph`` turns
    what is left of that silence into an error.

    Each new integer, such as an index to ignore, is one more kind. After :data:`VARIANTS` of them
    the formula itself runs for others: to forget old ones would free next to nothing, for torch
    has no way to unload their code, and to compile at every call is slower than not to.
    """
    variants = _variants.setdefault(formula, {})
    key = (large, *key)
    variant = variants.get(key)
    if variant is not None:
        return variant, False
    if len(variants) >= VARIANTS:
        _say_no_more(formula.__name__)
        return formula, False
    clone = _clone(formula, len(variants))
    backend = "inductor" if inductor() is None else functools.partial(_inductor, large)
    variant = torch.compile(clone, fullgraph=True, dynamic=True, backend=backend)
    variants[key] = variant
    return variant, True


@functools.cache
def _say_no_more(name: str) -> None:
    warnings.warn(
        f"torchref: {name} is compiled for {VARIANTS} kinds of arguments; others run uncompiled",
        stacklevel=3,
    )


_variants: dict[Callable[..., Any], dict[tuple[Any, ...], Callable[..., Any]]] = {}


def kind(arg: Any) -> Any:
    """What of an argument a compilation cannot leave open."""
    if isinstance(arg, Tensor):
        order = sorted(range(arg.ndim), key=arg.stride)
        unit = tuple(min(stride, 2) for stride in arg.stride())
        sizes = tuple(min(size, 2) for size in arg.shape)
        return arg.dtype, arg.device, arg.is_contiguous(), tuple(order), unit, sizes
    return float if isinstance(arg, float) else arg


def traced(arg: Any) -> Any:
    if isinstance(arg, float):
        return torch.tensor(arg, dtype=torch.float64, device="cpu")
    # Dynamo reads `.grad`, which on a saved output warns, and fixes the sizes of a Parameter.
    is_more = isinstance(arg, Tensor) and (arg.requires_grad or isinstance(arg, Parameter))
    return arg.detach() if is_more else arg


@functools.cache
def can_compile() -> bool:
    """Whether there is a C++ compiler for :func:`torch.compile`; where there is none, say so."""
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++", "c++"
    found = sys.platform == "win32" or any(map(shutil.which, compilers))
    if not found:
        warnings.warn(
            "torchref: fused steps run uncompiled: no C++ compiler (g++ or $CXX) is installed",
            stacklevel=2,
        )
    return found


def _clone(formula: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A copy of a formula with a code object of its own, so that it has a limit of its own."""
    function = formula
    code: CodeType = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    clone = FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


class _Call(NamedTuple):
    """What Dynamo made of a formula's call: code of Inductor's, its inputs and its outputs."""

    run: Callable[..., Sequence[Any]]
    inputs: tuple[Any, ...]
    outputs: Sequence[Any]


class _Thread(threading.local):
    calls: list[_Call] | None = None  # while somebody records


_thread = _Thread()


class _Tracing:
    formula = 0  # how many Compileds ask torch.compile, which sees a constant here
    lock = threading.Lock()


def traces_formula() -> bool:
    """Whether it is the ``compiled`` backend that traces, and not a user's torch.compile."""
    return torch.compiler.is_compiling() and _Tracing.formula > 0


@contextlib.contextmanager
def _recording() -> Iterator[list[_Call]]:
    calls = _thread.calls = []
    with _Tracing.lock:
        _Tracing.formula += 1
    try:
        yield calls
    finally:
        with _Tracing.lock:
            _Tracing.formula -= 1
        _thread.calls = None


def _inductor(
    large: bool, graph: torch.fx.GraphModule, inputs: list[Any]
) -> Callable[..., Sequence[Any]]:
    """Inductor as a backend of torch.compile, which notes the calls of its code."""
    compile_fx = inductor()
    assert compile_fx is not None
    options = {
        # Sizes and strides need no second look: they are in the key, or the code leaves them open.
        "size_asserts": False,
        # of elements for a thread; that it is another keeps the two apart in Inductor's cache
        "cpp.min_chunk_size": 1024 if large else 512,
    }
    run: Any = compile_fx(graph, inputs, config_patches=options)

    def noted(*inputs: Any) -> Sequence[Any]:
        outputs = run(*inputs)
        if _thread.calls is not None:
            _thread.calls.append(_Call(run, inputs, outputs))
        return outputs

    return noted


class _Replay(NamedTuple):
    """A call's code, where its inputs are among the arguments, and which outputs are wanted."""

    run: Callable[..., Sequence[Any]]
    inputs: tuple[tuple[int | None, Any], ...]  # a place, or None and a constant: a size
    outputs: tuple[int | None, ...]  # None for a None
    is_tuple: bool

    def __call__(self, args: tuple[Any, ...]) -> Any:
        inputs = [value if place is None else args[place] for place, value in self.inputs]
        made = self.run(*[_number(x) if isinstance(x, float) else x for x in inputs])
        outputs = tuple([None if place is None else made[place] for place in self.outputs])
        return _results(outputs if self.is_tuple else outputs[0], args)


@functools.lru_cache(256)
def _number(value: float) -> Tensor:
    """A float as code takes it. Not for Dynamo: of two that are one tensor it makes one input."""
    return traced(value)


def _signature(args: tuple[Any, ...]) -> Any:
    """All that decides which code Dynamo would run; None where tensors share memory.

    For then it also depends on which of them do.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if len({storage_key(x.untyped_storage()) for x in tensors}) < len(tensors):
        return None
    settings = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return settings, *[
        (arg.dtype, arg.device, arg.shape, arg.stride())
        if isinstance(arg, Tensor)
        else float
        if isinstance(arg, float)
        else arg
        for arg in args
    ]


def _replay(calls: list[_Call], args: tuple[Any, ...], result: Any) -> _Replay | None:
    """How to repeat a call without Dynamo; None where it did more than one call of code."""
    if len(calls) != 1:
        return None
    run, inputs, outputs = calls[0]
    places = {id(arg): place for place, arg in enumerate(args)}
    made = {id(output): place for place, output in enumerate(outputs)}
    wanted = result if isinstance(result, tuple) else (result,)
    if not all(id(x) in places for x in inputs if isinstance(x, Tensor)):
        return None
    if not all(y is None or id(y) in made for y in wanted):
        return None
    sources = [(places[id(x)], None) if isinstance(x, Tensor) else (None, x) for x in inputs]
    found = tuple(None if y is None else made[id(y)] for y in wanted)
    return _Replay(run, tuple(sources), found, isinstance(result, tuple))


def _results(output: Any, args: tuple[Any, ...]) -> Any:
    """A formula's results, with the first argument itself where it was written in place.

    Autograd knows it by identity.
    """
    if isinstance(output, tuple):
        return tuple([_itself(y, args[0]) for y in output])
    return _itself(output, args[0])


def _itself(y: Any, x: Tensor) -> Any:
    return x if isinstance(y, Tensor) and y.data_ptr() == x.data_ptr() != 0 else y
