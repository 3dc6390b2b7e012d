"""Time an optimizer's step: ours and torch's, in turns, on the parameters of real models.

    python scripts/benchmark_optimizers.py
    python scripts/benchmark_optimizers.py --model resnet50 --optimizer AdamW --json steps.json
    python scripts/benchmark_optimizers.py --device cuda --dtype bfloat16

Every implementation steps the same parameters with the same gradients, in an order drawn anew each
round, and the median round counts. A ratio is torch's time over ours: above 1, ours is faster. The
first column is torch's against itself; a ratio nearer to 1 than that one is a tie.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parameter_lists import Shapes, gpt2, resnet50

import torchref
import torchref.optim

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {}),
    "SGD momentum": ("SGD", {"momentum": 0.9}),
    "RMSprop": ("RMSprop", {}),
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {}),
}
Step = Callable[[], Any]


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "gpt2": gpt2,
    "small": lambda: [(1024,)] * 500,
}


def implementations(name: str, shapes: Shapes, device: str, dtype: torch.dtype) -> dict[str, Step]:
    """A step of each implementation. They share parameters and gradients, not their state."""
    cls, options = OPTIMIZERS[name]
    params = [torch.nn.Parameter(torch.randn(s, device=device, dtype=dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    steps: dict[str, Step] = {}
    flags: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}}
    if cls != "RMSprop":
        flags["fused"] = {"fused": True}
    for flag, kwargs in flags.items():
        for library in (torch, torchref):
            optimizer = getattr(library.optim, cls)(params, lr=1e-5, **options, **kwargs)
            steps[f"{library.__name__} {flag}"] = optimizer.step
    steps["torch again"] = getattr(torch.optim, cls)(params, lr=1e-5, **options).step
    optimizer = getattr(torchref.optim, cls)(params, lr=1e-5, **options)

    def compiled() -> None:
        with torchref.backend("compiled"):
            optimizer.step()

    steps["torchref compiled"] = compiled
    return steps


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each round of each implementation."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # compiles, and touches the memory
        step()
        step()
    for _ in range(rounds):
        for name in random.sample(sorted(steps), len(steps)):
            wait()
            start = time.perf_counter()
            steps[name]()
            wait()
            times[name].append(time.perf_counter() - start)
    return times


def rows_of(model: str, name: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for implementation, seconds in times.items():
        twentieth = sorted(seconds)
        rows.append(
            {
                "model": model,
                "optimizer": name,
                "implementation": implementation,
                "ms": statistics.median(seconds) * 1e3,
                "p20_ms": twentieth[len(seconds) // 5] * 1e3,
                "p80_ms": twentieth[-1 - len(seconds) // 5] * 1e3,
            }
        )
    return rows


def line(model: str, name: str, times: dict[str, list[float]]) -> str:
    """A table's row: milliseconds of torch's default, then ratios."""
    ms = {key: statistics.median(seconds) * 1e3 for key, seconds in times.items()}

    def ratio(theirs: str, ours: str) -> str:
        return f"{ms[theirs] / ms[ours]:.2f}" if theirs in ms and ours in ms else "-"

    best = "torch fused" if "torch fused" in ms else "torch default"
    cells = [
        f"{ms['torch default']:.1f}",
        ratio("torch default", "torch again"),
        ratio("torch default", "torchref default"),
        ratio("torch foreach", "torchref foreach"),
        ratio("torch fused", "torchref fused"),
        ratio(best, "torchref compiled"),
    ]
    return f"| {model} | {name} | " + " | ".join(cells) + " |"


HEADER = """\
| parameters | optimizer | torch, ms | torch again | default | foreach | fused | compiled |
|---|---|---|---|---|---|---|---|"""


def environment(device: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchref": torchref.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="all unless given")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, action="append", help="all unless given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA or ROCm device")
    about = environment(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()), args.dtype, sep=", ")
    print(HEADER, flush=True)
    rows = []
    for model in args.model or MODELS:
        for name in args.optimizer or OPTIMIZERS:
            dtype = getattr(torch, args.dtype)
            steps = implementations(name, MODELS[model](), args.device, dtype)
            times = measure(steps, args.rounds, args.device)
            rows += rows_of(model, name, times)
            print(line(model, name, times), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
