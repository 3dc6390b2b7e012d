"""Finished runs side by side: what differed, and what came of it."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torchref.diagnostics.drawing import new_figure
from torchref.training.config import read_mapping

TITLES = {"epochs": "epochs trained"}  # of options there is one called so, too
COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


@dataclass(frozen=True)
class Finished:
    """A run's folder as it was read."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    rows: list[dict[str, float]]


def read_run(path: str | Path) -> Finished:
    """Read what a run of ``scripts/train.py`` left.

    Raises:
        FileNotFoundError: there is no such folder, or the run did not finish.
        ValueError: a file is damaged; the message names it.
    """
    path = Path(path)
    for name in ("config.yaml", "metrics.json", "metrics.csv"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: no finished run ({name} is missing)")
    config = read_mapping(path / "config.yaml")
    metrics = _read(path / "metrics.json", json.load)
    if not isinstance(metrics, dict):
        raise ValueError(f"{path / 'metrics.json'} is damaged: expected names and values")
    if metrics.get("unfinished"):
        raise FileNotFoundError(f"{path}: no finished run (it was resumed and stopped)")
    return Finished(path.name, config, metrics, _by_epoch(_read(path / "metrics.csv", _rows)))


def _read(path: Path, read: Callable[[IO[str]], Any]) -> Any:
    try:
        with open(path, newline="") as file:
            return read(file)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _rows(file: IO[str]) -> list[dict[str, float]]:
    reader = csv.DictReader(file)
    found = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num} has more cells than the header")
        found.append({name: float(cell) for name, cell in row.items() if cell})
    return found


def compare(runs: Sequence[Finished]) -> list[list[str]]:
    """A table: a row for each option that differs and each result, a column for each run.

    Example:
        >>> a = Finished("a", {"lr": 0.1, "width": 8}, {"test_accuracy": 0.9, "seed": 0}, [])
        >>> b = Finished("b", {"lr": 0.2, "width": 8}, {"test_accuracy": 0.8, "seed": 0}, [])
        >>> compare([a, b])
        [['', 'a', 'b'], ['lr', '0.1', '0.2'], ['test_accuracy', '0.9', '0.8']]
    """
    names = dict.fromkeys(name for run in runs for name in run.config if name != "name")
    options = [[name, *(run.config.get(name) for run in runs)] for name in names]
    differing = [row for row in options if any(value != row[1] for value in row[2:])]
    skipped = ("versions", "seed", "test_opened")
    names = dict.fromkeys(name for run in runs for name in run.metrics if name not in skipped)
    results = [[TITLES.get(n, n), *(run.metrics.get(n) for run in runs)] for n in names]
    table = [["", *(run.name for run in runs)], *differing, *results]
    return [[_shown(cell) for cell in row] for row in table]


def plot_runs(runs: Sequence[Finished], path: str | Path) -> None:
    """Draw validation loss against the epoch, a line for each run, training loss dotted."""
    figure, axes = new_figure((8, 4.5))
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        for part, style in (("val", "-"), ("train", ":")):
            rows = [row for row in run.rows if f"{part}_loss" in row]
            epochs, losses = ([row[name] for row in rows] for name in ("epoch", f"{part}_loss"))
            label = run.name if part == "val" else None
            axes.plot(epochs, losses, style, color=color, label=label)
    axes.set_xlabel("epoch")
    axes.set_title("validation loss (training loss dotted)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)  # a folder's name may have two $
    figure.savefig(path, dpi=120)


def _by_epoch(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The logger writes training and validation metrics of an epoch in lines of their own."""
    epochs: dict[float, dict[str, float]] = {}
    for row in rows:
        if "epoch" in row:
            epochs.setdefault(row["epoch"], {}).update(row)
    return [row for row in epochs.values() if "val_loss" in row]


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
