"""Exponentially weighted averages of tensors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchref._checks import require_floating, require_number
from torchref.autograd import opmath


class ExponentialMovingAverage:
    r"""A running average of tensors in which a value's weight fades with its age.

    .. math::
        v_t = \beta v_{t-1} + (1 - \beta) x_t, \quad v_0 = 0
        \qquad
        \hat v_t = \frac{v_t}{1 - \beta^t}

    The value from :math:`k` updates ago weighs :math:`(1 - \beta) \beta^k`. These weights sum to
    :math:`1 - \beta^t`, so that :math:`v_t` starts out too close to zero; :math:`\hat v_t` is
    corrected for it.

    Averages of half-precision tensors are kept in float32: rounded to half, an increment of
    :math:`(1 - \beta)` of a value would be lost.

    Args:
        params: the floating point or complex tensors to follow, for instance
            ``model.parameters()``. They are read at each :meth:`update` and never written.
        decay: :math:`\beta` in [0, 1), the share of the average kept at each update.

    Raises:
        ValueError: ``params`` is empty, or ``decay`` is out of range.
        TypeError: ``params`` is a single tensor, or holds something else than tensors of floating
            point or complex numbers.

    Example:
        >>> import torch, torchref
        >>> x = torch.tensor([4.0])
        >>> ema = torchref.optim.ExponentialMovingAverage([x], decay=0.75)
        >>> ema.effective_window
        4.0
        >>> ema.update()
        >>> ema.average()
        [tensor([4.])]
        >>> ema.average(bias_correction=False)
        [tensor([1.])]

    Source: Brown, "Exponential smoothing for predicting demand", 1956; the correction is Kingma
    and Ba's, "Adam: a method for stochastic optimization", 2015.
    """

    def __init__(self, params: Iterable[Tensor], decay: float) -> None:
        if isinstance(params, Tensor):
            raise TypeError(
                "ExponentialMovingAverage: expected `params` to be an iterable of tensors, "
                "got a Tensor"
            )
        self.params = list(params)
        self.decay = _checked(decay)
        self.num_updates = 0
        if not self.params:
            raise ValueError("ExponentialMovingAverage: expected tensors in `params`, got none")
        for x in self.params:
            if not isinstance(x, Tensor):
                kind = type(x).__name__
            elif not (x.is_floating_point() or x.is_complex()):
                kind = str(x.dtype)
            else:
                continue
            raise TypeError(
                "ExponentialMovingAverage: expected floating point or complex tensors in "
                f"`params`, got {kind}"
            )
        self.averages = [torch.zeros_like(opmath(x.detach())) for x in self.params]

    @property
    def effective_window(self) -> float:
        """The number of recent values that carry most of the weight, 1 / (1 - decay)."""
        return 1 / (1 - self.decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take the tensors' current values into the averages."""
        self.num_updates += 1
        for v, x in zip(self.averages, self.params, strict=True):
            v.mul_(self.decay).add_(x.to(v), alpha=1 - self.decay)

    @torch.no_grad()
    def average(self, bias_correction: bool = True) -> list[Tensor]:
        """The averages, as new tensors of the followed tensors' types.

        Args:
            bias_correction: divide by the sum of the weights, 1 - decay ** updates.

        Raises:
            RuntimeError: :meth:`update` has not run.
        """
        if self.num_updates == 0:
            raise RuntimeError(
                "ExponentialMovingAverage.average: there is no value yet, call `update` first"
            )
        total = 1 - self.decay**self.num_updates if bias_correction else 1.0
        return [(v / total).to(x.dtype) for v, x in zip(self.averages, self.params, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Decay, number of updates and uncorrected averages, to be saved."""
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "averages": [v.clone() for v in self.averages],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`'s result, on the averages' own devices.

        Raises:
            ValueError: the shapes are not those of the followed tensors, or the decay or the number
                of updates is out of range. Nothing is loaded then.
            TypeError, NotImplementedError: the averages are no tensors, or not of real numbers.
        """
        for saved in state_dict["averages"]:
            require_floating("ExponentialMovingAverage.load_state_dict", saved, "averages")
        expected = [tuple(v.shape) for v in self.averages]
        given = [tuple(v.shape) for v in state_dict["averages"]]
        if expected != given:
            raise ValueError(
                "ExponentialMovingAverage.load_state_dict: expected `averages` of shapes "
                f"{expected}, got {given}"
            )
        decay, num_updates = _checked(state_dict["decay"]), state_dict["num_updates"]
        if not isinstance(num_updates, int) or num_updates < 0:
            raise ValueError(
                "ExponentialMovingAverage.load_state_dict: expected an integer `num_updates` >= 0, "
                f"got {num_updates!r}"
            )
        self.decay, self.num_updates = decay, num_updates
        for v, saved in zip(self.averages, state_dict["averages"], strict=True):
            v.copy_(saved)


def _checked(decay: float) -> float:
    require_number("ExponentialMovingAverage", "decay", decay)
    if not 0 <= decay < 1:
        raise ValueError(f"ExponentialMovingAverage: expected `decay` in [0, 1), got {decay}")
    return decay
