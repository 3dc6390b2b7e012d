"""Adapters to others' collections, which are imported when one of their sets is asked for."""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchref.data import datasets as ours
from torchref.data.images import as_pixels, stack_images


def from_torchvision(
    name: str, root: str | Path | None, image_size: int | None, target: str | None
) -> ours.Dataset:
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
    known = inspect.signature(make).parameters
    parts: list[dict[str, Any]] = [{}]
    if "train" in known:
        parts = [{"train": True}, {"train": False}]
    elif "split" in known:
        parts = [{"split": "train"}, {"split": "test"}]
    made: list[Any] = [make(str(root or "data"), download=True, **part) for part in parts]
    pairs = [pair for part in made for pair in (part[i] for i in range(len(part)))]
    labels = [int(label) for _, label in pairs]
    test = len(made[1]) if len(made) > 1 else 0
    data = _images([image for image, _ in pairs], labels, test, image_size, f"torchvision:{name}")
    return _named(data, getattr(made[0], "classes", None))


def from_hugging_face(
    name: str, root: str | Path | None, image_size: int | None, target: str | None
) -> ours.Dataset:
    """A set of the hub with a column of classes beside a column of images, texts or numbers."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"hf:{name}: {error}: pip install datasets") from None
    loaded = datasets.load_dataset(name, cache_dir=None if root is None else str(root))
    if "train" not in loaded:
        raise ValueError(f"hf:{name}: expected a split `train`, it has {', '.join(loaded)}")
    parts = [loaded[part] for part in ("train", "test") if part in loaded]
    features = parts[0].features
    labels = [c for c, f in features.items() if type(f).__name__ == "ClassLabel" or c == target]
    target = target or (labels[0] if labels else "label")
    if target not in features:
        raise ValueError(f"hf:{name}: no column {target!r}; --target names one of {[*features]}")
    y = [value for part in parts for value in part[target]]
    test = len(parts[1]) if len(parts) > 1 else 0
    names = getattr(features[target], "names", None)
    kinds = {c: _kind(f) for c, f in features.items() if c != target}
    for kind in ("image", "string"):
        if kind in kinds.values():
            column = next(c for c in kinds if kinds[c] == kind)
            values = [value for part in parts for value in part[column]]
            if kind == "image":
                return _named(_images(values, y, test, image_size, f"hf:{name}"), names)
            return _named(_table(values, y, test), names)
    numbers = [column for column, kind in kinds.items() if kind == "number"]
    if not numbers:
        raise ValueError(f"hf:{name}: expected images, texts or numbers, got {kinds}")
    columns = [np.concatenate([np.asarray(part[c], np.float32) for part in parts]) for c in numbers]
    return _named(_table(torch.from_numpy(np.stack(columns, 1)), y, test), names)


def _kind(feature: Any) -> str:
    if type(feature).__name__ == "Image":
        return "image"
    dtype = getattr(feature, "dtype", "")
    return "number" if dtype.startswith(("int", "uint", "float", "bool")) else str(dtype)


def _images(
    images: Sequence[Any], labels: Sequence[Any], test: int, size: int | None, name: str
) -> ours.Dataset:
    pixels = [as_pixels(image, size) for image in images]
    names = (f"{name}: sample {i + 1}" for i in range(len(pixels)))
    return ours.image_set(stack_images(pixels, names), labels, test)


def _table(x: Any, y: Sequence[Any], test: int) -> ours.Dataset:
    targets, classes = ours.as_targets(y, "auto")
    held = torch.arange(len(y) - test, len(y)) if test else None
    return ours.Dataset(x, targets, classes, test=held)


def _named(data: ours.Dataset, names: Sequence[str] | None) -> ours.Dataset:
    """The set with its classes called as its makers do, where they are numbered 0, 1, ..."""
    numbered = data.classes == [str(i) for i in range(len(data.classes or ()))]
    if names is None or data.classes is None or not numbered or len(names) != len(data.classes):
        return data
    return replace(data, classes=list(map(str, names)))
