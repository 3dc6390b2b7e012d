"""What learning curves say about bias and variance, over epochs and over samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchref.diagnostics.drawing import new_figure

UNDERFITTING = "underfitting (high bias)"
OVERFITTING = "overfitting (high variance)"
GOOD = "good fit"
UNCLEAR = "unclear"

FIXES = {  # the course's, in its order
    UNDERFITTING: (
        "Use a more complex model (deeper or wider).",
        "Train longer (more epochs).",
        "Reduce regularization (a lower L2 penalty or less dropout).",
        "Use better features.",
        "Lower the learning rate gradually, not too early.",
    ),
    OVERFITTING: (
        "Get more training data.",
        "Add regularization (L1, L2, dropout).",
        "Use data augmentation.",
        "Use a simpler model.",
        "Use early stopping.",
        "Use cross-validation to tune hyperparameters.",
    ),
    GOOD: (),
    UNCLEAR: (),
}

# Shares of the baseline's error. How low an error can be is unknown without a target, so what lies
# between HIGH and LOW, or between WIDE and CLOSE, decides nothing.
HIGH = 0.5  # half of what a constant guess gets wrong is wrong still: little was learned
LOW = 0.25
WIDE = 0.12  # of the gap between the errors; half of LOW, so that it is no detail of a low error
CLOSE = 0.06
MOVING = 0.05  # a fall between two windows that is larger than this is no end of training
DOMINATES = 2.0  # with a target: bias or variance is the larger one by this factor
SIGNIFICANT = 2.0  # standard deviations of the noise, about 95%
WINDOW = 5  # least epochs that stand for an end of training; two of them show a trend
SHARE = 0.2  # of all epochs, where that is more
RISEN = 1.1  # validation loss at the end, of its lowest
MEASURED = (
    "The training error is measured during training, with dropout and augmentation on, and looks "
    "worse than the same model evaluated; evaluate the training part to be sure."
)

CURVES = {"train_error": ("#1f77b4", "training"), "val_error": ("#d95f02", "validation")}


class _Levels(NamedTuple):
    """Errors at the end as shares: 0 is the target, 1 the baseline."""

    train: float
    val: float
    noise: float
    train_fall: float
    val_fall: float

    @property
    def gap(self) -> float:
        return self.val - self.train


@dataclass(frozen=True)
class Diagnosis:
    """A verdict over learning curves, and the numbers it rests on.

    Errors are shares of wrong classes, or losses where values are predicted. Those at the end are
    means over the last epochs, of which there are ``window``.
    """

    verdict: str
    """``underfitting (high bias)``, ``overfitting (high variance)``, ``good fit``, ``unclear``."""
    explanation: str
    """One or two plain sentences; of ``unclear``, what would settle it."""
    fixes: tuple[str, ...]
    """What the course lists against the verdict, in its order."""
    notes: tuple[str, ...]
    """What makes the numbers look other than they are."""
    train_error: float
    val_error: float
    best_epoch: int
    """The epoch with the lowest validation loss, whose weights early stopping keeps."""
    best_train_error: float
    best_val_error: float
    trend: float
    """Change of the validation error from the window before the last to the last one."""
    noise: float
    """Standard deviation of the gap: between epochs and, with ``val_samples``, of sampling."""
    window: int

    @property
    def gap(self) -> float:
        """Validation error minus training error at the end."""
        return self.val_error - self.train_error

    def __str__(self) -> str:
        fixes = [f"{i}. {fix}" for i, fix in enumerate(self.fixes, 1)]
        return "\n".join([f"{self.verdict}: {self.explanation}", *self.notes, *fixes])


def majority_error(y: Tensor) -> float:
    """The error of always guessing the most frequent class: what a model has to beat.

    Args:
        y: (samples,) int64 classes, at least one sample.

    Raises:
        ValueError: ``y`` has another shape or type, no sample, or a class below 0.

    Example:
        >>> majority_error(torch.tensor([0, 0, 0, 1]))
        0.25
    """
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or len(y) == 0:
        raise ValueError(
            "majority_error: expected `y` with the class of each sample, got "
            f"{y.dtype} of shape {tuple(y.shape)}"
        )
    if y.min() < 0:
        raise ValueError(f"majority_error: expected classes >= 0 in `y`, got {y.min().item()}")
    return 1 - y.long().bincount().max().item() / len(y)


def diagnose(
    rows: Sequence[dict[str, float]],
    *,
    baseline: float | None = None,
    target: float | None = None,
    val_samples: int | None = None,
) -> Diagnosis:
    r"""Tell bias from variance by the training and validation errors of each epoch.

    The errors at the end of training, :math:`E_t` and :math:`E_v`, are compared on the scale of
    the baseline :math:`E_b`, the error of whoever guesses without looking at the sample. Without a
    target

    ============================  ==========================================================
    underfitting (high bias)      :math:`E_t` and :math:`E_v` are high, over 0.5 :math:`E_b`
    overfitting (high variance)   :math:`E_t` is low, at most 0.25 :math:`E_b`, and the gap
                                  :math:`E_v - E_t` is over 0.12 :math:`E_b` and the noise
    good fit                      both are low, and the gap is at most 0.06 :math:`E_b`
    unclear                       anything between, training that still goes on, few epochs
    ============================  ==========================================================

    With a target :math:`E^*`, good is :math:`E_v \le E^*`. Above it by more than the noise, the
    verdict is the larger, by a factor 2, of bias :math:`E_t - E^*` and variance :math:`E_v - E_t`.

    Dropout and augmentation are on where :math:`E_t` is measured, so it may be above :math:`E_v`;
    a note says so. Bias is then overrated and the gap underrated.

    The verdict is on the end of training, not on the best epoch: that one is chosen for its
    validation loss, and early stopping has cut off there what would be seen after it.

    Args:
        rows: one dict an epoch with ``train_loss``, ``val_loss`` and, of classes,
            ``train_accuracy`` and ``val_accuracy``; :attr:`History.rows` is such a list.
        baseline: > 0; of classes :func:`majority_error`, of values 1 by default: the loss of
            predicting the mean, where targets are scaled to deviation 1, as :class:`Run` does.
        target: in [0, baseline), the error that would do, an expert's say.
        val_samples: > 0, samples of the validation part: then noise has the sampling error of the
            share of wrong classes, too.

    Raises:
        ValueError: a number is out of its range, a row lacks a metric, or there is no row.

    Example:
        >>> rows = [
        ...     {"train_loss": 2 / (i + 3), "val_loss": 0.5, "train_accuracy": min(1, 0.8 + i / 50),
        ...      "val_accuracy": 0.8}
        ...     for i in range(20)
        ... ]
        >>> print(diagnose(rows, baseline=0.5).verdict)
        overfitting (high variance)
        >>> diagnose(rows[:5], baseline=0.5).explanation
        'At the end ... There are 5 epochs, and 10 are needed to see a trend: train longer.'

    Source: the course, "Bias and variance of a model"; with a target: Ng, "Machine learning
    yearning", 2018, "Bias and variance" and "Comparing to the optimal error rate".
    """
    curves = _read(rows)
    if baseline is None and curves.classes:
        raise ValueError("diagnose: expected `baseline`, of classes majority_error(y), got None")
    baseline = 1.0 if baseline is None else baseline
    _check("diagnose", baseline, target)
    if val_samples is not None and not val_samples >= 1:
        raise ValueError(f"diagnose: expected `val_samples` > 0, got {val_samples}")
    numbers = _measure(curves, val_samples)
    levels = _levels(numbers, baseline, target or 0.0)
    verdict, reason = _judge(curves, levels, target)
    return Diagnosis(
        verdict=verdict,
        explanation=f"{_said(numbers, baseline, target)} {reason}",
        fixes=FIXES[verdict],
        notes=tuple(_notes(curves, levels, numbers)),
        train_error=numbers.train_error,
        val_error=numbers.val_error,
        best_epoch=numbers.best_epoch,
        best_train_error=curves.train[numbers.best_epoch].item(),
        best_val_error=curves.val[numbers.best_epoch].item(),
        trend=-numbers.val_fall,
        noise=numbers.noise,
        window=numbers.window,
    )


class _Curves(NamedTuple):
    """Errors and validation loss, (epochs,) each."""

    train: Tensor
    val: Tensor
    val_loss: Tensor
    classes: bool

    @property
    def finite(self) -> bool:
        return bool(torch.stack([self.train, self.val, self.val_loss]).isfinite().all())


class _Numbers(NamedTuple):
    train_error: float
    val_error: float
    train_fall: float
    val_fall: float
    noise: float
    best_epoch: int
    window: int


def _read(rows: Sequence[dict[str, float]]) -> _Curves:
    if not rows:
        raise ValueError("diagnose: expected a row for each epoch in `rows`, got none")
    classes = "val_accuracy" in rows[0]
    names = ("train_accuracy", "val_accuracy") if classes else ("train_loss", "val_loss")
    columns = {}
    for name in (*names, "val_loss"):
        if absent := [i for i, row in enumerate(rows) if name not in row]:
            raise ValueError(f"diagnose: expected {name} in each of `rows`, not in row {absent[0]}")
        columns[name] = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    train, val = (1 - columns[n] if classes else columns[n] for n in names)
    return _Curves(train, val, columns["val_loss"], classes)


def _check(name: str, baseline: float, target: float | None) -> None:
    if not 0 < baseline < math.inf:
        raise ValueError(f"{name}: expected a finite `baseline` > 0, got {baseline}")
    if target is not None and not 0 <= target < baseline:
        raise ValueError(f"{name}: expected `target` in [0, {baseline:g}), got {target}")


def _measure(curves: _Curves, val_samples: int | None) -> _Numbers:
    epochs = len(curves.val)
    window = min(max(WINDOW, int(SHARE * epochs)), epochs)
    before = slice(-2 * window, -window) if epochs >= 2 * window else slice(0, 1)
    ends = [errors[-window:].mean().item() for errors in (curves.train, curves.val)]
    starts = [errors[before].mean().item() for errors in (curves.train, curves.val)]
    # A trend adds little to what differs from one epoch to the next, of which each has half.
    steps = torch.stack([curves.train, curves.val])[:, -window:].diff()
    squares = steps.square().mean().nan_to_num().item()  # sum of two variances: of the gap
    if curves.classes and val_samples is not None:
        wrong = (ends[1] * val_samples + 1) / (val_samples + 2)  # no error in few samples is not 0
        squares += wrong * (1 - wrong) / val_samples
    return _Numbers(
        *ends,
        *(start - end for start, end in zip(starts, ends, strict=True)),
        noise=math.sqrt(squares),
        best_epoch=int(curves.val_loss.nan_to_num(nan=math.inf).argmin()),
        window=window,
    )


def _levels(numbers: _Numbers, baseline: float, low: float) -> _Levels:
    scale = baseline - low
    return _Levels(
        train=(numbers.train_error - low) / scale,
        val=(numbers.val_error - low) / scale,
        noise=numbers.noise / scale,
        train_fall=numbers.train_fall / scale,
        val_fall=numbers.val_fall / scale,
    )


def _judge(curves: _Curves, levels: _Levels, target: float | None) -> tuple[str, str]:
    """The verdict, and a sentence that says why or what would settle it."""
    epochs = len(curves.val)
    if not curves.finite:
        return UNCLEAR, "An error is not finite: lower the learning rate and train again."
    if epochs < 2 * WINDOW:
        are = "is 1 epoch" if epochs == 1 else f"are {epochs} epochs"
        few = f"There {are}, and {2 * WINDOW} are needed to see a trend"
        return UNCLEAR, f"{few}: train longer."
    fall = max(MOVING, SIGNIFICANT * levels.noise)
    if levels.val_fall > fall or (levels.train > LOW and levels.train_fall > fall):
        return UNCLEAR, "Errors are still falling: train longer."
    return _by_baseline(levels) if target is None else _by_target(levels)


def _by_baseline(levels: _Levels) -> tuple[str, str]:
    train, val, gap = levels.train, levels.val, levels.gap
    if min(train, val) - levels.noise > HIGH:
        return UNDERFITTING, "Both are high: the model does not fit what it trains on."
    if train <= LOW and gap > max(WIDE, SIGNIFICANT * levels.noise):
        return OVERFITTING, "The training error is low and the gap is wide."
    if max(train, val + levels.noise) <= LOW and gap <= CLOSE:
        return GOOD, "Both are low, and close."
    return UNCLEAR, _what_settles(levels)


def _what_settles(levels: _Levels) -> str:
    train, gap = levels.train, levels.gap
    if train > LOW and gap < -CLOSE:
        return "Only the training error is not low: evaluate the training part as validation is."
    if CLOSE < gap <= max(WIDE, SIGNIFICANT * levels.noise):
        return "The gap is not clear of the noise: take more validation samples or cross-validate."
    if train > HIGH:
        return "Whether both are high is within the noise: take more validation samples."
    if train > LOW or levels.val > LOW:
        return (
            "Whether that is high depends on what can be reached: an expert's error, say, which "
            "`target` of diagnose takes."
        )
    return "Whether both are low is within the noise: take more validation samples."


def _by_target(levels: _Levels) -> tuple[str, str]:
    bias, variance = levels.train, levels.gap
    if levels.val <= 0 and bias > max(WIDE, SIGNIFICANT * levels.noise):
        return UNCLEAR, "Only the training error misses the target: take more validation samples."
    if levels.val <= 0:
        return GOOD, "The validation error reaches the target."
    if levels.val <= SIGNIFICANT * levels.noise:
        return UNCLEAR, "The target is missed within the noise: take more validation samples."
    if bias > max(DOMINATES * variance, SIGNIFICANT * levels.noise):
        return UNDERFITTING, "The training error itself is far from the target."
    if variance > max(DOMINATES * bias, SIGNIFICANT * levels.noise):
        return OVERFITTING, "The gap is most of what is missing to the target."
    return UNCLEAR, (
        "Bias and variance are of like size, or within the noise: a larger model, then more "
        "regularization, and more validation samples tell which helps."
    )


def _said(numbers: _Numbers, baseline: float, target: float | None) -> str:
    aim = "" if target is None else f", of a target {target:.3g}"
    return (
        f"At the end the training error is {numbers.train_error:.3g}, the validation error "
        f"{numbers.val_error:.3g} (noise {numbers.noise:.2g}){aim}; guessing has {baseline:.3g}."
    )


def _notes(curves: _Curves, levels: _Levels, numbers: _Numbers) -> list[str]:
    notes, best, window = [], numbers.best_epoch, numbers.window
    if not curves.finite:
        return notes
    if levels.gap < -levels.noise:
        notes.append(MEASURED)
    loss, lowest = curves.val_loss[-window:].mean().item(), curves.val_loss[best].item()
    if best < len(curves.val) - window and lowest > 0 and loss > RISEN * lowest:
        notes.append(
            f"The validation loss has risen from {lowest:.3g} (epoch {best}) to {loss:.3g}; early "
            f"stopping keeps epoch {best}, with validation error {curves.val[best]:.3g}."
        )
    return notes


class SizeDiagnosis(NamedTuple):
    """Whether more data would help, and why."""

    verdict: str
    """``more data helps``, ``more data does not help``, ``unclear``."""
    explanation: str


def diagnose_size(
    rows: Sequence[dict[str, float]], *, baseline: float = 1.0, target: float = 0.0
) -> SizeDiagnosis:
    """Tell from errors over the number of samples whether more of them would help.

    ===========================  ===============================================================
    more data does not help      the last training error is over 0.5 of the baseline, or the curves
                                 have met: the last gap is at most 0.06 of the baseline
    more data helps              the last gap is over 0.12, less than the first one, and since half
                                 of the samples the validation error has fallen by over 0.05
    unclear                      anything else, and less than three sizes
    ===========================  ===============================================================

    Args:
        rows: as :func:`torchref.training.learning_curve_over_size` returns them.
        baseline: > 0; of classes :func:`majority_error`, of values 1.
        target: in [0, baseline), the error that would do.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> curve = [(50, 0.0, 0.3), (100, 0.01, 0.22), (200, 0.02, 0.15)]
        >>> keys = ("samples", "train_error", "val_error")
        >>> diagnose_size([dict(zip(keys, row)) for row in curve], baseline=0.5).verdict
        'more data helps'

    Source: the course, "Bias and variance of a model", "Get more training data"; Ng, "Machine
    learning yearning", 2018, "Learning curves".
    """
    _check("diagnose_size", baseline, target)
    if len(rows) < 3:
        return SizeDiagnosis(UNCLEAR, f"There are {len(rows)} sizes, and 3 are needed.")
    last = rows[-1]
    half = next((row for row in reversed(rows) if row["samples"] <= last["samples"] / 2), rows[0])
    scale = baseline - target
    train = (last["train_error"] - target) / scale
    first_gap, gap = ((row["val_error"] - row["train_error"]) / scale for row in (rows[0], last))
    fall = (half["val_error"] - last["val_error"]) / scale
    said = (
        f"From {half['samples']:.0f} to {last['samples']:.0f} samples the validation error goes "
        f"from {half['val_error']:.3g} to {last['val_error']:.3g}, the training error from "
        f"{half['train_error']:.3g} to {last['train_error']:.3g}."
    )
    if train > HIGH:
        why = "The training error is high itself, and validation errors seldom get below it."
        return SizeDiagnosis("more data does not help", f"{said} {why}")
    if gap <= CLOSE:
        return SizeDiagnosis("more data does not help", f"{said} The curves have met.")
    if gap > WIDE and gap < first_gap and fall > MOVING:
        return SizeDiagnosis("more data helps", f"{said} The gap is wide and shrinks.")
    return SizeDiagnosis(UNCLEAR, f"{said} More `repeats` or validation samples would tell.")


def plot_size_curve(rows: Sequence[dict[str, float]], path: str | Path) -> None:
    """Draw both errors against the number of training samples into a file.

    Args:
        rows: as :func:`torchref.training.learning_curve_over_size` returns them.
        path: of the picture; its ending decides the format.
    """
    figure, axes = new_figure((7, 4))
    samples = [row["samples"] for row in rows]
    for name, (color, label) in CURVES.items():
        errors = [row[name] for row in rows]
        axes.plot(samples, errors, color=color, label=label, marker="o", markersize=4)
    axes.set_title("error over the number of training samples")
    axes.set_xlabel("training samples")
    axes.set_ylabel("error")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
