"""Where a model's predictions go wrong: by class, by confidence, and sample by sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchref.diagnostics.drawing import new_figure

LONGEST_NAME = 24
COLORS = {"right": "#1f77b4", "wrong": "#d95f02"}
NUMBERED = 12  # classes up to which the cells of a picture have room for numbers


@dataclass(frozen=True)
class ClassScores:
    """Scores of each class, (classes,) float64; 0 where there is nothing to divide by."""

    precision: Tensor
    recall: Tensor
    f1: Tensor
    support: Tensor
    """Samples of the class, int64."""


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in bins of equal width, (bins,) float64; NaN where one is empty.

    ``ece`` is the expected calibration error, 0 where confidence is accuracy in every bin.
    """

    edges: Tensor
    """(bins + 1,), from 0 to 1."""
    count: Tensor
    """Samples in the bin, int64."""
    confidence: Tensor
    accuracy: Tensor
    ece: float


class ConfusedPair(NamedTuple):
    """A class that is taken for another; ``share`` is of the samples of the true class."""

    true: int
    predicted: int
    count: int
    share: float


class Sample(NamedTuple):
    """A sample, what it is and what it was taken for; ``probability`` is of ``predicted``."""

    index: int
    true: int
    predicted: int
    probability: float
    loss: float


class ValueSample(NamedTuple):
    """A sample with a value; ``residual`` is ``true - predicted``."""

    index: int
    true: float
    predicted: float
    residual: float


def confusion_matrix(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """How many samples of each class (rows) were taken for each class (columns).

    Args:
        predicted: (samples,) int64 classes in [0, classes).
        y: (samples,) int64 true classes in [0, classes).
        classes: how many, >= 2.

    Returns:
        (classes, classes) int64.

    Raises:
        ValueError: the shapes differ, or a class is out of its range.
        ImportError: torchmetrics is missing.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), classes=2)
        tensor([[1, 1],
                [0, 1]])

    Source: the course, "Prediction (Inference)"; scikit-learn's ``confusion_matrix``.
    """
    if classes < 2:
        raise ValueError(f"confusion_matrix: expected `classes` >= 2, got {classes}")
    _check_labels("confusion_matrix", "predicted", predicted, classes)
    _check_labels("confusion_matrix", "y", y, classes)
    _check_as_many("confusion_matrix", len(predicted), y)
    metrics = _torchmetrics()
    return metrics.multiclass_confusion_matrix(predicted, y, classes, validate_args=False)


def class_scores(matrix: Tensor) -> ClassScores:
    r"""Precision, recall, F1 and support of each class.

    .. math::
        p_k = \frac{M_{kk}}{\sum_i M_{ik}}, \quad
        r_k = \frac{M_{kk}}{\sum_j M_{kj}}, \quad
        F_k = \frac{2 p_k r_k}{p_k + r_k}

    Args:
        matrix: of :func:`confusion_matrix`.

    Raises:
        ValueError: ``matrix`` is not square.

    Example:
        >>> class_scores(torch.tensor([[1, 1], [0, 2]])).recall
        tensor([0.5000, 1.0000], dtype=torch.float64)

    Source: scikit-learn's ``precision_recall_fscore_support`` with ``zero_division=0``.
    """
    _check_square("class_scores", matrix)
    hits, support, taken = matrix.diagonal().double(), matrix.sum(1), matrix.sum(0)
    return ClassScores(
        precision=hits / taken.clamp_min(1),
        recall=hits / support.clamp_min(1),
        f1=2 * hits / (taken + support).clamp_min(1),
        support=support,
    )


def confused_pairs(matrix: Tensor, count: int = 5) -> list[ConfusedPair]:
    """The pairs of true and predicted class with the most samples, the diagonal aside.

    Args:
        matrix: of :func:`confusion_matrix`.
        count: most pairs, > 0; there are fewer where fewer are confused.

    Raises:
        ValueError: ``matrix`` is not square, or ``count`` is not positive.

    Example:
        >>> confused_pairs(torch.tensor([[5, 0], [3, 1]]))
        [ConfusedPair(true=1, predicted=0, count=3, share=0.75)]
    """
    _check_square("confused_pairs", matrix)
    _check_count("confused_pairs", count)
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    support = matrix.sum(1)
    pairs = []
    for place in wrong.argsort(descending=True, stable=True)[:count].tolist():
        true, predicted = divmod(place, len(matrix))
        found = int(wrong[place])
        if found:
            share = found / int(support[true])
            pairs.append(ConfusedPair(true, predicted, found, share))
    return pairs


def reliability(probabilities: Tensor, y: Tensor, bins: int = 10) -> Reliability:
    r"""Whether predictions that are made with 90% confidence are right nine times in ten.

    The confidence of a sample is its largest probability. In bin :math:`B_b`, from one edge up to
    but without the next (the last one has 1, too),

    .. math::
        \mathrm{ECE} = \sum_b \frac{|B_b|}{n} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    Args:
        probabilities: (samples, classes), as ``predict_proba`` gives them.
        y: (samples,) int64 true classes.
        bins: > 0.

    Raises:
        ValueError: shapes do not match, there is no sample, an entry is no probability, a class is
            out of its range, or ``bins`` is not positive.

    Example:
        >>> p = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.45, 0.55]])
        >>> found = reliability(p, torch.tensor([0, 1, 1]))
        >>> round(found.ece, 4), found.count.tolist()
        (0.45, [0, 0, 0, 0, 0, 1, 0, 0, 0, 2])

    Source: Guo et al., "On calibration of modern neural networks", 2017.
    """
    _check_probabilities("reliability", probabilities, y)
    if bins < 1:
        raise ValueError(f"reliability: expected `bins` > 0, got {bins}")
    confidence, predicted = probabilities.double().max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=y.device)
    place = torch.bucketize(confidence, edges[1:-1], right=True)
    count = place.bincount(minlength=bins)
    confident = place.bincount(confidence, minlength=bins)
    right = place.bincount((predicted == y).double(), minlength=bins)
    ece = (right - confident).abs().sum().item() / len(y)
    return Reliability(edges, count, confident / count, right / count, ece)


