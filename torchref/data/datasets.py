"""Small sets that need no network, files of one's own, and adapters to others' collections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchref.data.images import find_idx, read_folder, read_idx
from torchref.data.table import (
    FLOAT32_MAX,
    Column,
    Table,
    encode,
    find_columns,
    is_number,
    read_table,
    sort_labels,
)
from torchref.data.text import load_reviews

BUNDLED = ("digits", "breast_cancer", "wine", "iris", "diabetes", "reviews")
IDX = ("mnist", "fashion-mnist")
SOURCES = ("csv:PATH", "text:PATH", "npz:PATH", "folder:DIR", "torchvision:NAME", "hf:NAME")
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
CLOTHES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
FLIPPED_DIGITS = {
    "horizontal_flip": "a mirrored digit is no digit",
    "vertical_flip": "an upside-down 6 is a 9",
}
UPSIDE_DOWN = "clothes are photographed upright"


@dataclass(frozen=True)
class Dataset:
    """Samples ``x`` with a class or a value each, and what a model has to know about them.

    ``x`` is (samples, features) float32, NaN where a number is missing, or a list of texts. ``y``
    is (samples,) int64 classes, or float32 values where ``classes`` is None.
    """

    x: Tensor | list[str]
    y: Tensor
    classes: list[str] | None
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of the image that a row of ``x`` holds the pixels of."""
    high: float = 1.0
    """The largest pixel there can be; the smallest is 0."""
    columns: list[Column] | None = None
    """How the cells of a table became features."""
    test: Tensor | None = None
    """Indices of the samples that whoever made the set keeps for the test."""
    groups: Tensor | None = None
    times: Tensor | None = None
    confusing: Mapping[str, str] = field(default_factory=dict)
    """Augmentations that take a sample out of its class, and why."""

    @property
    def kind(self) -> Literal["text", "image", "table"]:
        if not isinstance(self.x, Tensor):
            return "text"
        return "table" if self.shape is None else "image"

    @property
    def images(self) -> Tensor:
        """The samples as (samples, C, H, W)."""
        if self.shape is None or not isinstance(self.x, Tensor):
            raise ValueError(f"images: this is a set of {self.kind}, not of images")
        return self.x.unflatten(1, self.shape)


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    task: str = "auto",
    target: str | None = None,
    categories: Sequence[str] = (),
    drop: Sequence[str] = (),
    missing: str = "refuse",
    group: str | None = None,
    time: str | None = None,
) -> Dataset:
    """Load a set by name.

    Args:
        name: one of

            - ``digits``, ``breast_cancer``, ``wine``, ``iris`` (classes) and ``diabetes`` (values)
              from scikit-learn, ``reviews`` (texts) from here;
            - ``mnist``, ``fashion-mnist``: the four IDX files in ``root``, packed or not;
            - ``csv:PATH``: a table; ``text:PATH``: a table with a column of texts;
            - ``npz:PATH``: arrays ``x`` and ``y``, or ``x_train``, ``y_train``, ``x_test``,
              ``y_test``;
            - ``folder:DIR``: images in one subfolder for each class, or in such subfolders of
              ``train`` and ``test``;
            - ``torchvision:NAME``, ``hf:NAME``: a set of torchvision's or of Hugging Face's hub.
        root: folder of what is on disk; by default ``data/<name>`` or, of Debian's packages,
            ``/usr/share/datasets/<name>``.
        image_size: side in pixels that images of a folder are resized to.
        task: ``classification``, ``regression``, or ``auto``: classes unless all targets are
            numbers and one of them is not whole.
        target: name of the column to predict; the last one by default. In a file without a header
            columns are called 1, 2, ...
        categories: names of columns whose numbers are categories. A column in which no cell is a
            number is one anyhow.
        drop: names of columns that are left out.
        missing: ``refuse`` a table with gaps, or ``impute``: NaN, for :class:`Impute`.
        group: name of a column whose values must not be shared by two parts of a split.
        time: name of a column of numbers that orders the samples.

    Raises:
        ValueError: a name or value is unknown, or a file is malformed; file and row are named.
        FileNotFoundError: there is no such file.
        ImportError: the collection's package is missing; the message says what to install.

    Example:
        >>> data = load_dataset("iris")
        >>> data.x.shape, data.classes
        (torch.Size([150, 4]), ['setosa', 'versicolor', 'virginica'])
        >>> load_dataset("digits").images.shape
        torch.Size([1797, 1, 8, 8])
    """
    for argument, value, known in (
        ("task", task, ("auto", "classification", "regression")),
        ("missing", missing, ("refuse", "impute")),
    ):
        if value not in known:
            raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {value!r}")
    source, colon, rest = name.partition(":")
    if name == "reviews":
        texts, labels = load_reviews()
        return Dataset(texts, *as_targets(labels, "classification"))
    if name in BUNDLED:
        return _from_scikit_learn(name)
    if name in IDX:
        return _from_idx(name, root)
    if colon and source == "csv":
        roles = {"target": target, "group": group, "time": time}
        return _from_csv(read_table(rest), roles, categories, drop, missing, task)
    if colon and source == "text":
        return _from_text(read_table(rest), target)
    if colon and source == "npz":
        return _from_npz(Path(rest), task)
    if colon and source == "folder":
        return _from_folder(Path(rest), image_size)
    if colon and source in ("torchvision", "hf"):
        from torchref.data import hubs

        load = hubs.from_torchvision if source == "torchvision" else hubs.from_hugging_face
        return load(rest, root, image_size, target)
    known = ", ".join((*BUNDLED, *IDX, *SOURCES))
    raise ValueError(f"dataset: expected one of {known}, got {name!r}")


