"""Batch normalization over every dimension but the second."""

import math

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from torchref.autograd import Function, opmath, rounded
from torchref.dispatch import accelerated


class _BatchNorm(TorchBatchNorm):
    ranks: tuple[int, ...]
    unbiased_running_var = True  # for a module that was torch's when it was made

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        unbiased_running_var: bool = True,
        **kwargs,  # `bias`, from torch 2.13 on
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.unbiased_running_var = unbiased_running_var

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        tracks = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average, without asking the device
                momentum = self.num_batches_tracked.double().reciprocal()
        uses_buffers = not self.training or tracks
        return batch_norm(
            input,
            self.running_mean if uses_buffers else None,
            self.running_var if uses_buffers else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,  # pyright: ignore[reportArgumentType]
            self.eps,
            unbiased_running_var=self.unbiased_running_var,
        )

    def extra_repr(self) -> str:
        given = "" if self.unbiased_running_var else ", unbiased_running_var=False"
        return super().extra_repr() + given

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim not in self.ranks:
            expected = " or ".join(f"{rank}D" for rank in self.ranks)
            raise ValueError(
                f"{type(self).__name__}: expected {expected} `input`, got shape "
                f"{tuple(input.shape)}"
            )


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Drop-in for :class:`torch.nn.BatchNorm1d`, on (N, C) or (N, C, L); see :func:`batch_norm`.

    Adds ``unbiased_running_var``.
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Drop-in for :class:`torch.nn.BatchNorm2d`, on (N, C, H, W); see :func:`batch_norm`.

    Adds ``unbiased_running_var``.
    """

    ranks = (4,)


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Drop-in for :class:`torch.nn.BatchNorm3d`, on (N, C, D, H, W); see :func:`batch_norm`.

    Adds ``unbiased_running_var``.
    """

    ranks = (5,)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    unbiased_running_var: bool = True,
) -> Tensor:
    r"""Normalize each channel to mean 0 and variance 1, then scale and shift it.

    With the mean :math:`\mu` and the biased variance :math:`\sigma^2` of the channel's n values (in
    training) or the running ones (at inference),

    .. math::
        \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \quad y = \gamma \hat x + \beta
        \qquad
        d\gamma = \sum dy\, \hat x, \quad d\beta = \sum dy

    .. math::
        dx = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}
        \Big(dy - \frac{d\beta}{n} - \hat x \frac{d\gamma}{n}\Big) \text{ in training}, \quad
        dx = \frac{\gamma\, dy}{\sqrt{\sigma^2 + \epsilon}} \text{ at inference}

    Training also moves the running statistics, in place:
    :math:`r \leftarrow (1 - m)\, r + m\, s` with the share m = ``momentum`` of the batch's mean or
    variance. Courses often give the share that is *kept*, 0.9 for torch's 0.1, and keep the biased
    variance; torch keeps :math:`\sigma^2 n / (n - 1)`.

    Args:
        input: floating point, shape (N, C, ...).
        running_mean, running_var: shape (C,), or None in training: then nothing is kept.
        weight, bias: :math:`\gamma` and :math:`\beta`, shape (C,), or None for 1 and 0.
        training: whether to use the batch's statistics.
        momentum: the share of the batch in the running statistics, in [0, 1].
        eps: added to the variance; > 0 in training.
        unbiased_running_var: False keeps the biased variance.

    Returns:
        A tensor of ``input``'s shape, type and memory format. An empty batch leaves the running
        statistics as they are.

    Raises:
        ValueError: one value per channel in training, one running statistic without the other, or
            an ``eps`` out of range.
        RuntimeError: a tensor has not one entry per channel, or the running statistics are missing
            at inference.
        NotImplementedError: ``input`` is not floating point.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> torchref.nn.functional.batch_norm(x, None, None, training=True)
        tensor([[-1.0000],
                [ 1.0000]])

    Source: Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing
    internal covariate shift", 2015.
    """
    _check(input, running_mean, running_var, weight, bias, training, eps)
    if not training:
        return BatchNormEvalFunction.call(input, weight, bias, running_mean, running_var, eps)
    if input.numel() == 0:
        running_mean = running_var = None
    options = (running_mean, running_var, momentum, eps, unbiased_running_var)
    return BatchNormFunction.call(input, weight, bias, *options)[0]


