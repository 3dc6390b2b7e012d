"""Every piece of ``torchref.nn`` beside torch's, forward, and forward and backward.

On the CPU torch, torch.compile, our formula and our compiled formula compete; on a GPU our kernel
and, where they are installed, Liger and quack do, too. Before anything is timed its numbers are
held against torch's in float64, on inputs of at most ``CHECKED`` elements. What is wrong is
reported and not timed. A new piece is one entry in ``CASES``.
"""

import contextlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as theirs
from torch import Tensor

import torchref
import torchref.nn.functional as ours
from torchref.nn.linear import linear_bias_bwd
from torchref.testing import measure_parity

from . import cuda, results, timing
from .options import Options
from .results import Row, group, rows_of

Shape = tuple[int, ...]
Inputs = tuple[Any, ...]
Function = Callable[..., Any]

CHECKED = 2**22
COLD = 2**20  # elements: smaller tensors lie in the L2 cache in training, too
SECONDS = 10.0  # for the samples of a group
OTHERS_BOUND = 10  # times ours, for those whose authors promise less
DROPPED = 0.1


@dataclass(frozen=True)
class Sizes:
    cpu: tuple[Shape, ...]
    gpu: tuple[Shape, ...]
    quick_cpu: tuple[Shape, ...]
    quick_gpu: tuple[Shape, ...]

    def of(self, options: Options) -> tuple[Shape, ...]:
        if options.device == "cpu":
            return self.quick_cpu if options.quick else self.cpu
        return self.quick_gpu if options.quick else self.gpu


FLAT = Sizes(
    cpu=((2**14,), (2**17,), (2**20,), (2**22,)),
    gpu=tuple((2**power,) for power in range(10, 29, 3)),
    quick_cpu=((2**14,), (2**20,)),
    quick_gpu=((2**14,), (2**28,)),
)
ROWS = Sizes(
    cpu=((16, 1024), (128, 1024), (1024, 1024), (4096, 1024)),
    gpu=(*((4096, 2**power) for power in range(10, 19)), (32768, 1024), (32768, 32768)),
    quick_cpu=((16, 1024), (1024, 1024)),
    quick_gpu=((4096, 32768),),
)
IMAGES = Sizes(
    cpu=((1, 64, 16, 16), (8, 64, 16, 16), (64, 64, 16, 16), (256, 64, 16, 16)),
    gpu=(
        *((256, 64, 112, 112), (256, 64, 56, 56), (256, 256, 56, 56)),
        *((256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7)),
    ),
    quick_cpu=((1, 64, 16, 16), (64, 64, 16, 16)),
    quick_gpu=((256, 64, 112, 112),),
)
HEADS = Sizes(  # rows, classes, features
    cpu=((16, 1024, 256), (128, 1024, 256), (1024, 1024, 256), (4096, 1024, 256)),
    gpu=((4096, 32768, 4096), (8192, 131072, 4096)),
    quick_cpu=((16, 1024, 256), (1024, 1024, 256)),
    quick_gpu=((4096, 32768, 4096),),
)


@dataclass(frozen=True)
class Draw:
    """Random tensors of one type, on one device, in one layout."""

    dtype: torch.dtype
    device: str
    layout: str

    def __call__(self, shape: Shape, grad: bool = True) -> Tensor:
        x = torch.randn(shape, dtype=self.dtype, device=self.device)
        if self.layout == "channels_last" and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(grad)

    def classes(self, rows: int, count: int) -> Tensor:
        return torch.randint(count, (rows,), device=self.device)


