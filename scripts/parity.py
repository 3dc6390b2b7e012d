"""Print how far every piece is from torch's, against float64 truth.

    python scripts/parity.py
    python scripts/parity.py --backend compiled --dtype float32
    python scripts/parity.py --only BatchNorm --device cuda

A row is one piece in one dtype: of its output, gradients and buffers the one nearest to its bound,
our largest error there, torch's own, and the bound: twice torch's, and a few roundings. Exit status
1 if one is beyond it.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.options import OneLineParser
from torch import Tensor

import torchref
from torchref._printing import printing
from torchref.nn.functional import linear_cross_entropy
from torchref.testing import Comparison, measure_parity

DTYPES = ["float64", "float32", "float16", "bfloat16"]
Case = tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Name, ours, theirs and inputs of every piece."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(device, dtype).requires_grad_()

    def both(name: str, *inputs: Any, train: bool = True, note: str = "", **kwargs: Any) -> Case:
        pair = [getattr(library.nn, name)(**kwargs) for library in (torchref, torch)]
        ours, theirs = (module.to(device, dtype).train(train) for module in pair)
        shown = ", ".join(f"{k}={v}" for k, v in kwargs.items() if not isinstance(v, Tensor))
        return f"{name}({shown}){note}", ours, theirs, inputs

    x, rows = draw(64, 1000, scale=4.0), draw(512, 100)
    for name in ("ReLU", "LeakyReLU", "Sigmoid", "Tanh", "ELU", "SELU", "GELU", "SiLU", "Softplus"):
        yield both(name, x)
    yield both("GELU", x, approximate="tanh")
    yield both("Softmax", x, dim=1)
    yield both("LogSoftmax", x, dim=1)
    yield both("Linear", rows, in_features=100, out_features=50)
    index = torch.randint(0, 100, (512,), device=device)
    index[::7] = -100
    probabilities = rows.detach().flip(0).softmax(1).requires_grad_()
    yield both("CrossEntropyLoss", rows, index)
    yield both("CrossEntropyLoss", rows, index, weight=torch.rand(100), label_smoothing=0.1)
    yield both("CrossEntropyLoss", rows, probabilities, reduction="sum")
    once = torchref.nn.CrossEntropyLoss(gradient_in_forward=True)
    plain = torch.nn.CrossEntropyLoss()
    yield "CrossEntropyLoss(gradient_in_forward=True)", once, plain, (rows, index)
    in_chunks = partial(linear_cross_entropy, options=SimpleNamespace(batch_chunk_size=128))
    heads = rows, draw(100, 100, scale=0.1), index
    yield "LinearCrossEntropyLoss(rows at a time=128)", in_chunks, linear_then_cross_entropy, heads
    yield both("NLLLoss", rows.detach().log_softmax(1).requires_grad_(), index)
    yield both("MSELoss", rows, draw(512, 100))
    yield both("L1Loss", rows, draw(512, 100))
    yield both("BCELoss", rows.detach().sigmoid().requires_grad_(), probabilities)
    yield both("BCEWithLogitsLoss", rows, probabilities, pos_weight=torch.rand(100))
    images = draw(8, 16, 9, 11)
    yield both("BatchNorm1d", rows, num_features=100)
    yield both("BatchNorm2d", images, num_features=16)
    nhwc = images.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    yield both("BatchNorm2d", nhwc, num_features=16, note=" channels_last")
    yield both("BatchNorm2d", images, num_features=16, train=False, note=" eval")
    yield both("BatchNorm3d", draw(4, 8, 3, 5, 5), num_features=8)
    maps = draw(4, 8, 3, 5, 5)
    for dims, inputs, train, activation, note in [
        (1, (rows,), True, "silu", ""),
        (2, (images, draw(8, 16, 9, 11)), True, "relu", " residual"),
        (2, (nhwc, draw(8, 16, 9, 11)), True, "silu", " residual, channels_last"),
        (2, (images, draw(8, 16, 9, 11)), False, "relu", " residual, eval"),
        (3, (maps, maps.detach().flip(0).requires_grad_()), True, "relu", " residual"),
    ]:
        made = getattr(torchref.nn, f"BatchNormAct{dims}d"), batch_norm_then(f"BatchNorm{dims}d")
        ours, theirs = (
            cls(inputs[0].shape[1], activation=activation).to(device, dtype).train(train)
            for cls in made
        )
        yield f"BatchNormAct{dims}d(activation={activation}){note}", ours, theirs, inputs
    if device == "cpu":  # elsewhere the masks differ, as torch's do between devices
        yield both("Dropout", x, p=0.3)
    for activation, p in [("relu", 0.3), ("gelu", 0.3)] if device == "cpu" else [("gelu", 0.0)]:
        ours, theirs = (
            cls(100, 50, activation=activation, p=p).to(device, dtype)
            for cls in (torchref.nn.LinearActDropout, LinearThenDropout)
        )
        yield f"LinearActDropout(activation={activation}, p={p})", ours, theirs, (rows,)
    for name, kwargs in OPTIMIZERS:
        ours, theirs = (
            partial(optimized, getattr(m.optim, name), kwargs) for m in (torchref, torch)
        )
        shown = ", ".join(f"{k}={v}" for k, v in kwargs.items())
        start = draw(1000).detach()
        gradients = torch.randn(100, 1000).to(device, dtype)
        yield f"{name}({shown})", ours, theirs, (start, gradients)


class LinearThenDropout(torch.nn.Linear):
    """Torch's product, sum, activation and dropout."""

    def __init__(self, inputs: int, outputs: int, activation: str, p: float) -> None:
        super().__init__(inputs, outputs)
        self.activation, self.p = activation, p

    def forward(self, input: Tensor) -> Tensor:
        u = torch.nn.functional.linear(input, self.weight) + self.bias
        y = getattr(torch.nn.functional, self.activation)(u)
        return torch.nn.functional.dropout(y, self.p)


