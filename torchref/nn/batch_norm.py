"""Batch normalization over every dimension but the second, alone or with what follows it."""

import math
from typing import Any

import torch
from torch import Tensor

from torchref._checks import require_constant, require_floating
from torchref.autograd import Function, opmath, rounded, summed
from torchref.dispatch import accelerated
from torchref.internals import TorchBatchNorm
from torchref.nn.activation import FUSED, checked_activation


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
        made = {"device": device, "dtype": dtype, **kwargs}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **made)
        self.unbiased_running_var = unbiased_running_var

    def forward(self, input: Tensor) -> Tensor:
        y = batch_norm(input, **self._arguments(input))
        self._count_batch()
        return y

    def _arguments(self, input: Tensor) -> dict[str, Any]:
        """Those of :func:`batch_norm`."""
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.momentum is None and self._tracks() and self.num_batches_tracked is not None:
            # the cumulative average, without asking the device
            momentum = (self.num_batches_tracked + 1).double().reciprocal()
        uses_buffers = not self.training or self._tracks()
        return {
            "running_mean": self.running_mean if uses_buffers else None,
            "running_var": self.running_var if uses_buffers else None,
            "weight": self.weight,
            "bias": self.bias,
            "training": self.training or (self.running_mean is None and self.running_var is None),
            "momentum": momentum,
            "eps": self.eps,
            "unbiased_running_var": self.unbiased_running_var,
        }

    def _count_batch(self) -> None:
        """After the batch is through: one that is refused does not count."""
        if self._tracks() and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def _tracks(self) -> bool:
        return self.training and self.track_running_stats

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


