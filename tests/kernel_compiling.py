"""Compile kernels for GPUs that are not here, with the arguments their launchers would give."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
}


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
    wide: int  # loads and stores of 128 bits
    narrow: int  # other accesses to global memory


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Keep every launch instead of running it. Tensors may be on the meta device."""
    launches: list[Launch] = []
    before = _launch._run, _launch.multiprocessors
    _launch._run = lambda *call: launches.append(Launch(*call))
    try:
        yield launches
    finally:
        _launch._run = before[0]


def build(launch: Launch, target: GPUTarget) -> Built:
    signature, constants, attributes = {}, {}, {}
    names = launch.kernel.arg_names
    values = [*launch.args, *launch.constexprs.values()]
    assert names[len(launch.args) :] == list(launch.constexprs), "constexprs come last, in order"
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        marks = []
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            marks.append(["tt.divisibility", 16])
            if target.backend == "hip":
                marks.append(["tt.pointer_range", 32])
        elif number >= len(launch.args) or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(number,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                marks.append(["tt.divisibility", 16])
        if marks:
            attributes[(number,)] = marks
    source = ASTSource(launch.kernel, signature, constants, attributes)
    warps = launch.num_warps * 32 // target.warp_size
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    return _nvidia(compiled) if target.backend == "cuda" else _amd(compiled.asm["amdgcn"])


def _nvidia(compiled: Any) -> Built:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    sass = compiled.asm["sass"]
    accesses = re.findall(r"\b(?:LDG|STG)\.E[.\w]*", sass)
    wide = sum("128" in access for access in accesses)
    return Built(registers, stack, wide, len(accesses) - wide)


def _amd(assembly: str) -> Built:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    scratch = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
    accesses = re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", assembly)
    wide = sum("dwordx4" in access for access in accesses)
    return Built(registers, scratch, wide, len(accesses) - wide)
