"""Launch a kernel at a few microseconds of host time.

``kernel[grid](...)`` binds, specializes and hashes its arguments on every call, 20 to 40 us of host
time. Here the compiled kernel is kept under a key of our own: everything that the JIT specializes
on, and nothing else. A call that the JIT must see (the first of its kind, one with launch hooks,
one in the interpreter) goes through it.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

INTERPRETED = triton.knobs.runtime.interpret  # what @triton.jit goes by
if INTERPRETED:
    import numpy  # triton's interpreter needs it, nothing else here does

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: KernelInterface[Any], programs: int, *args: Any, num_warps: int = 4, **constexprs: Any
) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of the first argument, a tensor.

    ``args`` are the kernel's parameters in their order, then come its constexprs, by name and in
    their order. Nothing runs on fake tensors: under tracing a launcher only allocates its outputs.
    """
    if not isinstance(args[0], FakeTensor):
        _run(kernel, programs, args, num_warps, constexprs)


def _run(
    kernel: Any, programs: int, args: tuple[Any, ...], num_warps: int, constexprs: dict[str, Any]
) -> None:
    if INTERPRETED:
        with numpy.errstate(all="ignore"):  # a GPU does not warn of an overflow either
            kernel[(programs,)](*args, **constexprs)
        return
    index = args[0].get_device()
    if index == torch.cuda.current_device():
        _run_here(kernel, programs, index, args, num_warps, constexprs)
    else:
        with torch.cuda.device(index):
            _run_here(kernel, programs, index, args, num_warps, constexprs)


def _run_here(
    kernel: Any,
    programs: int,
    index: int,
    args: tuple[Any, ...],
    num_warps: int,
    constexprs: dict[str, Any],
) -> None:
    key = (kernel.fn, index, num_warps, *map(specialization, args))
    key += tuple(map(_hashable, constexprs.values()))
    cached = None if _watched(kernel) else _compiled.get(key)
    if cached is None:
        # Fusing a * b + c is the default up to Triton 3.9; said, because it changes in 3.10.
        options = {"num_warps": num_warps, "enable_fp_fusion": True}
        compiled = kernel[(programs,)](*args, **constexprs, **options)
        if compiled is not None:
            _compiled[key] = compiled, tuple(constexprs.values())
        return
    compiled, constants = cached
    stream = driver.active.get_current_stream(index)
    size = (programs, 1, 1)
    hooks = (None, None, None)  # launch metadata, and the two that would read it
    function, metadata = compiled.function, compiled.packed_metadata
    compiled.run(*size, stream, function, metadata, *hooks, *args, *constants)


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
        return arg % 16 == 0, -(2**31) <= arg < 2**31
    return None if arg is None else type(arg)


def _hashable(constexpr: Any) -> Any:
    # a jitted function's own hash is that of its source, behind a lock
    return constexpr.fn if isinstance(constexpr, KernelInterface) else constexpr


def _watched(kernel: Any) -> bool:
    """Whether somebody (a profiler, a debugger) asked the JIT to be told of every launch."""
    runtime = triton.knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.add_stages_inspection_hook
        or runtime.debug
    )


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def power_of_2(n: int, least: int, most: int) -> int:
    """The power of 2 that holds ``n``, between ``least`` and ``most``, powers of 2 themselves."""
    if isinstance(n, torch.SymInt):  # traced: nothing is launched, and no size is to be fixed
        return most
    return min(most, max(least, 1 << (n - 1).bit_length()))


def multiprocessors(x: Tensor) -> int:
    """How many of them the device of ``x`` has."""
    if x.device.type == "cpu":  # in the interpreter: few, so that small tests take several programs
        return 4
    return torch.cuda.get_device_properties(x.device).multi_processor_count
