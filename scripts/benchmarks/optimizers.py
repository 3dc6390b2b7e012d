"""An optimizer's step, ours and torch's, on the parameters of real models.

Every implementation steps the same parameters with the same gradients and has a state of its own.
torch's default is the baseline; ``torchref foreach`` is to be read beside ``torch foreach``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import torchref
import torchref.optim
from torchref.testing import measure_parity

from . import cuda, results, timing
from .options import Options
from .parameter_lists import Shapes, gpt2, resnet50
from .results import Row, group, rows_of

SECONDS = 30.0  # for the samples of a group
STEPS = 5  # of the check


@dataclass(frozen=True)
class Case:
    """An optimizer; ``bytes`` are those a step moves for each float32 parameter."""

    name: str
    cls: str
    bytes: int
    options: dict[str, Any] = field(default_factory=dict)
    max_norm: float | None = None

    def step(self, library: Any, params: list[Tensor], lr: float, **flags: Any) -> timing.Call:
        """A step of torch's optimizer or of ours, with the gradients clipped where asked for."""
        clips_inside = {"max_norm": self.max_norm} if self.max_norm and library is torchref else {}
        options = {"lr": lr, **self.options, **clips_inside, **flags}
        optimizer = getattr(library.optim, self.cls)(params, **options)
        if self.max_norm is None or clips_inside:
            return optimizer.step

        def clipped() -> None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm or 0.0)
            optimizer.step()

        return clipped


CASES = [
    Case("SGD", "SGD", 12),
    Case("SGD_momentum", "SGD", 20, {"momentum": 0.9}),
    Case("RMSprop", "RMSprop", 20),
    Case("Adam", "Adam", 28),
    Case("AdamW", "AdamW", 28),
    Case("AdamW_clipped", "AdamW", 32, max_norm=1.0),
]
NAMES = tuple(case.name for case in CASES)
MODELS: dict[str, Callable[[], Shapes]] = {
    "gpt2": gpt2,
    "resnet50": resnet50,
    "small": lambda: [(1024,)] * 500,
}
ON_A_GPU: dict[str, Callable[[], Shapes]] = {"one": lambda: [(2**27,)]}


def implementations(
    case: Case, params: list[Tensor], options: Options, lr: float = 1e-5
) -> dict[str, timing.Call]:
    def step(library: Any, **flags: Any) -> timing.Call:
        return case.step(library, params, lr, **flags)

    steps = {"torch": step(torch), "torch again": step(torch), "torchref": step(torchref)}
    flags = ["foreach", "fused"] if case.cls != "RMSprop" else ["foreach"]  # torch fuses no RMSprop
    for flag in flags:
        for library in (torch, torchref):
            steps[f"{library.__name__} {flag}"] = step(library, **{flag: True})
    ours = step(torchref)

    def compiled() -> None:
        with torchref.backend("compiled"):
            ours()

    steps["torchref compiled"] = compiled
    if options.device == "cuda" and not options.quick:  # minutes of compilation
        steps["torch.compile"] = torch.compile(step(torch))
    return steps


def run(options: Options) -> list[Row]:
    """Measure, and say so line by line."""
    rows = []
    models = MODELS if options.device == "cpu" else ON_A_GPU | MODELS
    for model, shapes in models.items():
        for case in CASES:
            if options.wants(case.name) and not (options.quick and model == "gpt2"):
                measured = measure(case, model, shapes(), options)
                print(results.line(measured), flush=True)
                rows += measured
    return rows


def measure(case: Case, model: str, shapes: Shapes, options: Options) -> list[Row]:
    shared = group("optimizers", case.name, "step", model, sum(map(math.prod, shapes)))
    if options.time_is_up():
        return rows_of(shared, {}, {"torch": {"note": "skipped: no time left"}})
    params: list[Tensor] = [
        torch.nn.Parameter(torch.randn(shape, device=options.device)) for shape in shapes
    ]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    steps = implementations(case, params, options)
    figures: dict[str, Row] = {name: {} for name in steps}
    for name in steps:
        figures[name] = {} if name in ("torch", "torch again") else verdict(case, name, options)
    right = {name: step for name, step in steps.items() if not figures[name].get("note")}
    of_device = timing.repeated if options.device == "cpu" else cuda.eager
    samples = {name: of_device(warm(step)) for name, step in right.items()}
    if options.device == "cuda":
        for name, step in right.items():
            figures[name] |= {"host_us": cuda.host_us(step), "launches": cuda.launches(step)}
    seconds = timing.in_turns(samples, SECONDS)
    moved = case.bytes * shared["elements"]
    return rows_of(shared, seconds, figures, moved, options.ceilings.get("copy_gbs"))


def warm(step: timing.Call) -> timing.Call:
    """Its first call makes the state, its second compiles."""
    step()
    step()
    return step


def verdict(case: Case, name: str, options: Options) -> Row:
    """Errors of a few steps of small parameters, and a note if they are too large."""

    def stepped(implementation: str, *starts: Tensor) -> tuple[Tensor, ...]:
        params = [start.detach().clone().requires_grad_() for start in starts]
        for p in params:
            p.grad = p.detach().sin()
        step = implementations(case, list(params), options, lr=0.1)[implementation]
        for _ in range(STEPS):
            step()
        return tuple(p.detach() for p in params)

    starts = [torch.randn(shape, device=options.device) for shape in ((33, 7), (5,), (1000,))]
    comparisons = measure_parity(partial(stepped, name), partial(stepped, "torch"), *starts)
    return results.verdict(comparisons)
