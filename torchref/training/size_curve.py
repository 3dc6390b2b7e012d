"""Training on growing shares of the samples: would more of them help?"""

from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

import torch
from torch import Tensor

from torchref.data.datasets import Dataset
from torchref.training.config import Config
from torchref.training.data_module import take
from torchref.training.run import Run, load


def learning_curve_over_size(
    config: Config,
    sizes: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0),
    *,
    dataset: Dataset | None = None,
    root: str | Path = "runs",
    repeats: int = 1,
) -> list[dict[str, float]]:
    """Train on growing shares of the training part, and measure both errors after each.

    A larger share holds the smaller ones. The validation part is always the same, and the test
    part stays closed. Errors are of the best epoch's weights, in evaluation mode: the share of
    wrong classes or, of values, the mean square in units of the training part's variance, so that
    predicting the mean has about 1. A small share takes fewer steps in an epoch; patience, not
    epochs, should end the training.

    Args:
        config: see :class:`Config`; trained without the torch twin.
        sizes: shares of the training part, rising, in (0, 1].
        dataset: what ``config.dataset`` names, where it is loaded already.
        root: each run's files are in ``root/<name>-size/<samples>/``.
        repeats: >= 1, trainings for each size, with other weights and samples; errors are means.

    Returns:
        A dict for each size with ``samples``, ``train_error`` and ``val_error``; these are NaN
        where no epoch's validation loss was finite.

    Raises:
        ValueError: a size is out of its range, or a share has less than two samples.

    Source: the course, "Bias and variance of a model"; Cortes et al., "Learning curves: asymptotic
    values and rate of convergence", 1994.
    """
    if not sizes or list(sizes) != sorted(set(sizes)) or not 0 < sizes[0] <= sizes[-1] <= 1:
        raise ValueError(
            f"learning_curve_over_size: expected rising `sizes` in (0, 1], got {tuple(sizes)}"
        )
    if repeats < 1:
        raise ValueError(f"learning_curve_over_size: expected `repeats` >= 1, got {repeats}")
    dataset = load(config) if dataset is None else dataset
    root, config = Path(root) / f"{config.folder}-size", replace(config, parity=False)
    train, val, test = Run(config, root=root, dataset=dataset, progress=False).data.parts
    rows = []
    for count in [round(share * len(train)) for share in sizes]:
        if count < 2:
            raise ValueError(f"sizes: expected two samples or more in a share, got {count}")
        found = []
        for seed in range(config.seed, config.seed + repeats):
            part = _nested(dataset, train, config.split, seed, count)
            one = replace(config, seed=seed, name=str(count))
            run = Run(one, root=root, dataset=dataset, parts=(part, val, test), progress=False)
            usable = run.execute(test=False)["best_epoch"] is not None
            found.append(
                [_error(run, dataset, index, train) if usable else nan for index in (part, val)]
            )
        errors = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
        rows.append({"samples": count, "train_error": errors[0], "val_error": errors[1]})
    return rows


def _nested(dataset: Dataset, train: Tensor, split: str, seed: int, count: int) -> Tensor:
    """Some of the training part: of the same seed, a larger count holds what a smaller one has."""
    if split == "chronological":
        return train[-count:]  # what comes right before the validation part
    generator = torch.Generator().manual_seed(seed)
    if split == "grouped" and dataset.groups is not None:  # a share of the groups
        groups = dataset.groups[train].unique(return_inverse=True)[1]
        order = torch.randperm(int(groups.max()) + 1, generator=generator)[groups].argsort()
        return train[order[:count]]
    train = train[torch.randperm(len(train), generator=generator)]
    if dataset.classes is not None:  # each class in its proportion
        place = torch.empty(len(train), dtype=torch.float64)
        for label in dataset.y[train].unique():
            own = (dataset.y[train] == label).nonzero()[:, 0]
            place[own] = (torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own)
        train = train[place.argsort(stable=True)]
    return train[:count]


def _error(run: Run, dataset: Dataset, index: Tensor, train: Tensor) -> float:
    """Of the model as it predicts: without dropout and augmentation."""
    y = dataset.y[index]
    predicted = run.model.predict(take(dataset.x, index))
    if dataset.classes is not None:
        return (predicted != y).double().mean().item()
    scale = dataset.y[train].double().var(correction=0).item() or 1.0
    return (predicted.double() - y).square().mean().item() / scale
