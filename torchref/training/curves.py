"""Learning curves as a picture."""

from collections.abc import Sequence
from pathlib import Path

from torchref.diagnostics.drawing import new_figure

COLORS = {"train": "#1f77b4", "val": "#d95f02"}
LABELS = {"train": "training", "val": "validation"}


def plot_learning_curves(
    rows: Sequence[dict[str, float]], path: str | Path, best_epoch: int | None = None
) -> None:
    """Draw training and validation loss, and score, against the epoch into a file.

    Args:
        rows: one dict an epoch with ``epoch``, ``train_loss``, ``val_loss``, and the same of one
            more metric, as ``train_accuracy`` and ``val_accuracy``; :attr:`History.rows` is such a
            list.
        path: of the picture; its ending decides the format.
        best_epoch: marked with a dashed line.
    """
    scores = [name.removeprefix("train_") for name in rows[0] if name.startswith("train_")]
    panels = sorted(scores, key=lambda name: name != "loss")
    figure, _ = new_figure((10, 4), columns=len(panels))
    for axes, metric in zip(figure.axes, panels, strict=True):
        for part, color in COLORS.items():
            points = [(row["epoch"], row[f"{part}_{metric}"]) for row in rows]
            marker = "." if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), color=color, label=LABELS[part], marker=marker)
        if best_epoch is not None:
            label = f"best epoch ({best_epoch})"
            axes.axvline(best_epoch, color="0.4", linestyle="--", linewidth=1, label=label)
        axes.set_title(metric)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
