"""Looks before a run: can the network learn one batch, and which learning rates make sense?"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchref.diagnostics.drawing import new_figure
from torchref.training.checks import check_range
from torchref.training.data_module import DataModule
from torchref.training.module import Classifier, Supervised

SMOOTHING = 0.9
NO_FALL = 1e-3  # of the loss may be noise
LEARNED = 0.1  # of the loss may be left; what is wired wrongly hardly gets below 1/2


@dataclass(frozen=True)
class OverfitCheck:
    """What became of one batch; ``accuracy`` is None for values."""

    passed: bool
    steps: int
    first_loss: float
    last_loss: float
    accuracy: float | None

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        right = "" if self.accuracy is None else f", accuracy {self.accuracy:.4f}"
        return (
            f"{verdict}: one batch, {self.steps} steps: loss {self.first_loss:.4g} -> "
            f"{self.last_loss:.4g}{right}"
        )


def overfit_one_batch(
    model: Supervised, batch: tuple[Any, Tensor], steps: int = 300
) -> OverfitCheck:
    """Train a copy of the model on one batch until it knows it by heart, which it should.

    A network that cannot is too small, or something is wrong: a loss or gradient, targets that do
    not belong to their samples, a learning rate, an initialization. Dropout and penalties, which
    are there to prevent it, are off in the copy.

    It passes when a tenth of the first loss is left at most and, of classes, each is right. Samples
    of which equals have different targets cannot be learned.

    Args:
        model: stays as it is.
        batch: samples and targets, two or more.
        steps: at most, > 0; it ends as soon as it passes.

    Raises:
        ValueError: ``steps`` is out of its range, or there is no sample.

    Example:
        >>> from torchref.training import MLPClassifier
        >>> model = MLPClassifier(4, ["no", "yes"], normalize="none")
        >>> overfit_one_batch(model, (torch.randn(16, 4), torch.arange(16) % 2)).passed
        True

    Source: Karpathy, "A Recipe for Training Neural Networks", 2019.
    """
    check_range("steps", steps, "> 0", steps > 0)
    x, y = batch
    check_range("batch", len(y), "a sample or more", len(y) > 0)
    model = deepcopy(model).train()
    model.l1 = model.l2 = 0.0
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    optimizer = model.configure_optimizers()
    first = last = float("nan")
    accuracy = None
    for step in range(steps):
        loss, output = model.cost(x, y)
        last = loss.item()
        first = last if step == 0 else first
        if isinstance(model, Classifier):
            accuracy = (output.argmax(-1) == y).double().mean().item()
        if last <= LEARNED * first and accuracy in (None, 1.0):
            return OverfitCheck(True, step, first, last, accuracy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return OverfitCheck(False, steps, first, last, accuracy)


def learning_rate_range(
    model: Supervised,
    data: DataModule,
    path: str | Path | None = None,
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
) -> tuple[list[float], list[float], float | None]:
    """The loss while the learning rate grows from step to step, and the rate where it falls most.

    A copy of the model trains; nothing is applied to the model itself, for the suggestion is a
    hint, often too high for the whole of a training. It ends early when the loss is four times the
    least. (Lightning's finder, 2.6, halves the first losses of its average, and so may see the
    steepest fall where nothing falls.)

    Args:
        model: stays as it is.
        data: whose training part it steps through.
        path: of a picture, if one is wanted; its ending decides the format.
        low, high: the first and the last rate, > 0.
        steps: how many rates, >= 20.

    Returns:
        The rates, the losses as an exponentially weighted average, and the suggestion: None where
        the loss never fell by a thousandth.

    Raises:
        ValueError: ``steps``, ``low`` or ``high`` is out of its range.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.
    """
    check_range("steps", steps, ">= 20", steps >= 20)
    check_range("high", high, "finite and > 0", 0 < high < float("inf"))
    check_range("low", low, f"> 0 and below {high}", 0 < low < high)
    model = deepcopy(model).train()
    optimizer = model.configure_optimizers()
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    for step, batch in enumerate(islice(_endless(data), steps)):
        rate = low * (high / low) ** (step / (steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model.cost(*batch)[0] + model.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = SMOOTHING * average + (1 - SMOOTHING) * loss.item()
        smooth = average / (1 - SMOOTHING ** (step + 1))
        if not smooth < 4 * min(losses, default=smooth):  # NaN, too
            break
        rates.append(rate)
        losses.append(smooth)
    suggestion = _steepest(rates, losses)
    if path is not None:
        _draw(rates, losses, suggestion, path)
    return rates, losses, suggestion


def _endless(data: DataModule) -> Iterator[tuple[Any, Tensor]]:
    for epoch in count():
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]
        yield from loader


def _steepest(rates: list[float], losses: list[float]) -> float | None:
    """Where the loss falls most over a tenth of the steps, all of the same ratio of rates."""
    width = max(len(losses) // 10, 1)
    falls = [a - b for a, b in zip(losses, losses[width:], strict=False)]
    if not falls or max(falls) <= NO_FALL * losses[0]:
        return None
    return rates[falls.index(max(falls)) + width // 2]


def _draw(rates: list[float], losses: list[float], suggestion: float | None, path: Any) -> None:
    figure, axes = new_figure((7, 4))
    axes.plot(rates, losses, color="#1f77b4", label="training loss, averaged")
    if suggestion is not None:
        label = f"steepest fall: {suggestion:.2g}"
        axes.axvline(suggestion, color="0.4", linestyle="--", linewidth=1, label=label)
    axes.set_xscale("log")
    if losses:  # none where the first was not finite
        axes.set_ylim(top=losses[0] + 0.5 * (losses[0] - min(losses)))
    axes.set_xlabel("learning rate")
    axes.set_title("loss while the learning rate grows")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
