"""What is done with probabilities: a class, or none, and how well that goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchref._checks import require_floating
from torchref.training.checks import check_range

ABSTAIN = -1
# Of a softmax, its reciprocal of a sum and the product with that; and two of a mean of several.
ROUNDINGS = 4


@dataclass(frozen=True)
class Decisions:
    """What a threshold makes of some samples; ``accuracy`` is of the decided ones, NaN if none."""

    threshold: float
    coverage: float
    """The share of the samples that are decided."""
    accuracy: float


def decide(probabilities: Tensor, threshold: float | Tensor) -> Tensor:
    """The most probable class of each sample, or -1 where it is not probable enough.

    Args:
        probabilities: (samples, classes), as ``predict_proba`` gives them; NaN never decides.
        threshold: the least probability that decides, in [0, 1]; one for all classes, or (classes,)
            for a class that needs more confidence than others.

    Returns:
        (samples,) int64.

    Raises:
        ValueError: the threshold is out of its range or has another shape, or a probability is
            out of [0, 1], as a logit is.

    Example:
        >>> p = torch.tensor([[0.95, 0.05], [0.4, 0.6]])
        >>> decide(p, 0.9)
        tensor([ 0, -1])
        >>> decide(p, torch.tensor([0.99, 0.5]))
        tensor([-1,  1])

    Source: the course, "Why do we need softmax at inference time?"; Chow, "On optimum recognition
    error and reject tradeoff", 1970.
    """
    _check_probabilities("decide", probabilities)
    limits = torch.as_tensor(threshold, dtype=probabilities.dtype, device=probabilities.device)
    check_range("threshold", threshold, "in [0, 1]", bool(((limits >= 0) & (limits <= 1)).all()))
    classes = probabilities.shape[-1]
    check_range("threshold", threshold, f"one, or {classes}", limits.shape in ((), (classes,)))
    largest, label = probabilities.max(-1)
    confident = largest >= limits.expand(classes)[label]  # False for NaN
    return label.masked_fill(~confident, ABSTAIN)


def log_loss(probabilities: Tensor, y: Tensor) -> float:
    r"""The mean of :math:`-\log \hat{y}_{i, y_i}`: cross-entropy of probabilities.

    A probability below its type's epsilon counts as that, as in scikit-learn's ``log_loss``.

    Args:
        probabilities: (samples, classes).
        y: (samples,) int64.

    Raises:
        ValueError: ``y`` has another length, a class is out of its range, or a probability is NaN
            or out of [0, 1], as a logit is.

    Example:
        >>> round(log_loss(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 1])), 4)
        0.4904

    Source: the course, "During Evaluation (e.g., Log Loss / Cross-Entropy)".
    """
    _check_probabilities("log_loss", probabilities, nan=False)
    _check_targets("log_loss", probabilities, y)
    p = probabilities.gather(-1, y[:, None]).clamp_min(torch.finfo(probabilities.dtype).eps)
    return -p.log().mean().item()


def coverage_curve(
    probabilities: Tensor, y: Tensor, thresholds: Sequence[float] = (0.0, 0.5, 0.7, 0.9, 0.95, 0.99)
) -> list[Decisions]:
    """How many samples each threshold decides, and how many of those rightly.

    Raises:
        ValueError: see :func:`decide` and :func:`log_loss`; NaN never decides.

    Example:
        >>> p = torch.tensor([[0.95, 0.05], [0.4, 0.6]])
        >>> for row in coverage_curve(p, torch.tensor([0, 0]), [0.0, 0.9]):
        ...     print(row)
        Decisions(threshold=0.0, coverage=1.0, accuracy=0.5)
        Decisions(threshold=0.9, coverage=0.5, accuracy=1.0)

    Source: El-Yaniv and Wiener, "On the foundations of noise-free selective classification", 2010.
    """
    _check_probabilities("coverage_curve", probabilities)
    _check_targets("coverage_curve", probabilities, y)
    rows = []
    for threshold in thresholds:
        labels = decide(probabilities, threshold)
        decided = labels != ABSTAIN
        right = (labels == y)[decided].double().mean().item()
        rows.append(Decisions(threshold, decided.double().mean().item(), right))
    return rows


def _check_probabilities(name: str, probabilities: Tensor, nan: bool = True) -> None:
    require_floating(name, probabilities, "probabilities")
    # float64 ones are often computed in float32
    eps = max(torch.finfo(probabilities.dtype).eps, torch.finfo(torch.float32).eps)
    far = (probabilities - 0.5).abs() > 0.5 + ROUNDINGS * eps
    wrong = far if nan else far | probabilities.isnan()
    if len(bad := probabilities[wrong]):
        raise ValueError(f"{name}: expected `probabilities` in [0, 1], got {bad[0].item():g}")


def _check_targets(name: str, probabilities: Tensor, y: Tensor) -> None:
    if y.shape != probabilities.shape[:1]:
        raise ValueError(
            f"{name}: expected a class for each of {len(probabilities)} samples in `y`, got "
            f"{' x '.join(map(str, y.shape)) or 1}"
        )
    classes = probabilities.shape[-1]
    if len(bad := y[(y < 0) | (y >= classes)]):
        raise ValueError(f"{name}: expected `y` in [0, {classes}), got {bad[0].item()}")
