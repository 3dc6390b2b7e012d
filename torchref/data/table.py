"""Tables of text (CSV): what each column holds, and its cells as numbers."""

import codecs
import csv
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import accumulate, chain, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchref.data.reading import check_file, check_size

FLOAT32_MAX = torch.finfo(torch.float32).max
MISSING = {"", "?", "-", "na", "n/a", "nan", "null", "none"}
LONGEST = 2**24  # characters of a row, at most: a long document
CATEGORIES = 1000  # of a column, at most: each is a feature
IDENTIFIERS = 100  # so many rows, none like another, are names of the rows
YEARS = range(1900, 2101)


@dataclass(frozen=True)
class Column:
    """A column of numbers, or of one of some categories, each of which is a feature, 0 or 1."""

    name: str
    categories: tuple[str, ...] | None = None

    @property
    def width(self) -> int:
        return 1 if self.categories is None else len(self.categories)


class Rows:
    """Rows of equally many cells, packed: as a string each, short cells take ten times the room."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines = array("q")  # that each row ends on
        self._text = bytearray()  # all cells, in UTF-8
        self._starts = array("q")  # of the rows in it
        self._ends = array("I")  # of the cells, from their row's start on

    def __len__(self) -> int:
        return len(self.lines)

    def append(self, line: int, cells: list[str]) -> None:
        encoded = [cell.encode() for cell in cells]
        self.lines.append(line)
        self._starts.append(len(self._text))
        self._ends.extend(accumulate(map(len, encoded)))
        self._text += b"".join(encoded)

    def drop_first(self) -> None:
        del self.lines[0], self._starts[0], self._ends[: self.width]

    def column(self, position: int) -> list[str]:
        ends = self._ends[position :: self.width]
        begins = self._ends[position - 1 :: self.width] if position else repeat(0, len(self))
        places = zip(self._starts, begins, ends, strict=True)
        return [self._text[start + begin : start + end].decode() for start, begin, end in places]


@dataclass(frozen=True)
class Table:
    """The cells of a file."""

    path: Path
    names: list[str]  # 1, 2, ... where the file has none
    rows: Rows
    header: bool

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.names)}

    def find(self, name: str) -> int:
        """Where the column of that name is."""
        if name not in self._positions:
            raise ValueError(
                f"{self.path}: no column {name!r}; it has {', '.join(self.names)}{self.delimiter}"
            )
        return self._positions[name]

    @property
    def delimiter(self) -> str:
        """What to say where another delimiter than the comma left one column."""
        return _delimiter(self.names)

    def cells(self, position: int) -> list[str]:
        return self.rows.column(position)

    def place(self, row: int, position: int) -> str:
        return f"{self.path}: row {self.rows.lines[row]}, column {position + 1}"


def read_table(path: str | Path) -> Table:
    """Read a CSV file in UTF-8: commas, an optional header, as many cells in each row.

    The first line is a header if none of its cells is a number or a gap; only its first cell may
    be empty, as pandas writes it, and is then called 1. Any other first line is a row of data, and
    is refused where it looks like a header: a name stands above nothing but numbers, or all its
    numbers are years, two or more, and other numbers stand below.

    Raises:
        ValueError: it is no CSV file, it has no rows, a row has another number of cells than the
            first or over 2**24 characters, or two columns have one name; the message names the row.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    check_file(path)
    parsed = _parse(path)
    line, first = next(parsed, (0, []))
    if not first:
        raise ValueError(f"{path}: no rows")
    rows = Rows(len(first))
    for place, cells in chain([(line, first)], parsed):
        if len(cells) != rows.width:
            raise ValueError(
                f"{path}: row {place}: expected {rows.width} columns, got {len(cells)}"
                f"{_delimiter(first)}"
            )
        rows.append(place, cells)
    header = _is_header(path, line, first, lambda position: rows.column(position)[1:])
    if header:
        rows.drop_first()
    if not len(rows):
        raise ValueError(f"{path}: no rows")
    names = [cell or "1" for cell in first] if header else [str(i + 1) for i in range(rows.width)]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{path}: row {line}: two columns are called {name!r}; a table of words alone "
            "needs a header"
        )
    return Table(path, names, rows, header)


