"""What the kernels should reach on an H100 at large sizes, and which rows tell whether they do.

And what the formulas should reach on a CPU, compiled and not.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import results
from .results import Row, groups

Group = dict[str, Row]  # by implementation

NO_GPU = "no GPU yet"
LARGE = 2**26  # elements, well beyond the caches


@dataclass(frozen=True)
class Measure:
    """A number of each group whose rows are ``where``, of which the worst counts."""

    where: Callable[[Row], bool]
    value: Callable[[Group], float | None]
    worst: Callable[[Iterable[float]], float] = min

    def of(self, rows: list[Row]) -> str:
        """One number for each pass."""
        found: dict[str, list[float]] = {}
        for group in groups(filter(self.where, rows)):
            if (value := self.value(group)) is not None:
                found.setdefault(next(iter(group.values()))["pass"], []).append(value)
        return " / ".join(f"{self.worst(values):.2f}" for _, values in sorted(found.items()))


@dataclass(frozen=True)
class Target:
    """``wanted`` are the fraction of a copy's bandwidth, and torch's and torch.compile's time."""

    name: str
    wanted: tuple[str, str, str]
    measures: tuple[tuple[Measure, ...], tuple[Measure, ...], tuple[Measure, ...]]

    def line(self, rows: list[Row] | None) -> list[str]:
        """What is wanted and what was measured, without rows that no GPU has measured."""
        cells = [self.name]
        for wanted, measures in zip(self.wanted, self.measures, strict=True):
            values = [value for measure in measures if (value := measure.of(rows or []))]
            missing = NO_GPU if rows is None else "not measured"
            cells += [wanted, "; ".join(values) or missing]
        return cells


def figure(name: str, ours: str = "kernel") -> Callable[[Group], float | None]:
    return lambda group: group[ours][name] if ours in group else None


def ratio(theirs: str, ours: str = "kernel") -> Callable[[Group], float | None]:
    """Their time over ours."""

    def value(group: Group) -> float | None:
        times = [group[name]["ms"] if name in group else None for name in (theirs, ours)]
        return times[0] / times[1] if times[0] and times[1] else None

    return value


def more_host_us(group: Group) -> float | None:
    times = [group[name]["host_us"] if name in group else None for name in ("kernel", "torch")]
    return times[0] - times[1] if times[0] and times[1] else None


def large(*ops: str, dtype: str | None = None, training: bool = False) -> Callable[[Row], bool]:
    return lambda row: (
        row["op"] in ops
        and row["mode"] == "cold"
        and row["elements"] >= LARGE
        and dtype in (None, row["dtype"])
        and not (training and row["pass"] == "forward")
    )


def columns(least: int, most: int) -> Callable[[Row], bool]:
    """Softmax of rows of so many columns."""

    def where(row: Row) -> bool:
        softmax = row["op"] in ("softmax", "log_softmax") and row["mode"] == "cold"
        return softmax and least <= int(row["shape"].split("x")[1]) <= most

    return where


def small(mode: str) -> Callable[[Row], bool]:
    return lambda row: (
        row["section"] == "pieces" and row["mode"] == mode and row["elements"] < 2**20
    )


def optimizer(*ops: str, least: int = 10**8, most: int = 10**12) -> Callable[[Row], bool]:
    return lambda row: (
        row["section"] == "optimizers" and row["op"] in ops and least <= row["elements"] <= most
    )


def standard(
    name: str,
    wanted: tuple[str, str, str],
    where: Callable[[Row], bool],
    *more: Measure,
    ours: str = "kernel",
) -> Target:
    """Fraction of a copy, ratio to torch, ratio to torch.compile, and ``more`` beside the last."""
    fraction, eager, compiled = (
        Measure(where, figure(name, ours))
        for name in ("fraction_of_copy", "ratio_to_torch", "ratio_to_compile")
    )
    return Target(name, wanted, ((fraction,), (eager,), (compiled, *more)))


_ACTIVATIONS = (
    *("relu", "leaky_relu", "sigmoid", "tanh", "elu", "selu", "gelu", "gelu_tanh", "silu"),
    "softplus",
)
_OPTIMIZERS = ("SGD", "SGD_momentum", "RMSprop", "Adam", "AdamW")
_GRADIENT_IN_FORWARD = large("cross_entropy_gradient_in_forward", training=True)
_HEAD = large("linear_cross_entropy", training=True)
_MANY = optimizer(*_OPTIMIZERS, least=0, most=10**8)
_OVER_FLOOR = Measure(_HEAD, ratio("kernel", "floor"), max)

