"""Scalers fitted on the training split, whose statistics travel with the model."""

from typing import Any

import torch
from torch import Tensor, nn


class Standard(nn.Module):
    r"""Z-score: each feature with mean 0 and standard deviation 1 over the training split.

    .. math::
        y = \frac{x - \mu}{\sigma}, \quad
        \mu = \frac{1}{n} \sum_i x_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i (x_i - \mu)^2

    Statistics are computed in float64 and kept as buffers ``mean`` and ``std`` in the type of the
    data, so they move, are saved and are loaded with the module that holds this one. A constant
    feature has ``std`` 1: it becomes exactly 0.

    Example:
        >>> scale = Standard().fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> scale(torch.tensor([[4.0, 5.0]]))
        tensor([[3., 0.]])
        >>> scale.inverse(torch.tensor([[3.0, 0.0]]))
        tensor([[4., 5.]])

    Source: the course, "Normalizing inputs"; scikit-learn's ``StandardScaler``.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)
        self.register_buffer("std", None)

    def fit(self, x: Tensor) -> "Standard":
        """Take the statistics of the training split, once.

        Args:
            x: (samples, features), finite, at least one sample.

        Raises:
            RuntimeError: it is fitted already; a second fit is how test data leaks into training.
            ValueError: ``x`` has another shape, no rows, or a NaN or infinity.
        """
        if self.mean is not None:
            raise RuntimeError("Standard: fitted already; fit a new one")
        if x.ndim != 2 or len(x) == 0:
            raise ValueError(
                f"Standard: expected `x` of shape (samples, features), got {tuple(x.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError("Standard: expected finite `x`, got a NaN or an infinity")
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        x64 = x.double()
        constant = (x64 == x64[0]).all(0)  # exact: rounding in the mean would leave a tiny std
        self.mean = torch.where(constant, x64[0], x64.mean(0)).to(dtype)
        self.std = torch.where(constant, 1.0, x64.std(0, correction=0)).to(dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x`` of shape (..., features).

        Raises:
            RuntimeError: it is not fitted.
            ValueError: ``x`` has another number of features than the training split had.
        """
        mean, std = self._statistics(x)
        return (x - mean) / std

    def inverse(self, x: Tensor) -> Tensor:
        """Undo :meth:`forward`."""
        mean, std = self._statistics(x)
        return x * std + mean

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean is None or self.std is None:
            raise RuntimeError("Standard: not fitted; call `fit` with the training split first")
        if x.ndim == 0 or x.shape[-1] != len(self.mean):
            raise ValueError(
                f"Standard: expected {len(self.mean)} features, got shape {tuple(x.shape)}"
            )
        return self.mean, self.std

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("mean", "std"):  # a fresh module has no buffers yet to copy into
            if getattr(self, name) is None and prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return "unfitted" if self.mean is None else f"{len(self.mean)}"
