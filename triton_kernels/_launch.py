"""Launch a kernel at a few microseconds of host time.

``kernel[grid](...)`` binds, specializes and hashes its arguments on every call: 6 to 9 us of host
time for 6 to 14 of them, the driver not counted. Here it is 2.5 to 4.5: the compiled kernel is kept
under a key of our own, everything that the JIT specializes on and nothing else.

A call that the JIT must see (the first of its kind, one that somebody watches, one in the
interpreter) goes through it.
"""

import math
from typing import Any

import torch
import triton.runtime
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

try:
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError:  # a private name: wherever torch has moved it, its objects still bear it

    class _Named(type):
        def __instancecheck__(cls, x: Any) -> bool:
            return any(kind.__name__ == cls.__name__ for kind in type(x).__mro__)

    FakeTensor: Any = _Named("FakeTensor", (), {})

INTERPRETED = knobs.runtime.interpret  # what @triton.jit goes by
driver: Any = triton.runtime.driver  # its declared type is that of a driver without streams

KINDS = 1024  # of launches that are kept, before we begin anew: the JIT forgets none of its own

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: JITFunction[Any], programs: int, *args: Any, num_warps: int = 4, **constexprs: Any
) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of the first argument, a tensor.

    ``args`` are the kernel's parameters in their order, then come its constexprs, by name and in
    their order. ``num_warps`` is in warps of 32 threads, half as many of AMD's 64. Nothing runs on
    fake tensors: under tracing a launcher only allocates its outputs.
    """
    if not isinstance(args[0], FakeTensor):
        _run(kernel, programs, args, num_warps, constexprs)


def _run(
    kernel: JITFunction[Any],
    programs: int,
    args: tuple[Any, ...],
    num_warps: int,
    constexprs: dict[str, Any],
) -> None:
    if INTERPRETED:
        _interpret(kernel, programs, args, constexprs)
        return
    index = args[0].get_device()
    if index == torch.cuda.current_device():
        _run_here(kernel, programs, index, args, num_warps, constexprs)
    else:
        with torch.cuda.device(index):
            _run_here(kernel, programs, index, args, num_warps, constexprs)


def _interpret(
    kernel: JITFunction[Any], programs: int, args: tuple[Any, ...], constexprs: dict[str, Any]
) -> None:
    import numpy  # triton's interpreter needs it, nothing else here does

    with numpy.errstate(all="ignore"):  # a GPU does not warn of an overflow either
        kernel[(programs,)](*args, **constexprs)


def _run_here(
    kernel: JITFunction[Any],
    programs: int,
    index: int,
    args: tuple[Any, ...],
    num_warps: int,
    constexprs: dict[str, Any],
) -> None:
    if torch.version.hip is not None:
        num_warps = max(1, num_warps * 32 // driver.active.get_current_target().warp_size)
    # Fusing a * b + c is the default up to Triton 3.9; said, because it changes in 3.10.
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    if _watched(kernel):  # not kept: what is compiled for a debugger is for nobody else
        kernel[(programs,)](*args, **constexprs, **options)
        return
    constants = constexprs.values()
    key = (kernel.fn, index, num_warps, *map(specialization, args), *map(_hashable, constants))
    compiled = _compiled.get(key)
    if compiled is None:  # also where a hook of the JIT's forbade the compilation last time
        compiled = kernel[(programs,)](*args, **constexprs, **options)
        if len(_compiled) >= KINDS:
            _compiled.clear()
        _compiled[key] = compiled
        return
    stream = driver.active.get_current_stream(index)
    function, metadata = compiled.function, compiled.packed_metadata
    hooks = (None, None, None)  # launch metadata, and the two that would read it
    compiled.run(programs, 1, 1, stream, function, metadata, *hooks, *args, *constants)


def specialization(arg: Any) -> Any:
    """What the JIT compiles a runtime argument for: equal here where it is equal there."""
    if isinstance(arg, Tensor):
        aligned = arg.data_ptr() % 16 == 0
        if torch.version.hip is None:
            return arg.dtype, aligned
        # AMD's buffer instructions address 2 GiB
        return arg.dtype, aligned, arg.untyped_storage().size() < 2**31
    if type(arg) is int:
        if arg == 1:
            return 1
        return arg % 16 == 0, -(2**31) <= arg < 2**31, arg < 2**63
    return type(arg)


def _hashable(constexpr: Any) -> Any:
    # a jitted function's own hash is that of its source, behind a lock
    return constexpr.fn if isinstance(constexpr, JITFunction) else constexpr


def _watched(kernel: JITFunction[Any]) -> bool:
    """Whether somebody (a profiler, a debugger) asked the JIT to be told of every launch."""
    runtime = knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def power_of_2(n: int, least: int, most: int) -> int:
    """The power of 2 that holds ``n``, between ``least`` and ``most``, powers of 2 themselves."""
    if isinstance(n, torch.SymInt):  # traced: nothing is launched, and no size is to be fixed
        return most
    return min(most, max(least, 1 << (n - 1).bit_length()))


def vector_step(n: int) -> int:
    """The greatest power of 2 up to 16 that divides ``n``."""
    return 16 if isinstance(n, torch.SymInt) else math.gcd(n, 16)  # as in power_of_2


def divisor(n: int, reduction: str) -> float:
    """What the sum of n losses is divided by."""
    # as in power_of_2: float() would fix a traced size
    return float(n) if reduction == "mean" and not isinstance(n, torch.SymInt) else 1.0


def multiprocessors(x: Tensor) -> int:
    """How many of them the device of ``x`` has."""
    if x.device.type == "cpu":  # in the interpreter: few, so that small tests take several programs
        return 4
    return torch.cuda.get_device_properties(x.device).multi_processor_count