@dataclass(frozen=True)
class Case:
    """A piece, as ours and as torch's: one function or several, one after the other.

    Args:
        name: in the results and on the command line.
        ours, theirs: functions of the same arguments.
        inputs: those arguments, of a shape. Where none requires a gradient, forward alone is timed.
        sizes: what shapes to time.
        moves: for each element of the input, the elements that must move through memory, forward,
            then forward and backward; 0 where memory is not what takes the time.
        layouts: of the input.
        peers: where others' functions are, ``"module:name"``, by distribution.
        truth: where the piece draws random numbers, the function that it is once ``call`` has drawn
            them from the seed 0.
        floor: what every implementation of forward and backward must compute, timed beside them.
        elements: how many a shape has.
    """

    name: str
    ours: Function
    theirs: Function
    inputs: Callable[[Draw, Shape], Inputs]
    sizes: Sizes
    moves: tuple[float, float]
    layouts: tuple[str, ...] = ("contiguous",)
    peers: Mapping[str, str] = field(default_factory=dict)
    truth: Callable[[Function, Inputs], Function] | None = None
    floor: Function | None = None
    elements: Callable[[Shape], int] = math.prod


def _one(draw: Draw, shape: Shape) -> Inputs:
    return (draw(shape),)


def _indices(draw: Draw, shape: Shape) -> Inputs:
    return draw(shape), draw.classes(*shape)


def _log_probabilities(draw: Draw, shape: Shape) -> Inputs:
    x = draw(shape, grad=False).log_softmax(1)
    return x.requires_grad_(), draw.classes(*shape)


def _probabilities(draw: Draw, shape: Shape) -> Inputs:
    return draw(shape), draw(shape, grad=False).softmax(1)


def _two(draw: Draw, shape: Shape) -> Inputs:
    return draw(shape), draw(shape, grad=False)


def _unit(draw: Draw, shape: Shape) -> Inputs:
    x, target = (draw(shape, grad=False).sigmoid() for _ in range(2))
    return x.requires_grad_(), target


def _constant(draw: Draw, shape: Shape) -> Inputs:
    return (draw(shape, grad=False),)


def _head(draw: Draw, shape: Shape) -> Inputs:
    rows, classes, features = shape
    weight = draw((classes, features), grad=False) / features**0.5
    return draw((rows, features)), weight.requires_grad_(), draw.classes(rows, classes)


def _normalized(draw: Draw, shape: Shape, grad: bool) -> Inputs:
    """As a batch norm takes them: input, running statistics, weight and bias."""
    channels = shape[1:2]
    mean, var = draw(channels, grad=False), draw(channels, grad=False).square() + 0.5
    return draw(shape), mean, var, draw(channels, grad), draw(channels, grad)


def _with_bias(draw: Draw, shape: Shape) -> Inputs:
    return draw(shape), draw(shape[1:])


def _relu(x: Tensor, bias: Tensor) -> Tensor:
    return theirs.relu(x + bias)


def _relu_then_dropout(x: Tensor, bias: Tensor) -> Tensor:
    return theirs.dropout(_relu(x, bias), DROPPED)


def _with_residual(draw: Draw, shape: Shape) -> Inputs:
    return *_normalized(draw, shape, grad=True), draw(shape)


def _batch_norm_act(*inputs: Tensor) -> Tensor:
    *normalized, residual = inputs
    return ours.batch_norm_act(*normalized, training=True, residual=residual)


def _batch_norm_then_add_and_relu(*inputs: Tensor) -> Tensor:
    *normalized, residual = inputs
    return theirs.relu(theirs.batch_norm(*normalized, training=True) + residual)


def _linear_then_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return theirs.cross_entropy(theirs.linear(x, weight), target)