def image_set(x: np.ndarray, labels: Sequence[Any] | np.ndarray, test: int = 0) -> Dataset:
    """A set of (N, C, H, W) images of which the last ``test`` are for the test."""
    high = 255.0 if x.dtype == np.uint8 else float(x.max(initial=0.0))
    y, classes = as_targets(labels, "classification")
    rows = torch.from_numpy(x.reshape(len(x), -1).astype(np.float32))
    held = torch.arange(len(x) - test, len(x)) if test else None
    return Dataset(rows, y, classes, shape=x.shape[1:], high=high, test=held)


def read_features(path: str | Path, columns: Sequence[Column] | None = None) -> Tensor:
    """Read samples without labels, one a row, from a ``.csv`` or ``.npy`` file.

    Args:
        path: an .npy file may hold images, too, (samples, C, H, W).
        columns: of the table that a model was trained on. They are found by name where the file
            has a header, whatever else it holds; else it must hold them in their order.

    Returns:
        (samples, features) float32, NaN where a number is missing.

    Raises:
        ValueError: the file is malformed, has another ending, or is not a table of finite numbers.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".csv":
        table = read_table(path)
        if columns is None:
            every = range(len(table.names))
            return encode(table, [Column(name) for name in table.names], every)
        if table.header:
            positions = [table.find(column.name) for column in columns]
        elif len(table.names) == len(columns):
            positions = list(range(len(columns)))
        else:
            raise ValueError(
                f"{path}: expected {len(columns)} columns ({', '.join(c.name for c in columns)}), "
                f"got {len(table.names)}"
            )
        return encode(table, columns, positions, "impute")
    if path.suffix != ".npy":
        raise ValueError(f"{path}: expected a .csv or .npy file")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a .npy file of numbers: {error}") from None
    if array.ndim < 2 or array.dtype.kind not in "fiub":
        raise ValueError(
            f"{path}: expected numbers of shape (samples, features), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return _as_rows(array, str(path))


def read_texts(path: str | Path) -> list[str]:
    """Read texts, one a line, or those in the column ``text`` (else the first) of a ``.csv``."""
    path = Path(path)
    if path.suffix == ".csv":
        table = read_table(path)
        return table.cells(table.find("text") if "text" in table.names else 0)
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8: {error}") from None


def _from_scikit_learn(name: str) -> Dataset:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    x = torch.as_tensor(bunch.data, dtype=torch.float32)
    if name == "diabetes":
        return Dataset(x, torch.as_tensor(bunch.target, dtype=torch.float32), None)
    data = {
        "x": x,
        "y": torch.as_tensor(bunch.target),
        "classes": list(map(str, bunch.target_names)),
    }
    if name == "digits":
        return Dataset(**data, shape=(1, 8, 8), high=16.0, confusing=FLIPPED_DIGITS)
    return Dataset(**data)


def _from_idx(name: str, root: str | Path | None) -> Dataset:
    folders = [Path(root)] if root else [Path("data", name), Path("/usr/share/datasets", name)]
    folder = next((path for path in folders if path.is_dir()), folders[0])
    images, labels = [], []
    for part in ("train", "t10k"):
        files = [
            find_idx(folder, f"{part}-{stem}")
            for stem in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        image, label = map(read_idx, files)
        if image.ndim != 3 or label.ndim != 1 or len(image) != len(label) or not len(image):
            raise ValueError(
                f"{files[0]}: expected images and as many labels, got shapes {image.shape} and "
                f"{label.shape}"
            )
        images.append(image)
        labels.append(label)
    if images[0].shape[1:] != images[1].shape[1:]:
        raise ValueError(
            f"{files[0]}: {images[1].shape[1:]} pixels, the others {images[0].shape[1:]}"
        )
    data = image_set(np.concatenate(images)[:, None], np.concatenate(labels), len(images[1]))
    if name == "mnist":
        return replace(data, confusing=FLIPPED_DIGITS)
    classes = CLOTHES if len(data.classes or ()) == len(CLOTHES) else data.classes
    return replace(data, classes=classes, confusing={"vertical_flip": UPSIDE_DOWN})


def _from_csv(
    table: Table,
    roles: dict[str, str | None],
    categories: Sequence[str],
    drop: Sequence[str],
    missing: str,
    task: str,
) -> Dataset:
    width = len(table.names)
    if width < 2:
        raise ValueError(
            f"{table.path}: expected features and a class in the last column, got 1 column"
        )
    target = width - 1 if roles["target"] is None else table.find(roles["target"])
    others = {
        role: table.find(n) for role, n in roles.items() if n is not None and role != "target"
    }
    out = {target, *others.values(), *(table.find(name) for name in drop)}
    positions = [i for i in range(width) if i not in out]
    if not positions:
        raise ValueError(f"{table.path}: no column is left for the features")
    used = [name for name in categories if table.find(name) in positions]
    columns = find_columns(table, positions, used)
    y, classes = as_targets(table.cells(target), task, lambda row: table.place(row, target))
    if classes is not None and len(classes) < 2:
        raise ValueError(
            f"{table.path}: expected two classes or more in column {table.names[target]}, got "
            f"{classes}"
        )
    times = None
    if "time" in others:
        times = encode(table, [Column("time")], [others["time"]]).flatten().double()
    groups = None
    if "group" in others:
        _, groups = np.unique(table.cells(others["group"]), return_inverse=True)
        groups = torch.from_numpy(groups)
    x = encode(table, columns, positions, missing)
    return Dataset(x, y, classes, columns=columns, groups=groups, times=times)


def _from_text(table: Table, target: str | None) -> Dataset:
    label = len(table.names) - 1 if target is None else table.find(target)
    text = table.find("text") if "text" in table.names else 0
    if label == text:
        raise ValueError(f"{table.path}: expected a column of texts and one of classes")
    y, classes = as_targets(table.cells(label), "classification")
    return Dataset(table.cells(text), y, classes)


def _from_npz(path: Path, task: str) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile's and NumPy's, of many classes
        raise ValueError(f"{path}: not an .npz file of arrays: {error}") from None
    names = ("x", "y") if "x" in arrays else ("x_train", "y_train", "x_test", "y_test")
    if absent := [name for name in names if name not in arrays]:
        raise ValueError(
            f"{path}: expected arrays x and y, or x_train, y_train, x_test and y_test; no "
            f"{absent[0]} among {', '.join(arrays)}"
        )
    xs, ys = [arrays[name] for name in names[::2]], [arrays[name] for name in names[1::2]]
    for name, x, y in zip(names[::2], xs, ys, strict=True):
        if x.ndim not in (2, 3, 4) or y.ndim != 1 or len(x) != len(y) or not len(x):
            raise ValueError(
                f"{path}: expected samples {name} of 2 to 4 dimensions and as many targets, got "
                f"shapes {x.shape} and {y.shape}"
            )
        if x.dtype.kind not in "fiub" or x.shape[1:] != xs[0].shape[1:]:
            raise ValueError(f"{path}: {name}: expected numbers like x's, got {x.dtype} {x.shape}")
    x, y = np.concatenate(xs), np.concatenate(ys)
    test = len(xs[1]) if len(xs) > 1 else 0
    if x.ndim == 2:
        held = torch.arange(len(x) - test, len(x)) if test else None
        return Dataset(_as_rows(x, f"{path}: x"), *as_targets(y, task), test=held)
    x = x[:, None] if x.ndim == 3 else x
    if x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    _as_rows(x, f"{path}: x")
    if x.min(initial=0) < 0:
        raise ValueError(f"{path}: x: expected pixels from 0 on, got {x.min()}")
    return image_set(x, y, test)


def _from_folder(path: Path, size: int | None) -> Dataset:
    if not ((path / "train").is_dir() and (path / "test").is_dir()):
        return image_set(*read_folder(path, size))
    (x, labels), (x_test, more) = (read_folder(path / part, size) for part in ("train", "test"))
    if x.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"{path}: images of shape {x.shape[1:]} in train, {x_test.shape[1:]} in test"
        )
    return image_set(np.concatenate([x, x_test]), labels + more, len(x_test))


def as_targets(
    labels: Sequence[Any] | np.ndarray, task: str, place: Any = lambda row: f"sample {row + 1}"
) -> tuple[Tensor, list[str] | None]:
    """Classes by number, with their names, or values and None."""
    cells = [str(label) for label in labels]
    numbers = [is_number(cell) for cell in cells]
    if task == "auto":
        whole = all(numbers) and all(float(cell).is_integer() for cell in cells)
        task = "regression" if all(numbers) and not whole else "classification"
    if task == "classification":
        for row, cell in enumerate(cells):
            if cell.lower() in ("", "nan"):
                raise ValueError(f"{place(row)}: {cell!r} is no class")
        classes = sort_labels(set(cells))
        index = {label: i for i, label in enumerate(classes)}
        return torch.tensor([index[cell] for cell in cells]), classes
    if not all(numbers):
        row = numbers.index(False)
        raise ValueError(f"{place(row)}: {cells[row]!r} is not a finite number to predict")
    return torch.tensor([float(cell) for cell in cells]), None


def _as_rows(array: np.ndarray, name: str) -> Tensor:
    with np.errstate(over="ignore"):  # what overflows is named below
        single = array.astype(np.float32)
    bad = np.argwhere(~np.isfinite(single))
    if len(bad):
        row, column, value = bad[0][0], bad[0][1:], array[tuple(bad[0])]
        where = ", ".join(str(i + 1) for i in column)
        raise ValueError(
            f"{name}: row {row + 1}, column {where}: {value} is not finite in float32 "
            f"(at most {FLOAT32_MAX:.2e})"
        )
    return torch.from_numpy(single.reshape(len(single), -1))