def batch_norm_then(name: str) -> type[torch.nn.Module]:
    """Torch's batch normalization, a sum and an activation."""
    base = getattr(torch.nn, name)

    class Composed(base):
        def __init__(self, channels: int, activation: str) -> None:
            super().__init__(channels)
            self.activation = activation

        def forward(self, input: Tensor, residual: Tensor | float = 0.0) -> Tensor:
            return getattr(torch.nn.functional, self.activation)(super().forward(input) + residual)

    return Composed


def linear_then_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight), target)


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Adam", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "amsgrad": True}),
]


def optimized(
    optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any], start: Tensor, gradients: Tensor
) -> Tensor:
    """The parameter after a step with each gradient."""
    parameter = start.clone().requires_grad_()
    stepping = optimizer([parameter], **kwargs)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        stepping.step()
    return parameter.detach()


def worst(comparisons: list[Comparison]) -> Comparison:
    return max(comparisons, key=lambda c: (bool(c.problem), c.error / c.bound if c.bound else 0.0))


def main() -> int:
    parser = OneLineParser(description="How far every piece is from torch's.")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all four")
    parser.add_argument("--backend", choices=["auto", "reference", "compiled", "triton"])
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--only", default="", help="pieces whose name contains this")
    options = parser.parse_args()
    try:
        torch.empty(0, device=options.device)
        if options.backend:
            torchref.set_backend(options.backend)
    except (RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    columns = f"{'ours':>8} {'torch':>8} {'bound':>8}"
    with printing(parser):
        print(f"torch {torch.__version__}, {options.device}, backend {torchref.get_backend()}\n")
        print(f"{'piece':<60} {'dtype':<9} {'worst in':<21} {columns}  verdict")
    failures = total = 0
    for dtype in options.dtype or DTYPES:
        torch.manual_seed(0)
        for name, ours, theirs, inputs in cases(getattr(torch, dtype), options.device):
            if options.only.lower() not in name.lower():
                continue
            row = worst(measure_parity(ours, theirs, *inputs, strides="Softmax" not in name))
            verdict = "ok" if not row.problem else f"FAILS: {row.problem}"
            errors = f"{row.error:8.1e} {row.their_error:8.1e} {row.bound:8.1e}"
            with printing(parser):
                print(f"{name:<60} {dtype:<9} {row.name:<21} {errors}  {verdict}")
            failures += bool(row.problem)
            total += 1
    if not total:
        parser.error(f"no piece's name contains {options.only!r}")
    with printing(parser):
        print(f"\n{total - failures} of {total} within the bound")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