TARGETS = [
    standard("activations", ("0.97", ">= 1.0", ">= 1.0"), large(*_ACTIVATIONS)),
    standard("dropout, bfloat16", ("0.95", ">= 1.2", ">= 1.1"), large("dropout", dtype="bfloat16")),
    standard(
        "bias, activation, dropout",
        ("0.95 / 0.92", ">= 2.8 / 1.9", ">= 1.05"),
        large("bias_act_dropout"),
    ),
    standard("softmax, up to 32K columns", ("0.95", ">= 1.0", ">= 1.0"), columns(0, 2**15)),
    standard("softmax, from 64K columns on", ("0.93", ">= 1.4", ">= 1.4"), columns(2**16, 2**40)),
    standard(
        "cross-entropy, logits kept",
        ("0.94", ">= 2.0", ">= 1.0"),
        large("cross_entropy", training=True),
    ),
    standard(
        "cross-entropy, gradient in forward",
        ("0.88", ">= 2.7", ">= 1.3; >= 1.8 to Liger"),
        _GRADIENT_IN_FORWARD,
        Measure(_GRADIENT_IN_FORWARD, ratio("liger")),
    ),
    Target(
        "linear layer + cross-entropy",
        ("<= 1.15 x three products' time", ">= 1.3", ">= 1.0; >= 1.3 to Liger"),
        (
            (_OVER_FLOOR,),
            (Measure(_HEAD, ratio("torch")),),
            (Measure(_HEAD, ratio("torch.compile")), Measure(_HEAD, ratio("liger"))),
        ),
    ),
    standard(
        "batch norm, training",
        ("0.93 / 0.92", ">= 1.0; >= 1.5 without cuDNN at 64 channels", ">= 1.0"),
        large("batch_norm_train"),
    ),
    standard(
        "batch norm + sum + ReLU, training",
        ("0.93", ">= 1.8 / 1.25", ">= 1.0"),
        large("batch_norm_act"),
    ),
    Target(
        "SGD, RMSprop, Adam(W), from 100 million parameters on",
        ("0.94", ">= 1.03 to fused; >= 2.3 to foreach", ">= 1.0"),
        (
            (Measure(optimizer(*_OPTIMIZERS), figure("fraction_of_copy", "torchref")),),
            (
                Measure(optimizer(*_OPTIMIZERS), ratio("torch fused", "torchref")),
                Measure(optimizer(*_OPTIMIZERS), ratio("torch foreach", "torchref")),
            ),
            (Measure(optimizer(*_OPTIMIZERS), ratio("torch.compile", "torchref")),),
        ),
    ),
    Target(
        "the same over 161 to 500 tensors",
        ("one launch", ">= 2 to fused", ">= 1.5"),
        (
            (Measure(_MANY, figure("launches", "torchref"), max),),
            (Measure(_MANY, ratio("torch fused", "torchref")),),
            (Measure(_MANY, ratio("torch.compile", "torchref")),),
        ),
    ),
    Target(
        "clipping + AdamW",
        ("0.93 of 32 bytes", ">= 1.2 to fused", ">= 1.15"),
        (
            (Measure(optimizer("AdamW_clipped"), figure("fraction_of_copy", "torchref")),),
            (Measure(optimizer("AdamW_clipped"), ratio("torch fused", "torchref")),),
            (Measure(optimizer("AdamW_clipped"), ratio("torch.compile", "torchref")),),
        ),
    ),
    Target(
        "small tensors",
        ("host: at most 10 µs more an operation", ">= 1.0 in a CUDA graph", ">= 1.0"),
        (
            (Measure(small("eager"), more_host_us, max),),
            (Measure(small("graph"), ratio("torch")),),
            (Measure(small("graph"), ratio("torch.compile")),),
        ),
    ),
]

# Of an implementation on the CPU, the least ratio to torch's time and the least geometric mean of
# the ratios, forward and backward, from `results.LARGE` elements on.
CPU_TARGETS = {"compiled": (1.0, 1.8), "formula": (1 / 3, 0.5)}


def on_cpu(rows: list[Row]) -> list[list[str]]:
    """A header, then two lines for each of ``CPU_TARGETS``: what is wanted, and what was measured.

    A piece counts with the slowest of its sizes and layouts.
    """
    lines = [["", "wanted", "measured", "below"]]
    for name, (least, mean) in CPU_TARGETS.items():
        slowest: dict[str, Row] = {}
        for row in rows:
            counts = row["section"] == "pieces" and row["pass"] == "forward+backward"
            counts = counts and row["implementation"] == name and row["ratio_to_torch"]
            if counts and row["elements"] >= results.LARGE:
                slowest[row["op"]] = min(slowest.get(row["op"], row), row, key=_ratio)
        if not slowest:
            continue
        ratios = {op: _ratio(row) for op, row in slowest.items()}
        below = sorted((op for op in ratios if _misses(slowest[op], least)), key=ratios.__getitem__)
        shown = ", ".join(f"{op} {ratios[op]:.2f}" for op in below)
        worst = f"{min(ratios.values()):.2f}; {len(below)} of {len(ratios)} below"
        lines.append([f"{name}: each piece", f">= {least:.2f}, or a tie", worst, shown])
        measured = statistics.geometric_mean(ratios.values())
        lines.append([f"{name}: geometric mean", f">= {mean:.2f}", f"{measured:.2f}", ""])
    return lines


def _ratio(row: Row) -> float:
    return row["ratio_to_torch"]


def _misses(row: Row, least: float) -> bool:
    return row["ratio_to_torch"] < least / (1 + row["spread"])
