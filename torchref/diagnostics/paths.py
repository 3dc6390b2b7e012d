"""How optimizers go down a ravine, and how averages smooth a series."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import torchref.optim
from torchref.diagnostics.drawing import new_figure

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# Rates near the largest that each takes in its stride on the ravine; SGD leaves it at 0.5.
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": partial(torchref.optim.SGD, lr=0.45),
    "momentum": partial(torchref.optim.SGD, lr=0.1, momentum=0.8),
    "RMSProp": partial(torchref.optim.RMSprop, lr=0.3, alpha=0.9),
    "Adam": partial(torchref.optim.Adam, lr=0.8),
}
COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd")


def ravine(point: Tensor) -> Tensor:
    r"""A valley that is 40 times as curved across as along.

    .. math::
        f(x, y) = \frac{x^2}{20} + 2 y^2, \quad
        \nabla f = (x / 10,\ 4 y), \quad
        \kappa = \frac{4}{1 / 10} = 40

    Plain gradient descent diverges from a learning rate of 2 / 4 on, for the steep direction, and
    with less crawls along the flat one: by a factor 1 - lr / 10 each step.

    Args:
        point: (..., 2).

    Returns:
        (...).

    Example:
        >>> ravine(torch.tensor([10.0, 1.0]))
        tensor(7.)

    Source: the course, "Gradient Descent with momentum", "Example Scenario".
    """
    x, y = point.unbind(-1)
    return x.square() / 20 + 2 * y.square()


def optimizer_paths(
    optimizers: Mapping[str, Optimizer] = OPTIMIZERS,
    function: Callable[[Tensor], Tensor] = ravine,
    *,
    start: Sequence[float] = (-9.0, 1.8),
    steps: int = 40,
) -> dict[str, Tensor]:
    """The points that optimizers pass from one start on a function of two numbers.

    Args:
        optimizers: by name, from parameters to an optimizer; by default torchref's SGD, SGD with
            momentum, RMSprop and Adam.
        function: (2,) to a scalar.
        start: two numbers.
        steps: > 0.

    Returns:
        (steps + 1, 2) float64 for each name, the start included.

    Raises:
        ValueError: ``steps`` is not positive, or ``start`` is not two numbers.

    Example:
        >>> paths = optimizer_paths(steps=1)
        >>> paths["SGD"][1]  # (-9, 1.8) - 0.45 * (-0.9, 7.2)
        tensor([-8.5950, -1.4400], dtype=torch.float64)

    Source: the course, "Gradient Descent with momentum", "RMSProp" and "Adam method for gradient
    descent".
    """
    if steps < 1:
        raise ValueError(f"optimizer_paths: expected `steps` > 0, got {steps}")
    if len(start) != 2:
        raise ValueError(f"optimizer_paths: expected `start` of two numbers, got {tuple(start)}")
    return {name: _follow(make, function, start, steps) for name, make in optimizers.items()}


def _follow(
    make: Optimizer, function: Callable[[Tensor], Tensor], start: Sequence[float], steps: int
) -> Tensor:
    point = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = make([point])
    points = [point.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        function(point).backward()
        optimizer.step()
        points.append(point.detach().clone())
    return torch.stack(points)


def smooth(series: Tensor, decay: float, bias_correction: bool = True) -> Tensor:
    r"""The exponentially weighted average of a series up to each of its values.

    .. math::
        v_t = \beta v_{t-1} + (1 - \beta) x_t, \quad v_0 = 0
        \qquad
        \hat v_t = \frac{v_t}{1 - \beta^t}

    Args:
        series: (steps, ...) floating point, one value or more.
        decay: :math:`\beta` in [0, 1): about :math:`1 / (1 - \beta)` values count.
        bias_correction: return :math:`\hat v_t` instead of :math:`v_t`, which starts near 0.

    Raises:
        ValueError: the series is empty, or ``decay`` is out of its range.
        TypeError: the series is not floating point.

    Example:
        >>> smooth(torch.tensor([4.0, 8.0]), 0.5)
        tensor([4.0000, 6.6667])
        >>> smooth(torch.tensor([4.0, 8.0]), 0.5, bias_correction=False)
        tensor([2., 5.])

    Source: the course, "Exponentially weighted average".
    """
    if series.ndim == 0 or len(series) == 0:
        raise ValueError(f"smooth: expected `series` of values, got shape {tuple(series.shape)}")
    value = torch.empty_like(series[0])
    average = torchref.optim.ExponentialMovingAverage([value], decay)
    averages = []
    for x in series.detach():
        value.copy_(x)
        average.update()
        averages += average.average(bias_correction)
    return torch.stack(averages)


def plot_paths(
    paths: Mapping[str, Tensor],
    path: str | Path,
    function: Callable[[Tensor], Tensor] = ravine,
) -> None:
    """Draw paths over the function's contours, a panel for each, into a file.

    Args:
        paths: as :func:`optimizer_paths` returns them, at least one.
        path: of the picture; its ending decides the format.
        function: (..., 2) to (...), what the paths went down.
    """
    figure, _ = new_figure((9, 2 * len(paths) + 0.4), rows=len(paths), columns=1)
    points = torch.cat(list(paths.values()))
    x, y = (_span(*ends) for ends in zip(*(p.tolist() for p in points.aminmax(dim=0)), strict=True))
    heights = function(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)).numpy()
    low, high = heights.min(), heights.max()
    levels = [low + (high - low) * (i / 14) ** 2 for i in range(1, 15)]
    for i, (axes, (name, points)) in enumerate(zip(figure.axes, paths.items(), strict=True)):
        axes.contour(x.numpy(), y.numpy(), heights, levels=levels, colors="0.75", linewidths=0.8)
        color = COLORS[i % len(COLORS)]
        axes.plot(*points.T.tolist(), color=color, marker=".", markersize=5, linewidth=1.2)
        axes.plot(*points[0].tolist(), marker="o", color="black", markersize=5)
        axes.plot(*points[-1].tolist(), marker="*", color="black", markersize=9)
        end = function(points[-1]).item()
        axes.set_title(f"{name}: f = {end:.2g} after {len(points) - 1} steps", fontsize="medium")
        axes.set_ylabel("y")
        axes.grid(visible=False)
    figure.axes[-1].set_xlabel("x")
    figure.savefig(path, dpi=120)


def _span(low: float, high: float) -> Tensor:
    margin = 0.08 * (high - low) or 1.0
    return torch.linspace(low - margin, high + margin, 200, dtype=torch.float64)


def plot_smoothing(
    series: Tensor, path: str | Path, decays: Sequence[float] = (0.5, 0.9, 0.98)
) -> None:
    """Draw a series and its averages, with and without bias correction, into a file.

    Args:
        series: (steps,) floating point.
        path: of the picture; its ending decides the format.
        decays: in [0, 1), a color each.

    Raises:
        ValueError: ``series`` has another number of dimensions.
    """
    if series.ndim != 1:
        raise ValueError(f"plot_smoothing: expected `series` (steps,), got {tuple(series.shape)}")
    figure, axes = new_figure((9, 4))
    steps = range(1, len(series) + 1)
    axes.plot(steps, series.tolist(), ".", color="0.7", markersize=4, label="values")
    for i, decay in enumerate(decays):
        color = COLORS[i % len(COLORS)]
        label = rf"$\beta$ = {decay:g}"
        axes.plot(steps, smooth(series, decay).tolist(), color=color, label=label)
        raw = smooth(series, decay, bias_correction=False).tolist()
        axes.plot(steps, raw, color=color, linestyle=":", label=f"{label}, not corrected")
    axes.set_title("exponentially weighted averages")
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
