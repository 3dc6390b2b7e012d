"""Every piece of ``torchref.nn`` beside torch's, forward, and forward and backward.

On the CPU torch, torch.compile, our formula and our compiled formula compete; on a GPU our kernel
and, where they are installed, Liger and quack do, too. Before anything is timed its numbers are
held against torch's in float64, on inputs of at most ``CHECKED`` elements. What is wrong is
reported and not timed.
"""

import contextlib
import itertools
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import torchref
from torchref.testing import measure_parity

from . import cuda, results, timing
from .cases import CASES, Case, Draw, Function, Inputs, Shape
from .options import Options
from .results import Row, group, rows_of

CHECKED = 2**22
COLD = 2**20  # elements: smaller tensors lie in the L2 cache in training, too
SECONDS = 10.0  # for the samples of a group
OTHERS_BOUND = 10  # times ours, for those whose authors promise less
NAMES = tuple(case.name for case in CASES)


@dataclass(frozen=True)
class Contestant:
    """An implementation: a function, and the backend of ours under which it runs."""

    function: Function
    backend: str = "reference"
    is_ours: bool = False

    @contextlib.contextmanager
    def running(self, training: bool) -> Iterator[None]:
        with torch.set_grad_enabled(training), torchref.backend(self.backend):
            yield


def contestants(case: Case, options: Options) -> dict[str, Contestant]:
    compiled = {"torch.compile": "default"}
    backends = {"formula": "reference", "compiled": "compiled"}
    if options.device == "cuda":
        backends = {"kernel": "triton"} | ({} if options.quick else backends)
        if not options.quick:
            compiled["torch.compile max-autotune"] = "max-autotune-no-cudagraphs"
    return {
        "torch": Contestant(case.theirs),
        "torch again": Contestant(case.theirs),
        **{name: Contestant(_compiled(case.theirs, mode)) for name, mode in compiled.items()},
        **{name: Contestant(case.ours, backend, True) for name, backend in backends.items()},
    }


