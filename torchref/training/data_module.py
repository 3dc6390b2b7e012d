"""The three parts of a data set as Lightning asks for them."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchref.data.normalize import Fitted
from torchref.data.split import (
    chronological_split,
    grouped_split,
    random_split,
    ratios_for,
    stratified_split,
)
from torchref.training.checks import check_choice, check_integer, check_range
from torchref.training.resume import ResumableDataLoader

EVALUATION_BATCH = 1024
SPLITS = ("auto", "stratified", "random", "chronological", "grouped")

Texts = Sequence[str]
Change = Callable[[Any, Tensor], tuple[Any, Tensor]]


class Samples(Dataset):
    """Some rows of tensors, or of texts, that a loader takes a batch at a time."""

    def __init__(self, x: Tensor | Texts, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Any, Tensor]:
        return take(self.x, index := torch.as_tensor(indices)), self.y[index]


class DataModule(LightningDataModule):
    """Training, validation and test parts of samples held in memory.

    One argument chooses between the course's three forms of gradient descent: ``batch_size="full"``
    is batch, 1 is stochastic, anything between is mini-batch. The order of the samples is a
    function of ``seed`` and the epoch. With several processes, each trains on its share in batches
    of ``batch_size`` and evaluates the whole validation and test parts, so no score counts a
    sample twice; pass ``use_distributed_sampler=False`` to the Trainer.

    A last batch of a single sample is left out of its epoch: batch norm has no variance for it.

    The test part opens once: a second ``test`` raises, for what was chosen after the first has seen
    it. Statistics of scalers come from the training part alone, by :meth:`fit`.

    Args:
        x: (samples, ...), or a list of texts.
        y: (samples,) labels, or values, which are floating point.
        split: ``stratified`` by ``y``, ``random``, ``chronological``, ``grouped``, or ``auto``:
            as ``groups`` or ``times`` say, else stratified, or random where ``y`` holds values.
        ratios: shares of the training, validation and test parts, or ``auto``: by the number of
            samples, see :func:`torchref.data.ratios_for`.
        gap: samples left out at each border of a chronological split.
        groups: (samples,) for a grouped split.
        times: (samples,) for a chronological split; by default the order of the samples.
        test: indices of a test part that is given; the others are shared out.
        parts: indices of all three parts, instead of a split.
        batch_size: >= 1, or ``"full"``.
        augment: ``(x, y) -> (x, y)`` applied to each training batch on its device, drawing from
            torch's default generator.
        reopen_test: whether ``test`` may run more than once.
        seed: of the split and of the order.

    Raises:
        ValueError: an argument is out of its range, or a part would be too small.
        TypeError: ``gap`` or ``seed`` is no integer, or ``ratios`` are no numbers.

    Example:
        >>> x, y = torch.zeros(100, 2), torch.arange(100) % 2
        >>> data = DataModule(x, y, batch_size=32)
        >>> [len(labels) for _, labels in data.train_dataloader()]
        [32, 32, 6]

    Source: the course, "Mini Batch Gradient Descent" and "Train, Dev, Test sets".
    """

    def __init__(
        self,
        x: Tensor | Texts,
        y: Tensor,
        *,
        split: str = "auto",
        ratios: Sequence[float] | Literal["auto"] = "auto",
        gap: int = 0,
        groups: Tensor | None = None,
        times: Tensor | None = None,
        test: Tensor | None = None,
        parts: Sequence[Tensor] | None = None,
        batch_size: int | Literal["full"] = 64,
        augment: Change | None = None,
        reopen_test: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        batch_size = _checked_size(batch_size)
        gap, seed = check_integer("gap", gap, 0), check_integer("seed", seed, 0)
        split = _resolved(split, y, groups, times)
        check_range("gap", gap, "0 but for a chronological split", not gap or split[0] == "c")
        for name, value in (("y", y), ("groups", groups), ("times", times)):
            if value is not None and len(value) != len(x):
                raise ValueError(
                    f"DataModule: expected `{name}` of as many samples as `x`, {len(x)}, got "
                    f"{len(value)}"
                )
        if y.is_floating_point() and len(bad := (~y.isfinite()).nonzero()):
            raise ValueError(
                f"DataModule: expected `y` without NaN and infinity, got "
                f"{y[tuple(bad[0])].item()} in sample {bad[0, 0].item()}"
            )
        for part in [] if test is None else [test]:
            _check_indices("test", part, len(y))
        if parts is None:
            rest, held = _hold_out(len(y), test)
            ratios = _three(_checked_ratios(ratios, len(y)))
            whole = min(ratios) > 0 and abs(sum(ratios) - 1) < 1e-6
            check_range("ratios", ratios, "positive numbers with sum 1", whole)
            shares = ratios if held is None else _without_test(ratios)
            keys = [None if key is None else key[rest] for key in (groups, times)]
            parts = [rest[p] for p in _share_out(split, shares, gap, seed, y[rest], *keys)]
            parts += [] if held is None else [held]
        self.parts = _three(parts)
        _check_parts(self.parts, len(y))
        self.train, self.val, self.test = (Samples(take(x, p), y[p]) for p in self.parts)
        self.batch_size = batch_size
        self.augment = augment
        self.reopen_test = reopen_test
        self.seed = seed
        self.test_opened = 0
        self.fingerprint: str | None = None
        """Of the data, where it is known: a resumed run compares it."""

    def fit(self, statistics: Fitted) -> Fitted:
        """Fit a scaler, or whatever has a ``fit``, on the training part and return it."""
        return statistics.fit(self.train.x)

    def resample(self, change: Change) -> None:
        """Replace the training part by ``change(x, y)`` of it, as :func:`torchref.data.smote`."""
        self.train = Samples(*change(self.train.x, self.train.y))

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def train_dataloader(self) -> DataLoader:
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        share = math.ceil(len(self.train) / world_size)
        size = share if self.batch_size == "full" else int(self.batch_size)
        return ResumableDataLoader(
            self.train,
            size,
            seed=self.seed,
            num_replicas=world_size,
            rank=rank,
            drop_last=size > 1 and share % size == 1,
            collate_fn=_as_it_is,
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, EVALUATION_BATCH, collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader:
        if self.test_opened and not self.reopen_test:
            raise RuntimeError(
                "test: the test part was opened before, and a second score is not of unseen data; "
                "reopen_test=True allows it"
            )
        self.test_opened += 1
        return DataLoader(self.test, EVALUATION_BATCH, collate_fn=_as_it_is)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.augment is None or self.trainer is None or not self.trainer.training:
            return batch
        return self.augment(*batch)


def _checked_size(size: int | Literal["full"]) -> int | Literal["full"]:
    if isinstance(size, str) and size == "full":
        return size
    whole = isinstance(size, Integral) and not isinstance(size, bool)
    check_range("batch_size", size, ">= 1 or 'full'", whole and size >= 1)
    return int(size)


def _checked_ratios(ratios: Sequence[float] | Literal["auto"], count: int) -> Sequence[float]:
    if isinstance(ratios, str) and ratios == "auto":
        return ratios_for(count)
    if not (isinstance(ratios, Iterable) and all(hasattr(r, "__float__") for r in ratios)):
        raise TypeError(f"ratios: expected three numbers or 'auto', got {ratios!r}")
    return ratios


def _resolved(split: str, y: Tensor, groups: Tensor | None, times: Tensor | None) -> str:
    """The split that is meant: patients or times are not given to be left unused."""
    check_choice("split", split, SPLITS)
    both = groups is not None and times is not None
    check_range("split", split, "grouped or chronological, of `groups` and `times`", not both)
    meant = "grouped" if groups is not None else "chronological" if times is not None else None
    if split == "auto":
        return meant or ("random" if y.is_floating_point() else "stratified")
    check_range("split", split, f"{meant}, by the column that is given", meant in (None, split))
    return split


def _check_indices(name: str, part: Tensor, count: int) -> None:
    if len(bad := part[(part < 0) | (part >= count)]):
        raise ValueError(f"{name}: expected indices in [0, {count}), got {bad[0].item()}")


def _check_parts(parts: Sequence[Tensor], count: int) -> None:
    for part in parts:
        _check_indices("parts", part, count)
    sizes = [len(part) for part in parts]
    check_range("parts", sizes, "two training samples and one of the others", min(sizes) >= 1)
    check_range("parts", sizes, "two training samples or more", sizes[0] >= 2)
    together = torch.cat(list(parts))
    alone = len(together.unique()) == len(together)
    check_range("parts", sizes, "each sample in one part at most", alone)


def take(x: Tensor | Texts, index: Tensor) -> Any:
    """Some samples, of tensors or of texts."""
    return x[index] if isinstance(x, Tensor) else [x[i] for i in index.tolist()]


def _as_it_is(batch: Any) -> Any:
    """Samples.__getitems__ makes the batch."""
    return batch


def _three(parts: Sequence[Any]) -> list[Any]:
    if len(parts) != 3:
        raise ValueError(
            f"ratios: expected three parts (training, validation, test), got {len(parts)}"
        )
    return list(parts)


def _without_test(ratios: Sequence[float]) -> list[float]:
    return [ratio / (ratios[0] + ratios[1]) for ratio in ratios[:2]]


def _hold_out(count: int, test: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if test is None:
        return torch.arange(count), None
    kept = torch.ones(count, dtype=torch.bool)
    kept[test] = False
    return kept.nonzero().flatten(), test


def _share_out(
    split: str,
    ratios: Sequence[float],
    gap: int,
    seed: int,
    y: Tensor,
    groups: Tensor | None,
    times: Tensor | None,
) -> Sequence[Tensor]:
    if split == "stratified":
        check_range("split", split, "random, for values", not y.is_floating_point())
        return stratified_split(y, ratios, seed)
    if split == "random":
        return random_split(len(y), ratios, seed)
    if split == "chronological":
        return chronological_split(len(y) if times is None else times, ratios, gap)
    if groups is None:
        raise ValueError("split: grouped needs `groups`; --group names a column of the table")
    return grouped_split(groups, ratios, seed, None if y.is_floating_point() else y)
