"""Small sets that need no network, files of one's own, and adapters to others' collections."""

import hashlib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchref.data.images import find_idx, read_folder, read_idx
from torchref.data.reading import check_file, check_size
from torchref.data.table import (
    FLOAT32_MAX,
    LONGEST,
    Column,
    Table,
    encode,
    find_columns,
    find_undecodable,
    is_float,
    is_missing,
    is_number,
    name_labels,
    read_table,
    read_times,
    sort_labels,
)
from torchref.data.text import load_reviews

BUNDLED = ("digits", "breast_cancer", "wine", "iris", "diabetes", "reviews")
IDX = ("mnist", "fashion-mnist")
SOURCES = ("csv:PATH", "text:PATH", "npz:PATH", "folder:DIR", "torchvision:NAME", "hf:NAME")
OPTIONS: dict[str, tuple[str, ...]] = {  # of load_dataset that mean something to a source
    **dict.fromkeys(BUNDLED, ()),
    **dict.fromkeys(IDX, ("root",)),
    "csv": ("task", "target", "categories", "drop", "missing", "group", "time"),
    "text": ("target",),
    "npz": ("task",),
    "folder": ("image_size",),
    "torchvision": ("root", "image_size"),
    "hf": ("root", "image_size", "target", "task"),
}
FEW, MANY = 20, 100  # different whole numbers that are classes at most; MANY where none is alone
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

    @cached_property
    def fingerprint(self) -> str:
        """Twelve digits that change when a sample, a target or a name does."""
        digest = hashlib.sha256()
        if isinstance(self.x, Tensor):
            digest.update(self.x.contiguous().numpy().tobytes())
        else:
            digest.update("\0".join(self.x).encode())
        digest.update(self.y.contiguous().numpy().tobytes())
        digest.update(repr((self.classes, self.columns)).encode())
        return digest.hexdigest()[:12]


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
        image_size: side in pixels that images of a folder or a collection are resized to, > 0.
        task: ``classification``, ``regression``, or ``auto``: classes unless all targets are
            numbers and one of them is not whole. Over 100 different whole numbers, or over 20 of
            which one stands alone, could be either, and ``task`` must say which.
        target: name of the column to predict; the last one by default. In a file without a header
            columns are called 1, 2, ... No target may be missing, which an empty cell, ``?``,
            ``NA``, ``N/A``, ``NaN`` and ``null`` are; ``none`` and ``-`` can be classes. Where all
            classes, categories or groups are numbers, equal ones are one: 1 and 1.0.
        categories: names of columns whose numbers are categories. A column in which no cell is a
            number is one anyhow. None may have over 1,000, or as many as rows where those are
            over 100.
        drop: names of columns that are left out.
        missing: ``refuse`` a table with gaps, or ``impute``: NaN, for :class:`Impute`.
        group: name of a column whose values must not be shared by two parts of a split.
        time: name of a column of numbers or ISO dates that orders the samples.

    Raises:
        ValueError: a name or value is unknown, an option means nothing to the set, or a file is
            malformed; file and row are named.
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
    if image_size is not None and image_size <= 0:
        raise ValueError(f"image_size: expected > 0, got {image_size}")
    source, colon, rest = name.partition(":")
    if source not in OPTIONS or bool(colon) == (source in (*BUNDLED, *IDX)):
        known = ", ".join((*BUNDLED, *IDX, *SOURCES))
        raise ValueError(f"dataset: expected one of {known}, got {name!r}")
    given = {"root": root, "image_size": image_size, "target": target, "categories": categories}
    given |= {"drop": drop, "missing": missing == "impute", "group": group, "time": time}
    _refuse_unused(name, OPTIONS[source], [option for option in given if given[option]], task)
    if name == "reviews":
        texts, labels = load_reviews()
        return Dataset(texts, *as_targets(labels, "classification", name))
    if source in BUNDLED:
        return _from_scikit_learn(name)
    if source in IDX:
        return _from_idx(name, root)
    if source == "csv":
        roles = {"target": target, "group": group, "time": time}
        return _from_csv(read_table(rest), roles, categories, drop, missing, task)
    if source == "text":
        return _from_text(read_table(rest), target)
    if source == "npz":
        return _from_npz(Path(rest), task)
    if source == "folder":
        return _from_folder(Path(rest), image_size)
    from torchref.data import hubs

    if source == "torchvision":
        return hubs.from_torchvision(rest, root, image_size)
    return hubs.from_hugging_face(rest, root, image_size, target, task)


def _refuse_unused(name: str, known: Sequence[str], given: Sequence[str], task: str) -> None:
    """An option without effect would be believed to have one."""
    if unused := [option for option in given if option not in known]:
        raise ValueError(
            f"{', '.join(unused)}: without meaning for {name}, which knows "
            f"{', '.join(known) or 'no option'}"
        )
    own = "regression" if name == "diabetes" else "classification"
    if "task" not in known and task not in ("auto", own):
        raise ValueError(f"task: expected auto or {own} for {name}, got {task}")


