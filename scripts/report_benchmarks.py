"""Write docs/benchmarks.md and its charts from what benchmark.py wrote.

    python scripts/report_benchmarks.py cpu.json h100.json

Every figure on the page is in one of the files; the command that made it stands beneath.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.options import OneLineParser
from benchmarks.results import Record, Row
from benchmarks.targets import TARGETS, on_cpu

DOCS = Path(__file__).resolve().parents[1] / "docs"
FASTER, SLOWER, TIE = "#1f77b4", "#d95f02", "0.7"

RATIOS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]  # marked on an axis

INTRODUCTION = """\
# Benchmarks

Ratios are torch's time over another's: above 1, that one is faster; `~` marks a tie. The
competitors of a row run in one process, in turns, in an order drawn anew each round, and the median
counts. One of them is torch itself, a second time ("torch again"): what differs by no more than
these two, or than random halves of their samples do, is a tie. Before it is timed, every
implementation is held against torch in float64, ours within the bound of `torchref.testing`; what
is wrong says so and has no time. Wins and losses are shown alike.

- **formula**: ours from primitive torch operations (`torchref.backend("reference")`)
- **compiled**: the formula through `torch.compile` (`torchref.backend("compiled")`)
- **kernel**: our Triton kernel
- **floor**: the matrix products alone, which every implementation needs
"""
TARGETS_INTRODUCTION = """\
## Targets