def highest_loss(probabilities: Tensor, y: Tensor, count: int = 9) -> list[Sample]:
    r"""The samples to which the model gives the least probability of being what they are.

    They are confidently wrong, or wrongly labeled. The loss is :math:`-\log \hat y_{i, y_i}`; a
    probability below its type's epsilon counts as that.

    Args:
        probabilities: (samples, classes), as ``predict_proba`` gives them.
        y: (samples,) int64 true classes.
        count: most samples, > 0.

    Returns:
        The largest loss first; of equal ones the first sample.

    Raises:
        ValueError: as :func:`reliability`, or ``count`` is not positive.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> worst = highest_loss(p, torch.tensor([1, 1]), count=1)[0]
        >>> worst.index, worst.predicted, round(worst.loss, 3)
        (0, 0, 2.303)
    """
    _check_probabilities("highest_loss", probabilities, y)
    _check_count("highest_loss", count)
    loss = _losses(probabilities, y)
    return _samples(probabilities, y, loss.argsort(descending=True, stable=True)[:count])


def most_confused(probabilities: Tensor, y: Tensor, count: int = 9) -> list[Sample]:
    """The samples whose two most probable classes are closest: the model cannot decide.

    Args:
        probabilities, y, count: see :func:`highest_loss`.

    Returns:
        The smallest difference first; of equal ones the first sample.

    Raises:
        ValueError: as :func:`highest_loss`.

    Example:
        >>> p = torch.tensor([[0.9, 0.1], [0.48, 0.52]])
        >>> most_confused(p, torch.tensor([0, 1]), count=1)[0].index
        1
    """
    _check_probabilities("most_confused", probabilities, y)
    _check_count("most_confused", count)
    top = probabilities.topk(2, -1).values
    return _samples(probabilities, y, (top[:, 0] - top[:, 1]).argsort(stable=True)[:count])


def residuals(predicted: Tensor, y: Tensor) -> Tensor:
    """What each predicted value lacks to the true one, ``y - predicted``, in float64.

    Args:
        predicted, y: (samples,), at least one.

    Raises:
        ValueError: the shapes differ, or there is no sample.

    Example:
        >>> residuals(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0]))
        tensor([ 0.5000, -1.0000], dtype=torch.float64)
    """
    if y.ndim != 1 or len(y) == 0:
        raise ValueError(f"residuals: expected `y` (samples,), got shape {tuple(y.shape)}")
    if predicted.shape != y.shape:
        raise ValueError(
            f"residuals: expected `predicted` of shape {tuple(y.shape)}, got "
            f"{tuple(predicted.shape)}"
        )
    return y.double() - predicted.double()


