"""Tables of text (CSV): what each column holds, and its cells as numbers."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max
MISSING = {"", "?", "-", "na", "n/a", "nan", "null", "none"}


@dataclass(frozen=True)
class Column:
    """A column of numbers, or of one of some categories, each of which is a feature, 0 or 1."""

    name: str
    categories: tuple[str, ...] | None = None

    @property
    def width(self) -> int:
        return 1 if self.categories is None else len(self.categories)


@dataclass(frozen=True)
class Table:
    """The cells of a file with the line that each row ends on."""

    path: Path
    names: list[str]  # 1, 2, ... where the file has none
    lines: list[int]
    rows: list[list[str]]
    header: bool

    def find(self, name: str) -> int:
        """Where the column of that name is."""
        if name not in self.names:
            raise ValueError(f"{self.path}: no column {name!r}; it has {', '.join(self.names)}")
        if self.names.count(name) > 1:
            raise ValueError(f"{self.path}: two columns are called {name!r}")
        return self.names.index(name)

    def cells(self, position: int) -> list[str]:
        return [row[position] for row in self.rows]

    def place(self, row: int, position: int) -> str:
        return f"{self.path}: row {self.lines[row]}, column {position + 1}"


def read_table(path: str | Path) -> Table:
    """Read a CSV file. A first line that holds neither a number nor a gap is its header.

    Raises:
        ValueError: it is no CSV file, it has no rows, or a row has another number of cells than
            the first; the message names the row.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            rows = [(reader.line_num, [c.strip() for c in cells]) for cells in reader if cells]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file: {error}") from None
    header = bool(rows) and _is_header(rows[0][1])
    if len(rows) == header:
        raise ValueError(f"{path}: no rows")
    width = len(rows[0][1])
    for line, cells in rows:
        if len(cells) != width:
            raise ValueError(f"{path}: row {line}: expected {width} columns, got {len(cells)}")
    names = rows[0][1] if header else [str(i + 1) for i in range(width)]
    lines, cells = zip(*rows[header:], strict=True)
    return Table(path, names, list(lines), list(cells), header)


def find_columns(
    table: Table, positions: Iterable[int], categories: Sequence[str] = ()
) -> list[Column]:
    """What each column holds: categories where it is named so or no cell is a number."""
    named = {table.find(name) for name in categories}
    columns = []
    for position in positions:
        present = [c for c in table.cells(position) if c.lower() not in MISSING]
        known = None
        if position in named or (present and not any(map(is_number, present))):
            known = tuple(sort_labels(set(present)))
        columns.append(Column(table.names[position], known))
    return columns


def encode(
    table: Table, columns: Sequence[Column], positions: Sequence[int], missing: str = "refuse"
) -> Tensor:
    """The features of each row, (rows, features) float32.

    A missing number is NaN and a missing category none of them, where ``missing`` is ``impute``.

    Raises:
        ValueError: a cell is missing and ``missing`` is ``refuse``, or a cell is no number, or none
            of its column's categories; row and column are named.
    """
    features = np.zeros((len(table.rows), sum(column.width for column in columns)), np.float32)
    start = 0
    for column, position in zip(columns, positions, strict=True):
        places = {c: start + i for i, c in enumerate(column.categories or ())}
        for row, cell in enumerate(table.cells(position)):
            if cell.lower() in MISSING and cell not in places:
                if missing == "refuse":
                    raise ValueError(
                        f"{table.place(row, position)}: {cell!r} is missing; --missing impute "
                        "takes the training split's median"
                    )
                features[row, start] = 0.0 if column.categories else np.nan
            elif column.categories is None:
                features[row, start] = _number(table, row, position, cell)
            elif cell in places:
                features[row, places[cell]] = 1.0
            else:
                raise ValueError(
                    f"{table.place(row, position)}: {cell!r} is none of the categories of "
                    f"{column.name} ({', '.join(column.categories)})"
                )
        start += column.width
    return torch.from_numpy(features)


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Numbers in their order, then everything else in the alphabet's."""
    return sorted(labels, key=lambda c: (not is_number(c), float(c) if is_number(c) else c))


def is_number(cell: str) -> bool:
    """Whether it is finite in float32."""
    try:
        return abs(float(cell)) <= FLOAT32_MAX  # False for NaN
    except ValueError:
        return False


def _number(table: Table, row: int, position: int, cell: str) -> float:
    if not is_number(cell):
        raise ValueError(
            f"{table.place(row, position)}: {cell!r} is not a finite number; --categories "
            f"{table.names[position]} takes the column as categories"
        )
    return float(cell)


def _is_header(cells: list[str]) -> bool:
    """Names only: neither numbers nor what stands for a missing one."""
    none = MISSING | {"inf", "-inf"}
    return not any(_is_float(cell) or cell.lower() in none for cell in cells)


def _is_float(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
