"""Hidden units that are copies of each other, and stay so."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchref.diagnostics.gradient_flow import Probe
from torchref.internals import AnyConv, AnyConvTranspose

TOLERANCE = 1e-4  # of a layer's largest number: rounding makes copies differ by some 1e-6


class Copies(NamedTuple):
    """Units of one layer that are the same; ``still`` says that their gradient is 0."""

    layer: str
    units: tuple[int, ...]
    still: bool

    def __str__(self) -> str:
        what = f"{self.layer}: units {_listed(self.units)} are copies of each other"
        if self.still:
            return f"{what}, and the gradient of their weights is 0: this step does not move them"
        return f"{what}, with the same gradient: {len(self.units)} units do the work of one"


class Symmetry(NamedTuple):
    """Groups of copies; there are none in a network that can learn."""

    copies: tuple[Copies, ...]

    @property
    def found(self) -> bool:
        return bool(self.copies)

    def __str__(self) -> str:
        if not self.found:
            return "no two units of a hidden layer are copies of each other"
        return "\n".join(
            [
                *map(str, self.copies),
                "The same weights give the same output, hence the same gradient and the same step: "
                "no training parts them.",
                "Draw the weights at random, torchref.nn.init.initialize(model): xavier_normal_ "
                "for sigmoid and tanh, kaiming_normal_ for ReLU, lecun_normal_ for SELU. Only "
                "biases may start at 0.",
            ]
        )


def check_symmetry(model: nn.Module, loss: Callable[[], Tensor]) -> Symmetry:
    """Find hidden units that are copies of each other.

    Units i and j of a linear or convolution layer are copies where their incoming weights, their
    biases and the gradients of both are equal. Equal gradients are what equal outgoing weights
    cause, through whatever comes after the layer; then a step keeps the units equal, and so does
    every later one. All units of a layer are copies after an initialization with a constant. With
    weights of 0 the gradient of the early ones is 0, too; behind ReLU or tanh, whose outputs are
    then 0, it stays so, and only the output's bias learns. The last layer is not looked at.

    Dropout draws another mask for each unit and thereby parts copies: call ``model.eval()`` to find
    them nevertheless. Gradients and buffers stay as they were.

    Args:
        model: in the mode that it is to be judged in.
        loss: computes the loss of a batch with ``model``; called once.

    Returns:
        :attr:`Symmetry.copies`, which are words when printed.

    Raises:
        ValueError: ``model`` has no weight that learns, or the loss is no scalar or does not depend
            on them.

    Example:
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        ... )
        >>> x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
        >>> loss = lambda: torch.nn.functional.cross_entropy(net(x), y)
        >>> check_symmetry(net, loss).found
        False
        >>> used = torchref.nn.init.initialize(net, "zeros")
        >>> print(check_symmetry(net, loss).copies[0])
        0: units 0 to 3 are copies of each other, and the gradient of their weights is 0: this step
        does not move them

    Source: the course, "Weight initialization".
    """
    probe = Probe(model)
    learn = [p for p in model.parameters() if p.requires_grad]
    grads = probe.gradients("check_symmetry", loss, learn)
    copies = []
    for layer in probe.layers[:-1]:
        if isinstance(layer, (nn.Linear, AnyConv)) and layer.weight in grads:
            copies += _copies(probe.names[layer], layer, grads)
    return Symmetry(tuple(copies))


def _copies(name: str, layer: "nn.Linear | AnyConv", grads: dict[Tensor, Tensor]) -> list[Copies]:
    weight, bias, grad = layer.weight, layer.bias, _units(layer, grads[layer.weight])
    parts = [_units(layer, weight.detach()), grad]
    if bias is not None:
        parts += [bias.detach()[:, None], grads.get(bias, torch.zeros_like(bias))[:, None]]
    of_unit = torch.cat([_scaled(part) for part in parts], 1)
    same = torch.cdist(of_unit, of_unit, p=math.inf) <= TOLERANCE
    groups: dict[int, list[int]] = {}
    for unit, first in enumerate(same.int().argmax(1).tolist()):
        groups.setdefault(first, []).append(unit)
    still = (grad == 0).all(1)
    return [
        Copies(name, tuple(units), bool(still[units].all()))
        for units in groups.values()
        if len(units) > 1
    ]


def _units(layer: nn.Module, weight: Tensor) -> Tensor:
    """The incoming weights of each unit, (units, weights)."""
    if isinstance(layer, AnyConvTranspose):  # (in, out / groups, ...)
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _scaled(x: Tensor) -> Tensor:
    return x.float() / x.float().abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


def _listed(units: tuple[int, ...]) -> str:
    *others, last = units
    if len(others) > 1 and last - others[0] == len(others):  # they are in order
        return f"{others[0]} to {last}"
    if len(others) > 5:
        return f"{', '.join(map(str, others[:5]))} and {len(units) - 5} more"
    return f"{', '.join(map(str, others))} and {last}"
