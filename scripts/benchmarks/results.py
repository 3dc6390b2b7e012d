"""Rows of results: what is in one, the files that hold them, and what they tell together.

A row is one implementation of one operation: ``section, op, pass, implementation, shape, dtype,
layout, mode``, the ``elements`` of its input, and

====================  ============================================================================
``ms``                the median, with ``p20_ms``, ``p80_ms`` and the number of ``samples``
``gbs``               GB/s: the bytes that the operation must move, whoever computes it, over ``ms``
``fraction_of_copy``  ``gbs`` over that of a copy in the same run
``host_us``           microseconds until the call returns, while the GPU may still be at work
``launches``          kernels on the GPU
``peak_bytes``        the GPU's memory that a call takes beyond its input
``error``             the largest difference from float64 truth, with ``torch_error``, torch's own
                      in the same tensor, and the ``bound`` that :mod:`torchref.testing` sets
``ratio_to_torch``    torch's time over this one: above 1, this is faster
``ratio_to_compile``  that of torch.compile over this one
``spread``            how far from 1 a ratio may be by chance; ``tie`` where it is no farther
``note``              why there is no time: wrong, failed, absent or skipped
====================  ============================================================================

What is unknown is None. Rows that differ in the implementation alone are a group.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import torchref
from torchref.testing import Comparison

from . import timing

Row = dict[str, Any]
Record = dict[str, Any]  # what a file holds

FORMAT = "torchref benchmark 1"
GROUP = ("section", "op", "pass", "shape", "elements", "dtype", "layout", "mode")
FIGURES = (
    *("ms", "p20_ms", "p80_ms", "samples", "gbs", "fraction_of_copy", "host_us", "launches"),
    *("peak_bytes", "error", "torch_error", "bound", "ratio_to_torch", "ratio_to_compile"),
    *("spread", "tie", "note"),
)
LARGE = 2**20  # elements from which on a ratio counts in the geometric means
MARGIN = 1.2  # between two runs


def group(section: str, op: str, which: str, shape: str, elements: int, **rest: str) -> Row:
    """What the rows of competitors share; ``rest`` may give dtype, layout and mode."""
    shared = {"section": section, "op": op, "pass": which, "shape": shape, "elements": elements}
    return shared | {"dtype": "float32", "layout": "contiguous", "mode": "eager"} | rest


def rows_of(
    shared: Row,
    seconds: Mapping[str, list[float]],
    figures: Mapping[str, Row],
    moved: float = 0.0,
    copy_gbs: float | None = None,
) -> list[Row]:
    """The rows of a group.

    Args:
        shared: what :func:`group` makes.
        seconds: samples of every implementation that was timed; of ``"torch"`` and ``"torch
            again"``, if of any.
        figures: of every implementation, what else is known: the ``note`` of one without a time.
        moved: the bytes that the operation must move, 0 where they are not what it takes time for.
        copy_gbs: the bandwidth of a copy.
    """
    spread = timing.spread(seconds["torch"], seconds["torch again"]) if seconds else 0.0
    ms = {name: statistics.median(samples) * 1e3 for name, samples in seconds.items()}
    rows = []
    for name, known in figures.items():
        row: Row = shared | {"implementation": name} | dict.fromkeys(FIGURES) | known
        if name in ms:
            row |= timing.summary(seconds[name])
            row["ratio_to_torch"] = ratio = ms["torch"] / ms[name]
            row["spread"], row["tie"] = spread, timing.is_tie(ratio, spread)
            if "torch.compile" in ms:
                row["ratio_to_compile"] = ms["torch.compile"] / ms[name]
            if moved:
                row["gbs"] = moved / ms[name] / 1e6
            if moved and copy_gbs:
                row["fraction_of_copy"] = row["gbs"] / copy_gbs
        rows.append(row)
    return rows


def verdict(comparisons: list[Comparison], allowed: float = 1.0) -> Row:
    """The figures of a check, with a note if one is beyond ``allowed`` times its bound."""
    worst = max(comparisons, key=lambda c: (bool(c.problem), c.error / c.bound if c.bound else 0))
    figures = {"error": worst.error, "torch_error": worst.their_error, "bound": worst.bound}
    # an error that is NaN is beyond any bound
    wrong = [c.problem for c in comparisons if c.problem and not c.error <= allowed * c.bound]
    known = figures if math.isfinite(worst.error) else {}
    return known | {"note": f"wrong: {wrong[0]}" if wrong else None}


def line(rows: list[Row]) -> str:
    """A group in a line: torch's time, and its ratio to the others'."""
    first = rows[0]
    shown = [f"{first[name]:<{width}}" for name, width in (("op", 32), ("pass", 16), ("shape", 13))]
    results = []
    for row in rows:
        if row["note"]:
            results.append(f"{row['implementation']} {row['note']}")
        elif row["implementation"] == "torch":
            results.append(f"torch {row['ms']:.3g} ms, {row['samples']} samples")
        else:
            results.append(f"{row['implementation']} {row['ratio_to_torch']:.2f}")
    described = [first[name] for name in ("dtype", "layout", "mode")]
    return " ".join([*shown, *described]) + ": " + ", ".join(results)


def groups(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """The rows of each group by implementation, in the order in which they came."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in GROUP), {})[row["implementation"]] = row
    return list(found.values())


def main_mode(rows: list[Row]) -> list[Row]:
    """On a GPU those whose inputs are not in its cache; on the CPU all."""
    return [row for row in rows if row["mode"] == "cold"] or rows