def image_set(x: np.ndarray, targets: tuple[Tensor, list[str] | None], test: int = 0) -> Dataset:
    """A set of (N, C, H, W) images of which the last ``test`` are for the test."""
    high = 255.0 if x.dtype == np.uint8 else float(x.max(initial=0)) or 1.0
    rows = torch.from_numpy(x.reshape(len(x), -1).astype(np.float32))
    return Dataset(rows, *targets, shape=x.shape[1:], high=high, test=last(test, len(x)))


def last(test: int, samples: int) -> Tensor | None:
    """The indices of a test part that follows the others."""
    return torch.arange(samples - test, samples) if test else None


def read_features(
    path: str | Path,
    columns: Sequence[Column] | None = None,
    *,
    shape: tuple[int, int, int] | None = None,
    missing: str = "refuse",
    target: str | None = None,
) -> Tensor:
    """Read samples, one a row, from a ``.csv`` or ``.npy`` file, as a trained model takes them.

    Args:
        path: the file.
        columns: of the table that a model was trained on. They are found by name where that table
            and the file have a header, whatever else the file holds; else it must hold them in
            their order.
        shape: (C, H, W) of the images that a model was trained on. An .npy file may then have the
            shape (N, C * H * W), (N, C, H, W), (N, H, W, C) or, of gray images, (N, H, W).
        missing: ``refuse`` gaps in a table, or ``impute``: NaN, for a model that was trained so.
        target: name of a column that is left out, as it holds the classes.

    Returns:
        (samples, features) float32, NaN where a number is missing.

    Raises:
        ValueError: the file is malformed, has another ending, or is not a table of finite numbers
            that fits ``columns`` or ``shape``, or a pixel is below 0.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return _encode_samples(read_table(path), columns, missing, target)
    if path.suffix != ".npy":
        raise ValueError(f"{path}: expected a .csv or .npy file")
    check_file(path)
    try:
        with np.errstate(over="ignore"):  # a size that overflows is refused
            array = np.lib.format.open_memmap(path, mode="r")  # looks at the file's size first
    except OSError:
        raise
    except Exception as error:  # NumPy's, of many classes
        raise ValueError(f"{path}: not a .npy file of numbers: {error}") from None
    if array.dtype.kind not in "fiub" or (shape is None and array.ndim != 2):
        raise ValueError(
            f"{path}: expected numbers of shape (samples, features), "
            f"got {array.dtype} of shape {array.shape}"
        )
    if shape is not None:
        array = _channels_first(array, shape, path)
    if not len(array):
        raise ValueError(f"{path}: expected one sample or more, got shape {array.shape}")
    rows = _as_rows(array, str(path))
    if shape is not None and rows.min() < 0:
        raise ValueError(f"{path}: expected pixels from 0 on, got {rows.min():g}")
    return rows


def _encode_samples(
    table: Table, columns: Sequence[Column] | None, missing: str, target: str | None
) -> Tensor:
    label = None if target is None else table.find(target)
    others = [i for i in range(len(table.names)) if i != label]
    if columns is None:
        columns, positions = [Column(table.names[i]) for i in others], others
    elif table.header and not all(column.name.isdecimal() for column in columns):
        positions = [table.find(column.name) for column in columns]
    elif len(others) == len(columns):
        positions = others
    else:
        raise ValueError(
            f"{table.path}: expected {len(columns)} columns "
            f"({', '.join(column.name for column in columns)}), got {len(others)}"
        )
    return encode(table, columns, positions, missing, trained=True)


def _channels_first(array: np.ndarray, shape: tuple[int, int, int], path: Path) -> np.ndarray:
    """Images, or rows of their pixels, in the order of a model's."""
    channels, height, width = shape
    known = [(channels * height * width,), shape]
    known += [(height, width)] if channels == 1 else []
    if array.shape[1:] in known:
        return array
    if array.shape[1:] == (height, width, channels):
        return array.transpose(0, 3, 1, 2)
    expected = ", ".join(f"(N, {', '.join(map(str, each))})" for each in known)
    raise ValueError(
        f"{path}: expected shape {expected} or (N, {height}, {width}, {channels}), got "
        f"{array.shape}"
    )


