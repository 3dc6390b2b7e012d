"""Images changed at random in a training batch, and a picture of what became of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

COLUMNS = 8  # images that a picture shows
DRAWS = 4  # rows below the originals

OPTIONS: dict[str, str] = {
    "rotation": "largest angle to either side in degrees, in [0, 180]",
    "horizontal_flip": "probability of swapping left and right, in [0, 1]",
    "vertical_flip": "probability of swapping top and bottom, in [0, 1]",
    "crop": "largest share of height and width cut away before resizing back, in [0, 1)",
    "zoom": "largest change of size, by a factor from 1 - zoom to 1 + zoom, in [0, 1)",
    "translation": "largest shift to any side as a share of height or width, in [0, 1)",
    "brightness": "largest amount added or taken away as a share of the white level, in [0, inf)",
    "contrast": "largest change of contrast, by a factor of 1 +- contrast, in [0, inf)",
    "noise": "standard deviation of Gaussian noise as a share of the white level, in [0, inf)",
    "cutout": "share of the area that a rectangle sets to 0, in [0, 1)",
    "mixup": "alpha of the Beta distribution by which two samples mix, in [0, inf)",
}
LIMITS = {  # and whether the limit itself is allowed
    "rotation": (180, True),
    "horizontal_flip": (1, True),
    "vertical_flip": (1, True),
    "crop": (1, False),
    "zoom": (1, False),
    "translation": (1, False),
    "brightness": (math.inf, False),
    "contrast": (math.inf, False),
    "noise": (math.inf, False),
    "cutout": (1, False),
    "mixup": (math.inf, False),
}


@dataclass(frozen=True, kw_only=True)
class ImageAugment:
    r"""Batches of images, each image changed by draws of its own; 0 leaves a change out.

    In this order: flips; crop; rotation, zoom and translation as one affine map, which interpolates
    once; contrast, brightness, noise; clipping to [0, high]; cutout; mixup. What comes into view
    from outside an image is 0.

    It is no module: a model that holds one has the same ``state_dict``, and whether it runs is for
    the training loop to say. It belongs before normalization and in training alone. Draws come from
    torch's generators: those of a sample from the CPU's, noise from that of the device of ``x``.

    Args:
        rotation: degrees in [0, 180]; the angle is uniform in [-rotation, rotation].
        horizontal_flip, vertical_flip: probability in [0, 1].
        crop: in [0, 1); a rectangle of the image's proportions, with sides that are at least
            1 - crop of its sides to the nearest pixel, anywhere in it, is resized to all of it.
        zoom: in [0, 1); the size changes by a factor uniform in [1 - zoom, 1 + zoom].
        translation: in [0, 1); shifts along height and width are uniform in +-translation of them.
        brightness: in [0, inf); one number for all pixels of an image, uniform in
            [-brightness, brightness] * high, is added.
        contrast: in [0, inf); the distance to the mean of all pixels of an image is multiplied by a
            factor uniform in [max(0, 1 - contrast), 1 + contrast].
        noise: in [0, inf); standard deviation of Gaussian noise as a share of ``high``.
        cutout: in [0, 1); share of the area of a rectangle that is set to 0, with sides to the
            nearest pixel, anywhere, and proportions from 0.3 to 3.3 times those of the image, or
            as far as the image has room.
        mixup: in [0, inf); alpha of :func:`mixup`.
        high: the largest pixel, > 0: 1 or 255 usually.
        classes: how many, for labels of :func:`mixup` that are class numbers.

    Raises:
        ValueError: an argument is outside its range; the message names it.
        ImportError: kornia is missing.

    Example:
        >>> augment = ImageAugment(horizontal_flip=1.0)
        >>> x, y = augment(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([3]))
        >>> x, y
        (tensor([[[[1., 0.]]]]), tensor([3]))

    Source: the course, "Data augmentation", "For Images"; kornia; DeVries and Taylor, 2017,
    "Improved Regularization of Convolutional Neural Networks with Cutout"; Zhong et al., 2017,
    "Random Erasing Data Augmentation".
    """

    rotation: float = 0.0
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    crop: float = 0.0
    zoom: float = 0.0
    translation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    cutout: float = 0.0
    mixup: float = 0.0
    high: float = 1.0
    classes: int | None = None

    def __post_init__(self) -> None:
        for name, (limit, included) in LIMITS.items():
            value = getattr(self, name)
            if not (0 <= value < limit or (included and value == limit)):
                end = "]" if included else ")"
                raise ValueError(
                    f"ImageAugment: expected `{name}` in [0, {limit}{end}, got {value}"
                )
        if not 0 < self.high < math.inf:
            raise ValueError(f"ImageAugment: expected `high` > 0 and finite, got {self.high}")
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"ImageAugment: expected `classes` >= 1, got {self.classes}")
        _kornia()

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A changed batch; ``x`` and ``y`` stay as they are.

        Args:
            x: (N, C, H, W) floating point, pixels in [0, high].
            y: (N,) classes, (N, classes) probabilities, or targets of a regression.

        Returns:
            Images of the shape, type and device of ``x``, or ``x`` itself where every change is
            left out; ``y``, or what :func:`mixup` makes of it.

        Raises:
            ValueError: ``x`` is not such a batch, ``y`` is of another length, or it is nothing that
                :func:`mixup` mixes.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                "ImageAugment: expected floating point `x` of shape (N, C, H, W), got "
                f"{tuple(x.shape)} of {x.dtype}"
            )
        _check_length("ImageAugment", x, y)
        z = self._changed(x.to(_wide(x)))
        if self.mixup:
            z, y = mixup(z, y, self.mixup, self.classes)
        return z.to(x.dtype), y

    def _changed(self, x: Tensor) -> Tensor:
        moves, erasures = self._moves(*x.shape[-2:]), self._erasures(*x.shape[-2:])
        z = x
        for move in moves:
            z = move(z)
        z = self._relit(z)
        if z is not x:
            z = z.clamp(0, self.high)  # the weights of an interpolation may sum to a bit over 1
        for erasure in erasures:
            z = erasure(z)
        return z

    def _moves(self, height: int, width: int) -> list[nn.Module]:
        # Made for each batch: a crop has to know the size, and these modules keep their last draws.
        kornia, moves = _kornia(), []
        if self.horizontal_flip:
            moves.append(kornia.RandomHorizontalFlip(self.horizontal_flip))
        if self.vertical_flip:
            moves.append(kornia.RandomVerticalFlip(self.vertical_flip))
        if self.crop:
            area, ratio = ((1 - self.crop) ** 2, 1.0), (width / height, width / height)
            # not "slice", which loops over the samples
            moves.append(
                kornia.RandomResizedCrop((height, width), area, ratio, cropping_mode="resample")
            )
        if self.rotation or self.zoom or self.translation:
            shift, scale = (self.translation, self.translation), (1 - self.zoom, 1 + self.zoom)
            moves.append(kornia.RandomAffine(self.rotation, shift, scale, p=1.0))
        return moves

    def _relit(self, x: Tensor) -> Tensor:
        # kornia's contrast is about 0 instead of the mean, and its noise is not clipped
        if self.contrast:
            mean = x.mean((1, 2, 3), keepdim=True)
            x = mean + (x - mean) * _uniform(x, max(0.0, 1 - self.contrast), 1 + self.contrast)
        if self.brightness:
            x = x + self.high * _uniform(x, -self.brightness, self.brightness)
        if self.noise:
            x = x + self.high * self.noise * torch.randn_like(x)
        return x

    def _erasures(self, height: int, width: int) -> list[nn.Module]:
        if not self.cutout:
            return []
        # From 0.3 to 3.3 as in the paper, but only where the rectangle fits into the image: kornia
        # would cut off what sticks out and erase less.
        bounds = torch.tensor([max(0.3, self.cutout), min(3.3, 1 / self.cutout)])
        ratio = bounds * height / width  # a tensor: kornia compares floats before it rounds them
        return [_kornia().RandomErasing((self.cutout, self.cutout), ratio, p=1.0)]


def mixup(x: Tensor, y: Tensor, alpha: float, classes: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Mix each sample and its label with those of another one.

    .. math::
        \tilde{x}_i = \lambda_i x_i + (1 - \lambda_i) x_{j(i)}, \quad
        \tilde{y}_i = \lambda_i y_i + (1 - \lambda_i) y_{j(i)}, \quad
        \lambda_i \sim \mathrm{Beta}(\alpha, \alpha)

    with a random permutation j of the batch and classes as one-hot vectors. The paper draws one
    lambda for a batch; here each sample has its own, as with every other change of an image. The
    expected loss is the same, and no batch is mixed hardly at all or all halfway.

    Args:
        x: (N, ...) floating point.
        y: (N,) int64 classes, or floating point (N, ...): (N, classes) probabilities or targets of
            a regression.
        alpha: > 0; far below 1 one of both samples prevails, far above 1 they are averaged.
        classes: how many; needed for class numbers.

    Returns:
        x of the same shape and type, and y: classes become (N, classes) probabilities.

    Raises:
        ValueError: ``alpha`` is not positive and finite, ``y`` is of another length than ``x``, or
            it does not fit ``classes``.

    Example:
        >>> x, y = mixup(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]), alpha=0.4, classes=2)
        >>> torch.equal(x[:, 0], y[:, 1]), y.sum(1)
        (True, tensor([1., 1.]))

    Source: the course, "Data augmentation", "For Images"; Zhang et al., 2018, "mixup: Beyond
    Empirical Risk Minimization".
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"mixup: expected `alpha` > 0 and finite, got {alpha}")
    _check_length("mixup", x, y)
    y = _targets(y, classes, _wide(x))
    share, partner = draw_beta(len(x), alpha), torch.randperm(len(x))
    return _mix(x, share, partner), _mix(y, share, partner)


def _targets(y: Tensor, classes: int | None, dtype: torch.dtype) -> Tensor:
    """What may be mixed: floating point numbers."""
    if y.is_floating_point():
        if classes is not None and y.shape[1:] != (classes,):
            raise ValueError(
                f"mixup: expected probabilities `y` of shape (N, {classes}), got {tuple(y.shape)}"
            )
        return y
    if classes is None or y.ndim != 1:
        raise ValueError(
            "mixup: expected `classes` with class numbers `y` of shape (N,), or floating point "
            f"`y`, got classes={classes} and {tuple(y.shape)} of {y.dtype}"
        )
    outside = y[(y < 0) | (y >= classes)]
    if len(outside):
        raise ValueError(f"mixup: expected `y` in [0, {classes}), got {outside[0].item()}")
    return one_hot(y.long(), classes).to(dtype)


def draw_beta(count: int, alpha: float) -> Tensor:
    """Draws from Beta(alpha, alpha), by logarithms of Gamma variables.

    Those underflow where torch's own draws do: Beta(1e-4, 1e-4) is 0 or 1, and torch's mostly 1/2.
    """
    one_more = torch.full((2, count), alpha + 1, dtype=torch.float64)
    # Gamma(alpha) is Gamma(alpha + 1) * U ** (1 / alpha)
    gamma = torch.distributions.Gamma(one_more, torch.ones_like(one_more)).sample()
    root = torch.empty_like(gamma).exponential_()
    return ((gamma[0] / gamma[1]).log() - (root[0] - root[1]) / alpha).sigmoid()


def _mix(x: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    wide, share = x.to(_wide(x)), share.reshape(-1, *[1] * (x.ndim - 1))
    # lerp stays between its two ends, whatever it rounds
    return torch.lerp(wide[partner.to(x.device)], wide, share.to(wide)).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)  # half is too coarse to place pixels with


def _uniform(x: Tensor, low: float, high: float) -> Tensor:
    """One number for each image, drawn on the CPU as kornia's are."""
    return torch.empty(len(x), 1, 1, 1).uniform_(low, high).to(x)


