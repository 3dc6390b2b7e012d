"""How the gradient reaches each layer, what activations do to it, and a verdict in words."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchref.autograd import opmath
from torchref.diagnostics.drawing import new_figure
from torchref.internals import AnyConv
from torchref.nn import LinearActDropout
from torchref.nn.activation import SELU_ALPHA, SELU_SCALE
from torchref.nn.batch_norm import _BatchNormAct

UPDATE_RATIO = 1e-3  # Karpathy's rule of thumb for a step: a thousandth of the weights

COLORS = ("#9ecae1", "#5aa2d0", "#2878b8")  # of the first, a middle and the last reading
ZERO = "#d95f02"

FLAT = 0.05  # of the largest slope: sigmoid for |x| > 4.4, tanh for |x| > 2.2

# Each pair is where a verdict begins to be possible, and where it is certain.

# Early layers' gradient over late layers'. Healthy networks of 3 to 50 layers lie above 0.1; at
# 0.001 early layers need a thousand steps for the way that late ones make in one.
SHRINKS = (0.05, 1e-3)
GROWS = tuple(1 / limit for limit in SHRINKS)

# Gradient over weights: at 100 a step of SGD with its usual rate of 0.01 is as long as the weights
# themselves. Healthy networks lie below 1.
OVERTHROWS = (10.0, 100.0)

# A step over the weights: as long as they are, it leaves nothing of them. Adam's are its rate times
# the root of their number, a few hundredths of them.
OVERSHOOTS = (0.3, 1.0)

# Shares of units and of outputs, in the worst layer. In a deep ReLU network with He initialization
# and no batch norm a third of the units may be dead from the start, and it still learns.
DIES = (0.3, 0.75)
SATURATES = (0.4, 0.6)

REMEDIES = {
    "vanishing": (
        "activation functions whose slope is not small: ReLU, Leaky ReLU, ELU",
        "weight initialization: Xavier for tanh, He for ReLU (torchref.nn.init.initialize)",
        "batch normalization",
        "residual connections",
    ),
    "exploding": (
        "weight initialization: Xavier for tanh, He for ReLU (torchref.nn.init.initialize)",
        "normalized inputs (torchref.data.Standard)",
        "batch normalization",
        "a smaller learning rate, and gradient clipping (torchref.optim.clip_grad_norm_)",
    ),
    "dead": (
        "Leaky ReLU or ELU, which let a gradient through where the input is negative",
        "weight initialization: He, with biases of 0 (torchref.nn.init.initialize)",
        "batch normalization",
        "a smaller learning rate: one long step can push a unit below 0 for good",
    ),
    "saturated": (
        "activation functions that do not saturate: ReLU, Leaky ReLU, ELU",
        "weight initialization: Xavier for sigmoid and tanh (torchref.nn.init.initialize)",
        "batch normalization, normalized inputs (torchref.data.Standard)",
    ),
    "unclear": (),
    "healthy": (),
}


class LayerFlow(NamedTuple):
    """What one layer receives.

    ``update_ratio`` is the norm of a step's change of the weights over the norm of the weights.
    ``saturated`` is the share of outputs of the layer's sigmoid, tanh, ELU or SELU whose slope is
    below ``FLAT`` of its maximum, ``dead`` the share of the units of its ReLU or ReLU6 that were 0
    for every sample; None where the layer has no such activation.
    """

    layer: str
    grad_norm: float
    weight_norm: float
    update_ratio: float
    saturated: float | None
    dead: float | None


class Verdict(NamedTuple):
    """``vanishing``, ``exploding``, ``dead``, ``saturated``, ``healthy`` or ``unclear``.

    ``reason`` has the numbers it rests on, ``remedies`` are the course's, in its order.
    """

    name: str
    reason: str
    remedies: tuple[str, ...]

    def __str__(self) -> str:
        numbered = (f"\n  {i}. {remedy}" for i, remedy in enumerate(self.remedies, 1))
        return f"{self.name}: {self.reason}{''.join(numbered)}"


class GradientFlow(NamedTuple):
    """The layers, from input to output, and what is to be said about them."""

    layers: tuple[LayerFlow, ...]

    @property
    def verdict(self) -> Verdict:
        """The first that holds of exploding, dead, vanishing, saturated, unclear, healthy."""
        layers = self.layers
        if (doubt := _not_to_be_judged(layers)) is not None:
            return _verdict("unclear", doubt)
        doubts = []
        for check in (_exploding, _dead, _vanishing, _saturated):
            suspicion = check(layers)
            if suspicion is None:
                continue
            name, reason, certain = suspicion
            if certain:
                return _verdict(name, reason)
            doubts.append(f"possibly {name}: {reason}")
        if doubts:
            return _verdict("unclear", "; ".join(doubts))
        return _verdict("healthy", _compared(layers))

    def __str__(self) -> str:
        width = max([5, *(len(layer.layer) for layer in self.layers)])
        head = f"{'layer':<{width}}  gradient   weights    update  saturated   dead"
        rows = (
            f"{x.layer:<{width}}  {x.grad_norm:8.1e}  {x.weight_norm:8.1e}  {x.update_ratio:8.1e}"
            f"  {_percent(x.saturated):>9}  {_percent(x.dead):>5}"
            for x in self.layers
        )
        return "\n".join([head, *rows])


def gradient_flow(
    model: nn.Module, loss: Callable[[], Tensor], *, lr: float = 0.01
) -> GradientFlow:
    r"""Measure how the gradient of one batch reaches each layer of a network.

    A layer is a module that itself has weights of two dimensions or more. Of each, in the order of
    the forward pass,

    .. math::
        \lVert g \rVert, \qquad \lVert w \rVert, \qquad
        \frac{\eta \lVert g \rVert}{\lVert w \rVert}

    where the last is what a step of plain SGD with rate :math:`\eta` would change, and should be
    near 0.001; and the share of saturated outputs and of dead units of its activation. A
    convolution's units are its channels. Activations are seen that are modules, torch's or ours,
    alone or fused; one that is called as a function inside ``forward`` is not, nor is any inside a
    network that runs compiled.

    Gradients and buffers, such as a running mean, stay as they were; random numbers are drawn as
    ``loss`` does.

    Args:
        model: in the mode that it is to be judged in.
        loss: computes the loss of a batch with ``model``; called once.
        lr: :math:`\eta`, finite, > 0.

    Returns:
        :attr:`GradientFlow.layers`, and :attr:`GradientFlow.verdict`.

    Raises:
        ValueError: ``lr`` is out of its range, ``model`` has no weight that learns, or the loss is
            no scalar or does not depend on one.

    Example:
        >>> layers = []
        >>> for _ in range(20):
        ...     layers += [torch.nn.Linear(16, 16), torch.nn.Sigmoid()]
        >>> net = torch.nn.Sequential(*layers)
        >>> x = torch.randn(32, 16)
        >>> flow = gradient_flow(net, lambda: net(x).square().mean())
        >>> flow.verdict.name
        'vanishing'

    Source: the course, "The vanishing gradient problem" and "Common activation functions"; the
    ratio: Karpathy, "CS231n: Neural networks, part 3", 2015.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"gradient_flow: expected `lr` finite and > 0, got {lr}")
    probe = Probe(model)
    weights = [w for of in probe.weights.values() for w in of if w.requires_grad]
    grads = probe.gradients("gradient_flow", loss, weights)
    layers = []
    for _, row in probe.rows(grads):
        update_ratio = lr * row["grad_norm"] / row["weight_norm"]
        layers.append(as_numbers({**row, "update_ratio": update_ratio}))
    return GradientFlow(tuple(LayerFlow(**layer) for layer in layers))


