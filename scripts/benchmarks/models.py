"""A training step of whole models: forward, loss, backward, optimizer.

torch's model, loss and fused AdamW compete with the same model after :func:`torchref.convert`, our
loss and our fused AdamW; each as it is, through torch.compile and, on a GPU, from a CUDA graph.
There the models are of a size that people train, in channels_last and bfloat16's autocast.

A converted model is timed only where its loss and gradients are torch's, with dropout off. The loss
meets the rule of :mod:`torchref.testing` by itself, the gradients meet it together: a ReLU whose
input is rounded to the other side of 0 moves single gradients of a deep network by any amount.

Besides a row's other figures there is ``saved_bytes``, what forward keeps for backward other than
parameters; None where torch.compile or a graph does the keeping.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import torchref
import torchref.optim
from torchref.testing import Comparison, measure_parity

from . import cuda, results, timing
from .networks import GPT, mlp, resnet18, resnet50
from .options import Options
from .results import Row, group, rows_of

Batch = tuple[Tensor, Tensor]  # input, classes

CHECKED = 8  # samples
SECONDS = 8.0  # for the samples of a model
IN_A_GRAPH = 3  # steps


@dataclass(frozen=True)
class Case:
    """A network and the shape of its batch: images, rows or, with ``tokens``, class indices.

    ``compiles`` says whether torch.compile gets through it in a minute.
    """

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    tokens: bool = False
    compiles: bool = True

    def batch(self, device: str, most: int | None = None) -> Batch:
        """At most so many samples."""
        shape = (min(self.shape[0], most or self.shape[0]), *self.shape[1:])
        if self.tokens:
            x, classes = torch.randint(self.classes, (2, *shape), device=device)
            return x, classes
        x = torch.randn(shape, device=device)
        return _in_layout(x, self.layout(device)), torch.randint(self.classes, shape[:1]).to(device)

    def layout(self, device: str) -> str:
        return "channels_last" if device == "cuda" and len(self.shape) == 4 else "contiguous"

    def group(self, device: str) -> Row:
        shape = "x".join(map(str, self.shape))
        dtype = "bfloat16" if device == "cuda" else "float32"
        described = {"dtype": dtype, "layout": self.layout(device)}
        return group("models", self.name, "step", shape, math.prod(self.shape), **described)


ON_THE_CPU = [
    Case("resnet18", partial(resnet18, classes=10), (16, 3, 32, 32), 10),
    Case("resnet50", resnet50, (4, 3, 64, 64), 1000, compiles=False),
    Case("mlp", partial(mlp, 784, 1024, 3, 10), (128, 784), 10),
    Case("gpt", partial(GPT, 2048, 128, layers=4, heads=4, width=256), (4, 128), 2048, True),
]
ON_A_GPU = [
    Case("resnet18", resnet18, (128, 3, 224, 224), 1000),
    Case("resnet50", resnet50, (64, 3, 224, 224), 1000),
    Case("mlp", partial(mlp, 784, 4096, 3, 10), (8192, 784), 10),
    Case("gpt", GPT, (8, 1024), 50257, True),
]
NAMES = tuple(case.name for case in ON_THE_CPU)


@dataclass(frozen=True)
class Contestant:
    """A way to run a step."""

    converted: bool = False
    compiled: bool = False
    graph: bool = False
    backend: str = "auto"


def contestants(case: Case, options: Options) -> dict[str, Contestant]:
    found = {
        "torch": Contestant(),
        "torch again": Contestant(),
        "converted": Contestant(converted=True),
    }
    if options.device == "cpu":
        found["converted, compiled"] = Contestant(converted=True, backend="compiled")
    else:
        found["torch, CUDA graph"] = Contestant(graph=True)
        found["converted, CUDA graph"] = Contestant(converted=True, graph=True)
    if case.compiles and not options.quick:
        found["torch.compile"] = Contestant(compiled=True)
        found["converted, torch.compile"] = Contestant(converted=True, compiled=True)
    return found


class WithLoss(nn.Module):
    """A network and its loss, on a GPU under autocast."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return self.loss(self.network(x).flatten(0, -2), classes.flatten())


