"""Weight initialization, matched to the activation that follows."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchref.internals import AnyConv

_CONVOLUTIONS = tuple(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))


def zeros_(tensor: Tensor) -> Tensor:
    """Fill with 0. For biases: weights of 0 keep every neuron of a layer the same.

    Example:
        >>> torchref.nn.init.zeros_(torch.empty(2))
        tensor([0., 0.])
    """
    return constant_(tensor, 0.0)


def constant_(tensor: Tensor, val: float) -> Tensor:
    """Fill with ``val``.

    Example:
        >>> torchref.nn.init.constant_(torch.empty(2), 3.0)
        tensor([3., 3.])
    """
    with torch.no_grad():
        return tensor.fill_(val)


def normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill from :math:`\mathcal{N}(\text{mean}, \text{std}^2)`.

    Example:
        >>> bool(torchref.nn.init.normal_(torch.empty(10000)).mean().abs() < 0.1)
        True
    """
    with torch.no_grad():
        return tensor.normal_(mean, std, generator=generator)


def uniform_(
    tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Fill from :math:`\mathcal{U}(a, b)`.

    Example:
        >>> w = torchref.nn.init.uniform_(torch.empty(100), -1.0, 1.0)
        >>> bool(w.abs().max() <= 1)
        True
    """
    with torch.no_grad():
        return tensor.uniform_(a, b, generator=generator)


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    r"""The factor on the standard deviation that keeps the variance through a nonlinearity.

    ==================================  ==============================
    linear, sigmoid, conv...            1
    tanh                                5 / 3
    relu                                :math:`\sqrt{2}`
    leaky_relu (slope ``param``)        :math:`\sqrt{2 / (1 + a^2)}`
    selu                                3 / 4
    ==================================  ==============================

    Args:
        nonlinearity: one of these names.
        param: the slope of leaky_relu; 0.01 where None.

    Raises:
        ValueError: another name, or a ``param`` that is no number.

    Example:
        >>> round(torchref.nn.init.calculate_gain("relu"), 4)
        1.4142
    """
    if nonlinearity in ("linear", "sigmoid", *_CONVOLUTIONS):
        return 1.0
    if nonlinearity == "tanh":
        return 5.0 / 3
    if nonlinearity == "relu":
        return math.sqrt(2.0)
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        if isinstance(slope, bool) or not isinstance(slope, int | float):
            raise ValueError(f"calculate_gain: expected a number `param`, got {param!r}")
        return math.sqrt(2.0 / (1 + slope**2))
    if nonlinearity == "selu":
        return 3.0 / 4
    raise ValueError(f"calculate_gain: unknown `nonlinearity` {nonlinearity!r}")


def xavier_uniform_(
    tensor: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Xavier (Glorot) initialization, for sigmoid and tanh: variance 2 / (fan_in + fan_out).

    .. math::
        W \sim \mathcal{U}(-a, a), \quad a = \text{gain} \sqrt{\frac{6}{n_{in} + n_{out}}}

    Args:
        tensor: at least 2 dimensions, (out, in, ...).
        gain: see :func:`calculate_gain`.
        generator: None for torch's default one.

    Raises:
        ValueError: fewer than 2 dimensions.

    Example:
        >>> w = torchref.nn.init.xavier_uniform_(torch.empty(3, 3))
        >>> bool(w.abs().max() <= 1)
        True

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010.
    """
    std = gain * math.sqrt(2.0 / sum(_fans("xavier_uniform_", tensor)))
    bound = math.sqrt(3.0) * std  # in this order, as torch's bits are
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(
    tensor: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Xavier (Glorot) initialization from :math:`\mathcal{N}(0, \text{gain}^2 \cdot 2 / (n_{in} +
    n_{out}))`; see :func:`xavier_uniform_`.

    Example:
        >>> w = torchref.nn.init.xavier_normal_(torch.empty(300, 200))
        >>> bool((w.std() - (2 / 500) ** 0.5).abs() < 0.002)
        True
    """
    std = gain * math.sqrt(2.0 / sum(_fans("xavier_normal_", tensor)))
    return normal_(tensor, 0.0, std, generator)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""He (Kaiming) initialization, for ReLU and its kin.

    .. math::
        W \sim \mathcal{U}(-b, b), \quad b = \text{gain} \sqrt{\frac{3}{n}}

    Args:
        tensor: at least 2 dimensions, (out, in, ...).
        a: the slope of the leaky ReLU that follows.
        mode: ``"fan_in"`` keeps the variance forward, ``"fan_out"`` backward.
        nonlinearity: what follows; see :func:`calculate_gain`.
        generator: None for torch's default one.

    Raises:
        ValueError: fewer than 2 dimensions, or an unknown ``mode`` or ``nonlinearity``.

    Example:
        >>> w = torchref.nn.init.kaiming_uniform_(torch.empty(4, 6), nonlinearity="relu")
        >>> bool(w.abs().max() <= 1)
        True

    Source: He et al., "Delving deep into rectifiers", 2015.
    """
    bound = math.sqrt(3.0) * _kaiming_std("kaiming_uniform_", tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""He (Kaiming) initialization from :math:`\mathcal{N}(0, \text{gain}^2 / n)`, which is
    :math:`\mathcal{N}(0, 2 / n_{in})` before a ReLU; see :func:`kaiming_uniform_`.

    Example:
        >>> w = torchref.nn.init.kaiming_normal_(torch.empty(300, 200), nonlinearity="relu")
        >>> bool((w.std() - 0.1).abs() < 0.003)
        True
    """
    std = _kaiming_std("kaiming_normal_", tensor, a, mode, nonlinearity)
    return normal_(tensor, 0.0, std, generator)


def lecun_uniform_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""LeCun initialization from :math:`\mathcal{U}(-\sqrt{3 / n_{in}}, \sqrt{3 / n_{in}})`; see
    :func:`lecun_normal_`.

    Example:
        >>> w = torchref.nn.init.lecun_uniform_(torch.empty(4, 3))
        >>> bool(w.abs().max() <= 1)
        True
    """
    bound = math.sqrt(3.0 / max(_fans("lecun_uniform_", tensor)[0], 1))
    return uniform_(tensor, -bound, bound, generator)


def lecun_normal_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""LeCun initialization, for SELU: :math:`W \sim \mathcal{N}(0, 1 / n_{in})`.

    torch has no function of this name; it is ``kaiming_normal_(w, nonlinearity="linear")``.

    Args:
        tensor: at least 2 dimensions, (out, in, ...).
        generator: None for torch's default one.

    Raises:
        ValueError: fewer than 2 dimensions.

    Example:
        >>> w = torchref.nn.init.lecun_normal_(torch.empty(300, 100))
        >>> bool((w.std() - 0.1).abs() < 0.003)
        True

    Source: LeCun et al., "Efficient BackProp", 1998; with SELU: Klambauer et al., 2017.
    """
    return normal_(tensor, 0.0, 1 / math.sqrt(max(_fans("lecun_normal_", tensor)[0], 1)), generator)


METHODS = {
    "zeros": zeros_,
    "normal": lambda tensor: normal_(tensor, std=0.01),
    "uniform": lambda tensor: uniform_(tensor, -0.05, 0.05),
    "xavier_uniform": xavier_uniform_,
    "xavier_normal": xavier_normal_,
    "kaiming_uniform": lambda tensor: kaiming_uniform_(tensor, nonlinearity="relu"),
    "kaiming_normal": lambda tensor: kaiming_normal_(tensor, nonlinearity="relu"),
    "lecun_uniform": lecun_uniform_,
    "lecun_normal": lecun_normal_,
}


def initialize(model: nn.Module, method: str = "auto") -> dict[str, str]:
    """Initialize every linear and convolution layer of a model; biases become 0.

    ``auto`` matches each weight to the activation that comes next among the model's modules, in
    the order in which they were registered:

    =====================================  ================================================
    ReLU, LeakyReLU, ELU, GELU, SiLU,      ``kaiming_normal`` (He); a LeakyReLU's slope counts
    Softplus
    SELU                                   ``lecun_normal``
    Sigmoid, Tanh, Softmax, none           ``xavier_normal`` (Glorot)
    =====================================  ================================================

    An activation called as a function inside ``forward`` is not a module and not seen: name the
    method then. Layers of other kinds (normalization, embedding, attention's own projections) keep
    what they have.

    Args:
        model: changed in place.
        method: ``auto``, or one name for all: ``zeros``, ``normal`` (std 0.01), ``uniform``
            (within 0.05), ``xavier_uniform``, ``xavier_normal``, ``kaiming_uniform``,
            ``kaiming_normal`` (both with ReLU's gain), ``lecun_uniform``, ``lecun_normal``.

    Returns:
        The method used for each layer, by the layer's name in ``model.named_modules()``.

    Raises:
        ValueError: an unknown ``method``, a layer under the old ``weight_norm``, one whose
            parametrization has no ``right_inverse``, or a lazy one that has seen no input. No layer
            is changed then.
        TypeError: ``model`` is no module.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> torchref.nn.init.initialize(model)
        {'0': 'kaiming_normal', '2': 'xavier_normal'}

    Source: He et al., 2015; Glorot and Bengio, 2010; Klambauer et al., 2017.
    """
    if method != "auto" and method not in METHODS:
        raise ValueError(
            f"initialize: expected `method` auto, {', '.join(METHODS)}, got {method!r}"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"initialize: expected a module `model`, got {type(model).__name__}")
    modules = list(model.named_modules())
    layers = [
        (name, layer, _activation_after(position, modules))
        for position, (name, layer) in enumerate(modules)
        if isinstance(layer, _LAYERS) and not isinstance(layer, _ATTENTION_PROJECTION)
    ]
    for name, layer, _ in layers:
        _check_weight(name, layer)
    used = {}
    for name, layer, activation in layers:
        used[name] = _method_for(activation) if method == "auto" else method
        weight = layer.weight.detach()
        if method == "auto" and isinstance(activation, nn.LeakyReLU):
            kaiming_normal_(weight, a=activation.negative_slope)
        else:
            METHODS[used[name]](weight)
        if parametrize.is_parametrized(layer, "weight"):
            layer.weight = weight  # through the parametrization, back to what it is made of
        if layer.bias is not None:
            zeros_(layer.bias)
    return used


def _check_weight(name: str, layer: Any) -> None:
    """Raise where a layer's weight cannot be set."""
    if hasattr(layer, "weight_g"):
        raise ValueError(
            f"initialize: {name} has torch.nn.utils.weight_norm, which overwrites its weight; "
            "use torch.nn.utils.parametrizations.weight_norm"
        )
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"initialize: {name} is lazy and has no weight yet; run the model first")
    if parametrize.is_parametrized(layer, "weight"):
        for step in layer.parametrizations.weight:
            if not hasattr(step, "right_inverse"):
                kind = type(step).__name__
                raise ValueError(f"initialize: {name} has a {kind}, which has no `right_inverse`")


_LAYERS = (nn.Linear, AnyConv)
_ATTENTION_PROJECTION = nn.modules.linear.NonDynamicallyQuantizableLinear
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus)
_SATURATING = (nn.Sigmoid, nn.Tanh, nn.Softmax, nn.LogSoftmax)


def _activation_after(position: int, modules: list[tuple[str, nn.Module]]) -> nn.Module | None:
    for _, module in modules[position + 1 :]:
        if isinstance(module, (*_RECTIFIERS, nn.SELU, *_SATURATING)):
            return module
        if isinstance(module, _LAYERS):
            return None
    return None


def _method_for(activation: nn.Module | None) -> str:
    if isinstance(activation, _RECTIFIERS):
        return "kaiming_normal"
    return "lecun_normal" if isinstance(activation, nn.SELU) else "xavier_normal"


def _kaiming_std(name: str, tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode.lower() not in ("fan_in", "fan_out"):
        raise ValueError(f'{name}: expected `mode` "fan_in" or "fan_out", got {mode!r}')
    fan = _fans(name, tensor)[mode.lower() == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(max(fan, 1))


def _fans(name: str, tensor: Tensor) -> tuple[int, int]:
    """How many inputs reach an output of the layer, and how many outputs an input reaches."""
    if tensor.ndim < 2:
        raise ValueError(
            f"{name}: expected a `tensor` with at least 2 dimensions, got shape "
            f"{tuple(tensor.shape)}"
        )
    field = math.prod(tensor.shape[2:])
    return tensor.shape[1] * field, tensor.shape[0] * field
