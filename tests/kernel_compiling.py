"""Compile kernels for GPUs that are not here, with the arguments their launchers would give."""

import contextlib
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchref import triton_kernels
from torchref.triton_kernels import _launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
MULTIPROCESSORS = 132  # an H100's
MODULES: list[ModuleType] = [
    importlib.import_module(f"{triton_kernels.__name__}.{file.name}")
    for file in pkgutil.iter_modules(triton_kernels.__path__)
]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Launch:
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    num_warps: int
    constexprs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Built:
    """What a compiler made of a kernel."""

    registers: int
    spilled: int  # bytes of stack or scratch a thread
    wide: int  # loads and stores of 128 bits or more
    narrow: int  # other accesses to global memory


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Keep every launch instead of running it. Tensors may be on the meta device."""
    launches: list[Launch] = []
    importers = [module for module in MODULES if hasattr(module, "multiprocessors")]
    run, multiprocessors = _launch._run, _launch.multiprocessors
    _launch._run = lambda *call: launches.append(Launch(*call))
    for module in importers:
        module.multiprocessors = lambda x: MULTIPROCESSORS
    try:
        yield launches
    finally:
        _launch._run = run
        for module in importers:
            module.multiprocessors = multiprocessors


def specialized(launch: Launch, backend: str) -> tuple[dict, dict, dict]:
    """The signature, the constants and the attributes that the JIT would compile it for."""
    signature, constants, attributes = {}, {}, {}
    names = launch.kernel.arg_names
    values = [*launch.args, *launch.constexprs.values()]
    assert names[len(launch.args) :] == list(launch.constexprs), "constexprs come last, in order"
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        marks = []
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            # an allocation's first element is aligned
            if value.storage_offset() * value.element_size() % 16 == 0:
                marks.append(["tt.divisibility", 16])
            if backend == "hip" and value.untyped_storage().size() < 2**31:
                marks.append(["tt.pointer_range", 32])
        elif number >= len(launch.args) or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                marks.append(["tt.divisibility", 16])
        if marks:
            attributes[(number,)] = marks
    return signature, constants, attributes


def build(launch: Launch, target: GPUTarget) -> Built:
    source = ASTSource(launch.kernel, *specialized(launch, target.backend))
    warps = max(1, launch.num_warps * 32 // target.warp_size)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        return _nvidia(compiled.asm["cubin"], compiled.asm["ptx"])
    return _amd(compiled.asm["amdgcn"])


def _nvidia(cubin: bytes, ptx: str) -> Built:
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    # a stack may also be the frame of a call that needs nothing in it
    if stack and not re.search(r"\b(?:LDL|STL)\b", _cuobjdump(cubin, "-sass")):
        stack = 0
    # in PTX, where a vector is one already and loops are not yet unrolled
    accesses = re.findall(r"\b(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+)\b", ptx)
    assert len(accesses) == len(re.findall(r"\b(?:ld|st)\.global", ptx))
    assert "cp.async" not in ptx, "a way to global memory that is not counted"
    wide = sum(int(vector or 1) * int(bits) >= 128 for vector, bits in accesses)
    return Built(registers, stack, wide, len(accesses) - wide)


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(assembly: str) -> Built:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    scratch = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
    accesses = re.findall(r"^\s*(?:global|buffer|flat)_(?:load|store)_\w+", assembly, re.M)
    wide = sum("dwordx4" in access for access in accesses)
    return Built(registers, scratch, wide, len(accesses) - wide)
