"""Figures that no screen shows."""

from typing import Any


def new_figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure that no screen shows, and its axes; an array of them where there are several."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(
            f"torchref.diagnostics: {error.name} is missing: pip install 'torchref-triton[train]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would pick a screen and keep the figure
    axes = figure.subplots(rows, columns)
    for ax in figure.axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