class _BatchNormAct(_BatchNorm):
    activation = "relu"  # for a module that was another's when it was made
    param: float | None = None

    def __init__(
        self, *args: Any, activation: str = "relu", param: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        checked_activation(type(self).__name__, activation, param)
        self.activation, self.param = activation, param

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = batch_norm_act(
            input,
            activation=self.activation,
            param=self.param,
            residual=residual,
            **self._arguments(input),
        )
        self._count_batch()
        return y

    def extra_repr(self) -> str:
        given = "" if self.param is None else f", param={self.param}"
        return f"{super().extra_repr()}, activation={self.activation!r}{given}"


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    """:class:`BatchNorm1d`, then a residual if one is given, then an activation, in one pass.

    In place of a ``BatchNorm1d`` followed by an activation, whose ``state_dict`` it takes; called
    with ``(input, residual=None)``; see :func:`batch_norm_act`.

    Args:
        activation, param: as in :func:`batch_norm_act`, keyword only.
        The others: as :class:`BatchNorm1d`'s.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` knows no activation and would drop it; that of
    :class:`SyncBatchNorm` keeps it.

    Example:
        >>> norm = torchref.nn.BatchNormAct1d(3, activation="silu")
        >>> norm(torch.randn(4, 3)).shape
        torch.Size([4, 3])
    """


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    """:class:`BatchNorm2d`, then a residual if one is given, then an activation, in one pass.

    In place of a ``BatchNorm2d`` followed by an activation, whose ``state_dict`` it takes; called
    with ``(input, residual=None)``, as the last one of a residual block is; see
    :func:`batch_norm_act`.

    Args:
        activation, param: as in :func:`batch_norm_act`, keyword only.
        The others: as :class:`BatchNorm2d`'s.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` knows no activation and would drop it; that of
    :class:`SyncBatchNorm` keeps it.

    Example:
        >>> norm = torchref.nn.BatchNormAct2d(3)
        >>> x = torch.randn(2, 3, 4, 4)
        >>> bool((norm(x, residual=x) >= 0).all())
        True
    """


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    """:class:`BatchNorm3d`, then a residual if one is given, then an activation, in one pass.

    In place of a ``BatchNorm3d`` followed by an activation, whose ``state_dict`` it takes; called
    with ``(input, residual=None)``; see :func:`batch_norm_act`.

    Args:
        activation, param: as in :func:`batch_norm_act`, keyword only.
        The others: as :class:`BatchNorm3d`'s.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` knows no activation and would drop it; that of
    :class:`SyncBatchNorm` keeps it.

    Example:
        >>> norm = torchref.nn.BatchNormAct3d(3, activation="leaky_relu", param=0.2)
        >>> norm(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """


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
        momentum: the share of the batch in the running statistics, in [0, 1]; below 0 is
            taken, as by torch.
        eps: added to the variance; > 0 in training.
        unbiased_running_var: False keeps the biased variance.

    Returns:
        A tensor of ``input``'s shape, type and memory format. An empty batch leaves the running
        statistics as they are.

    Raises:
        ValueError: one value per channel in training, one running statistic without the other, an
            ``eps`` out of range, or a ``momentum`` above 1, by which a variance may become
            negative, or NaN.
        RuntimeError: a tensor has not one entry per channel, or the running statistics are missing
            at inference.
        NotImplementedError: ``input`` is not floating point.
        TypeError: ``input`` is no tensor, or ``momentum`` no number.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> torchref.nn.functional.batch_norm(x, None, None, training=True)
        tensor([[-1.0000],
                [ 1.0000]])

    Source: Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing
    internal covariate shift", 2015.
    """
    statistics = (running_mean, running_var, training, momentum, eps)
    check("batch_norm", input, weight, bias, *statistics)
    return _run(input, weight, bias, None, *statistics, unbiased_running_var, None, 0.0)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    param: float | None = None,
    residual: Tensor | None = None,
    unbiased_running_var: bool = True,
) -> Tensor:
    r"""Batch normalization, the sum with a residual and an activation, in one pass over memory.

    .. math::
        u = \mathrm{batch\_norm}(x) + r, \quad y = f(u)
        \qquad
        du = dy\, f'(u), \quad dr = du

    and :math:`dx, d\gamma, d\beta` are those of :func:`batch_norm` for the upstream gradient
    :math:`du`. Between the three nothing is stored or rounded, nor kept for backward: that makes
    :math:`u` again from the input, or, for a ReLU after a residual, reads its sign in the output.

    Args:
        input, running_mean, running_var, weight, bias, training, momentum, eps: as in
            :func:`batch_norm`; ``unbiased_running_var``, too.
        activation: :math:`f`, one of relu, leaky_relu, sigmoid, tanh, elu, selu, gelu, gelu_tanh
            and silu.
        param: the slope of leaky_relu (0.01 unless given) or the alpha of elu (1).
        residual: :math:`r`, of ``input``'s shape and type, or None for 0.

    Returns:
        A tensor of ``input``'s shape, type and memory format.

    Raises:
        ValueError: ``activation`` is none of these or has no ``param``, or ``residual`` differs
            from ``input`` in shape or type; otherwise what :func:`batch_norm` raises.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> torchref.nn.functional.batch_norm_act(x, None, None, training=True)
        tensor([[0.0000],
                [1.0000]])

    Source: He et al., "Deep residual learning for image recognition", 2016.
    """
    name = "batch_norm_act"
    statistics = (running_mean, running_var, training, momentum, eps)
    check(name, input, weight, bias, *statistics)
    then = (activation, checked_then(name, input, residual, activation, param))
    return _run(input, weight, bias, residual, *statistics, unbiased_running_var, *then)


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    unbiased: bool,
    activation: str | None,
    param: float,
) -> Tensor:
    inputs, then = (x, weight, bias, residual), (activation, param)
    if not training:
        return BatchNormEvalFunction.call(*inputs, running_mean, running_var, eps, *then)
    if x.numel() == 0:
        running_mean = running_var = None
    moved = (running_mean, running_var, momentum, eps, unbiased)
    return BatchNormFunction.call(*inputs, *moved, *then)[0]


class BatchNormFunction(Function):
    """Normalization by the batch's own statistics, and what follows it."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        unbiased: bool,
        activation: str | None,
        param: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        moved = (running_mean, running_var, momentum, eps, unbiased)
        return batch_norm_fwd(x, weight, bias, *moved, residual, activation, param)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, _, _, _, ctx.eps, _, activation, param = inputs
        y, mean, rstd = output
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.then = activation, param
        shift = None if activation is None else bias
        kept = kept_for_backward(residual, y, activation)
        ctx.save_for_backward(x, weight, mean, rstd, shift, kept)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 11
        x, weight, mean, rstd, bias, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was saved has no graph
            mean, rstd, *_ = _statistics(opmath(x), ctx.eps)
        wanted = tuple(ctx.needs_input_grad[:4])
        grads = batch_norm_bwd(dy, x, weight, mean, rstd, wanted, bias, kept, *ctx.then)
        dx, dweight, dbias, dresidual = grads
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, dweight, dbias, dresidual, *(None,) * 7


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
    residual: Tensor | None = None,
    activation: str | None = None,
    param: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and each channel's mean and 1 / sqrt(variance + eps); moves the running ones."""
    x32 = opmath(x)
    mean, rstd, var, centred = _statistics(x32, eps)
    if running_mean is not None:
        move(running_mean, mean, momentum)
    if running_var is not None:
        n = x.numel() // x.shape[1]
        move(running_var, var * (n / (n - 1)) if unbiased else var, momentum)
    y = _affine(centred, rstd, weight, bias)
    return rounded(_activated(y, residual, activation, param), x), mean, rstd


@accelerated("batch_norm")
def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: tuple[bool, bool, bool, bool],
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    activation: str | None = None,
    param: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and residual, each where wanted.

    ``kept`` is the residual, or the output of a ReLU after it.
    """
    centred = opmath(x) - _channels(mean, x)
    saved = (centred, rstd, weight, bias, kept)
    dy32 = _before_activation(opmath(dy), *saved, activation, param)
    dbias, dweight = _sums(dy32), _sums(dy32 * centred) * rstd
    dx = None
    if wanted[0]:
        n = max(x.numel() // max(x.shape[1], 1), 1)
        dx = rounded(_dx(dy32, centred, rstd, weight, dbias / n, dweight / n), x)
    dresidual = rounded(dy32, x) if wanted[3] else None
    return dx, _cast(dweight, weight, wanted[1]), dbias if wanted[2] else None, dresidual


class BatchNormEvalFunction(Function):
    """Normalization by the running statistics, and what follows it."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        activation: str | None,
        param: float,
    ) -> Tensor:
        statistics = (running_mean, running_var, eps)
        return batch_norm_eval_fwd(x, weight, bias, *statistics, residual, activation, param)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, running_mean, running_var, ctx.eps, *ctx.then = inputs
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        shift = None if ctx.then[0] is None else bias
        kept = kept_for_backward(residual, output, ctx.then[0])
        ctx.save_for_backward(x, weight, running_mean, running_var, shift, kept)

    @staticmethod
    def backward(ctx, dy):
        wanted = tuple(ctx.needs_input_grad[:4])
        x, weight, running_mean, running_var, bias, kept = ctx.saved_tensors
        saved = (x, weight, running_mean, running_var, ctx.eps)
        grads = batch_norm_eval_bwd(dy, *saved, wanted, bias, kept, *ctx.then)
        dx, dweight, dbias, dresidual = grads
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, dweight, dbias, dresidual, *(None,) * 5


