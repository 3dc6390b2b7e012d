"""Training, validation and test indices."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchref._checks import require_integer

# NumPy's RandomState is frozen: a seed gives the same numbers in every version on every machine.


def ratios_for(count: int) -> tuple[float, float, float]:
    """The usual shares of training, validation and test samples for a data set of a size.

    ============  =================  ======================  ============================
    Data set      Samples            Train / val / test      Remark
    ============  =================  ======================  ============================
    small         up to 10,000       0.7 / 0.15 / 0.15       consider :func:`folds`, too
    medium        10,000 to 100,000  0.7 / 0.15 / 0.15       or 0.8 / 0.1 / 0.1
    large         over 100,000       0.9 / 0.05 / 0.05       a few thousand test well
    academic      any                0.7 / 0.15 / 0.15       or 0.6 / 0.2 / 0.2
    industrial    any                0.9 / 0.05 / 0.05       or 0.8 / 0.1 / 0.1
    ============  =================  ======================  ============================

    The first three rows are what this function returns; the last two are for you to choose.

    Args:
        count: number of samples.

    Example:
        >>> ratios_for(100_000), ratios_for(100_001)
        ((0.7, 0.15, 0.15), (0.9, 0.05, 0.05))

    Source: the course, "Train, Dev, Test sets".
    """
    return (0.7, 0.15, 0.15) if count <= 100_000 else (0.9, 0.05, 0.05)


def random_split(
    count: int, ratios: Sequence[float] | Literal["auto"] = "auto", seed: int = 0
) -> tuple[Tensor, ...]:
    """Share samples out at random.

    The last parts are rounded to whole samples and the first takes the rest, so the sizes add up.

    Args:
        count: number of samples.
        ratios: share of each part, at least two, each > 0, with sum 1; ``"auto"`` is
            ``ratios_for(count)``.
        seed: from 0 to 2**32 - 1; the same seed gives the same parts on any machine.

    Returns:
        One int64 tensor of shuffled indices for each ratio; together they hold each index once.

    Raises:
        ValueError: the ratios do not sum to 1, a part would be empty, or ``seed`` is out of its
            range.

    Example:
        >>> train, val, test = random_split(100)
        >>> len(train), len(val), len(test)
        (70, 15, 15)

    Source: the course, "Train, Dev, Test sets".
    """
    sizes = _sizes("random_split", count, _shares("random_split", count, ratios))
    check_seed("random_split", seed)
    order = np.random.RandomState(seed).permutation(count)
    return torch.as_tensor(order, dtype=torch.int64).split(sizes)


def stratified_split(
    y: Tensor, ratios: Sequence[float] | Literal["auto"] = "auto", seed: int = 0
) -> tuple[Tensor, ...]:
    """Share samples out at random, with the proportions of the classes kept in every part.

    The last parts are rounded to whole samples and the first takes the rest, so the sizes add up.
    Every part has a sample of every class, of a rare one more than its proportion if need be.

    Args:
        y: (samples,) class of each sample.
        ratios: share of each part, at least two, each > 0, with sum 1; ``"auto"`` is
            ``ratios_for(len(y))``.
        seed: from 0 to 2**32 - 1; the same seed gives the same parts on any machine.

    Returns:
        One int64 tensor of shuffled indices into ``y`` for each ratio; together they hold each
        index once.

    Raises:
        ValueError: the ratios do not sum to 1, a class has fewer samples than there are parts, a
            part has fewer samples than there are classes, or ``seed`` is out of its range.

    Example:
        >>> y = torch.tensor([0] * 50 + [1] * 50)
        >>> train, val, test = stratified_split(y)
        >>> len(train), len(val), len(test), len(y[val].unique())
        (70, 15, 15, 2)

    Source: the course, "Train, Dev, Test sets".
    """
    _check_column("stratified_split", "y", y)
    sizes = _sizes("stratified_split", len(y), _shares("stratified_split", len(y), ratios))
    classes, label, counts = y.cpu().unique(return_inverse=True, return_counts=True)
    _check_classes(classes, counts, sizes)
    check_seed("stratified_split", seed)
    rng = np.random.RandomState(seed)
    # In a random order, for equal remainders go to the classes that come first.
    rank = rng.permutation(len(classes))
    label = rank[label.numpy()]
    table = _apportioned(counts.numpy()[rank.argsort()], sizes)
    order = rng.permutation(len(y))
    by_class = order[label[order].argsort(kind="stable")]
    part_of = np.empty(len(y), dtype=np.int64)
    part_of[by_class] = np.repeat(np.tile(np.arange(len(sizes)), len(classes)), table.ravel())
    return _indices(part_of, len(sizes), rng)


def chronological_split(
    count_or_times: int | Tensor,
    ratios: Sequence[float] | Literal["auto"] = "auto",
    gap: int = 0,
) -> tuple[Tensor, ...]:
    """The past for training, what follows for validation, the latest for the test; no shuffle.

    The last parts are rounded to whole samples and the first takes the rest, so the sizes add up
    to all samples but those of the gaps.

    Args:
        count_or_times: number of samples whose rows are in the order of time, or a (samples,)
            tensor of their times. Samples of the same time stay in the order of rows, and a
            border may fall between them.
        ratios: share of each part, at least two, each > 0, with sum 1; ``"auto"`` is
            ``ratios_for`` of the number of samples.
        gap: >= 0, samples left out at each border, in no part: as many as a sample's features or
            its target look back or ahead.

    Returns:
        One int64 tensor of indices for each ratio, each in the order of time.

    Raises:
        ValueError: the ratios do not sum to 1, a time is NaN, ``gap`` is negative, or a part would
            be empty.

    Example:
        >>> chronological_split(10, (0.5, 0.25, 0.25), gap=1)
        (tensor([0, 1, 2, 3]), tensor([5, 6]), tensor([8, 9]))

    Source: the course, "Train, Dev, Test sets" (time-series forecasting).
    """
    order = _in_time(count_or_times)
    if not gap >= 0:
        raise ValueError(f"chronological_split: expected `gap` >= 0, got {gap}")
    shares = _shares("chronological_split", len(order), ratios)
    sizes = _sizes("chronological_split", len(order), shares, gap)
    starts = accumulate((size + gap for size in sizes[:-1]), initial=0)
    return tuple(order[start : start + size] for start, size in zip(starts, sizes, strict=True))


def grouped_split(
    groups: Tensor,
    ratios: Sequence[float] | Literal["auto"] = "auto",
    seed: int = 0,
    y: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Share whole groups out, so that no patient, writer or device is in two parts.

    Greedy: the largest groups first, those of one size in random order, each to the part that
    lacks most. A part has more than its share by at most one group. With ``y`` a part lacks
    the shares of the classes that the group holds.

    Args:
        groups: (samples,) group of each sample.
        ratios: share of each part in samples, at least two, each > 0, with sum 1; ``"auto"`` is
            ``ratios_for(len(groups))``.
        seed: from 0 to 2**32 - 1; the same seed gives the same parts on any machine.
        y: (samples,) class of each sample, to be balanced; None balances the sizes alone.

    Returns:
        One int64 tensor of shuffled indices for each ratio; together they hold each index once.

    Raises:
        ValueError: the ratios do not sum to 1, there are fewer groups than parts, a part has no
            sample of a class, or ``seed`` is out of its range.

    Example:
        >>> groups = torch.tensor([7, 7, 7, 7, 3, 3, 5, 5])
        >>> train, test = grouped_split(groups, (0.5, 0.5))
        >>> groups[train], groups[test]
        (tensor([7, 7, 7, 7]), tensor([5, 3, 5, 3]))

    Source: scikit-learn's ``StratifiedGroupKFold`` for the idea of a greedy assignment.
    """
    _check_column("grouped_split", "groups", groups)
    shares = _shares("grouped_split", len(groups), ratios)
    names, group = groups.cpu().unique(return_inverse=True)
    if len(names) < len(shares):
        raise ValueError(
            f"grouped_split: expected at least {len(shares)} groups, one for each part, got "
            f"{len(names)}"
        )
    y = torch.zeros(len(groups), dtype=torch.int64) if y is None else y
    _check_column("grouped_split", "y", y, len(groups))
    classes, label = y.cpu().unique(return_inverse=True)
    cells = len(names) * len(classes)
    table = torch.bincount(group * len(classes) + label, minlength=cells).numpy()
    table = table.reshape(len(names), len(classes))
    check_seed("grouped_split", seed)
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(names))
    order = order[(-table.sum(1)[order]).argsort(kind="stable")]
    part_of_group = _greedy(table, order, shares)
    _check_parts(classes, table, part_of_group, len(shares))
    return _indices(part_of_group[group.numpy()], len(shares), rng)


