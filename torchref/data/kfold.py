"""Cross-validation: folds, and what their scores say together."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

METHODS = ("plain", "stratified", "time", "grouped")


def folds(
    y_or_count: Tensor | int,
    k: int = 5,
    *,
    method: Literal["plain", "stratified", "time", "grouped"] = "stratified",
    repeats: int = 1,
    groups: Tensor | None = None,
    gap: int = 0,
    seed: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Training and validation indices, with each sample in the validation part of one fold.

    The test split is no part of this: take it off first, and make folds of the rest.

    Args:
        y_or_count: (samples,) class of each sample, or the number of samples, which is enough for
            every method but ``"stratified"``.
        k: number of folds, from 2 to the number of samples; less than that for ``"time"``.
        method: ``"plain"`` shuffles; ``"stratified"`` shuffles and keeps the proportions of the
            classes in each fold; ``"time"`` takes rows in their order, always trains on what is
            before the validation part, and so never validates the first samples; ``"grouped"``
            has no group in both parts.
        repeats: from 1 to 2**32 - ``seed``; so many times ``k`` folds, with seeds ``seed``,
            ``seed + 1``, and so on. 1 for ``"time"`` and ``"grouped"``, where nothing is random.
        groups: (samples,) group of each sample, for ``"grouped"``.
        gap: >= 0, samples left out between training and validation, for ``"time"``.
        seed: in [0, 2**32).

    Returns:
        ``k * repeats`` pairs of int64 indices.

    Raises:
        ValueError: an argument is out of its range or of no use to the method, or a class has
            fewer than ``k`` samples under ``"stratified"``.
        ImportError: scikit-learn is missing.

    Example:
        >>> for train, val in folds(torch.tensor([0, 0, 0, 0, 1, 1]), 2):
        ...     print(train, val)
        tensor([0, 1, 5]) tensor([2, 3, 4])
        tensor([2, 3, 4]) tensor([0, 1, 5])
        >>> folds(4, 2, method="time")[1]
        (tensor([0, 1, 2]), tensor([3]))

    Source: the course, "K-fold cross-validation"; scikit-learn's ``KFold``, ``StratifiedKFold``,
    ``TimeSeriesSplit`` and ``GroupKFold``.
    """
    y = y_or_count if isinstance(y_or_count, Tensor) else None
    count = len(y_or_count) if isinstance(y_or_count, Tensor) else y_or_count
    _check_arguments(count, k, method, repeats, gap, seed)
    label = _labels(y, k) if method == "stratified" else None
    group = _groups(groups, count, k, method)
    found = []
    for splitter in _splitters(k, method, repeats, gap, seed):
        for pair in splitter.split(torch.empty(count, 1).numpy(), label, group):
            train, val = (torch.as_tensor(part, dtype=torch.int64) for part in pair)
            found.append((train, val))
    return found


@dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation of scores, and the interval from ``low`` to ``high``."""

    mean: float
    std: float
    low: float
    high: float


def mean_and_interval(
    scores: Sequence[float] | Tensor, test_to_train: float, confidence: float = 0.95
) -> Estimate:
    r"""Mean of the scores of folds, with a confidence interval that knows they share samples.

    .. math::
        \bar{s} \pm t_{n-1,\,(1 + c) / 2} \; \sigma \,
        \sqrt{\frac{1}{n} + \frac{n_\text{test}}{n_\text{train}}}, \quad
        \sigma^2 = \frac{1}{n - 1} \sum_i (s_i - \bar{s})^2

    for n scores and confidence c. Scores of models that trained on mostly the same samples are
    correlated; :math:`\sigma^2 / n` alone would give an interval that is too narrow.

    Args:
        scores: one for each fold.
        test_to_train: > 0, validation samples of a fold by its training samples:
            ``1 / (k - 1)`` for k folds, repeated or not.
        confidence: in (0, 1), probability that the interval aims at.

    Returns:
        Of a single score, a deviation and an interval of NaN.

    Raises:
        ValueError: there is no score, or an argument is out of its range.
        ImportError: SciPy is missing.

    Example:
        >>> found = mean_and_interval([0.8, 0.9, 0.7, 0.8, 0.8], test_to_train=1 / 4)
        >>> f"{found.mean:.2f} +- {found.std:.2f}, from {found.low:.2f} to {found.high:.2f}"
        '0.80 +- 0.07, from 0.67 to 0.93'

    Source: Nadeau and Bengio, "Inference for the Generalization Error", 2003; for repeated folds
    Bouckaert and Frank, 2004; the course, "K-fold cross-validation".
    """
    x = torch.as_tensor(scores, dtype=torch.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(
            f"mean_and_interval: expected at least one of `scores`, got shape {tuple(x.shape)}"
        )
    if not test_to_train > 0:
        raise ValueError(f"mean_and_interval: expected `test_to_train` > 0, got {test_to_train}")
    if not 0 < confidence < 1:
        raise ValueError(f"mean_and_interval: expected `confidence` in (0, 1), got {confidence}")
    mean = x.mean().item()
    if len(x) == 1:
        return Estimate(mean, nan, nan, nan)
    std = x.std().item()
    half = _student_t(len(x) - 1, confidence) * std * sqrt(1 / len(x) + test_to_train)
    return Estimate(mean, std, mean - half, mean + half)


def _check_arguments(count: int, k: int, method: str, repeats: int, gap: int, seed: int) -> None:
    if method not in METHODS:
        raise ValueError(f"folds: expected `method` of {', '.join(METHODS)}, got {method!r}")
    if not 2 <= k <= count:
        raise ValueError(f"folds: expected `k` from 2 to the {count} samples, got {k}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"folds: expected `seed` in [0, {2**32 - 1}], got {seed}")
    if not 1 <= repeats <= 2**32 - seed:  # each has a seed
        raise ValueError(f"folds: expected `repeats` in [1, {2**32 - seed}], got {repeats}")
    if repeats > 1 and method in ("time", "grouped"):
        raise ValueError(
            f"folds: expected `repeats` 1 for method {method!r}, where nothing is random, got "
            f"{repeats}"
        )
    if not gap >= 0 or (gap and method != "time"):
        raise ValueError(
            f"folds: expected `gap` >= 0, and 0 but for method 'time', got {gap} for {method!r}"
        )
    if method == "time":
        # as TimeSeriesSplit: k validation parts of one size at the end, the rest trains first
        size = count // (k + 1)
        if size == 0 or count - k * size - gap < 1:
            raise ValueError(
                f"folds: expected samples to train on before the first of {k} validation parts, "
                f"got {count} samples with `gap` {gap}; use a smaller `k` or `gap`"
            )


def _labels(y: Tensor | None, k: int) -> Any:
    if y is None or y.ndim != 1:
        got = "a number of samples" if y is None else f"shape {tuple(y.shape)}"
        raise ValueError(
            f"folds: expected classes of shape (samples,) for method 'stratified', got {got}"
        )
    classes, label, counts = y.cpu().unique(return_inverse=True, return_counts=True)
    rarest = int(counts.argmin())
    if counts[rarest] < k:
        raise ValueError(
            f"folds: expected at least {k} samples of each class, one for each fold, but class "
            f"{classes[rarest].item()} has {counts[rarest].item()}; use a smaller `k`, join it "
            "with another class or leave it out"
        )
    return label.numpy()


def _groups(groups: Tensor | None, count: int, k: int, method: str) -> Any:
    if (groups is None) == (method == "grouped"):
        raise ValueError(
            "folds: expected `groups` with method 'grouped' and with no other, got method "
            f"{method!r} {'without' if groups is None else 'with'} them"
        )
    if groups is None:
        return None
    if groups.shape != (count,):
        raise ValueError(f"folds: expected `groups` of shape ({count},), got {tuple(groups.shape)}")
    if groups.isnan().any():  # each would be a group of its own
        count = int(groups.isnan().sum())
        raise ValueError(f"folds: expected `groups` without NaN, got {count} of them")
    names, group = groups.cpu().unique(return_inverse=True)
    if len(names) < k:
        raise ValueError(
            f"folds: expected at least {k} groups, one for each fold, got {len(names)}"
        )
    return group.numpy()


def _splitters(k: int, method: str, repeats: int, gap: int, seed: int) -> list[Any]:
    try:
        from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, TimeSeriesSplit
    except ModuleNotFoundError as error:
        raise ImportError(
            f"folds: {error.name} is missing: pip install 'torchref-triton[train]'"
        ) from error
    if method == "time":
        return [TimeSeriesSplit(k, gap=gap)]
    if method == "grouped":
        return [GroupKFold(k)]
    cls = KFold if method == "plain" else StratifiedKFold
    return [cls(k, shuffle=True, random_state=seed + i) for i in range(repeats)]


def _student_t(degrees: int, confidence: float) -> float:
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        raise ImportError(
            f"mean_and_interval: {error.name} is missing: pip install 'torchref-triton[train]'"
        ) from error
    return float(t.ppf((1 + confidence) / 2, degrees))