def _parse(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line that it ends on."""
    csv.field_size_limit(max(LONGEST, csv.field_size_limit()))  # of the process, so never lowered
    left = LONGEST

    def read_lines() -> Iterator[str]:
        nonlocal left
        while line := file.readline(left + 1):
            left -= len(line)
            if left < 0 or "\0" in line:
                wrong = f"over {LONGEST} characters" if left < 0 else "a NUL"
                raise ValueError(f"{path}: row {reader.line_num + 1}: not a CSV file: {wrong}")
            yield line

    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(read_lines(), strict=True, skipinitialspace=True)
        try:
            for cells in reader:
                left = LONGEST
                if cells:
                    yield reader.line_num, [cell.strip() for cell in cells]
        except csv.Error as error:
            raise ValueError(f"{path}: row {reader.line_num}: not a CSV file: {error}") from None
        except UnicodeDecodeError as error:
            row, reason = find_undecodable(path), error.reason
            raise ValueError(f"{path}: row {row}: not a CSV file in UTF-8: {reason}") from None


def find_undecodable(path: Path) -> int:
    """The first line that is not UTF-8, in a file that has one."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with open(path, "rb") as file:
        while chunk := file.read(2**16):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n")
            line += chunk.count(b"\n")
    return line  # it ends within a character


def find_columns(
    table: Table, positions: Iterable[int], categories: Sequence[str] = ()
) -> list[Column]:
    """What each column holds: categories where it is named so or no cell is a number.

    Raises:
        ValueError: a column has no value at all, or more categories than a network should take
            for features: over 1,000, or another in each of over 100 rows; the column is named.
    """
    named = {table.find(name) for name in categories}
    columns = []
    for position in positions:
        name = table.names[position]
        present = [c for c in table.cells(position) if not is_missing(c)]
        if not present:
            raise ValueError(
                f"{table.path}: no value in column {name}; --drop {name} leaves it out"
            )
        known = None
        if position in named or not any(map(is_float, present)):
            known = tuple(sort_labels(set(name_labels(present).values())))
            if len(known) > CATEGORIES or len(known) == len(present) > IDENTIFIERS:
                raise ValueError(
                    f"{table.path}: {len(known)} categories in the {len(present)} rows of column "
                    f"{name}, each of which would be a feature; --drop {name} leaves it out"
                )
        columns.append(Column(name, known))
    return columns


def read_times(table: Table, position: int) -> Tensor:
    """A column of numbers, or of ISO dates, as seconds since 1970, in UTC where they name no zone.

    Returns:
        (rows,) float64, as float32 does not tell the seconds of a day apart.

    Raises:
        ValueError: a cell is neither, or another than those before; row and column are named.
    """
    cells = table.cells(position)
    numeric, times = is_float(cells[0]), []
    for row, cell in enumerate(cells):
        try:
            times.append(float(cell) if numeric else _seconds(cell))
        except ValueError:
            times.append(math.nan)
        if numeric != is_float(cell) or not math.isfinite(times[-1]):
            raise ValueError(
                f"{table.place(row, position)}: {cell!r} is no time; expected numbers, or ISO "
                "dates such as 2024-01-27 or 2024-01-27T10:00, in the whole column"
            )
    return torch.tensor(times, dtype=torch.float64)


def _seconds(cell: str) -> float:
    moment = datetime.fromisoformat(cell)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def encode(
    table: Table,
    columns: Sequence[Column],
    positions: Sequence[int],
    missing: str = "refuse",
    trained: bool = False,
) -> Tensor:
    """The features of each row, (rows, features) float32.

    A missing number is NaN and a missing category none of them, where ``missing`` is ``impute``.
    ``trained`` says that the columns are a model's: no error then advises an option of training.

    Raises:
        ValueError: a cell is missing and ``missing`` is ``refuse``, or a cell is no number, or none
            of its column's categories; row and column are named. Or the features would take over
            a hundred times the room of the file.
    """
    shape = len(table.rows), sum(column.width for column in columns)
    check_size(table.path, 4 * math.prod(shape))
    features = np.zeros(shape, np.float32)
    start = 0
    for column, position in zip(columns, positions, strict=True):
        cells = table.cells(position)
        places = _places(column.categories or (), cells)
        for row, cell in enumerate(cells):
            if cell in places:
                features[row, start + places[cell]] = 1.0
            elif missing == "impute" and is_missing(cell):
                features[row, start] = 0.0 if column.categories else np.nan
            elif column.categories is None and is_number(cell):
                features[row, start] = float(cell)
            else:
                raise ValueError(f"{table.place(row, position)}: {_wrong(cell, column, trained)}")
        start += column.width
    return torch.from_numpy(features)


def _places(categories: Sequence[str], cells: Iterable[str]) -> dict[str, int]:
    """Which of the categories each cell that is one is."""
    places = {category: i for i, category in enumerate(categories)}
    if categories and all(map(is_number, categories)):
        numbers = {_value(category): i for category, i in places.items()}
        others = filter(is_number, set(cells) - places.keys())
        places |= {c: numbers[_value(c)] for c in others if _value(c) in numbers}
    return places


def _wrong(cell: str, column: Column, trained: bool) -> str:
    """What is wrong with a cell, and what may be done about it."""
    if is_missing(cell):
        advice = "; --missing impute takes the training split's median"
        return f"{cell!r} is missing" + (
            ", and the model was trained without gaps" if trained else advice
        )
    if column.categories is None:
        advice = f"; --categories {column.name} takes the column as categories"
        return f"{cell!r} is not a finite number" + ("" if trained else advice)
    return f"{cell!r} is none of the categories of {column.name} ({', '.join(column.categories)})"


def name_labels(labels: Iterable[str]) -> dict[str, str]:
    """Each label's name: itself, or where all are numbers, the shortest of those that equal it.

    Files that were put together by pandas hold 1 and 1.0.
    """
    different = sorted(set(labels), key=lambda c: (len(c), c))
    if not all(map(is_number, different)):
        return {label: label for label in different}
    names: dict[float, str] = {}
    return {label: names.setdefault(_value(label), label) for label in different}


def _value(number: str) -> float:
    try:
        return int(number)  # identifiers differ in digits that a float has not
    except ValueError:
        return float(number)


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Numbers in their order, then everything else in the alphabet's; equal numbers, too."""
    return sorted(labels, key=lambda c: (not is_number(c), float(c) if is_number(c) else 0.0, c))


def is_number(cell: str) -> bool:
    """Whether it is finite in float32."""
    return is_float(cell) and abs(float(cell)) <= FLOAT32_MAX  # False for NaN


def is_float(cell: str) -> bool:
    """Whether it is written as a number, whatever its size; 1_0, as Python has it, is none."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def is_missing(cell: str) -> bool:
    return cell.lower() in MISSING


def _is_header(path: Path, line: int, first: list[str], below: Callable[[int], list[str]]) -> bool:
    """Whether the first line holds names only; where it nearly does, it is refused."""
    names = first if first[0] else first[1:]
    odd = [cell for cell in names if not _is_name(cell)]
    if names and not odd:
        return True
    above_numbers = any(_is_name(cell) and _are_numbers(below(i)) for i, cell in enumerate(first))
    if odd and (above_numbers or _are_years(first, below)):
        raise ValueError(
            f"{path}: row {line}: it looks like a header, but {odd[0]!r} is no name; rename that, "
            "or write a line of names above the data"
        )
    return False


def _is_name(cell: str) -> bool:
    return not is_float(cell) and not is_missing(cell)


def _are_numbers(cells: Iterable[str]) -> bool:
    present = [cell for cell in cells if not is_missing(cell)]
    return bool(present) and all(map(is_float, present))


def _are_years(first: list[str], below: Callable[[int], list[str]]) -> bool:
    """Whether names and years, two or more, are above what are no years."""
    numbers = [i for i, cell in enumerate(first) if is_float(cell)]
    return 1 < len(numbers) < len(first) and all(
        _is_year(first[i]) and not all(map(_is_year, below(i))) for i in numbers
    )


def _is_year(cell: str) -> bool:
    return len(cell) == 4 and cell.isdecimal() and int(cell) in YEARS


def _delimiter(cells: list[str]) -> str:
    other = len(cells) == 1 and any(mark in cells[0] for mark in ";\t")
    return "; the delimiter must be a comma" if other else ""
