"""What a configuration asks to be done to training batches, for the kind of samples there are."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchref.data.augment import image, tabular, text
from torchref.data.datasets import Dataset
from torchref.data.normalize import Impute, Standard
from torchref.training.checks import check_choice, check_range
from torchref.training.data_module import Change, Samples

OPTIONS = {"image": image.OPTIONS, "text": text.OPTIONS, "table": tabular.OPTIONS}


def build_augment(
    options: Mapping[str, float] | None, dataset: Dataset, train: Samples
) -> Change | None:
    """A function ``(x, y) -> (x, y)`` of batches, or None where nothing is asked for.

    Args:
        options: names and values of ``ImageAugment``, ``TextAugment`` or ``TabularAugment``.
        dataset: whose samples are changed; where it calls an option confusing, a warning says why.
        train: the training part.

    Raises:
        ValueError: an option is unknown for such samples, or its value is out of its range.
    """
    if not options:
        return None
    for name, value in options.items():
        check_choice(f"augment, for {dataset.kind}s", name, OPTIONS[dataset.kind])
        if value and name in dataset.confusing:
            warnings.warn(
                f"augment: {name} may confuse the model: {dataset.confusing[name]}", stacklevel=2
            )
    settings: dict[str, Any] = dict(options)  # what is no number is not among them
    if dataset.kind == "text":
        change: Change = text.TextAugment(**settings)
    elif dataset.kind == "table":
        change = _of_tables(options, dataset, train)
    else:
        change = _of_images(options, dataset)
    with torch.random.fork_rng():  # what cannot be done is an error now, not in the first batch
        first: Any = train.x[:2]
        change(first, train.y[:2])
    return change


def oversample(dataset: Dataset, seed: int) -> Change:
    """SMOTE in units of each feature's deviation, as distances need; the rows come back as were.

    Neighbors are five, or what a smaller class has.

    Raises:
        ValueError: the samples are not classes of complete rows of numbers.
    """
    assert isinstance(dataset.x, Tensor) or dataset.kind == "text"
    numbers = dataset.kind == "table" and not any(c.categories for c in dataset.columns or ())
    complete = numbers and not torch.as_tensor(dataset.x).isnan().any()
    check_range("smote", True, "no, for what is no table of numbers", numbers)
    check_range("smote", True, "no, for a table with gaps", complete)
    check_range("smote", True, "no, for values to predict", dataset.classes is not None)

    def change(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scale = Standard().fit(x)
        counts = y.bincount()
        neighbors = max(min(5, int(counts[counts > 0].min()) - 1), 1)
        filled, labels = tabular.smote(scale(x), y, neighbors=neighbors, seed=seed)
        return torch.cat([x, scale.inverse(filled[len(x) :])]), labels

    return change


def _of_images(options: Mapping[str, float], dataset: Dataset) -> Change:
    classes = None if dataset.classes is None else len(dataset.classes)
    change = image.ImageAugment(**options, high=dataset.high, classes=classes)
    shape = dataset.shape
    assert shape is not None

    def augment(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        images, y = change(x.unflatten(1, shape), y)
        return images.flatten(1), y

    return augment


def _of_tables(options: Mapping[str, float], dataset: Dataset, train: Samples) -> Change:
    places: list[int] = []
    start = 0
    for column in dataset.columns or ():
        places += range(start, start + column.width) if column.categories else ()
        start += column.width
    change = tabular.TabularAugment(**options, categories=places)
    x: Any = train.x
    change.fit(Impute().fit(x)(x))
    return change