def largest(rows: Iterable[Row]) -> list[Row]:
    """Of each operation, pass, dtype, layout and mode the rows of the largest timed shape."""
    rows = list(rows)
    most: dict[tuple[Any, ...], int] = {}
    for row in rows:
        if row["ms"]:
            most[_kind(row)] = max(row["elements"], most.get(_kind(row), 0))
    return [row for row in rows if row["elements"] == most.get(_kind(row))]


def _kind(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in GROUP if name not in ("shape", "elements"))


def names(rows: Iterable[Row]) -> list[str]:
    """The implementations that are compared with torch."""
    return [n for n in dict.fromkeys(row["implementation"] for row in rows) if n != "torch"]


def geometric_means(rows: Iterable[Row]) -> dict[str, float]:
    """Of the ratios to torch, by implementation, over all rows of ``LARGE`` elements or more."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["ratio_to_torch"] and row["elements"] >= LARGE:
            ratios.setdefault(row["implementation"], []).append(row["ratio_to_torch"])
    return {name: statistics.geometric_mean(values) for name, values in ratios.items()}


def growth(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Any]]:
    """How cost grows, by operation, pass, layout and implementation.

    Of each ``ns``, the nanoseconds an element by number of elements, and ``exponent``, that of time
    as a power of size.
    """
    points: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        if row["ms"]:
            key = row["op"], row["pass"], row["layout"], row["implementation"]
            points.setdefault(key, {})[row["elements"]] = row["ms"]
    found = {}
    for key, times in points.items():
        if len(times) > 1:
            sizes = sorted(times)
            exponent = timing.exponent(sizes, [times[size] for size in sizes])
            ns = {size: times[size] * 1e6 / size for size in sizes}
            found[key] = {"ns": ns, "exponent": exponent}
    return found


def cell(row: Row | None) -> str:
    """A ratio to torch, ``~`` where it is a tie; or why there is none."""
    if row is None:
        return "-"
    if row["ratio_to_torch"] is None:
        return row["note"].split(":")[0]
    return f"{row['ratio_to_torch']:.2f}{'~' if row['tie'] else ''}"


def table(rows: list[Row]) -> list[list[str]]:
    """A header, then a line for each group: torch's milliseconds, and the others' ratios to it."""
    columns = names(rows)
    lines = [["op", "pass", "shape", "dtype", "layout", "torch, ms", *columns]]
    for members in groups(rows):
        torchs = next(iter(members.values())) | {"ms": None} | members.get("torch", {})
        ms = f"{torchs['ms']:.3g}" if torchs["ms"] else "-"
        described = [str(torchs[name]) for name in ("op", "pass", "shape", "dtype", "layout")]
        lines.append([*described, ms, *(cell(members.get(name)) for name in columns)])
    return lines


def environment(device: str) -> dict[str, Any]:
    """Where the results come from."""
    described = {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # of other processes, which spoil what is measured on the CPU
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchref": torchref.__version__,
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", *_ONLY_THE_COMMIT),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if device == "cuda":
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        described |= {
            "device": torch.cuda.get_device_name(),
            "driver": _output("nvidia-smi", *query),
            "liger-kernel": _version("liger-kernel"),
            "quack-kernels": _version("quack-kernels"),
        }
    return described


_ONLY_THE_COMMIT = ("--always", "--dirty", "--exclude=*")


def _processor() -> str:
    """Its name; `platform` knows its kind alone on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line of a command's output; None where it cannot run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 else None


def write(path: Path, record: Record) -> None:
    path.write_text(json.dumps({"format": FORMAT} | record, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Record:
    """What :func:`write` wrote.

    Raises:
        ValueError: there is no such file, or it is none of ours; the message is one line.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path}: not a JSON file") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: not written by scripts/benchmark.py (format {FORMAT!r})")
    return record


def compare(before: Record, after: Record) -> tuple[list[str], bool]:
    """What moved from one run to another, a line each, and whether one of ours is slower.

    It is ratios to torch that are compared: torch runs in both, so that it does not matter whether
    the machine was slower that day. What moved did so by more than the spreads of both runs. Ours
    is slower where it moved by more than ``MARGIN``, too: of many rows, some do by chance.
    """
    lines = [
        f"{name}: {old} -> {after['environment'].get(name)}"
        for name, old in before["environment"].items()
        if old != after["environment"].get(name)
    ]
    earlier = {_identity(row): row for row in before["rows"] if row["ratio_to_torch"]}
    later = {_identity(row): row for row in after["rows"] if row["ratio_to_torch"]}
    common = [key for key in later if key in earlier and later[key]["implementation"] != "torch"]
    moved, is_slower = 0, False
    for key in common:
        old, new = earlier[key], later[key]
        change = new["ratio_to_torch"] / old["ratio_to_torch"]
        if not timing.is_tie(change, old["spread"], new["spread"]):
            moved += 1
            what = " ".join(str(part) for part in key if part not in ("pieces", "contiguous"))
            verdict = "faster" if change > 1 else "slower"
            is_slower |= change < 1 / MARGIN and not new["implementation"].startswith("torch")
            ratios = f"{old['ratio_to_torch']:.2f} -> {new['ratio_to_torch']:.2f}"
            lines.append(f"{verdict}: {what}: {ratios} x torch")
    return [*lines, f"{moved} of {len(common)} rows that both runs timed have moved"], is_slower


def _identity(row: Row) -> tuple[str, ...]:
    named = ("section", "op", "pass", "implementation", "shape", "dtype", "layout", "mode")
    return tuple(row[name] for name in named)