def peers(case: Case) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Those that are installed, and a note for those that are not."""
    found, absent = {}, {}
    for name, where in case.peers.items():
        try:
            found[name] = Contestant(pkgutil.resolve_name(where))
        except (ImportError, AttributeError) as error:
            absent[name] = f"absent: {error}"
    return found, absent


def _compiled(function: Function, mode: str) -> Function:
    def call(*args):
        return function(*args)

    # Code of its own: Dynamo counts recompilations by code object, and gives up after eight.
    call.__code__ = call.__code__.replace(co_name=f"call_{next(_numbers)}")
    return torch.compile(call, fullgraph=True, dynamic=False, mode=mode)


_numbers = itertools.count()


@dataclass(frozen=True)
class Plan:
    """A case of one shape, type and layout: what is drawn, checked and timed together."""

    case: Case
    shape: Shape
    draw: Draw

    def inputs(self, most: int | None = None) -> Inputs:
        """Fresh ones; with fewer rows where there are more elements than ``most``."""
        first = self.shape[0]
        if most is not None:
            first = max(1, min(first, first * most // self.elements))
        return self.case.inputs(self.draw, (first, *self.shape[1:]))

    @property
    def elements(self) -> int:
        return self.case.elements(self.shape)

    def group(self, training: bool, mode: str) -> Row:
        which = "forward+backward" if training else "forward"
        shape = "x".join(map(str, self.shape))
        dtype = str(self.draw.dtype).removeprefix("torch.")
        described = {"dtype": dtype, "layout": self.draw.layout, "mode": mode}
        return group("pieces", self.case.name, which, shape, self.elements, **described)

    def modes(self) -> tuple[str, ...]:
        if self.draw.device == "cpu":
            return ("eager",)
        return ("cold", "graph", "eager") if self.elements >= COLD else ("graph", "eager")


def plans(options: Options) -> list[Plan]:
    """The largest first, so that what a deadline cuts off are the smaller."""
    dtypes = [torch.float32]
    if options.device == "cuda":
        dtypes = [torch.bfloat16] if options.quick else [torch.bfloat16, torch.float32]
    found = [
        Plan(case, shape, Draw(dtype, options.device, layout))
        for case in CASES
        if options.wants(case.name)
        for shape in case.sizes.of(options)
        for layout in case.layouts
        for dtype in dtypes
    ]
    return sorted(found, key=lambda plan: -plan.elements)


def run(options: Options) -> list[Row]:
    """Measure, and say so line by line."""
    rows = []
    for plan in plans(options):
        for measured in groups_of(plan, options):
            print(results.line(measured), flush=True)
            rows += measured
    return rows


def groups_of(plan: Plan, options: Options) -> Iterator[list[Row]]:
    """What :func:`compete` yields; one row that says why, where there is no time or memory."""
    note = "skipped: no time left"
    if not options.time_is_up():
        try:
            yield from compete(plan, options)
            return
        except Exception as error:
            note = f"failed: {_first_line(error)}"
    yield rows_of(plan.group(False, plan.modes()[0]), {}, {"torch": {"note": note}})


def compete(plan: Plan, options: Options) -> Iterator[list[Row]]:
    """Check every implementation, then time those that are right, pass by pass, mode by mode."""
    competing = contestants(plan.case, options)
    others, absent = peers(plan.case) if options.device == "cuda" else ({}, {})
    competing |= others
    figures: dict[str, Row] = {name: verdict(c, plan) for name, c in competing.items()}
    figures |= {name: {"note": note} for name, note in absent.items()}
    inputs = plan.inputs()
    differentiable = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    for training in (False, True) if differentiable else (False,):
        if training and plan.case.floor:
            competing["floor"], figures["floor"] = Contestant(plan.case.floor), {}
        for mode in plan.modes():
            yield timed(plan, training, mode, inputs, competing, figures, options)


def verdict(contestant: Contestant, plan: Plan) -> Row:
    """Errors on fresh inputs, and a note if they are too large or there are no numbers."""
    theirs, inputs = plan.case.theirs, plan.inputs(CHECKED)
    if contestant.function is theirs:
        return {}
    if plan.draw.device == "cuda":
        cuda.poison()
    try:
        with contestant.running(training=True):
            if plan.case.truth:
                theirs = plan.case.truth(contestant.function, inputs)
            comparisons = measure_parity(contestant.function, theirs, *inputs, strides=False)
    except ArithmeticError as error:
        return {"note": f"wrong: {error}"}
    except Exception as error:
        return {"note": f"failed: {_first_line(error)}"}
    if not contestant.is_ours:
        # Liger writes the gradient over the input
        comparisons = [c for c in comparisons if not c.name.endswith("afterwards")]
    return results.verdict(comparisons, 1 if contestant.is_ours else OTHERS_BOUND)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def timed(
    plan: Plan,
    training: bool,
    mode: str,
    inputs: Inputs,
    competing: Mapping[str, Contestant],
    figures: Mapping[str, Row],
    options: Options,
) -> list[Row]:
    """The rows of one pass in one mode."""
    sets = [inputs]
    if mode == "cold":
        held = sum(x.nbytes for x in inputs if isinstance(x, Tensor))
        sets += [plan.inputs() for _ in range(cuda.sets_of_buffers(held, cuda.l2_bytes()) - 1)]
    upstream = [_gradient(plan.case, given) if training else None for given in sets]
    figures = {name: dict(known) for name, known in figures.items()}
    samples = {}
    for name, contestant in competing.items():
        if figures[name].get("note"):
            continue
        calls = [
            _pass(contestant.function, given, None if name == "floor" else dy)
            for given, dy in zip(sets, upstream, strict=True)
        ]
        try:
            with contestant.running(training):
                sample, more = sample_of(calls, mode, plan.draw.device)
        except Exception as error:
            if name in ("torch", "torch again"):
                raise
            figures[name]["note"] = f"failed: {_first_line(error)}"
            continue
        figures[name] |= more
        samples[name] = _inside(contestant, training, sample)
    seconds = timing.in_turns(samples, SECONDS)
    moved = plan.case.moves[training] * plan.elements * plan.draw.dtype.itemsize
    shared = plan.group(training, mode)
    return rows_of(shared, seconds, figures, moved, options.ceilings.get("copy_gbs"))


def _gradient(case: Case, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return torch.randn_like(case.theirs(*inputs))


def _pass(function: Function, inputs: Inputs, dy: Tensor | None) -> timing.Call:
    """Forward, or with a gradient ``dy`` forward and backward."""
    if dy is None:
        return lambda: function(*inputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs), leaves, dy)


def sample_of(calls: Sequence[timing.Call], mode: str, device: str) -> tuple[timing.Sample, Row]:
    """How to measure these calls, of which each has its own buffers, and what else is known."""
    first = calls[0]
    if device == "cpu":
        return timing.repeated(first), {}
    eager = cuda.eager(first)
    if mode == "eager":
        known = {"host_us": cuda.host_us(first), "launches": cuda.launches(first)}
        return eager, known | {"peak_bytes": cuda.peak_bytes(first)}
    eager()
    count = max(len(calls), cuda.calls_in_a_graph(eager()))
    return cuda.replayed([calls[i % len(calls)] for i in range(count)]), {}


def _inside(contestant: Contestant, training: bool, sample: timing.Sample) -> timing.Sample:
    def run() -> float:
        with contestant.running(training):
            return sample()

    return run
