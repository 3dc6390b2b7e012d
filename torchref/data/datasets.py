"""Small classification sets that need no network, and files of one's own."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max

DATASETS = ("digits", "breast_cancer", "wine", "iris")


@dataclass(frozen=True)
class Dataset:
    """Features ``x`` (samples, features) float32, labels ``y`` (samples,) int64, class names."""

    x: Tensor
    y: Tensor
    classes: list[str]


def load_dataset(name: str) -> Dataset:
    """Load a classification set by name.

    Args:
        name: ``digits``, ``breast_cancer``, ``wine`` or ``iris`` from scikit-learn, or
            ``csv:PATH``: a table of numbers whose last column is the class (any text), with or
            without a header line.

    Raises:
        ValueError: the name is unknown, or the file is malformed; row and column are named.
        FileNotFoundError: there is no file at PATH.

    Example:
        >>> data = load_dataset("iris")
        >>> data.x.shape, data.classes
        (torch.Size([150, 4]), ['setosa', 'versicolor', 'virginica'])
    """
    if name.startswith("csv:"):
        return _load_csv(Path(name.removeprefix("csv:")))
    if name not in DATASETS:
        raise ValueError(f"dataset: expected {', '.join(DATASETS)} or csv:PATH, got {name!r}")
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    x = torch.as_tensor(bunch.data, dtype=torch.float32)
    return Dataset(x, torch.as_tensor(bunch.target), [str(c) for c in bunch.target_names])


def read_features(path: str | Path) -> Tensor:
    """Read samples without labels, one a row, from a ``.csv`` or ``.npy`` file.

    Returns:
        (samples, features) float32.

    Raises:
        ValueError: the file is malformed, has another ending, or is not a table of finite numbers.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".csv":
        rows = _read_table(path)
        return torch.tensor([_numbers(path, line, cells) for line, cells in rows])
    if path.suffix != ".npy":
        raise ValueError(f"{path}: expected a .csv or .npy file")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a .npy file of numbers: {error}") from None
    if array.ndim != 2 or array.dtype.kind not in "fiub":
        raise ValueError(
            f"{path}: expected numbers of shape (samples, features), "
            f"got {array.dtype} of shape {array.shape}"
        )
    with np.errstate(over="ignore"):  # what overflows is named below
        single = array.astype(np.float32)
    bad = np.argwhere(~np.isfinite(single))
    if len(bad):
        row, column = bad[0]
        value = array[row, column]
        raise ValueError(
            f"{path}: row {row + 1}, column {column + 1}: {value} is not finite in float32"
        )
    return torch.as_tensor(single)


def _load_csv(path: Path) -> Dataset:
    rows = _read_table(path)
    if len(rows[0][1]) < 2:
        raise ValueError(f"{path}: expected features and a class in the last column, got 1 column")
    x = torch.tensor([_numbers(path, line, cells[:-1]) for line, cells in rows])
    labels = [cells[-1] for _, cells in rows]
    classes = sorted(
        set(labels), key=lambda c: (not _is_number(c), float(c) if _is_number(c) else c)
    )
    if len(classes) < 2:
        raise ValueError(f"{path}: expected two classes or more in the last column, got {classes}")
    index = {label: i for i, label in enumerate(classes)}
    return Dataset(x, torch.tensor([index[label] for label in labels]), classes)


def _read_table(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file with their line numbers, without the header line."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            rows = [(reader.line_num, [c.strip() for c in cells]) for cells in reader if cells]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file: {error}") from None
    if rows and _is_header(rows[0][1]):
        rows = rows[1:]
    if not rows:
        raise ValueError(f"{path}: no rows")
    width = len(rows[0][1])
    for line, cells in rows:
        if len(cells) != width:
            raise ValueError(f"{path}: row {line}: expected {width} columns, got {len(cells)}")
    return rows


def _numbers(path: Path, line: int, cells: list[str]) -> list[float]:
    for column, cell in enumerate(cells, start=1):
        if not _is_number(cell):
            raise ValueError(
                f"{path}: row {line}, column {column}: {cell!r} is not a finite number"
            )
    return [float(cell) for cell in cells]


def _is_header(cells: list[str]) -> bool:
    """Names only: neither numbers nor what stands for a missing one."""
    missing = {"", "?", "-", "na", "n/a", "nan", "null", "none", "inf", "-inf"}
    return not any(_is_number(cell) or cell.lower() in missing for cell in cells)


def _is_number(cell: str) -> bool:
    try:
        return abs(float(cell)) <= FLOAT32_MAX  # False for NaN
    except ValueError:
        return False