@torch.no_grad()
def _three_products(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    scores = x @ weight.t()
    return scores @ weight, scores.t() @ x


def _masked(before: Function, call: Function, inputs: Inputs) -> Function:
    """What dropout makes of ``before``, by the mask that a call draws. That of ones is not 0."""
    torch.manual_seed(0)
    mask = call(*map(torch.ones_like, inputs)) != 0
    share, deviation = mask.double().mean().item(), math.sqrt(DROPPED * (1 - DROPPED))
    if abs(share - (1 - DROPPED)) > 5 * deviation / math.sqrt(mask.numel()):
        raise ArithmeticError(f"it keeps {share:.3f} of all elements")
    return lambda *inputs: before(*inputs) * mask / (1 - DROPPED)


def _both(name: str, function: str | None = None, **kwargs: Any) -> tuple[str, Function, Function]:
    """The name, ours and torch's of a function that both have."""
    our, their = (getattr(library, function or name) for library in (ours, theirs))
    return name, partial(our, **kwargs), partial(their, **kwargs)


_liger = "liger_kernel.transformers.functional:liger_"
_CROSS_ENTROPY = {
    "liger": f"{_liger}cross_entropy",
    "quack": "quack.cross_entropy:cross_entropy",
}
_SOFTMAX = {"liger": f"{_liger}softmax", "quack": "quack.softmax:softmax"}
_HEAD = {"liger": f"{_liger}fused_linear_cross_entropy"}
_LAYOUTS = ("contiguous", "channels_last")

CASES = [
    Case(*_both("relu"), _one, FLAT, (2, 5)),
    Case(*_both("leaky_relu"), _one, FLAT, (2, 5)),
    Case(*_both("sigmoid"), _one, FLAT, (2, 5)),
    Case(*_both("tanh"), _one, FLAT, (2, 5)),
    Case(*_both("elu"), _one, FLAT, (2, 5)),
    Case(*_both("selu"), _one, FLAT, (2, 5)),
    Case(*_both("gelu"), _one, FLAT, (2, 5)),
    Case(*_both("gelu_tanh", "gelu", approximate="tanh"), _one, FLAT, (2, 5)),
    Case(*_both("silu"), _one, FLAT, (2, 5)),
    Case(*_both("softplus"), _one, FLAT, (2, 5)),
    Case(*_both("dropout", p=DROPPED), _one, FLAT, (2, 4), truth=partial(_masked, lambda x: x)),
    Case(*_both("softmax", dim=1), _one, ROWS, (2, 5), peers=_SOFTMAX),
    Case(*_both("log_softmax", dim=1), _one, ROWS, (2, 5)),
    Case(*_both("cross_entropy"), _indices, ROWS, (1, 3), peers=_CROSS_ENTROPY),
    Case(
        *_both("cross_entropy_smoothed", "cross_entropy", label_smoothing=0.1),
        *(_indices, ROWS, (1, 3)),
    ),
    Case(*_both("cross_entropy_probabilities", "cross_entropy"), _probabilities, ROWS, (2, 5)),
    Case(*_both("nll_loss"), _log_probabilities, ROWS, (0, 1)),
    Case(*_both("mse_loss"), _two, FLAT, (2, 5)),
    Case(*_both("l1_loss"), _two, FLAT, (2, 5)),
    Case(*_both("binary_cross_entropy"), _unit, FLAT, (2, 5)),
    Case(*_both("binary_cross_entropy_with_logits"), _unit, FLAT, (2, 5)),
    Case(
        *_both("batch_norm_train", "batch_norm", training=True),
        *(partial(_normalized, grad=True), IMAGES, (3, 8), _LAYOUTS),
    ),
    Case(
        *_both("batch_norm_eval", "batch_norm"),
        *(partial(_normalized, grad=False), IMAGES, (2, 4), _LAYOUTS),
    ),
    Case(
        *("batch_norm_act", _batch_norm_act, _batch_norm_then_add_and_relu),
        *(_with_residual, IMAGES, (4, 10), _LAYOUTS),
    ),
    Case(
        *("bias_act_dropout", partial(ours.bias_act_dropout, p=DROPPED), _relu_then_dropout),
        *(_with_bias, ROWS, (2, 5)),
        truth=partial(_masked, _relu),
    ),
    Case("linear_bias_gradient", linear_bias_bwd, lambda dy: dy.sum(0), _constant, ROWS, (1, 0)),
    Case(
        *("linear_cross_entropy", ours.linear_cross_entropy, _linear_then_cross_entropy),
        *(_head, HEADS, (0, 0)),
        peers=_HEAD,
        floor=_three_products,
        elements=lambda shape: shape[0] * shape[1],
    ),
]
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
