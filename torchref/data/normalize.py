"""Scalers fitted on the training split, whose statistics travel with the model."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

BINS = 4096  # of a pass in search of quantiles
KEPT = 2**16  # values of a feature that are sorted at the end of that search


class Fitted(nn.Module):
    """Statistics of the training split, taken once by ``fit`` and kept as buffers."""

    names: tuple[str, ...]  # of the buffers

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.register_buffer(name, None)

    def fit(self, data: Any) -> Self:
        raise NotImplementedError

    @property
    def is_fitted(self) -> bool:
        return getattr(self, self.names[0]) is not None

    def _check_fitted(self, expected: bool) -> None:
        name = type(self).__name__
        if self.is_fitted and not expected:
            raise RuntimeError(f"{name}: fitted already; fit a new one")
        if expected and not self.is_fitted:
            raise RuntimeError(f"{name}: not fitted; call `fit` with the training split first")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        absent = [prefix + name for name in self.names if prefix + name not in state_dict]
        if len(absent) == len(self.names):  # of an unfitted one
            absent = []
        for name in self.names:  # a fresh module has no buffers yet to copy into
            if getattr(self, name) is None and prefix + name in state_dict and not absent:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        known = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        missing_keys += [key for key in absent if key not in missing_keys[known:]]


class Scaler(Fitted):
    """``(x - shift) / scale``, feature by feature, with both taken from the training split."""

    names: tuple[str, str]  # of the buffers that are shift and scale

    def fit(self, data: Tensor | Iterable[Any]) -> Self:
        """Take the statistics of the training split, once.

        They are computed in float64 and kept in the type of the data.

        Args:
            data: (samples, features), or an iterable of such batches, or of tuples that begin with
                one, as a ``DataLoader`` over more than fits in memory is.

        Raises:
            RuntimeError: it is fitted already; a second fit is how test data leaks into training.
            ValueError: a shape is another, there is no sample, or a column has a NaN or an
                infinity; the message names it.
        """
        self._check_fitted(False)
        name = type(self).__name__
        batches = _Batches(name, [data] if isinstance(data, Tensor) else data, self._rows)
        for buffer, value in zip(self.names, self._measured(batches), strict=True):
            setattr(self, buffer, value.to(batches.dtype))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``, of any leading shape.

        Raises:
            RuntimeError: it is not fitted.
            ValueError: ``x`` has another number of features than the training split had.
        """
        shift, scale = self._aligned(x)
        return (x - shift) / scale

    def inverse(self, x: Tensor) -> Tensor:
        """Undo :meth:`forward`."""
        shift, scale = self._aligned(x)
        return x * scale + shift

    def extra_repr(self) -> str:
        return f"{len(getattr(self, self.names[0]))}" if self.is_fitted else "unfitted"

    def _measured(self, batches: "_Batches") -> tuple[Tensor, Tensor]:
        """Shift and scale in float64."""
        raise NotImplementedError

    def _rows(self, x: Tensor) -> Tensor:
        """A batch as (samples, features)."""
        if x.ndim != 2:
            name = type(self).__name__
            raise ValueError(
                f"{name}: expected `x` of shape (samples, features), got {tuple(x.shape)}"
            )
        return x

    def _aligned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale as they broadcast with ``x``."""
        self._check_fitted(True)
        shift, scale = (getattr(self, buffer) for buffer in self.names)
        if x.ndim == 0 or x.shape[-1] != len(shift):
            name = type(self).__name__
            raise ValueError(f"{name}: expected {len(shift)} features, got shape {tuple(x.shape)}")
        return shift, scale


class Standard(Scaler):
    r"""Z-score: each feature with mean 0 and standard deviation 1 over the training split.

    .. math::
        y = \frac{x - \mu}{\sigma}, \quad
        \mu = \frac{1}{n} \sum_i x_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i (x_i - \mu)^2

    The statistics are buffers, ``mean`` and ``std``, so they move, are saved and are loaded with
    the module that holds this one. A constant feature has ``std`` 1: it becomes exactly 0.

    Example:
        >>> scale = Standard().fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> scale(torch.tensor([[4.0, 5.0]]))
        tensor([[3., 0.]])
        >>> scale.inverse(torch.tensor([[3.0, 0.0]]))
        tensor([[4., 5.]])

    Source: the course, "Normalizing inputs"; scikit-learn's ``StandardScaler``.
    """

    names = ("mean", "std")

    def _measured(self, batches: "_Batches") -> tuple[Tensor, Tensor]:
        return _mean_and_deviation(batches)


class MinMax(Scaler):
    r"""Each feature from 0 to 1 over the training split.

    .. math::
        y = \frac{x - \min_i x_i}{\max_i x_i - \min_i x_i}

    The statistics are buffers, ``min`` and ``range``. A constant feature has ``range`` 1: it
    becomes 0. What lies outside the training split's range leaves [0, 1]; it is not clipped.

    Example:
        >>> scale = MinMax().fit(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> scale(torch.tensor([[1.0, 5.0], [4.0, 5.0]]))
        tensor([[0.5000, 0.0000],
                [2.0000, 0.0000]])

    Source: the course, "Normalizing inputs"; scikit-learn's ``MinMaxScaler``.
    """

    names = ("min", "range")

    def _measured(self, batches: "_Batches") -> tuple[Tensor, Tensor]:
        low, high = _extremes(batches)
        return low, torch.where(low == high, 1.0, high - low)


class Robust(Scaler):
    r"""Each feature with median 0 and interquartile range 1, whatever a few outliers do.

    .. math::
        y = \frac{x - q_{0.5}}{q_{0.75} - q_{0.25}}

    with quantiles interpolated between neighbours. The statistics are buffers, ``median`` and
    ``iqr``; a feature of which half of the values are equal has ``iqr`` 1. From batches they are
    found in several passes, with the memory of some thousand numbers for each feature.

    Example:
        >>> scale = Robust().fit(torch.tensor([[0.0], [1.0], [2.0], [3.0], [1000.0]]))
        >>> scale(torch.tensor([[2.0], [4.0]]))
        tensor([[0.],
                [1.]])

    Source: scikit-learn's ``RobustScaler``.
    """

    names = ("median", "iqr")

    def _measured(self, batches: "_Batches") -> tuple[Tensor, Tensor]:
        low, median, high = _quantiles(batches, (0.25, 0.5, 0.75))
        return median, torch.where(low == high, 1.0, high - low)


class ImageNormalize(Scaler):
    r"""Pixels from 0 to 255 as numbers with mean 0 and standard deviation 1 in each channel.

    .. math::
        y = \frac{x / 255 - \mu}{\sigma}

    Fitted on training images of shape (N, C, H, W), or made with a mean and a deviation that are
    known, such as those of the images that a network was trained on. They are buffers, ``mean``
    and ``std``, of x / 255.

    Args:
        mean, std: one number for each channel; ``fit`` is then neither needed nor allowed.
        divisor: the largest pixel; 1 for images that are from 0 to 1 already.
        shape: (C, H, W) of images that come as rows of pixels, (samples, C * H * W).

    Raises:
        ValueError: only one of ``mean`` and ``std`` is given, they differ in length, or a deviation
            is not positive.

    Example:
        >>> scale = ImageNormalize(mean=[0.5], std=[0.25])
        >>> scale(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
        tensor([[[[-2.,  2.]]]])

    Source: the course, "Normalizing inputs".
    """

    names = ("mean", "std")

    def __init__(
        self,
        mean: Iterable[float] | None = None,
        std: Iterable[float] | None = None,
        *,
        divisor: float = 255.0,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < divisor < math.inf:
            raise ValueError(f"ImageNormalize: expected a finite `divisor` > 0, got {divisor}")
        self.divisor = divisor
        self.shape = shape
        if (mean is None) != (std is None):
            raise ValueError("ImageNormalize: expected both `mean` and `std`, or neither")
        if mean is not None and std is not None:
            self.mean, self.std = torch.tensor(list(mean)), torch.tensor(list(std))
            finite = torch.cat([self.mean, self.std]).isfinite().all()
            if self.mean.shape != self.std.shape or not (self.std > 0).all() or not finite:
                raise ValueError(
                    "ImageNormalize: expected a `mean` and a positive `std` for each channel, got "
                    f"{self.mean.tolist()} and {self.std.tolist()}"
                )

    def forward(self, x: Tensor) -> Tensor:
        """Scale images of shape (..., C, H, W), or rows of their pixels."""
        images = self._as_images(x)
        shift, scale = self._aligned(images)
        return ((images / self.divisor - shift) / scale).reshape(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        """Undo :meth:`forward`: pixels, as floating point numbers."""
        images = self._as_images(x)
        shift, scale = self._aligned(images)
        return ((images * scale + shift) * self.divisor).reshape(x.shape)

    def _as_images(self, x: Tensor) -> Tensor:
        if self.shape is None:
            return x
        if x.ndim == 0 or x.shape[-1] != math.prod(self.shape):
            raise ValueError(
                f"ImageNormalize: expected {math.prod(self.shape)} pixels in a row, got shape "
                f"{tuple(x.shape)}"
            )
        return x.unflatten(-1, self.shape)

    def _measured(self, batches: "_Batches") -> tuple[Tensor, Tensor]:
        return _mean_and_deviation(batches)

    def _rows(self, x: Tensor) -> Tensor:
        x = self._as_images(x)
        if x.ndim != 4:
            raise ValueError(
                f"ImageNormalize: expected `x` of shape (N, C, H, W), got {tuple(x.shape)}"
            )
        return x.movedim(1, -1).flatten(0, 2) / self.divisor

    def _aligned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim < 3:
            raise ValueError(
                f"ImageNormalize: expected `x` of shape (..., C, H, W), got {tuple(x.shape)}"
            )
        shift, scale = super()._aligned(x.movedim(-3, -1))
        return shift[:, None, None], scale[:, None, None]


class Impute(Fitted):
    """Each missing number, a NaN, as the median of its feature over the training split.

    The medians are a buffer, ``median``.

    Args:
        then: what is applied next, and fitted next where it is to be fitted.

    Example:
        >>> fill = Impute(MinMax()).fit(torch.tensor([[0.0], [float("nan")], [1.0], [4.0]]))
        >>> fill(torch.tensor([[float("nan")], [4.0]]))
        tensor([[0.2500],
                [1.0000]])

    Source: scikit-learn's ``SimpleImputer(strategy="median")``.
    """

    names = ("median",)

    def __init__(self, then: nn.Module | None = None) -> None:
        super().__init__()
        self.then = then or nn.Identity()

    def fit(self, data: Tensor) -> Self:
        """Take the medians of the training split, once.

        Args:
            data: (samples, features) floating point, NaN where a number is missing.

        Raises:
            RuntimeError: it is fitted already.
            ValueError: a feature has no number at all; the message names it.
        """
        self._check_fitted(False)
        x = data
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(
                "Impute: expected floating point `data` of shape (samples, features), got "
                f"{x.dtype} of shape {tuple(x.shape)}"
            )
        if len(empty := x.isnan().all(0).nonzero()):
            raise ValueError(f"Impute: column {empty[0].item()} of `data` has no number")
        columns = [column[~column.isnan()] for column in x.double().unbind(1)]
        medians = torch.stack([column.quantile(0.5) for column in columns])
        medians = medians.to(x.dtype)
        if isinstance(self.then, Fitted):
            self.then.fit(torch.where(x.isnan(), medians, x))
        self.median = medians  # last: what comes next may refuse the data
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Fill in ``x``, (..., features), and apply what comes next."""
        self._check_fitted(True)
        if x.ndim == 0 or x.shape[-1] != len(self.median):
            raise ValueError(
                f"Impute: expected {len(self.median)} features, got shape {tuple(x.shape)}"
            )
        return self.then(self._filled(x))

    def _filled(self, x: Tensor) -> Tensor:
        return torch.where(x.isnan(), self.median, x)


SCALERS: dict[str, type[nn.Module]] = {
    "standard": Standard,
    "minmax": MinMax,
    "robust": Robust,
    "image": ImageNormalize,
    "none": nn.Identity,
}


class _Batches:
    """Checked batches of rows in float64, as often as they are asked for."""

    def __init__(self, name: str, data: Iterable[Any], rows: Any) -> None:
        self.name, self.data, self.rows = name, data, rows
        self.dtype = torch.get_default_dtype()
        self.count: int | None = None  # of the first pass

    def __iter__(self) -> Iterator[Tensor]:
        count, features = 0, None
        for batch in self.data:
            x = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(x, Tensor):
                raise ValueError(f"{self.name}: expected tensors in `data`, got {type(x)}")
            if x.is_complex():
                raise ValueError(f"{self.name}: expected real numbers in `data`, got {x.dtype}")
            if x.is_floating_point():
                self.dtype = x.dtype
            x = self.rows(x.double())
            features = features or x.shape[1]
            if x.shape[1] != features:
                raise ValueError(
                    f"{self.name}: expected {features} features in every batch, got {x.shape[1]}"
                )
            if len(bad := (~x.isfinite()).any(0).nonzero()):
                raise ValueError(
                    f"{self.name}: column {bad[0].item()} of `x` has a NaN or an infinity"
                )
            if len(x):
                count += len(x)
                yield x
        if count == 0 and self.count is None:
            raise ValueError(f"{self.name}: expected at least one sample")
        if self.count is not None and count != self.count:
            raise ValueError(
                f"{self.name}: read {self.count} samples, then {count}: expected `data` that can "
                "be read several times, such as a DataLoader"
            )
        self.count = count


def _mean_and_deviation(batches: _Batches) -> tuple[Tensor, Tensor]:
    # Chan, Golub and LeVeque, 1979: batches of their own means merge without losing digits.
    count, mean, m2, low, high = 0, torch.zeros(()), torch.zeros(()), None, None
    for x in batches:
        center, total = x.mean(0), count + len(x)
        distance = center - mean
        m2 = m2 + (x - center).square().sum(0) + distance.square() * (count * len(x) / total)
        mean = mean + distance * (len(x) / total)
        count, low, high = total, *_widened(x, low, high)
    assert low is not None
    constant = low == high  # exact: rounding in the mean would leave a tiny std
    return (
        torch.where(constant, low, mean),
        torch.where(constant, 1.0, (m2 / count).sqrt()),
    )


def _widened(x: Tensor, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, Tensor]:
    """The extremes so far, with those of a batch."""
    lower, higher = x.aminmax(dim=0)
    if low is None or high is None:
        return lower, higher
    return low.minimum(lower), high.maximum(higher)


def _extremes(batches: _Batches) -> tuple[Tensor, Tensor]:
    low = high = None
    for x in batches:
        low, high = _widened(x, low, high)
    assert low is not None
    assert high is not None
    return low, high


def _quantiles(batches: _Batches, shares: tuple[float, ...]) -> list[Tensor]:
    """Quantiles of each feature, interpolated between neighbours in the order of its values."""
    low, high = _extremes(batches)
    assert batches.count is not None
    places = [share * (batches.count - 1) for share in shares]
    ranks = [min(int(place) + i, batches.count - 1) for place in places for i in (0, 1)]
    below, above = _ordered(batches, ranks, low, high).unflatten(0, (-1, 2)).unbind(1)
    parts = below.new_tensor([place - int(place) for place in places])
    return list(below + (above - below) * parts[:, None])


def _ordered(batches: _Batches, ranks: list[int], low: Tensor, high: Tensor) -> Tensor:
    """The values that have so many before them, (ranks, features), exact.

    Each is in an interval (low, high], at first all values, which a pass cuts into ``BINS`` to keep
    the one that holds it. When few values are left in all intervals, they are sorted.
    """
    rank = torch.tensor(ranks, device=low.device)[:, None].expand(-1, len(low))
    low = low.nextafter(low.new_tensor(-torch.inf)).expand(rank.shape)
    high = high.expand(rank.shape)
    before = torch.zeros_like(rank)  # values up to low
    within = torch.full_like(rank, batches.count or 0)
    while (within > KEPT).any() and (low.nextafter(high) < high).any():
        edges = _edges(low, high)
        counts = sum((_counted(x, edges) for x in batches), torch.zeros_like(edges).long())
        chosen = (counts <= rank[..., None]).sum(-1, keepdim=True)
        high = edges.gather(-1, chosen).squeeze(-1)
        first = chosen == 0
        previous = (chosen - 1).clamp_min(0)
        low = torch.where(first, low[..., None], edges.gather(-1, previous)).squeeze(-1)
        up_to_low = torch.where(first, before[..., None], counts.gather(-1, previous)).squeeze(-1)
        within = counts.gather(-1, chosen).squeeze(-1) - up_to_low
        before = up_to_low
    found = high.clone()
    kept: dict[tuple[int, int], list[Tensor]] = {}
    for x in batches:
        for i, j in (within <= KEPT).nonzero().tolist():
            column = x[:, j]
            inside = (column > low[i, j]) & (column <= high[i, j])
            kept.setdefault((i, j), []).append(column[inside])
    for (i, j), values in kept.items():
        found[i, j] = torch.cat(values).sort().values[rank[i, j] - before[i, j]]
    return found


def _edges(low: Tensor, high: Tensor) -> Tensor:
    """The right ends of ``BINS`` parts of (low, high], of which the last is high itself."""
    steps = torch.arange(1, BINS + 1, dtype=low.dtype, device=low.device) / BINS
    edges = low[..., None] * (1 - steps) + high[..., None] * steps  # high - low may overflow
    edges = edges.clamp(low.nextafter(high)[..., None], high[..., None])
    edges[..., -1] = high
    return edges


def _counted(x: Tensor, edges: Tensor) -> Tensor:
    """How many values of each feature are up to each edge."""
    return torch.stack(
        [
            torch.searchsorted(x[:, j].sort().values, edges[:, j].contiguous(), right=True)
            for j in range(x.shape[1])
        ],
        1,
    )