def read_texts(path: str | Path, target: str | None = None) -> list[str]:
    """Read texts, one a line, or those of a ``.csv``.

    The column is ``text``, else the first that is not ``target``.

    Raises:
        ValueError: the file is malformed or holds no text, or a line has over 2**24 characters.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".csv":
        table = read_table(path)
        return table.cells(_find_text(table, None if target is None else table.find(target)))
    check_file(path)
    try:
        texts = list(_read_lines(path))
    except UnicodeDecodeError as error:
        row, reason = find_undecodable(path), error.reason
        raise ValueError(f"{path}: row {row}: not a text in UTF-8: {reason}") from None
    if not texts:
        raise ValueError(f"{path}: no rows; expected a text each")
    return texts


def _read_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        for row, line in enumerate(iter(lambda: file.readline(LONGEST + 1), ""), 1):
            if len(line) > LONGEST or "\0" in line:
                wrong = f"over {LONGEST} characters" if len(line) > LONGEST else "a NUL"
                raise ValueError(f"{path}: row {row}: not a text: {wrong}")
            yield line.removesuffix("\n")


def _find_text(table: Table, label: int | None) -> int:
    if "text" in table.names:
        return table.find("text")
    return 1 if label == 0 and len(table.names) > 1 else 0


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
        if image.ndim != 3 or label.ndim != 1 or len(image) != len(label) or not image.size:
            raise ValueError(
                f"{files[0]}: expected images and as many labels, got shapes {image.shape} and "
                f"{label.shape}"
            )
        for file, array in zip(files, (image, label), strict=True):
            if array.dtype != np.uint8:  # as its name has it
                raise ValueError(f"{file}: expected unsigned bytes, got {array.dtype.name}")
        images.append(image)
        labels.append(label)
    if images[0].shape[1:] != images[1].shape[1:]:
        raise ValueError(
            f"{files[0]}: {images[1].shape[1:]} pixels, the others {images[0].shape[1:]}"
        )
    targets = as_targets(np.concatenate(labels), "classification", str(folder))
    data = image_set(np.concatenate(images)[:, None], targets, len(images[1]))
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
            f"{table.delimiter}"
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
    y, classes = _targets_of(table, target, task)
    times = read_times(table, others["time"]) if "time" in others else None
    groups = _read_groups(table, others["group"]) if "group" in others else None
    x = encode(table, columns, positions, missing)
    return Dataset(x, y, classes, columns=columns, groups=groups, times=times)


def _targets_of(table: Table, position: int, task: str) -> tuple[Tensor, list[str] | None]:
    name = f"{table.path}: column {table.names[position]}"
    return as_targets(table.cells(position), task, name, lambda row: table.place(row, position))


def _read_groups(table: Table, position: int) -> Tensor:
    cells = table.cells(position)
    for row, cell in enumerate(cells):
        if is_missing(cell):  # all of these would be one group
            raise ValueError(f"{table.place(row, position)}: {cell!r} is no group")
    names = name_labels(cells)
    return torch.from_numpy(np.unique([names[c] for c in cells], return_inverse=True)[1])


def _from_text(table: Table, target: str | None) -> Dataset:
    label = len(table.names) - 1 if target is None else table.find(target)
    text = _find_text(table, label)
    if label == text:
        raise ValueError(
            f"{table.path}: expected a column of texts and one of classes{table.delimiter}"
        )
    return Dataset(table.cells(text), *_targets_of(table, label, "classification"))


def _from_npz(path: Path, task: str) -> Dataset:
    arrays = _read_npz(path)
    names = ("x", "y") if "x" in arrays else ("x_train", "y_train", "x_test", "y_test")
    if absent := [name for name in names if name not in arrays]:
        raise ValueError(
            f"{path}: expected arrays x and y, or x_train, y_train, x_test and y_test; no "
            f"{absent[0]} among {', '.join(arrays)}"
        )
    xs, ys = [arrays[name] for name in names[::2]], [arrays[name] for name in names[1::2]]
    for name, x, y in zip(names[::2], xs, ys, strict=True):
        if x.ndim not in (2, 3, 4) or y.ndim != 1 or len(x) != len(y) or not x.size:
            raise ValueError(
                f"{path}: expected samples {name} of 2 to 4 dimensions and as many targets, got "
                f"shapes {x.shape} and {y.shape}"
            )
        if x.dtype.kind not in "fiub" or x.shape[1:] != xs[0].shape[1:]:
            raise ValueError(f"{path}: {name}: expected numbers like x's, got {x.dtype} {x.shape}")
    for name, y in zip(names[1::2], ys, strict=True):
        if y.dtype.kind not in "fiubSU":
            raise ValueError(f"{path}: {name}: expected numbers or names, got {y.dtype}")
    if len({y.dtype.kind in "SU" for y in ys}) > 1:  # together, numbers would be names
        types = " and ".join(str(y.dtype) for y in ys)
        raise ValueError(f"{path}: y_train, y_test: expected numbers or names in both, got {types}")
    ys = [np.char.decode(y, "utf-8", "backslashreplace") if y.dtype.kind == "S" else y for y in ys]
    train, test = len(ys[0]), sum(map(len, ys[1:]))

    def place(row: int) -> str:
        array, row = (names[1], row) if row < train else (names[-1], row - train)
        return f"{path}: {array}: row {row + 1}"

    x, targets = np.concatenate(xs), as_targets(np.concatenate(ys), task, f"{path}: y", place)
    _check_test_classes(f"{path}: y_test", *targets, train)
    if x.ndim == 2:
        return Dataset(_as_rows(x, f"{path}: x"), *targets, test=last(test, len(x)))
    x = x[:, None] if x.ndim == 3 else x
    if x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    _as_rows(x, f"{path}: x")
    if x.min(initial=0) < 0:
        raise ValueError(f"{path}: x: expected pixels from 0 on, got {x.min()}")
    return image_set(x, targets, test)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not an .npz file of arrays: {error}") from None
    check_size(path, unpacked)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile's and NumPy's, of many classes
        raise ValueError(f"{path}: not an .npz file of arrays: {error}") from None
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}


def _from_folder(path: Path, size: int | None) -> Dataset:
    split = (path / "train").is_dir() and (path / "test").is_dir()
    parts = [read_folder(path / part, size) for part in (("train", "test") if split else ("",))]
    shapes = [x.shape[1:] for x, _ in parts]
    if shapes[0] != shapes[-1]:
        raise ValueError(f"{path}: images of shape {shapes[0]} in train, {shapes[1]} in test")
    labels = [label for _, part in parts for label in part]
    targets = as_targets(labels, "classification", str(path))
    _check_test_classes(f"{path}: test", *targets, len(parts[0][1]))
    return image_set(np.concatenate([x for x, _ in parts]), targets, split * len(parts[-1][1]))


def _check_test_classes(name: str, y: Tensor, classes: list[str] | None, train: int) -> None:
    """What the training part has no sample of, nothing could learn."""
    if classes is not None and (unknown := set(y[train:].tolist()) - set(y[:train].tolist())):
        names = ", ".join(repr(classes[i]) for i in sorted(unknown))
        raise ValueError(f"{name}: expected classes that the training part has, got {names}")


def as_targets(
    labels: Sequence[Any] | np.ndarray,
    task: str,
    name: str,
    place: Callable[[int], str] | None = None,
) -> tuple[Tensor, list[str] | None]:
    """Classes by number, with their names, or values and None.

    Errors begin with ``name``, or with the ``place`` of a row.
    """
    place = place or (lambda row: f"{name}: sample {row + 1}")
    cells = [str(label) for label in labels]
    task = _guess_task(cells, name, place) if task == "auto" else task
    for row, cell in enumerate(cells):
        if task == "classification" and is_missing(cell) and cell.lower() not in ("none", "-"):
            raise ValueError(f"{place(row)}: {cell!r} is no class; leave the row out")
        if task == "regression" and is_missing(cell):
            raise ValueError(f"{place(row)}: {cell!r} is missing; leave the row out")
        if task == "regression" and not is_number(cell):
            raise ValueError(f"{place(row)}: {cell!r} is not a finite number to predict")
    if task == "regression":
        return torch.tensor([float(cell) for cell in cells]), None
    names = name_labels(cells)
    classes = sort_labels(set(names.values()))
    if len(classes) < 2:
        raise ValueError(f"{name}: expected two classes or more, got {classes}")
    index = {label: i for i, label in enumerate(classes)}
    return torch.tensor([index[names[cell]] for cell in cells]), classes


def _guess_task(cells: list[str], name: str, place: Callable[[int], str]) -> str:
    present = [cell for cell in cells if not is_missing(cell)]
    if not present or not all(map(is_float, present)):
        return "classification"
    if len(present) < len(cells):  # not one class more
        row = next(row for row, cell in enumerate(cells) if is_missing(cell))
        raise ValueError(f"{place(row)}: {cells[row]!r} is missing; leave the row out")
    if not all(float(cell).is_integer() for cell in cells):
        return "regression"
    counts = Counter(map(float, cells))
    if len(counts) > MANY or (len(counts) > FEW and min(counts.values()) == 1):
        raise ValueError(
            f"{name}: {len(counts)} different whole numbers could be classes or values: "
            "--task classification or --task regression says which"
        )
    return "classification"


def _as_rows(array: np.ndarray, name: str) -> Tensor:
    with np.errstate(over="ignore"):  # what overflows is named below
        single = array.astype(np.float32)
    bad = np.argwhere(~np.isfinite(single))
    if len(bad):
        row, column, value = bad[0][0], bad[0][1:], array[tuple(bad[0])]
        where = ", ".join(str(i + 1) for i in column)
        gap = "; gaps are imputed in a table alone, csv:PATH" if np.isnan(value) else ""
        raise ValueError(
            f"{name}: row {row + 1}, column {where}: {value} is not finite in float32 "
            f"(at most {FLOAT32_MAX:.2e}){gap}"
        )
    return torch.from_numpy(single.reshape(len(single), -1))
