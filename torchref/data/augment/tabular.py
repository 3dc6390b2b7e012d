"""Rows of a table changed at random: noise, shuffled values, interpolation, SMOTE."""

from collections.abc import Sequence
from math import isfinite
from typing import Self

import torch
from torch import Tensor

from torchref.data.augment.image import draw_beta
from torchref.data.split import check_seed

OPTIONS = {
    "noise": "deviation of the Gaussian noise on a number, in deviations of its column",
    "shuffle": "probability of a value to be replaced by that of another row of its class",
    "interpolate": "alpha of the Beta(alpha, alpha) share of a row in its mix with another one",
}


class TabularAugment:
    r"""New rows from the rows of a batch, in three steps of which each may be off.

    Shuffle, interpolation and noise follow one another:

    .. math::
        x_{ij} &\leftarrow x_{kj}, \quad y_k = y_i, \text{ with probability shuffle} \\
        x_i &\leftarrow \lambda_i x_i + (1 - \lambda_i) x_k, \quad y_k = y_i, \quad
            \lambda_i \sim \mathrm{Beta}(\text{interpolate}, \text{interpolate}) \\
        x_{ij} &\leftarrow x_{ij} + \text{noise} \; \sigma_j \, \varepsilon_{ij}, \quad
            \varepsilon_{ij} \sim \mathcal{N}(0, 1)

    Row k is another row of the batch, drawn anew each time. It is of the same class, so that labels
    stay true; a row that is alone in its class stays as it is. With floating point targets any row
    may be row k, interpolation mixes the targets as it mixes the rows, and shuffle is an error.
    Random numbers come from torch's default generator. For training alone.

    Args:
        noise: >= 0, in standard deviations of the column; needs :meth:`fit`.
        shuffle: probability in [0, 1].
        interpolate: >= 0; 0 is off, small values stay close to a row, 1 is uniform.
        categories: columns of categories, as codes or one-hot. They get no noise and are not
            interpolated. Shuffle takes all of them together from one other row, so that a one-hot
            code stays one.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> augment = TabularAugment(interpolate=1.0)
        >>> x, y = augment(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([0, 0, 1]))
        >>> bool(0 <= x[0] <= 1), x[2], y
        (True, tensor([9.]), tensor([0, 0, 1]))

    Source: the course, "Data augmentation" ("For Tabular Data"); interpolation is mixup (Zhang et
    al., 2018) within a class, as SMOTE (Chawla et al., 2002) is.
    """

    def __init__(
        self,
        *,
        noise: float = 0.0,
        shuffle: float = 0.0,
        interpolate: float = 0.0,
        categories: Sequence[int] = (),
    ) -> None:
        for name, value in (("noise", noise), ("interpolate", interpolate)):
            if not (value >= 0 and isfinite(value)):
                raise ValueError(f"TabularAugment: expected finite `{name}` >= 0, got {value}")
        if not 0 <= shuffle <= 1:
            raise ValueError(f"TabularAugment: expected `shuffle` in [0, 1], got {shuffle}")
        if any(column < 0 for column in categories):
            raise ValueError(
                f"TabularAugment: expected columns >= 0 in `categories`, got {list(categories)}"
            )
        self.noise = noise
        self.shuffle = shuffle
        self.interpolate = interpolate
        self.categories = list(categories)
        self.std: Tensor | None = None

    def fit(self, x: Tensor) -> Self:
        """Take the standard deviation of each column of the training split, once, in float64.

        Args:
            x: (samples, features).

        Raises:
            RuntimeError: it is fitted already.
            ValueError: the shape is another, there is no sample, or a column has a NaN or an
                infinity.
        """
        if self.std is not None:
            raise RuntimeError("TabularAugment: fitted already; fit a new one")
        self._check_rows(x)
        if len(x) == 0:
            raise ValueError("TabularAugment: expected at least one sample")
        if len(bad := (~x.isfinite()).any(0).nonzero()):
            raise ValueError(f"TabularAugment: column {bad[0].item()} has a NaN or an infinity")
        low, high = x.aminmax(dim=0)
        # exactly 0 for a constant column: rounding in the mean would leave a tiny deviation
        self.std = torch.where(low == high, 0.0, x.double().std(0, correction=0))
        self.std[self.categories] = 0.0
        return self

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A changed copy of a batch.

        Args:
            x: (N, features), floating point.
            y: (N,) integer labels, or (N, ...) floating point targets.

        Raises:
            RuntimeError: there is noise and it is not fitted.
            ValueError: a shape or type is another, or ``y`` is floating point and there is shuffle.
        """
        self._check_batch(x, y)
        # one class of all rows where y is no class
        label = y.new_zeros(len(y)).long() if y.is_floating_point() else y.long()
        if self.shuffle:
            x = self._shuffled(x, label)
        if self.interpolate:
            x, y = self._interpolated(x, y, label)
        if self.noise:
            assert self.std is not None
            x = x + torch.randn_like(x) * (self.noise * self.std).to(x)
        return x, y

    def _shuffled(self, x: Tensor, label: Tensor) -> Tensor:
        row = _others(label, x.shape[1])
        chosen = torch.rand(x.shape, device=x.device) < self.shuffle
        for drawn in (row, chosen):
            drawn[:, self.categories] = drawn[:, self.categories[:1]]  # one draw for all
        return torch.where(chosen, x.gather(0, row), x)

    def _interpolated(self, x: Tensor, y: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        row = _others(label, 1).squeeze(1)
        share = draw_beta(len(x), self.interpolate)
        mixed = x[row].lerp(x, share[:, None].to(x))
        mixed[:, self.categories] = x[:, self.categories]
        if y.is_floating_point():
            y = y[row].lerp(y, share.reshape(-1, *[1] * (y.ndim - 1)).to(y))
        return mixed, y

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        self._check_rows(x)
        if not x.is_floating_point():
            raise ValueError(f"TabularAugment: expected floating point `x`, got {x.dtype}")
        if y.ndim == 0 or len(y) != len(x) or (y.ndim > 1 and not y.is_floating_point()):
            raise ValueError(
                f"TabularAugment: expected `y` of shape ({len(x)},), got {y.dtype} of shape "
                f"{tuple(y.shape)}"
            )
        if self.shuffle and y.is_floating_point():
            raise ValueError(
                f"TabularAugment: expected integer labels `y` with `shuffle`, got {y.dtype}: "
                "values of rows with other targets would make a target wrong; use `interpolate`"
            )
        if self.noise and self.std is None:
            raise RuntimeError(
                "TabularAugment: not fitted; call `fit` with the training split first"
            )
        if self.std is not None and len(self.std) != x.shape[1]:
            raise ValueError(
                f"TabularAugment: expected {len(self.std)} features, got shape {tuple(x.shape)}"
            )

    def _check_rows(self, x: Tensor) -> None:
        if x.ndim != 2:
            raise ValueError(
                f"TabularAugment: expected `x` of shape (N, features), got {tuple(x.shape)}"
            )
        if self.categories and max(self.categories) >= x.shape[1]:
            raise ValueError(
                f"TabularAugment: expected `categories` among {x.shape[1]} columns, got "
                f"{self.categories}"
            )


def smote(x: Tensor, y: Tensor, *, neighbors: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Fill the smaller classes up to the size of the largest with synthetic rows.

    .. math::
        \tilde{x} = x_i + u \, (x_k - x_i), \quad u \sim \mathrm{Uniform}(0, 1)

    where row k is one of the nearest rows of the same class. For the training split alone, after
    the split: rows made from validation or test rows would carry them into training. Distances are
    between columns as they are, so scale them first; categories become numbers in between.

    Args:
        x: (samples, features), floating point.
        y: (samples,) integer labels.
        neighbors: >= 1, among how many nearest rows k is drawn.
        seed: from 0 to 2**32 - 1.

    Returns:
        All given rows in their order, then the new ones; the types are those given.

    Raises:
        ValueError: a shape or type is another, there is one class alone, a class to be filled up
            has no more than ``neighbors`` samples, or ``seed`` is out of its range.
        ImportError: imbalanced-learn is missing.

    Example:
        >>> x, y = torch.rand(10, 2), torch.tensor([0] * 7 + [1] * 3)
        >>> rows, labels = smote(x, y, neighbors=2)
        >>> labels.bincount(), bool((rows[:10] == x).all())
        (tensor([7, 7]), True)

    Source: Chawla et al., "SMOTE: Synthetic Minority Over-sampling Technique", 2002; the course,
    "Data augmentation" ("For Tabular Data"); imbalanced-learn's ``SMOTE``.
    """
    try:
        from imblearn.over_sampling import SMOTE
    except ModuleNotFoundError as error:
        raise ImportError(
            f"smote: {error.name} is missing: pip install 'torchref-triton[train]'"
        ) from error
    _check_smote(x, y, neighbors)
    check_seed("smote", seed)
    wide = x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))  # NumPy lacks bfloat16
    resampler = SMOTE(k_neighbors=neighbors, random_state=seed)
    rows, labels = resampler.fit_resample(wide.numpy(), y.cpu().long().numpy())[:2]
    new = slice(len(x), None)
    return (
        torch.cat([x, torch.as_tensor(rows[new]).to(x)]),
        torch.cat([y, torch.as_tensor(labels[new]).to(y)]),
    )