class BatchNormFunction(Function):
    """Normalization by the batch's own statistics."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        unbiased: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return batch_norm_fwd(x, weight, bias, running_mean, running_var, momentum, eps, unbiased)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs[:3]
        _, mean, rstd = output
        ctx.eps = inputs[6]
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 8
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was saved has no graph
            mean, rstd, _ = _statistics(opmath(x), ctx.eps)
        wanted = tuple(ctx.needs_input_grad[:3])
        dx, dweight, dbias = batch_norm_bwd(dy, x, weight, mean, rstd, wanted)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None, None, None


@accelerated("batch_norm", mutates=("running_mean", "running_var"))
def batch_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and each channel's mean and 1 / sqrt(variance + eps); moves the running ones."""
    x32 = opmath(x)
    mean, rstd, var = _statistics(x32, eps)
    if running_mean is not None:
        _move(running_mean, mean, momentum)
    if running_var is not None:
        n = x.numel() // x.shape[1]
        _move(running_var, var * (n / (n - 1)) if unbiased else var, momentum)
    return rounded(_affine(_normalized(x32, mean, rstd), weight, bias), x), mean, rstd


@accelerated("batch_norm")
def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, each where wanted."""
    dy32 = opmath(dy)
    dims = _all_but_channels(x)
    xhat = _normalized(opmath(x), mean, rstd)
    dbias, dweight = dy32.sum(dims), (dy32 * xhat).sum(dims)
    dx = None
    if wanted[0]:
        n = max(x.numel() // max(x.shape[1], 1), 1)
        slope = rstd if weight is None else rstd * opmath(weight)
        inner = dy32 - _channels(dbias / n, x) - xhat * _channels(dweight / n, x)
        dx = rounded(_channels(slope, x) * inner, x)
    return dx, _cast(dweight, weight, wanted[1]), dbias if wanted[2] else None


class BatchNormEvalFunction(Function):
    """Normalization by the running statistics."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
    ) -> Tensor:
        return batch_norm_eval_fwd(x, weight, bias, running_mean, running_var, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, running_mean, running_var, ctx.eps = inputs
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, running_mean, running_var)

    @staticmethod
    def backward(ctx, dy):
        wanted = tuple(ctx.needs_input_grad[:3])
        x, weight, running_mean, running_var = ctx.saved_tensors
        saved = (x, weight, running_mean, running_var, ctx.eps)
        dx, dweight, dbias = batch_norm_eval_bwd(dy, *saved, wanted)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None


@accelerated("batch_norm")
def batch_norm_eval_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> Tensor:
    rstd = (opmath(running_var) + eps).rsqrt()
    xhat = _normalized(opmath(x), opmath(running_mean), rstd)
    return rounded(_affine(xhat, weight, bias), x)


@accelerated("batch_norm")
def batch_norm_eval_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, each where wanted."""
    dy32 = opmath(dy)
    dims = _all_but_channels(x)
    rstd = (opmath(running_var) + eps).rsqrt()
    dx = dweight = None
    if wanted[0]:
        slope = rstd if weight is None else rstd * opmath(weight)
        dx = rounded(dy32 * _channels(slope, x), x)
    if wanted[1]:
        dweight = (dy32 * _normalized(opmath(x), opmath(running_mean), rstd)).sum(dims)
    return dx, _cast(dweight, weight, wanted[1]), dy32.sum(dims) if wanted[2] else None


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel's mean, 1 / sqrt(variance + eps) and biased variance, in two passes."""
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1])
        return zeros, zeros.clone(), zeros  # results of an operation may not be one tensor
    dims = _all_but_channels(x)
    mean = x.mean(dims)
    centred = x - _channels(mean, x)
    var = (centred * centred).mean(dims)
    return mean, (var + eps).rsqrt(), var


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    # Not folded to x * scale + shift: at a mean of 1e4 that loses three digits.
    return (x - _channels(mean, x)) * _channels(rstd, x)


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xhat if weight is None else xhat * _channels(opmath(weight), xhat)
    return y if bias is None else y + _channels(opmath(bias), xhat)


def _move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    running.copy_((1 - momentum) * opmath(running) + momentum * batch.detach())


def _cast(gradient: Tensor | None, weight: Tensor | None, wanted: bool) -> Tensor | None:
    return (
        rounded(gradient, weight)
        if wanted and gradient is not None and weight is not None
        else None
    )


def _channels(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 2))  # (C, 1, 1, ...)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    if not input.is_floating_point():
        raise NotImplementedError(
            f"batch_norm: expected a floating point `input`, got {input.dtype}"
        )
    if input.ndim < 2:
        raise ValueError(
            f"batch_norm: expected `input` of shape (N, C, ...), got {tuple(input.shape)}"
        )
    channels = input.shape[1]
    tensors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.numel() != channels:
            raise RuntimeError(
                f"batch_norm: expected `{argument}` of shape ({channels},), "
                f"got {tuple(tensor.shape)}"
            )
        if tensor is None and not training and argument.startswith("running"):
            raise RuntimeError(f"batch_norm: expected `{argument}` at inference, got None")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: expected both `running_mean` and `running_var`, or neither")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"batch_norm: expected a positive `eps`, got {eps}")
    if training and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            "batch_norm: expected more than 1 value per channel when training, got `input` of "
            f"shape {tuple(input.shape)}"
        )
