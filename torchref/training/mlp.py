"""What the hyperparameters build, from torchref's pieces or, as a twin, from torch's."""

from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch

import torchref
import torchref.optim
from torchref.data.normalize import SCALERS, ImageNormalize, Impute
from torchref.data.text import BagOfWords
from torchref.nn.init import initialize
from torchref.training.checks import check_choice, check_range

ACTIVATIONS = {
    "relu": "ReLU",
    "leaky_relu": "LeakyReLU",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "elu": "ELU",
    "selu": "SELU",
    "gelu": "GELU",
    "silu": "SiLU",
}
INITIALIZERS = {
    "auto": "auto",
    "he": "kaiming_normal",
    "xavier": "xavier_normal",
    "lecun": "lecun_normal",
    "normal": "normal",
    "zeros": "zeros",
}
LIBRARIES = {"torchref": (torchref.nn, torchref.optim), "torch": (torch.nn, torch.optim)}
OPTIMIZERS = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "rmsprop": ("RMSprop", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
}


def build_mlp(
    features: int,
    classes: int,
    *,
    depth: int = 2,
    width: int = 128,
    activation: str = "relu",
    dropout: float = 0.1,
    batch_norm: bool = True,
    init: str = "auto",
    library: ModuleType = torchref.nn,
) -> torch.nn.Sequential:
    """A multilayer perceptron: ``depth`` times Linear, BatchNorm, activation, Dropout; Linear.

    A Linear before a BatchNorm has no bias: the normalization would subtract it.

    Args:
        features: length of a sample, > 0.
        classes: number of logits, > 0.
        depth: hidden layers, >= 0; 0 is softmax regression.
        width: neurons of each hidden layer, > 0.
        activation: a key of ``ACTIVATIONS``.
        dropout: probability that a neuron is dropped, in [0, 1); 0 leaves the layer out.
        batch_norm: whether each hidden layer has one; it needs batches of two samples or more.
        init: a key of ``INITIALIZERS``; ``auto`` is He for the ReLU family, Xavier for sigmoid and
            tanh, LeCun for SELU.
        library: :mod:`torchref.nn`, or :mod:`torch.nn` for the twin.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> net = build_mlp(4, 3, depth=1, dropout=0.1)
        >>> [type(layer).__name__ for layer in net]
        ['Linear', 'BatchNorm1d', 'ReLU', 'Dropout', 'Linear']

    Source: the course, "Hyperparameters of a neural network".
    """
    check_range("features", features, "> 0", features > 0)
    check_range("classes", classes, "> 0", classes > 0)
    check_range("depth", depth, ">= 0", depth >= 0)
    check_range("width", width, "> 0", width > 0)
    check_range("dropout", dropout, "in [0, 1)", 0 <= dropout < 1)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("init", init, INITIALIZERS)
    layers: list[torch.nn.Module] = []
    for _ in range(depth):
        layers.append(library.Linear(features, width, bias=not batch_norm))
        if batch_norm:
            layers.append(library.BatchNorm1d(width))
        layers.append(getattr(library, ACTIVATIONS[activation])())
        if dropout:
            layers.append(library.Dropout(dropout))
        features = width
    net = torch.nn.Sequential(*layers, library.Linear(features, classes))
    initialize(net, INITIALIZERS[init])
    return net


def build_optimizer(
    name: str,
    params: Iterable[torch.nn.Parameter],
    lr: float,
    library: ModuleType = torchref.optim,
) -> torch.optim.Optimizer:
    """An optimizer by name, its other arguments at torch's defaults.

    Args:
        name: ``sgd``, ``momentum`` (SGD with 0.9), ``rmsprop``, ``adam`` or ``adamw``.
        params: what it updates.
        lr: learning rate, finite, > 0.
        library: :mod:`torchref.optim`, or :mod:`torch.optim` for the twin.

    Raises:
        ValueError: an argument is out of its range.
    """
    return optimizer_factory(name, lr, library)(params)


def optimizer_factory(name: str, lr: float, library: ModuleType = torchref.optim) -> Any:
    """What makes the optimizer of :func:`build_optimizer` of parameters."""
    check_choice("optimizer", name, OPTIMIZERS)
    check_range("lr", lr, "in (0, 1e30]", 0 < lr <= 1e30)  # of float32, beside a gradient
    kind, arguments = OPTIMIZERS[name]
    return partial(getattr(library, kind), lr=lr, **arguments)


def build_normalizer(name: str = "auto", inputs: dict[str, Any] | None = None) -> torch.nn.Module:
    """What samples go through before the network, to be fitted on the training part.

    Args:
        name: ``standard`` (z-scores), ``minmax``, ``robust``, ``image`` (by channel), ``none``, or
            ``auto``: ``image`` for images, tf-idf for texts, ``standard`` for tables.
        inputs: what samples are, numbers without a gap by default: ``{"kind": "table", "missing":
            bool}``, ``{"kind": "image", "shape": [C, H, W], "high": number}``, rows of pixels, or
            ``{"kind": "text"}``.

    Raises:
        ValueError: an unknown name, or one that such samples do not have.

    Example:
        >>> build_normalizer("minmax")
        MinMax(unfitted)
    """
    inputs = inputs or {"kind": "table"}
    kind = inputs["kind"]
    check_choice("kind", kind, ("table", "image", "text"))
    check_choice("normalize", name, ("auto", *SCALERS))
    if kind == "text":
        check_range("normalize", name, "auto, for texts", name == "auto")
        return BagOfWords()
    if name == "auto":
        name = "image" if kind == "image" else "standard"
    if name == "image":
        check_range("normalize", name, "another scaler, for a table", kind == "image")
        return ImageNormalize(divisor=inputs["high"], shape=tuple(inputs["shape"]))
    scaler = SCALERS[name]()
    return Impute(scaler) if inputs.get("missing") else scaler