def _others(label: Tensor, columns: int) -> Tensor:
    """For each row and column the index of another row of its class, (N, columns).

    A row that is alone gets its own index.
    """
    in_order, order = label.sort(stable=True)
    first = torch.searchsorted(in_order, in_order)
    count = torch.searchsorted(in_order, in_order, right=True) - first
    place = torch.arange(len(label), device=label.device) - first  # within the class
    uniform = torch.rand(len(label), columns, device=label.device)
    step = 1 + (uniform * (count[:, None] - 1)).long()
    other = order[first[:, None] + (place[:, None] + step) % count[:, None]]
    return torch.empty_like(other).index_copy_(0, order, other)


def _check_smote(x: Tensor, y: Tensor, neighbors: int) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"smote: expected floating point `x` of shape (samples, features), got {x.dtype} of "
            f"shape {tuple(x.shape)}"
        )
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(
            f"smote: expected integer `y` of shape ({len(x)},), got {y.dtype} of shape "
            f"{tuple(y.shape)}"
        )
    if neighbors < 1:
        raise ValueError(f"smote: expected `neighbors` >= 1, got {neighbors}")
    classes, counts = y.unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"smote: expected two classes or more, got {classes.tolist()}")
    rarest = counts.argmin()
    cls, count = classes[rarest].item(), int(counts[rarest])
    if count <= neighbors and count < counts.max():
        advice = f"pass `neighbors` up to {count - 1}" if count > 1 else "leave it out"
        raise ValueError(
            f"smote: expected more than {neighbors} samples of each class, one and its neighbors, "
            f"but class {cls} has {count}; {advice}"
        )