def _shares(name: str, count: int, ratios: Sequence[float] | Literal["auto"]) -> list[float]:
    if isinstance(ratios, str) and ratios == "auto":
        return list(ratios_for(count))
    several = not isinstance(ratios, str) and len(ratios) >= 2
    if not (several and min(ratios) > 0 and abs(sum(ratios) - 1) <= 1e-6):
        raise ValueError(f"{name}: expected positive `ratios` with sum 1 or 'auto', got {ratios!r}")
    return list(ratios)


def _sizes(name: str, count: int, shares: list[float], gap: int = 0) -> list[int]:
    kept = max(count - gap * (len(shares) - 1), 0)
    last = [round(kept * share) for share in shares[1:]]
    sizes = [kept - sum(last), *last]
    if min(sizes) < 1:
        gaps = f" and `gap` {gap}" if gap else ""
        raise ValueError(
            f"{name}: expected at least one sample in each part, got sizes {sizes} from {count} "
            f"samples{gaps}"
        )
    return sizes


def _check_column(name: str, argument: str, x: Tensor, count: int | None = None) -> None:
    if x.ndim != 1 or (count is not None and len(x) != count):
        shape = "(samples,)" if count is None else f"({count},)"
        raise ValueError(f"{name}: expected `{argument}` of shape {shape}, got {tuple(x.shape)}")
    if x.isnan().any():  # each would be a class, or a group, of its own
        raise ValueError(
            f"{name}: expected `{argument}` without NaN, got {int(x.isnan().sum())} of them"
        )