@accelerated("batch_norm")
def batch_norm_eval_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    param: float = 0.0,
) -> Tensor:
    rstd = (opmath(running_var) + eps).rsqrt()
    y = _affine(opmath(x) - _channels(opmath(running_mean), x), rstd, weight, bias)
    return rounded(_activated(y, residual, activation, param), x)


@accelerated("batch_norm")
def batch_norm_eval_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    wanted: tuple[bool, bool, bool, bool],
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    activation: str | None = None,
    param: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and residual, each where wanted; ``kept`` as above."""
    rstd = (opmath(running_var) + eps).rsqrt()
    dy32, centred = opmath(dy), None
    if wanted[1] or activation is not None:
        centred = opmath(x) - _channels(opmath(running_mean), x)
        saved = (centred, rstd, weight, bias, kept)
        dy32 = _before_activation(dy32, *saved, activation, param)
    dx = dweight = None
    if wanted[0]:
        dx = rounded(dy32 * _channels(_scale(rstd, weight), x), x)
    if wanted[1] and centred is not None:
        dweight = _sums(dy32 * centred) * rstd
    dbias = _sums(dy32) if wanted[2] else None
    dresidual = rounded(dy32, x) if wanted[3] else None
    return dx, _cast(dweight, weight, wanted[1]), dbias, dresidual


@accelerated("batch_norm")
def batch_norm_stats_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean and biased variance, for SyncBatchNorm."""
    mean, _, var, _ = _statistics(opmath(x), 1.0)
    return mean, var


@accelerated("batch_norm")
def batch_norm_dx_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dbias: Tensor,
    dscale: Tensor,
) -> Tensor:
    """The gradient of x from the means of dy and of dy times normalized x, for SyncBatchNorm."""
    centred = opmath(x) - _channels(mean, x)
    return rounded(_dx(opmath(dy), centred, rstd, weight, dbias, dscale), x)