def r2(predicted: Tensor, y: Tensor) -> float:
    r"""The share of the variance of the true values that the predictions explain.

    .. math::
        R^2 = 1 - \frac{\sum_i (y_i - \hat y_i)^2}{\sum_i (y_i - \bar y)^2}

    1 is perfect, 0 as good as always predicting the mean.

    Args:
        predicted, y: (samples,), two or more with different values.

    Raises:
        ValueError: the shapes differ, or all true values are equal.

    Example:
        >>> r2(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
        -1.0

    Source: scikit-learn's ``r2_score``.
    """
    missing = residuals(predicted, y).square().sum()
    if (y == y[0]).all():
        raise ValueError("r2: expected different values in `y`, got equal ones")
    values = y.double()
    return (1 - missing / (values - values.mean()).square().sum()).item()


def worst_values(predicted: Tensor, y: Tensor, count: int = 9) -> list[ValueSample]:
    """The samples with the largest residuals, either way, the largest first.

    Args:
        predicted, y: (samples,).
        count: most samples, > 0.

    Raises:
        ValueError: the shapes differ, there is no sample, or ``count`` is not positive.

    Example:
        >>> worst_values(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0]), count=1)
        [ValueSample(index=1, true=1.0, predicted=2.0, residual=-1.0)]
    """
    _check_count("worst_values", count)
    missing = residuals(predicted, y)
    order = missing.abs().argsort(descending=True, stable=True)[:count]
    columns = (order, y[order], predicted[order], missing[order])
    return [ValueSample(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def plot_confusion(matrix: Tensor, path: str | Path, classes: Sequence[str] | None = None) -> None:
    """Draw a confusion matrix into a file, colored by the share of each true class.

    Args:
        matrix: of :func:`confusion_matrix`.
        path: of the picture; its ending decides the format.
        classes: their names; numbers by default.

    Raises:
        ValueError: ``matrix`` is not square, or there are more or fewer names than classes.
    """
    _check_square("plot_confusion", matrix)
    names = list(map(str, range(len(matrix)))) if classes is None else list(map(_short, classes))
    if len(names) != len(matrix):
        raise ValueError(f"plot_confusion: expected {len(matrix)} `classes`, got {len(names)}")
    matrix = matrix.cpu()
    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    side = min(3 + 0.5 * len(matrix), 12)
    figure, axes = new_figure((side + 0.8, side))
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if len(matrix) <= NUMBERED:
        for (i, j), share in zip(_cells(len(matrix)), shares.flatten().tolist(), strict=True):
            color = "white" if share > 0.5 else "#111111"
            axes.text(j, i, str(int(matrix[i, j])), ha="center", va="center", color=color)
    turn = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticks(range(len(names)), names, rotation=turn, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.grid(visible=False)
    figure.savefig(path, dpi=120)


def _cells(size: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(size) for j in range(size)]


def plot_reliability(found: Reliability, path: str | Path) -> None:
    """Draw accuracy against confidence, and how many samples each bin has, into a file.

    On the dashed line confidence is accuracy; bars below it are overconfident.

    Args:
        found: by :func:`reliability`.
        path: of the picture; its ending decides the format.
    """
    figure, (above, below) = new_figure((5, 6), rows=2, columns=1)
    above.get_gridspec().set_height_ratios([3, 1])
    width = 1 / len(found.count)
    left = found.edges[:-1].tolist()
    accuracy = found.accuracy.nan_to_num().tolist()
    bars = {"align": "edge", "color": COLORS["right"], "edgecolor": "white", "alpha": 0.6}
    above.bar(left, accuracy, width, label="accuracy", **bars)
    above.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="calibrated")
    points = (found.confidence.tolist(), found.accuracy.tolist())
    above.plot(*points, "o", color=COLORS["wrong"], markersize=4, label="mean confidence")
    above.set_title(f"expected calibration error {found.ece:.3f}")
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1.02)
    above.legend(frameon=False, loc="upper left")
    below.bar(left, found.count.tolist(), width, **bars)
    below.set_xlabel("confidence")
    below.set_ylabel("samples")
    for axes in (above, below):
        axes.set_xlim(0, 1)
    figure.savefig(path, dpi=120)


def plot_worst_images(
    images: Tensor,
    samples: Sequence[Sample],
    path: str | Path,
    classes: Sequence[str] | None = None,
    high: float = 1.0,
) -> None:
    """Draw samples as a grid of images with what they are and what they were taken for.

    Args:
        images: (N, C, H, W) with 1 channel (gray) or 3 (RGB), pixels in [0, high], of all samples.
        samples: of :func:`highest_loss` or :func:`most_confused`, at least one.
        path: of the picture; its ending decides the format.
        classes: their names; numbers by default.
        high: the largest pixel.

    Raises:
        ValueError: ``images`` has another shape, or there is no sample.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            "plot_worst_images: expected `images` of shape (N, 1 or 3, H, W), got "
            f"{tuple(images.shape)}"
        )
    if not samples:
        raise ValueError("plot_worst_images: expected a sample or more in `samples`, got none")
    columns = math.ceil(math.sqrt(len(samples)))
    rows = math.ceil(len(samples) / columns)
    figure, _ = new_figure((2 * columns, 2.5 * rows), rows, columns)
    for axes in figure.axes:
        axes.set_axis_off()
    for axes, sample in zip(figure.axes, samples, strict=False):  # the last row may have gaps
        true, predicted = (
            str(label) if classes is None else _short(classes[label])
            for label in (sample.true, sample.predicted)
        )
        _show(axes, images[sample.index].detach().cpu().float() / high)
        axes.set_title(
            f"true {true}\npredicted {predicted} ({sample.probability:.2f})",
            fontsize="small",
            parse_math=False,
        )
    figure.savefig(path, dpi=120)


def _short(name: str) -> str:
    """A name that leaves room for the picture."""
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _show(axes: Any, image: Tensor) -> None:
    pixels = image.clamp(0, 1).movedim(0, -1).numpy()
    if pixels.shape[-1] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=1)
    else:
        axes.imshow(pixels)


def _losses(probabilities: Tensor, y: Tensor) -> Tensor:
    p = probabilities.gather(-1, y[:, None])[:, 0]
    return -p.clamp_min(torch.finfo(p.dtype).eps).log()


def _samples(probabilities: Tensor, y: Tensor, order: Tensor) -> list[Sample]:
    chosen = probabilities[order]
    largest, predicted = chosen.max(-1)
    columns = (order, y[order], predicted, largest, _losses(chosen, y[order]))
    return [Sample(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _torchmetrics() -> Any:
    try:
        from torchmetrics.functional import classification
    except ModuleNotFoundError as error:
        raise ImportError(
            f"torchref.diagnostics: {error.name} is missing: pip install 'torchref-triton[train]'"
        ) from error
    return classification


def _check_labels(function: str, name: str, labels: Tensor, classes: int) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{function}: expected `{name}` (samples,) of classes, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise ValueError(
            f"{function}: expected `{name}` in [0, {classes}), got {outside[0].item()}"
        )


def _check_as_many(function: str, count: int, y: Tensor) -> None:
    if count != len(y):
        raise ValueError(f"{function}: expected {count} classes in `y`, got {len(y)}")


def _check_probabilities(function: str, probabilities: Tensor, y: Tensor) -> None:
    shape = tuple(probabilities.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] < 2:
        raise ValueError(
            f"{function}: expected `probabilities` (samples, 2 or more classes), got shape {shape}"
        )
    outside = probabilities[~((probabilities >= 0) & (probabilities <= 1))]  # NaN is, too
    if len(outside):
        raise ValueError(
            f"{function}: expected `probabilities` in [0, 1], got {outside[0].item()}; logits?"
        )
    _check_labels(function, "y", y, shape[1])
    _check_as_many(function, shape[0], y)


def _check_square(function: str, matrix: Tensor) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(
            f"{function}: expected `matrix` of shape (classes, classes), got {tuple(matrix.shape)}"
        )


def _check_count(function: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{function}: expected `count` > 0, got {count}")