def _check_length(name: str, x: Tensor, y: Tensor) -> None:
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(
            f"{name}: expected `y` of as many samples as `x`, got {tuple(y.shape)} for "
            f"{tuple(x.shape)}"
        )


def _kornia() -> Any:
    try:
        from kornia import augmentation
    except ModuleNotFoundError as error:
        raise ImportError(
            f"ImageAugment: {error.name} is missing: pip install 'torchref-triton[train]'"
        ) from error
    return augmentation


def save_picture(
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    y: Tensor,
    path: str | Path,
    high: float = 1.0,
) -> None:
    """Draw some images and below each what four draws make of it into a file.

    The state of torch's generator is as before afterwards, so a picture changes no run.

    Args:
        augment: the augmentation to show, an :class:`ImageAugment` say.
        x: (N, C, H, W) floating point with 1 channel (gray) or 3 (RGB), pixels in [0, high]; the
            first 8 are shown.
        y: (N,) classes, or what else ``augment`` takes; classes are written above the images.
        path: of the picture; its ending decides the format.
        high: the largest pixel.

    Raises:
        ValueError: ``x`` has no sample or another number of channels.

    Source: the course, "Data augmentation", "Considerations".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if x.ndim != 4 or len(x) == 0 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"save_picture: expected `x` of shape (N, 1 or 3, H, W), N > 0, got {tuple(x.shape)}"
        )
    x, y = x[:COLUMNS].detach().cpu(), y[:COLUMNS].detach().cpu()
    with torch.random.fork_rng(devices=[]):
        rows = [x, *(augment(x, y)[0] for _ in range(DRAWS))]
    height = 1.1 * x.shape[2] / x.shape[3]  # of an image in inches
    figure = Figure(figsize=(1.1 * len(x) + 1, height * len(rows) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would pick a screen and keep the figure
    grid = figure.subplots(len(rows), len(x), squeeze=False)
    for axes, images, title in zip(grid, rows, _row_titles(), strict=True):
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for ax, image in zip(axes, images, strict=True):
            _show(ax, image.float() / high)
    if not y.is_floating_point() and y.ndim == 1:
        for ax, label in zip(grid[0], y.tolist(), strict=True):
            ax.set_title(f"class {label}", fontsize="medium")
    figure.savefig(path, dpi=120)


def _row_titles() -> list[str]:
    return ["original", *(f"draw {i + 1}" for i in range(DRAWS))]


def _show(ax: Any, image: Tensor) -> None:
    """Pixels in [0, 1], each a square, without axes."""
    image = image.clamp(0, 1).movedim(0, -1)
    ax.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
