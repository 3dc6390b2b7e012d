"""What decides a training run, and what it depends on besides."""

import platform
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml

import torchref
from torchref.data.augment import image, tabular, text
from torchref.data.reading import check_file
from torchref.training.checks import check_range

DEEPEST = 9  # collections in each other, in a YAML file
NETWORK = (
    "depth",
    "width",
    "activation",
    "dropout",
    "batch_norm",
    "init",
    "optimizer",
    "lr",
    "l1",
    "l2",
    "normalize",
)
DATA = (
    "dataset",
    "root",
    "image_size",
    "task",
    "target",
    "categories",
    "drop",
    "missing",
    "group",
    "time",
    "split",
    "ratios",
    "gap",
    "augment",
    "smote",
    "batch_size",
    "seed",
)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; each field is a flag of ``scripts/train.py`` and a YAML key.

    Ranges are checked where the values are used, by :class:`Run`. Scalars of NumPy become Python's.

    Raises:
        TypeError: a value is of another type than its field.

    Example:
        >>> Config(lr=0.01).width
        128
    """

    dataset: str = _option(
        "digits",
        "digits, breast_cancer, wine, iris, diabetes, reviews, mnist, fashion-mnist, csv:PATH, "
        "text:PATH, npz:PATH, folder:DIR, torchvision:NAME, hf:NAME",
    )
    root: str | None = _option(
        None, "folder of data on disk (mnist, fashion-mnist, torchvision, hf)"
    )
    image_size: int | None = _option(
        None, "side that images of a folder or a hub are resized to, > 0"
    )
    task: str = _option("auto", "auto (by the targets), classification or regression")
    target: str | None = _option(None, "column of a table to predict; default: the last")
    categories: list[str] | None = _option(None, "columns of a table whose numbers are categories")
    drop: list[str] | None = _option(None, "columns of a table to leave out")
    missing: str = _option("refuse", "gaps in a table: refuse, or impute the training median")
    group: str | None = _option(None, "column whose values stay in one part (--split grouped)")
    time: str | None = _option(
        None, "column of numbers or ISO dates that orders the rows (--split chronological)"
    )
    split: str = _option(
        "auto", "stratified, random, chronological, grouped; auto is stratified for classes"
    )
    ratios: list[float] | None = _option(
        None, "shares of training, validation, test; default: 0.7 0.15 0.15, 0.9 0.05 0.05 if large"
    )
    gap: int = _option(0, "samples left out at the borders of a chronological split, >= 0")
    reopen_test: bool = _option(
        False, "resume: do not mention that the test part was opened before"
    )
    augment: dict[str, float] | None = _option(
        None,
        "changes to training batches, as --augment.rotation 15 --augment.mixup 0.2; for images "
        f"{', '.join(image.OPTIONS)}; texts {', '.join(text.OPTIONS)}; tables "
        f"{', '.join(tabular.OPTIONS)}",
    )
    smote: bool = _option(False, "fill up small classes of the training part with SMOTE")
    augment_picture: bool = _option(False, "write augmented.png: images before and after")
    lr: float = _option(2e-3, "learning rate, > 0")
    epochs: int = _option(100, "most passes over the training split, > 0")
    batch_size: int | Literal["full"] = _option(
        64, "samples in a step: full is batch, 1 stochastic gradient descent; for each process"
    )
    depth: int = _option(2, "hidden layers, >= 0; 0 is softmax regression")
    width: int = _option(128, "neurons in a hidden layer, > 0")
    activation: str = _option("relu", "relu, leaky_relu, sigmoid, tanh, elu, selu, gelu or silu")
    init: str = _option(
        "auto", "auto (by activation: He for relu), he, xavier, lecun, normal, zeros"
    )
    optimizer: str = _option("adam", "sgd, momentum, rmsprop, adam or adamw")
    dropout: float = _option(0.1, "probability that a neuron is dropped, in [0, 1)")
    l1: float = _option(0.0, "weight of the sum of |w|, >= 0")
    l2: float = _option(1e-4, "weight of the sum of w^2, >= 0; half of a weight_decay")
    batch_norm: bool = _option(True, "batch norm in each hidden layer")
    patience: int = _option(15, "epochs without a better val_loss before it stops, >= 1")
    start_from_epoch: int = _option(0, "epochs that neither count nor are the best, >= 0")
    normalize: str = _option(
        "auto",
        "by the training part: standard, minmax, robust, image, none; auto is image for images, "
        "tf-idf for texts, else standard",
    )
    save_every: int | None = _option(
        None, "batches after which last.ckpt is written, besides the ends of epochs, >= 1"
    )
    seed: int = _option(0, "of the split, the weights, the order and dropout")
    name: str | None = _option(None, "folder under runs/, replaced if it exists; default: dataset")
    accelerator: str = _option("auto", "Lightning's: auto, cpu, gpu, ...")
    devices: int | str = _option(1, "Lightning's: how many, which (0,1), or auto")
    strategy: str = _option("auto", "Lightning's: auto, ddp, ...")
    num_nodes: int = _option(1, "machines, under a launcher on each")
    timeout: float = _option(
        1800.0, "seconds that a process of several waits for the others, > 0; DDP's alone"
    )
    precision: int | str = _option("32", "Lightning's: 32, 64, 16-mixed, bf16-mixed, ...")
    threads: int | Literal["auto"] = _option(
        "auto", "CPU threads; auto is 1 for a small network, faster there, else torch's choice"
    )
    compile: bool = _option(False, "run the network through torch.compile")
    backend: str = _option(
        torchref.get_backend(), "torchref's: auto, reference, compiled or triton"
    )
    parity: bool = _option(True, "train the torch twin beside it and compare losses")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Config).items():
            value = getattr(self, name)
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value := value.item())
            if not _is_a(value, hint):
                kind = hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
                raise TypeError(f"{name}: expected {kind}, got {value!r}")

    @property
    def resolved_split(self) -> str:
        """``split``, or what a column of groups or times makes of ``auto``."""
        if self.split != "auto" or not (self.group or self.time):
            return self.split
        return "grouped" if self.group else "chronological"

    @property
    def folder(self) -> str:
        """``name``, or the dataset's: ``digits``, or ``csv-table`` for ``csv:folder/table.csv``."""
        source, colon, rest = self.dataset.partition(":")
        default = f"{source}-{Path(rest).stem}" if colon else source
        folder = default if self.name is None else self.name
        plain = Path(folder).name == folder and folder not in ("", ".", "..") and "\0" not in folder
        check_range("name", folder, "a plain folder name", plain)
        return folder


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; an integer is a number, too, a bool is neither."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is list:
        return isinstance(value, list | tuple) and all(_is_a(x, parts[0]) for x in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is_a(x, parts[1]) for x in value.values())
    if parts:  # a union
        return any(_is_a(value, part) for part in parts)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def options() -> Iterable[Field[Any]]:
    """The fields of :class:`Config`, whose ``metadata["help"]`` says what each is."""
    return fields(Config)


def plain_yaml(text: str) -> str:
    """YAML as it is, but for what a few lines make costly: aliases, and lists in lists in lists.

    Raises:
        yaml.YAMLError: there is an alias, or a depth that no configuration has, or it is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"expected values, not aliases, got *{event.anchor}, line {line}")
        if depth > DEEPEST:
            raise yaml.YAMLError(f"expected values, not lists in lists, line {line}")
    return text


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file of names and values.

    Raises:
        ValueError: it is another one, or damaged.
    """
    check_file(path)
    try:
        found = yaml.safe_load(plain_yaml(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected names and values, got {found!r:.40}")
    return found


def versions() -> dict[str, str]:
    """What a result depends on besides the configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
        "torchmetrics": metadata.version("torchmetrics"),
        "torchref": torchref.__version__,
    }
