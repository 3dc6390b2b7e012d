"""Draw which program of a kernel takes which data: the pictures of docs/kernels.md.

python scripts/draw_kernels.py [FOLDER]
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "kernels"
PROGRAMS = ["#8ecae6", "#ffb703", "#95d5b2", "#e5989b", "#cdb4db", "#d4a373"]
PADDING, PLAIN, INK = "#eeeeee", "#ffffff", "#222222"
INCHES = 9  # of every picture's width, so that text is as large in each


def canvas(left: float, right: float, bottom: float) -> tuple[Figure, Axes]:
    """Axes in units of a cell, from the top down."""
    figure = Figure(figsize=(INCHES, INCHES * bottom / (right - left)))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, 0)
    return figure, axes


def cell(axes: Axes, x: float, y: float, color: str, text: Any = "", width: float = 1) -> None:
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=color, edgecolor=INK, linewidth=0.8))
    note(axes, x + width / 2, y + 0.52, str(text), ha="center")


def note(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    axes.text(x, y, text, **{"va": "center", "fontsize": 10, "color": INK, **options})


def heading(axes: Axes, x: float, y: float, text: str) -> None:
    note(axes, x, y, text, fontsize=11, fontweight="bold")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1.2})


def softmax() -> Figure:
    figure, axes = canvas(-0.3, 20.3, 17.2)
    heading(axes, 0, 0.5, "A row fits: a program takes a tile of whole rows")
    for row in range(6):
        for col in range(8):
            text, color = ("", PROGRAMS[row // 2]) if col < 6 else ("-∞", PADDING)
            cell(axes, 3 + col, 1.2 + row, color, text)
        if row % 2 == 0:
            note(axes, 2.7, 2.2 + row, f"program {row // 2}", ha="right")
    note(axes, 6, 7.6, "6 columns", ha="center")
    note(axes, 10, 7.6, "masked", ha="center")
    note(axes, 11.6, 4.2, "x is read once: maximum, sum\nand result stay in registers")

    heading(axes, 0, 9, "A wider row: one program walks along it, twice")
    for col in range(20):
        text, color = ("", PROGRAMS[col // 4]) if col < 18 else ("-∞", PADDING)
        cell(axes, col, 10.4, color, text)
        cell(axes, col, 15, color)
    for step in range(5):
        note(axes, 4 * step + 2, 10, f"step {step}", ha="center")
    for place in range(4):
        cell(axes, 4.4 + 1.6 * place, 12.6, PLAIN, "m, s", 1.6)
    note(axes, 4.1, 13.1, "each place in the tile", ha="right")
    note(axes, 11.2, 13.1, "m = max(m, x);  s = s · exp(m before - m) + exp(x - m)", fontsize=9)
    arrow(axes, (7.6, 11.5), (7.6, 12.5))
    arrow(axes, (7.6, 13.7), (7.6, 14.9))
    note(axes, 8, 14.3, "at the end all join into the row's maximum M and sum S")
    note(axes, 10, 16.5, "second walk, mostly from the cache: y = exp(x - M) / S", ha="center")
    return figure


def batch_norm() -> Figure:
    figure, axes = canvas(-3, 23.3, 16)
    heading(axes, -2.8, 0.5, "NCHW: a program takes one channel")
    for image in range(4):
        for channel in range(3):
            program = image % 2 * 3 + channel
            for i in range(4):
                cell(axes, 4 * channel + i, 1.2 + image, PROGRAMS[program], program)
        note(axes, -0.3, 1.7 + image, f"image {image}", ha="right")
    for channel in range(3):
        note(axes, 4 * channel + 2, 5.7, f"channel {channel}", ha="center")
    note(axes, 6, 7.2, "H·W = 4 values are neighbours;\n2 parts: every second image", ha="center")

    heading(axes, 14, 0.5, "channels_last: COLS channels")
    for pixel in range(8):
        for channel in range(8):
            program = pixel // 2 % 2 * 2 + channel // 4
            cell(axes, 15 + channel, 1.2 + pixel, PROGRAMS[program], program)
    note(axes, 14.7, 5.2, "pixels", ha="center", rotation=90)
    note(axes, 19, 9.7, "8 channels are neighbours, COLS = 4", ha="center")

    heading(axes, -2.8, 11.2, "Then, for each channel")
    for part in range(2):
        cell(axes, -2.8, 12 + 2 * part, PROGRAMS[3 * part], f"part {part}: mean, m2, n", 6.6)
        arrow(axes, (3.9, 12.5 + 2 * part), (5.1, 13.2 + 0.6 * part))
    for x, width, text in (
        (5.2, 5.4, "merged in order"),
        (12, 4.4, "mean, rstd"),
        (17.8, 5.2, "pass over x: y"),
    ):
        cell(axes, x, 13, PLAIN, text, width)
    arrow(axes, (10.7, 13.5), (11.9, 13.5))
    arrow(axes, (16.5, 13.5), (17.7, 13.5))
    note(axes, 14.2, 15, "running statistics move, too", ha="center")
    return figure


def dropout() -> Figure:
    figure, axes = canvas(-5.3, 16.3, 10.8)
    kept = [1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0]
    for program in range(2):
        note(axes, 8 * program + 4, 0.5, f"program {program}", ha="center")
    for i, keep in enumerate(kept):
        cell(axes, i, 1, PROGRAMS[i // 8], i)
        cell(axes, i, 5.2, PLAIN, f"r{i % 4}")
        cell(axes, i, 7, PROGRAMS[i // 8] if keep else PADDING, "✓" if keep else "0")
    for counter in range(4):
        cell(axes, 4 * counter + 0.2, 3.1, PLAIN, f"Philox(seed, {counter})", 3.6)
        arrow(axes, (4 * counter + 2, 2.1), (4 * counter + 2, 3))
        arrow(axes, (4 * counter + 2, 4.2), (4 * counter + 2, 5.1))
    for y, text in (
        (1.5, "place in memory"),
        (3.6, "a counter serves four"),
        (5.7, "random int32"),
        (7.5, "r ≥ threshold: kept"),
    ):
        note(axes, -0.3, y, text, ha="right")
    note(axes, 8, 9, "forward: y = x / (1 - p) where kept, else 0", ha="center")
    note(axes, 8, 9.9, "backward: the same mask again, from the same seed", ha="center")
    return figure


def optimizer() -> Figure:
    figure, axes = canvas(-5.5, 15.8, 12.6)
    words = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]  # the programs' tensors and chunks
    sizes, chunk = (10, 4, 6), 4
    for program, (tensor, part) in enumerate(words):
        for i in range(part * chunk, min((part + 1) * chunk, sizes[tensor])):
            cell(axes, i, 0.3 + 1.4 * tensor, PROGRAMS[program], program)
        x = 2.4 * program
        cell(axes, x, 5.2, PROGRAMS[program], f"{tensor}, {part}", 2.4)
        arrow(axes, (x + 1.2, 6.3), (x + 1.2, 7))
        note(axes, x + 1.2, 7.4, f"program {program}", ha="center", fontsize=9)
    for tensor, size in enumerate(sizes):
        note(axes, -0.3, 0.8 + 1.4 * tensor, f"tensor {tensor}: {size} elements", ha="right")
    note(
        axes,
        10.4,
        1.7,
        "a number in a cell:\nits program; chunks\nof 4 here, of 4096\nin the kernel",
    )
    note(axes, -0.3, 5.7, "words: tensor, chunk", ha="right")
    for y, label, fields in (
        (8.6, "rows: one a tensor", ("size", "flags", "grad", "param", "step", "m", "v")),
        (10.4, "numbers: one row a group", ("lr", "sign", "l2", "clip", "1 - β₁", "ln β₁", "...")),
    ):
        note(axes, -0.3, y + 0.5, label, ha="right")
        for i, field in enumerate(fields):
            cell(axes, 2.05 * i, y, PLAIN, field, 2.05)
    note(
        axes, 7.2, 12, "all on the device: nothing is compiled anew from step to step", ha="center"
    )
    return figure


PICTURES = {
    "softmax": softmax,
    "batch_norm": batch_norm,
    "dropout": dropout,
    "optimizer": optimizer,
}


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