What the kernels should reach on an H100: the share of the bandwidth that a copy reached in the same
run, and the ratio of others' time to ours. Of all operations and sizes in a row the worst counts,
forward / forward and backward. Where it was not measured, the table says so.
"""
CPU_INTRODUCTION = """\
On a CPU, forward and backward, against torch in the same run; a piece counts with the slowest of
its sizes and layouts from 1,048,576 elements on. [cpu.md](cpu.md) says what limits it.
"""
TARGETS_HEADER = [
    *("", "fraction of copy", "measured", "to torch", "measured", "to torch.compile", "measured")
]


def main(argv: list[str] | None = None) -> int:
    assert __doc__
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    try:
        records = [results.read(path) for path in parser.parse_args(argv).files]
    except ValueError as error:
        parser.error(str(error))
    (DOCS / "benchmarks").mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION]
    for record in records:
        parts += device(record)
    parts += targets(records)
    path = DOCS / "benchmarks.md"
    path.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts))
    print(path)
    return 0


def is_gpu(record: Record) -> bool:
    return bool(record["ceilings"])


def device(record: Record) -> Iterator[str]:
    """Everything about one run."""
    environment = {name: value for name, value in record["environment"].items() if value}
    yield f"## {environment.pop('device')}"
    yield ", ".join(f"{name} {_short(value)}" for name, value in environment.items()) + "."
    if is_gpu(record):
        ceilings = (f"{name} {gbs:,.0f}" for name, gbs in record["ceilings"].items())
        yield "Bandwidth at 1 GiB: " + ", ".join(ceilings) + "."
    command = f"    {record['command']}"
    for section in dict.fromkeys(row["section"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["section"] == section]
        yield f"### {section.capitalize()}"
        for part in of_section(section, rows, record):
            yield part
            if part.startswith("|"):
                yield command
    if left := untimed(record["rows"]):
        yield "### Not timed"
        yield "\n".join(f"- {line}" for line in left)


def of_section(section: str, rows: list[Row], record: Record) -> Iterator[str]:
    if section == "pieces":
        yield from of_pieces(rows, record)
    else:
        yield markdown(results.table(rows))
    if any(row.get("saved_bytes") for row in rows):
        yield "Memory that forward keeps for backward, MiB:"
        yield markdown(by_implementation(rows, "saved_bytes", 2**20))


def of_pieces(rows: list[Row], record: Record) -> Iterator[str]:
    main = results.main_mode(rows)
    yield "\n".join(tallies(main))
    yield from charts(results.largest(main), record)
    yield "At the largest size:"
    yield markdown(results.table(results.largest(main)))
    if is_gpu(record):
        yield "Fraction of the copy's bandwidth, tensors out of cache:"
        yield markdown(by_implementation(results.largest(main), "fraction_of_copy"))
        eager = results.largest(row for row in rows if row["mode"] == "eager")
        for title, figure, unit in (
            ("Host time of a call, microseconds:", "host_us", 1),
            ("Kernels launched:", "launches", 1),
            ("Memory beyond the input, MiB:", "peak_bytes", 2**20),
        ):
            if any(row[figure] for row in eager):
                yield title
                yield markdown(by_implementation(eager, figure, unit))
    if len(grown := growth(main)) > 1:
        yield (
            "How cost grows: nanoseconds an element from the smallest size to the largest, and the "
            "k of time = c · size^k. Below 1, the fixed cost of a call shows."
        )
        yield markdown(grown)


def tallies(rows: list[Row]) -> list[str]:
    """Wins, ties and losses of each implementation, and the mean of its ratios."""
    means = results.geometric_means(rows)
    lines = []
    for name in results.names(rows):
        large = [
            row
            for row in rows
            if row["implementation"] == name
            and row["ratio_to_torch"]
            and row["elements"] >= results.LARGE
        ]
        if name in ("torch again", "floor") or not large:
            continue
        ties = sum(row["tie"] for row in large)
        faster = sum(row["ratio_to_torch"] > 1 and not row["tie"] for row in large)
        lines.append(
            f"- **{name}**: {means[name]:.2f}, faster than torch in {faster} of {len(large)}, "
            f"a tie in {ties}, slower in {len(large) - faster - ties}"
        )
    size = f"{results.LARGE:,}"
    return [f"Geometric mean of the ratios to torch from {size} elements on:", "", *lines]


def growth(rows: list[Row]) -> list[list[str]]:
    grown = results.growth(rows)
    names = [
        n for n in ("torch", "formula", "compiled", "kernel") if any(n in key for key in grown)
    ]
    lines = [["op", "pass", "layout", *names]]
    for key in dict.fromkeys(key[:-1] for key in grown):
        cells = []
        for name in names:
            known = grown.get((*key, name))
            ns = " → ".join(f"{value:.3g}" for value in known["ns"].values()) if known else ""
            cells.append(f"{ns}; {known['exponent']:.2f}" if known else "-")
        lines.append([*key, *cells])
    return lines


def by_implementation(rows: list[Row], figure: str, unit: float = 1) -> list[list[str]]:
    """A line for each group, with one figure of each implementation that has it."""
    known = [row for row in rows if row.get(figure) is not None]
    names = list(dict.fromkeys(row["implementation"] for row in known))
    described = ("op", "pass", "shape", "dtype", "layout")
    lines = [[*described, *names]]
    for members in results.groups(known):
        first = next(iter(members.values()))
        values = [
            f"{members[name][figure] / unit:.3g}" if name in members else "-" for name in names
        ]
        lines.append([*(str(first[name]) for name in described), *values])
    return lines


def untimed(rows: list[Row]) -> list[str]:
    """What has no time and why, once for all passes and modes."""
    lines = (
        f"{row['op']} {row['shape']} {row['dtype']} {row['layout']}, {row['implementation']}: "
        f"{row['note']}"
        for row in rows
        if row["note"]
    )
    return list(dict.fromkeys(lines))


def targets(records: list[Record]) -> list[str]:
    gpus = [record for record in records if is_gpu(record)]
    parts = [TARGETS_INTRODUCTION]
    for record in gpus or [None]:
        rows = record["rows"] if record else None
        if record:
            parts.append(f"Measured on {record['environment']['device']}:")
        parts.append(markdown([TARGETS_HEADER, *(target.line(rows) for target in TARGETS)]))
        if record:
            parts.append(f"    {record['command']}")
    for record in records:
        if not is_gpu(record) and len(lines := on_cpu(record["rows"])) > 1:
            parts += [CPU_INTRODUCTION, f"Measured on {record['environment']['device']}:"]
            parts += [markdown(lines), f"    {record['command']}"]
    return parts


def markdown(lines: list[list[str]]) -> str:
    header, *rest = lines
    rows = [header, ["---"] * len(header), *rest]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def charts(rows: list[Row], record: Record) -> Iterator[str]:
    """A picture for each pass; on a GPU one of bandwidths, too."""
    figures = {"ratio_to_torch": "torch's time / time"}
    if is_gpu(record):
        figures |= {"fraction_of_copy": "bandwidth / a copy's"}
    for which in dict.fromkeys(row["pass"] for row in rows):
        for figure, label in figures.items():
            shown = [row for row in rows if row["pass"] == which]
            if any(row[figure] for row in shown):
                name = _file_name(record["environment"]["device"], which, figure)
                title = f"{record['environment']['device']}: {which}"
                draw(shown, figure, title, label, DOCS / "benchmarks" / name)
                yield f"![{label}, {which}](benchmarks/{name})"


def draw(rows: list[Row], figure: str, title: str, label: str, path: Path) -> None:
    """Bars of a figure, a panel for each implementation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    relative = figure == "ratio_to_torch"
    hidden = {"torch again", "floor"} | ({"torch"} if relative else set())
    names = [name for name in ("torch", *results.names(rows)) if name not in hidden]
    groups = results.groups(rows)
    picture = Figure(figsize=(3 + 2.6 * len(names), 1.8 + 0.24 * len(groups)), layout="constrained")
    FigureCanvasAgg(picture)  # no pyplot: it would pick a screen and keep the figure
    panels = picture.subplots(1, len(names), sharey=True, sharex=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(label)
        axes.tick_params(labelsize=8)
        axes.axvline(1.0, color="0.3", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        for place, members in enumerate(groups):
            if name in members:
                _bar(axes, place, members[name], figure, base=1.0 if relative else 0.0)
    values = [row[figure] for row in rows if row[figure] and row["implementation"] in names]
    if relative:  # in which twice as fast and twice as slow are equally long
        panels[0].set_xscale("log")
        panels[0].set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
        panels[0].minorticks_off()
        panels[0].set_xlim(min(*values, 0.5) / 1.2, max(*values, 2.0) * 1.8)
    else:
        panels[0].set_xlim(0.0, max(*values, 1.0) * 1.25)
    labels = [_label(next(iter(members.values())), rows) for members in groups]
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    picture.suptitle(f"{title}\nblue faster than torch, orange slower, grey a tie", fontsize=10)
    picture.savefig(path, dpi=110)


def _bar(axes: Any, place: int, row: Row, figure: str, base: float) -> None:
    """With its value beside it; where there is none, what is in its place."""
    value = row[figure]
    if value:
        axes.barh(place, value - base, left=base, color=_color(row))
    text = f"{value:.2f}" if value else (row["note"] or "").split(":")[0]
    where = {"textcoords": "offset points", "va": "center", "fontsize": 7}
    axes.annotate(text, (max(value or base, base), place), (3, 0), **where)


def _color(row: Row) -> str:
    if row["tie"]:
        return TIE
    return FASTER if row["ratio_to_torch"] > 1 else SLOWER


def _label(row: Row, rows: list[Row]) -> str:
    """The operation, and of layout and dtype what differs within the chart."""
    parts = [row["op"]]
    parts += [row["layout"]] if row["layout"] != "contiguous" else []
    parts += [row["dtype"]] if len({other["dtype"] for other in rows}) > 1 else []
    return " ".join(parts)


def _file_name(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-") + ".png"


def _short(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