def check_seed(name: str, seed: int) -> None:
    """Raise where NumPy takes no such seed."""
    require_integer(name, "seed", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name}: expected `seed` in [0, 2**32), got {seed}")


def _check_classes(classes: Tensor, counts: Tensor, sizes: list[int]) -> None:
    rarest = int(counts.argmin())
    rare = f"class {classes[rarest].item()} has {counts[rarest].item()}"
    if counts[rarest] < len(sizes):
        raise ValueError(
            f"stratified_split: expected at least {len(sizes)} samples of each class, one for each "
            f"part, but {rare}; add samples, join it with another class or leave it out"
        )
    if min(sizes) < len(classes):
        raise ValueError(
            f"stratified_split: expected at least {len(classes)} samples in each part, one of each "
            f"class, got sizes {sizes} ({rare}, the fewest); raise the ratio of the smallest part, "
            "use fewer parts or join classes"
        )


def _apportioned(counts: np.ndarray, sizes: list[int]) -> np.ndarray:
    """How many samples of each class each part gets, (classes, parts), none of them 0."""
    left, columns = counts, []
    for part in range(len(sizes) - 1, 0, -1):
        taken = _taken(left, sizes[part], left - part)  # one for each part yet to come
        left = left - taken
        columns.append(taken)
    return np.stack([left, *reversed(columns)], axis=1)


def _taken(left: np.ndarray, size: int, most: np.ndarray) -> np.ndarray:
    """``size`` samples in the proportions of ``left``, from 1 to ``most`` of each class."""
    total = left.sum()
    taken = (left * size // total).clip(1, most)
    while taken.sum() != size:
        lack = left * size - taken * total  # to the exact proportion, in whole numbers
        if taken.sum() < size:
            taken[np.where(taken < most, lack, -total * size).argmax()] += 1
        else:
            taken[np.where(taken > 1, lack, total * size).argmin()] -= 1
    return taken


def _in_time(count_or_times: int | Tensor) -> Tensor:
    if not isinstance(count_or_times, Tensor):
        return torch.arange(count_or_times)
    _check_column("chronological_split", "count_or_times", count_or_times)
    return count_or_times.cpu().argsort(stable=True)


def _greedy(table: np.ndarray, order: np.ndarray, shares: list[float]) -> np.ndarray:
    """The part of each group, from samples (groups, classes)."""
    share = table / table.sum(0)
    held = table > 0
    lack = np.tile(shares, (table.shape[1], 1))  # (classes, parts)
    missing = np.ones(lack.shape, dtype=bool)
    left = held.sum(0)  # groups yet to come of each class
    part_of_group = np.empty(len(table), dtype=np.int64)
    for group in order:
        # The last groups with a class are kept for the parts that are without it.
        urgent = held[group] & (left <= missing.sum(1))
        need = missing[urgent].sum(0)
        gain = (lack * share[group, :, None]).sum(0)  # `@` rounds differently on other machines
        part = np.where(need == need.max(), gain, -np.inf).argmax()
        lack[:, part] -= share[group]
        missing[held[group], part] = False
        left = left - held[group]
        part_of_group[group] = part
    return part_of_group


def _check_parts(classes: Tensor, table: np.ndarray, part_of_group: np.ndarray, parts: int) -> None:
    for part in range(parts):
        absent = np.flatnonzero(table[part_of_group == part].sum(0) == 0)
        if len(absent):
            column = table[:, absent[0]]
            raise ValueError(
                f"grouped_split: expected every class in every part, got no sample of class "
                f"{classes[absent[0]].item()} in part {part}; its {column.sum()} samples are in "
                f"{(column > 0).sum()} groups; use fewer parts, another seed or finer groups"
            )


def _indices(part_of: np.ndarray, parts: int, rng: np.random.RandomState) -> tuple[Tensor, ...]:
    """The samples of each part, shuffled."""
    order = rng.permutation(len(part_of))
    return tuple(
        torch.as_tensor(order[part_of[order] == part], dtype=torch.int64) for part in range(parts)
    )
