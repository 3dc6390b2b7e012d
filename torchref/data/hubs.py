"""Adapters to others' collections, which are imported when one of their sets is asked for."""

import importlib
import inspect
import operator
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchref.data import datasets as ours
from torchref.data.images import as_pixels, stack_images

Targets = tuple[torch.Tensor, list[str] | None]


def from_torchvision(name: str, root: str | Path | None, image_size: int | None) -> ours.Dataset:
    """A classification set of :mod:`torchvision.datasets`, downloaded into ``root``."""
    try:
        sets: Any = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ImportError(
            f"torchvision:{name}: {error}: pip install torchvision, in the build for your torch"
        ) from None
    make: Any = getattr(sets, name, None)
    if not isinstance(make, type):
        raise ValueError(f"torchvision:{name}: torchvision.datasets has no set {name!r}")
    try:
        made = _make_parts(make, str(root or "data"))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"torchvision:{name}: not to be had as a training and a test part: {error}"
        ) from None
    samples = [part[i] for part in made for i in range(len(part))]
    images, labels = zip(*(_pair(s, f"torchvision:{name}") for s in samples), strict=True)
    test = len(made[1]) if len(made) > 1 else 0
    targets = ours.as_targets(labels, "classification", f"torchvision:{name}")
    data = _images(images, targets, test, image_size, f"torchvision:{name}")
    return _named(data, getattr(made[0], "classes", None))


def _make_parts(make: Any, root: str) -> list[Any]:
    """The training and the test part, or all where the set is not divided."""
    known = inspect.signature(make).parameters
    rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    given = {"root": root, "download": True}
    given = {option: value for option, value in given.items() if rest or option in known}
    if "train" in known:
        return [make(**given, train=part) for part in (True, False)]
    if "split" in known:
        return [make(**given, split=part) for part in ("train", "test")]
    return [make(**given)]


def _pair(sample: Any, name: str) -> tuple[Any, int]:
    try:
        image, label = sample
        label = operator.index(label)
    except (TypeError, ValueError):
        image = label = None
    if label is None or not hasattr(image, "convert"):
        raise ValueError(f"{name}: expected pairs of a picture and a class's number, got {sample}")
    return image, label


def from_hugging_face(
    name: str,
    root: str | Path | None,
    image_size: int | None,
    target: str | None,
    task: str,
) -> ours.Dataset:
    """A set of the hub with a column of classes beside a column of images, texts or numbers.

    A test part of which all labels are hidden is left out, with a warning.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"hf:{name}: {error}: pip install datasets") from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ImportError(
            f"hf:{name}: datasets {datasets.__version__} may run code that a set brings: "
            "pip install 'datasets>=4'"
        )
    loaded = datasets.load_dataset(name, cache_dir=None if root is None else str(root))
    if "train" not in loaded:
        raise ValueError(f"hf:{name}: expected a split `train`, it has {', '.join(loaded)}")
    parts = [loaded[part] for part in ("train", "test") if part in loaded]
    features = parts[0].features
    labels = [c for c, f in features.items() if type(f).__name__ == "ClassLabel" or c == target]
    target = str(target or (labels[0] if labels else "label"))
    if target not in features:
        raise ValueError(f"hf:{name}: no column {target!r}; --target names one of {[*features]}")
    names = getattr(features[target], "names", None)
    if names is not None:
        parts = _with_labels(parts, target, len(names), f"hf:{name}")
        task = "classification" if task == "auto" else task
    y = [value for part in parts for value in part[target]]
    test = len(parts[1]) if len(parts) > 1 else 0
    targets = ours.as_targets(y, task, f"hf:{name}: column {target}")
    kinds = {c: _kind(f) for c, f in features.items() if c != target}
    for kind in ("image", "string"):
        if kind in kinds.values():
            column = next(c for c in kinds if kinds[c] == kind)
            values = [value for part in parts for value in part[column]]
            if kind == "image":
                return _named(_images(values, targets, test, image_size, f"hf:{name}"), names)
            return _named(_table(values, targets, test), names)
    numbers = [column for column, kind in kinds.items() if kind == "number"]
    if not numbers:
        raise ValueError(f"hf:{name}: expected images, texts or numbers, got {kinds}")
    columns = [np.concatenate([np.asarray(part[c], np.float32) for part in parts]) for c in numbers]
    return _named(_table(torch.from_numpy(np.stack(columns, 1)), targets, test), names)


def _with_labels(parts: list[Any], target: str, classes: int, name: str) -> list[Any]:
    """The parts without a test part whose labels are hidden, as -1."""
    hidden = [[label not in range(classes) for label in part[target]] for part in parts]
    if len(parts) > 1 and all(hidden[1]):
        warnings.warn(
            f"{name}: the labels of its test part are hidden; the test part is taken from its "
            "training part",
            stacklevel=2,
        )
        parts, hidden = parts[:1], hidden[:1]
    for part, flags in zip(parts, hidden, strict=True):
        if any(flags):
            row = flags.index(True)
            raise ValueError(
                f"{name}: column {target}, sample {row + 1}: expected a label in "
                f"[0, {classes - 1}], got {part[target][row]}: it is hidden"
            )
    return parts


def _kind(feature: Any) -> str:
    if type(feature).__name__ == "Image":
        return "image"
    dtype = getattr(feature, "dtype", "")
    return "number" if dtype.startswith(("int", "uint", "float", "bool")) else str(dtype)


def _images(
    images: Sequence[Any], targets: Targets, test: int, size: int | None, name: str
) -> ours.Dataset:
    pixels = [as_pixels(image, size) for image in images]
    names = (f"{name}: sample {i + 1}" for i in range(len(pixels)))
    return ours.image_set(stack_images(pixels, names), targets, test)


def _table(x: Any, targets: Targets, test: int) -> ours.Dataset:
    return ours.Dataset(x, *targets, test=ours.last(test, len(targets[0])))


def _named(data: ours.Dataset, names: Sequence[str] | None) -> ours.Dataset:
    """The set with its classes called as its makers do, where they are numbered 0, 1, ..."""
    numbered = data.classes == [str(i) for i in range(len(data.classes or ()))]
    if names is None or data.classes is None or not numbered or len(names) != len(data.classes):
        return data
    return replace(data, classes=list(map(str, names)))