def _dx(
    dy: Tensor,
    centred: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dbias: Tensor,
    dscale: Tensor,
) -> Tensor:
    inner = torch.addcmul(dy - _channels(dbias, dy), centred, _channels(-dscale * rstd, dy))
    return _channels(_scale(rstd, weight), dy) * inner


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each channel's mean, 1 / sqrt(variance + eps) and biased variance, in two passes; x - mean.

    Not folded to x * scale + shift: at a mean of 1e4 that loses three digits.
    """
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1])
        return zeros, zeros.clone(), zeros, x  # results of an operation may not be one tensor
    n = x.numel() // x.shape[1]
    mean = _sums(x) / n
    centred = x - _channels(mean, x)
    var = _sums(centred * centred) / n
    return mean, (var + eps).rsqrt(), var, centred


def _affine(centred: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = _channels(_scale(rstd, weight), centred)
    if bias is None:
        return centred * scale
    return torch.addcmul(_channels(opmath(bias), centred), centred, scale)


def _scale(rstd: Tensor, weight: Tensor | None) -> Tensor:
    return rstd if weight is None else rstd * opmath(weight)


def _activated(u: Tensor, residual: Tensor | None, activation: str | None, param: float) -> Tensor:
    u = u if residual is None else u + opmath(residual)
    return u if activation is None else FUSED[activation].fwd(u, param)


def _before_activation(
    dy: Tensor,
    centred: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str | None,
    param: float,
) -> Tensor:
    """The gradient of what the activation saw."""
    if activation is None:
        return dy
    if activation == "relu" and kept is not None:
        u = opmath(kept)  # the output, whose sign is the same
    else:
        u = _affine(centred, rstd, weight, bias)
        u = u if kept is None else u + opmath(kept)
    return FUSED[activation].bwd(dy, u, param)


def kept_for_backward(residual: Tensor | None, y: Tensor, activation: str | None) -> Tensor | None:
    """What else backward reads to know what the activation saw."""
    return y if residual is not None and activation == "relu" else residual


def move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    running.copy_((1 - momentum) * opmath(running) + momentum * batch.detach())


def _cast(gradient: Tensor | None, weight: Tensor | None, wanted: bool) -> Tensor | None:
    return (
        rounded(gradient, weight)
        if wanted and gradient is not None and weight is not None
        else None
    )


def _channels(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 2))  # (C, 1, 1, ...)


def _sums(x: Tensor) -> Tensor:
    """Those of each channel, over samples last: chains half as long, in which less is rounded."""
    return summed(x.sum(list(range(2, x.ndim))) if x.ndim > 2 else x)


def check(
    name: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    alone: bool = True,
) -> None:
    """Raise where :func:`batch_norm` says; ``alone`` says that no other process adds values."""
    require_floating(name, input)
    if input.ndim < 2:
        raise ValueError(f"{name}: expected `input` of shape (N, C, ...), got {tuple(input.shape)}")
    channels = input.shape[1]
    tensors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for argument, tensor in tensors.items():
        if tensor is not None and (tensor.ndim != 1 or tensor.numel() != channels):
            raise RuntimeError(
                f"{name}: expected `{argument}` of shape ({channels},), got {tuple(tensor.shape)}"
            )
        if tensor is not None and not tensor.is_floating_point():
            raise RuntimeError(
                f"{name}: expected a floating point `{argument}`, got {tensor.dtype}"
            )
        if tensor is None and not training and argument.startswith("running"):
            raise RuntimeError(f"{name}: expected `{argument}` at inference, got None")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{name}: expected both `running_mean` and `running_var`, or neither")
    require_constant(name, "eps", eps)
    if not eps >= 0 or (training and eps == 0):
        raise ValueError(f"{name}: expected a positive `eps`, got {eps}")
    if training:
        require_constant(name, "momentum", momentum)
        # a tensor would have to be waited for
        if not isinstance(momentum, Tensor) and not momentum <= 1:
            raise ValueError(f"{name}: expected `momentum` of 1 at most, got {momentum}")
    if training and alone and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"{name}: expected more than 1 value per channel when training, got `input` of "
            f"shape {tuple(input.shape)}"
        )


def checked_then(
    name: str, input: Tensor, residual: Tensor | None, activation: str, param: float | None
) -> float:
    """The activation's argument; raises where :func:`batch_norm_act` says."""
    argument = checked_activation(name, activation, param)
    if residual is not None and (residual.shape, residual.dtype) != (input.shape, input.dtype):
        raise ValueError(
            f"{name}: expected `residual` of shape {tuple(input.shape)} and type {input.dtype}, "
            f"got {tuple(residual.shape)} and {residual.dtype}"
        )
    return argument