class Step:
    """A step of training on one batch, the same each time."""

    def __init__(self, contestant: Contestant, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.model = _in_layout(WithLoss(case.network()).to(device), case.layout(device))
        self.batch = case.batch(device)
        if contestant.converted:
            torchref.convert(self.model)
        library = torchref if contestant.converted else torch
        flags: dict[str, Any] = {"fused": True, "capturable": contestant.graph}
        self.optimizer = library.optim.AdamW(self.model.parameters(), lr=1e-4, **flags)
        self.backend = contestant.backend
        self.loss: Callable[..., Tensor] = self.model
        if contestant.compiled:
            self.loss = torch.compile(self.model, fullgraph=True, dynamic=False)

    def __call__(self) -> None:
        with torchref.backend(self.backend):
            self.loss(*self.batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def saved_bytes(self) -> int:
        """What forward keeps for backward: the memory of all saved tensors but the parameters'."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torchref.backend(self.backend):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = self.loss(*self.batch)
            del loss  # till here, so that no two of them had one address
        return sum(size for address, size in kept.items() if address not in parameters)


def run(options: Options) -> list[Row]:
    """Measure, and say so line by line."""
    rows = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for case in ON_THE_CPU if options.device == "cpu" else ON_A_GPU:
            if options.wants(case.name):
                measured = measure(case, options)
                print(results.line(measured), flush=True)
                rows += measured
    return rows


def measure(case: Case, options: Options) -> list[Row]:
    shared = case.group(options.device)
    if options.time_is_up():
        return rows_of(shared, {}, {"all": {"note": "skipped: no time"}})
    figures: dict[str, Row] = {}
    samples: dict[str, timing.Sample] = {}
    for name, contestant in contestants(case, options).items():
        figures[name] = verdict(case, contestant, options.device)
        if figures[name].get("note"):
            continue
        try:
            samples[name], known = sample_of(Step(contestant, case, options.device), contestant)
        except Exception as error:
            figures[name]["note"] = f"failed: {(str(error) or repr(error)).splitlines()[0]}"
        else:
            figures[name] |= known
    seconds = timing.in_turns(samples, SECONDS) if "torch again" in samples else {}
    return rows_of(shared, seconds, figures)


def sample_of(step: Step, contestant: Contestant) -> tuple[timing.Sample, Row]:
    """How to measure a step, and what else is known of it."""
    step()  # makes the optimizer's state and compiles
    step()
    plain = not (contestant.compiled or contestant.graph)
    known: Row = {"saved_bytes": step.saved_bytes() if plain else None}
    if not step.batch[0].is_cuda:
        return timing.repeated(step), known
    if contestant.graph:
        return cuda.replayed([step] * IN_A_GRAPH), known
    known |= {"host_us": cuda.host_us(step), "launches": cuda.launches(step)}
    return cuda.eager(step), known | {"peak_bytes": cuda.peak_bytes(step)}


def verdict(case: Case, contestant: Contestant, device: str) -> Row:
    """Errors of the loss and the gradients, and a note if they are too large."""
    if not contestant.converted:
        return {}
    torch.manual_seed(0)
    theirs = _in_layout(WithLoss(case.network()).to(device), case.layout(device))
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = copy.deepcopy(theirs)
    torchref.convert(ours)
    with torchref.backend(contestant.backend):
        comparisons = measure_parity(ours, theirs, *case.batch(device, CHECKED))
    return results.verdict(together(comparisons))


def together(comparisons: list[Comparison]) -> list[Comparison]:
    """The gradients' comparisons as one, of the length of all errors; what has no error stays."""
    gradients = [c for c in comparisons if c.name.startswith("gradient") and c.error < math.inf]
    error = math.hypot(*(c.error for c in gradients))
    theirs = math.hypot(*(c.their_error for c in gradients))
    bound = math.hypot(*(c.bound for c in gradients))
    problem = "" if error <= bound else f"gradients: error {error:.3e} exceeds {bound:.3e}"
    dtype = gradients[0].dtype
    rest = [c for c in comparisons if c not in gradients]
    return [*rest, Comparison("gradients", dtype, error, theirs, bound, problem)]


def _in_layout(x: Any, layout: str) -> Any:
    """A tensor or a module."""
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