class Probe:
    """Hooks that see the forward pass; what they gather stays on the device.

    Several forward passes add up, until :attr:`flat` and :attr:`alive` are cleared.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, str] = {}
        self.weights: dict[nn.Module, list[Tensor]] = {}
        seen = set()
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.ndim > 1 and p not in seen]
            if own:
                # what a parametrization is made of belongs to the layer that it is a part of
                name = name.partition(".parametrizations.")[0]
                layer = model.get_submodule(name)
                self.names[layer] = name or type(layer).__name__
                self.weights.setdefault(layer, []).extend(own)
                seen.update(own)
        self.called: dict[nn.Module, int] = {}
        self.flat: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # flat outputs, and all
        self.alive: dict[tuple[nn.Module, nn.Module, int], Tensor] = {}
        self._layer: nn.Module | None = None
        self._handles: list[Any] = []

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        for module in self.model.modules():
            if module in self.weights:
                self._handles.append(module.register_forward_pre_hook(self._enter_layer))
            if _kind(module):
                self._handles.append(module.register_forward_hook(self._see_activation))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layer = None

    def gradients(
        self, name: str, loss: Callable[[], Tensor], weights: Sequence[Tensor]
    ) -> dict[Tensor, Tensor]:
        """The gradients of a loss that is seen on its way, without a trace in ``.grad``."""
        if not weights:
            raise ValueError(f"{name}: expected a `model` with weights that require a gradient")
        self.attach()
        try:
            with _buffers_kept(self.model), torch.enable_grad():
                value = loss()
                _check_scalar(name, value)
                found = torch.autograd.grad(value.sum(), weights, allow_unused=True)
        finally:
            self.detach()
        if all(grad is None for grad in found):
            raise ValueError(f"{name}: expected a `loss` that depends on the weights of `model`")
        return {w: g for w, g in zip(weights, found, strict=True) if g is not None}

    @property
    def layers(self) -> list[nn.Module]:
        """In the order of their first calls; what was not called follows its neighbour."""
        place, places = -1, {}
        for layer in self.weights:
            place = self.called.get(layer, place)
            places[layer] = place
        return sorted(places, key=places.__getitem__)

    def rows(self, grads: Mapping[Tensor, Tensor]) -> list[tuple[nn.Module, dict[str, Any]]]:
        """The layers that have a gradient, each with its numbers, which are tensors."""
        rows = []
        for layer in self.layers:
            weights = [w for w in self.weights[layer] if w in grads]
            if weights:
                row = {"grad_norm": norm([grads[w] for w in weights]), "weight_norm": norm(weights)}
                shares = {"saturated": self._saturated(layer), "dead": self._dead(layer)}
                rows.append((layer, {"layer": self.names[layer], **row, **shares}))
        return rows

    def alive_units(self) -> list[tuple[str, str, Tensor]]:
        """What :attr:`alive` holds, by the names of the modules, for a checkpoint."""
        names = {module: name for name, module in self.model.named_modules()}
        return [(names[of], names[module], x) for (of, module, _), x in self.alive.items()]

    def set_alive_units(
        self, units: Iterable[tuple[str, str, Tensor]], device: torch.device
    ) -> None:
        named = self.model.get_submodule
        self.alive = {(named(of), named(module), len(x)): x.to(device) for of, module, x in units}

    def _enter_layer(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():  # else the graph would keep what is seen here
            self._layer = module
            self.called.setdefault(module, len(self.called))

    @torch.no_grad()
    def _see_activation(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._layer is None or not output.numel():
            return
        y, kind = output.detach(), _kind(module)
        if kind == "relu":
            self._see_units(module, y)
        else:
            slope, counts = _slope(module, kind, opmath(y))
            flat, total = self.flat.get(self._layer, (0, 0))
            self.flat[self._layer] = (flat + (counts & (slope < FLAT)).sum(), total + counts.sum())

    def _see_units(self, module: nn.Module, y: Tensor) -> None:
        assert self._layer is not None
        dim = -1
        if isinstance(self._layer, AnyConv):
            dim -= len(self._layer.kernel_size)
        dim = dim if y.ndim >= -dim else -1  # after pooling and flattening
        alive = (y != 0).movedim(dim, 0).flatten(1).any(1)
        key = (self._layer, module, len(alive))
        self.alive[key] = self.alive[key] | alive if key in self.alive else alive

    def _saturated(self, layer: nn.Module) -> Tensor | None:
        if layer not in self.flat:
            return None
        flat, total = self.flat[layer]
        return flat / total

    def _dead(self, layer: nn.Module) -> Tensor | None:
        found = [alive for (of, _, _), alive in self.alive.items() if of is layer]
        return 1 - torch.cat(found).float().mean() if found else None


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    names = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, buffers in names:  # some are assigned anew, as the old one times a factor
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _check_scalar(name: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
        raise ValueError(f"{name}: expected `loss` to return a scalar tensor, got {got}")
    if not loss.requires_grad:
        raise ValueError(f"{name}: expected a `loss` with a gradient, got one that is detached")


def as_numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its tensors read."""
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()}


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of several tensors as one; squares neither under- nor overflow."""
    parts = torch.stack([_norm(opmath(x.detach())) for x in tensors])
    return parts[0] if len(parts) == 1 else _norm(parts)


def _norm(x: Tensor) -> Tensor:
    x = x.coalesce().values() if x.is_sparse else x
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    scale = largest.clamp_min(torch.finfo(x.dtype).tiny)
    return scale * torch.linalg.vector_norm(x / scale)


def plot_gradient_flow(flow: GradientFlow | Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw gradient norm and update-to-weight ratio of each layer, on log axes, into a file.

    Args:
        flow: of one batch, or the ``rows`` of a :class:`torchref.training.GradientFlowCallback`,
            of which the first reading, the last and one in the middle are drawn.
        path: of the picture; its ending decides the format.

    Raises:
        ValueError: there is nothing to draw.
    """
    readings = _readings(flow)
    if not readings:
        raise ValueError("plot_gradient_flow: expected at least one reading in `flow`")
    names = list(dict.fromkeys(row["layer"] for rows in readings.values() for row in rows))
    figure, (left, right) = new_figure((10, 4), columns=2)
    for axes, value in ((left, "grad_norm"), (right, "update_ratio")):
        for (label, rows), color in zip(readings.items(), COLORS[-len(readings) :], strict=True):
            of = {row["layer"]: row[value] for row in rows}  # one that was frozen has none
            _draw(axes, [of.get(name, math.nan) for name in names], label, color)
    left.set_title("gradient norm")
    right.set_title("update-to-weight ratio")
    label = f"rule of thumb ({UPDATE_RATIO:g})"
    right.axhline(UPDATE_RATIO, color="0.4", linestyle="--", linewidth=1, label=label)
    for axes in (left, right):
        _style(axes, names)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _readings(flow: GradientFlow | Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By the words of the legend."""
    if isinstance(flow, GradientFlow):
        return {"": [layer._asdict() for layer in flow.layers]} if flow.layers else {}
    steps = list(dict.fromkeys(row["step"] for row in flow))
    kept = list(dict.fromkeys(steps[i] for i in (0, len(steps) // 2, -1))) if steps else []
    return {f"step {step}": [row for row in flow if row["step"] == step] for step in kept}


def _draw(axes: Any, values: Sequence[float], label: str, color: str) -> None:
    line = [v if 0 < v < math.inf else math.nan for v in values]
    axes.plot(line, color=color, marker=".", label=label)
    if zeros := [i for i, v in enumerate(values) if v == 0]:
        bottom = axes.get_xaxis_transform()  # a log axis has no place for 0
        known = "exactly 0" in axes.get_legend_handles_labels()[1]
        label = "_" if known else "exactly 0"
        axes.plot(zeros, [0.02] * len(zeros), "x", color=ZERO, label=label, transform=bottom)


def _style(axes: Any, names: list[str]) -> None:
    every = -(-len(names) // 20)
    places = range(0, len(names), every)
    long = len(names) > 10 or max(map(len, names)) > 6
    axes.set_yscale("log")
    axes.set_xticks(places, [names[i] for i in places], rotation=90 if long else 0)
    axes.set_xlabel("layer, from input to output")


_KINDS = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ELU: "elu",
    nn.SELU: "selu",
}


def _kind(module: nn.Module) -> str | None:
    """Which activation a module is or ends with; None for one that is not looked at."""
    if isinstance(module, LinearActDropout | _BatchNormAct):
        return module.activation if module.activation in _KINDS.values() else None
    return next((kind for cls, kind in _KINDS.items() if isinstance(module, cls)), None)


def _slope(module: nn.Module, kind: str | None, y: Tensor) -> tuple[Tensor, Tensor]:
    """The slope over its maximum, from the output, and which elements count."""
    counts = torch.ones_like(y, dtype=torch.bool)
    if isinstance(module, LinearActDropout) and module.training and module.p:
        counts, y = y != 0, y * (1 - module.p)  # without what dropout did
    if kind == "sigmoid":
        return 4 * y * (1 - y), counts
    if kind == "tanh":
        return 1 - y * y, counts
    scale, alpha = SELU_SCALE, SELU_ALPHA
    if kind == "elu":
        scale, alpha = 1.0, _alpha(module)
    steepest = scale * max(alpha, 1.0)
    return torch.where(y > 0, scale, y + scale * alpha) / steepest, counts


def _alpha(module: Any) -> float:
    """Of an ELU."""
    return float(module.alpha if isinstance(module, nn.ELU) else module.param or 1.0)


# The checks: a name and a reason where there is a suspicion, and whether it is certain.
Suspicion = tuple[str, str, bool] | None


def _not_to_be_judged(layers: Sequence[LayerFlow]) -> str | None:
    if len(layers) < 2:
        plural = "" if len(layers) == 1 else "s"
        return f"{len(layers)} layer{plural} with a gradient; a comparison needs 2 or more"
    for x in layers:
        if x.weight_norm == 0:
            return f"the weights of {x.layer} are all 0; see check_symmetry"
    return None


def _exploding(layers: Sequence[LayerFlow]) -> Suspicion:
    for x in layers:
        if not math.isfinite(x.grad_norm):
            return "exploding", f"the gradient of {x.layer} is {x.grad_norm}", True
    x = max(layers, key=lambda x: x.grad_norm / x.weight_norm)
    ratio = x.grad_norm / x.weight_norm
    if ratio > OVERTHROWS[0]:
        reason = (
            f"the gradient of {x.layer} is {_shown(ratio)} times as long as its weights "
            f"({_shown(x.grad_norm)} and {_shown(x.weight_norm)}; certain from {OVERTHROWS[1]:g})"
        )
        return "exploding", reason, ratio >= OVERTHROWS[1]
    x = max(layers, key=lambda x: x.update_ratio if math.isfinite(x.update_ratio) else math.inf)
    if not x.update_ratio <= OVERSHOOTS[0]:
        reason = (
            f"a step of {x.layer} is {_shown(x.update_ratio)} times as long as its weights "
            f"(certain from {OVERSHOOTS[1]:g})"
        )
        return "exploding", reason, not x.update_ratio < OVERSHOOTS[1]
    early, late = _ends(layers)
    if late and early > GROWS[0] * late:
        return (
            "exploding",
            _compared(layers, f"; certain from {GROWS[1]:g}"),
            early >= GROWS[1] * late,
        )
    return None


def _dead(layers: Sequence[LayerFlow]) -> Suspicion:
    worst = max(layers, key=lambda x: x.dead or 0.0)
    share, layer = worst.dead or 0.0, worst.layer
    if share < DIES[0]:
        return None
    reason = (
        f"{_percent(share)} of the units after {layer} are 0 for every sample and get no gradient "
        f"(certain from {_percent(DIES[1])})"
    )
    return "dead", reason, share >= DIES[1]


def _vanishing(layers: Sequence[LayerFlow]) -> Suspicion:
    early, late = _ends(layers)
    if late == 0:
        return "vanishing", "late layers receive a gradient of 0", False
    if early > SHRINKS[0] * late:
        return None
    reason = _compared(layers, f"; certain up to {SHRINKS[1]:g}")
    return "vanishing", reason, early <= SHRINKS[1] * late


def _saturated(layers: Sequence[LayerFlow]) -> Suspicion:
    hidden = layers[:-1]  # a confident output is no fault
    worst = max(hidden, key=lambda x: x.saturated or 0.0)
    share, layer = worst.saturated or 0.0, worst.layer
    if share < SATURATES[0]:
        return None
    reason = (
        f"{_percent(share)} of the outputs after {layer} lie where the activation is flat, with "
        f"less than {_percent(FLAT)} of its slope (certain from {_percent(SATURATES[1])})"
    )
    return "saturated", reason, share >= SATURATES[1]


def _ends(layers: Sequence[LayerFlow]) -> tuple[float, float]:
    """The median gradient of the first and of the last third of the layers."""
    third = max(len(layers) // 3, 1)
    norms = [x.grad_norm for x in layers]
    return median(norms[:third]), median(norms[-third:])


def _compared(layers: Sequence[LayerFlow], limit: str = "") -> str:
    early, late = _ends(layers)
    ratio = early / late if late else math.inf
    return (
        f"early layers receive {_shown(ratio)} times the gradient of late ones ({_shown(early)} "
        f"and {_shown(late)}, in {len(layers)} layers{limit})"
    )


def _verdict(name: str, reason: str) -> Verdict:
    return Verdict(name, reason, REMEDIES[name])


def _shown(x: float) -> str:
    return f"{x:.2g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
