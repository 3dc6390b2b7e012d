"""Batch normalization by the statistics of all processes of a group."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchref.autograd import Function, opmath, rounded
from torchref.internals import (
    TorchBatchNorm,
    are_transforms_active,
    differentiates_forward,
    disable_dynamo,
)
from torchref.nn import batch_norm as local


class SyncBatchNorm(local._BatchNorm):
    r"""Drop-in for :class:`torch.nn.SyncBatchNorm`, which also runs on the CPU, over gloo.

    A :class:`BatchNorm2d`, or one of another rank, whose mean and variance in training are those of
    the joined batch of all processes of a group, however it is shared out: a process may have a
    batch of its own size, or an empty one. With :math:`n_r, \mu_r, \sigma_r^2` of process
    :math:`r`, which one all-gather brings together, and :math:`n = \sum_r n_r`,

    .. math::
        \mu = \frac{1}{n} \sum_r n_r\, \mu_r \qquad
        \sigma^2 = \frac{1}{n} \sum_r n_r \big(\sigma_r^2 + (\mu_r - \mu)^2\big)

    and backward sums dy and dy :math:`\hat x` over all processes, in one all-reduce. The gradients
    of weight and bias are the process's own, for DistributedDataParallel to join. In evaluation,
    without a process group and in a group of one it is a plain batch norm.

    Args:
        process_group: the processes that share statistics, None for all.
        unbiased_running_var: as in :class:`BatchNorm2d`, keyword only.
        The others: as :class:`torch.nn.SyncBatchNorm`'s.

    Raises:
        ValueError: ``input`` has fewer than two dimensions or no channels.
        RuntimeError: in forward-mode AD and under ``torch.func``, and in backward under
            ``create_graph``: the derivatives of other processes are out of their reach.

    Example:
        >>> norm = torchref.nn.SyncBatchNorm(3)
        >>> norm(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])

    Source: Zhang et al., "Context encoding for semantic segmentation", 2018; the merge of
    variances: Chan, Golub and LeVeque, 1979.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device=None,
        dtype=None,
        *,
        unbiased_running_var: bool = True,
        **kwargs: Any,  # `bias`, from torch 2.13 on
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            unbiased_running_var=unbiased_running_var,
            **kwargs,
        )
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if not self._has_others():
            return super().forward(input)
        y = _sync_batch_norm(input, None, self.process_group, **self._arguments(input))
        self._count_batch()
        return y

    def _has_others(self) -> bool:
        """Whether there are processes to share statistics with."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self.process_group) > 1

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] == 0:
            raise ValueError(
                f"{type(self).__name__}: expected `input` of shape (N, C, ...), got "
                f"{tuple(input.shape)}"
            )

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: Any | None = None
    ) -> nn.Module:
        """Make every batch norm of a model, ours and torch's, one of ours over processes.

        In place: only ``__class__`` changes, so that parameters, hooks and optimizers stay. A
        :class:`BatchNormAct2d` keeps its activation.

        Args:
            module: the model, or a batch norm.
            process_group: as in :class:`SyncBatchNorm`.

        Returns:
            ``module``.

        Raises:
            TypeError: ``module`` is none.

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Linear(20, 100), torch.nn.BatchNorm1d(100))
            >>> net = torchref.nn.SyncBatchNorm.convert_sync_batchnorm(net)
            >>> type(net[1])
            <class 'torchref.nn.sync_batch_norm.SyncBatchNorm'>
        """
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"convert_sync_batchnorm: expected a module `module`, got {type(module).__name__}"
            )
        for name, inner in module.named_modules():
            becomes = _BECOMES.get(type(inner))
            if becomes is not None:
                inner.__class__ = becomes
                vars(inner)["process_group"] = process_group
            elif isinstance(inner, TorchBatchNorm) and not isinstance(inner, SyncBatchNorm):
                kind = type(inner).__name__
                warnings.warn(f"convert_sync_batchnorm: left {name!r}, a {kind}", stacklevel=2)
        return module


class SyncBatchNormAct(local._BatchNormAct, SyncBatchNorm):
    """:class:`SyncBatchNorm`, then a residual if one is given, then an activation, in one pass.

    Args:
        activation, param: as in :func:`batch_norm_act`, keyword only.
        The others: as :class:`SyncBatchNorm`'s.

    Example:
        >>> norm = torchref.nn.SyncBatchNormAct(3, activation="silu")
        >>> x = torch.randn(4, 3, 8, 8)
        >>> norm(x, residual=x).shape
        torch.Size([4, 3, 8, 8])
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._has_others():
            return super().forward(input, residual)
        then = {"activation": self.activation, "param": self.param}
        arguments = self._arguments(input) | then
        y = _sync_batch_norm(input, residual, self.process_group, **arguments)
        self._count_batch()
        return y


_BECOMES: dict[type, type] = {
    nn.SyncBatchNorm: SyncBatchNorm,
    **{getattr(nn, f"BatchNorm{n}d"): SyncBatchNorm for n in (1, 2, 3)},
    **{getattr(local, f"BatchNorm{n}d"): SyncBatchNorm for n in (1, 2, 3)},
    **{getattr(local, f"BatchNormAct{n}d"): SyncBatchNormAct for n in (1, 2, 3)},
}


# With its collectives outside of graphs, as torch's.
@disable_dynamo
def _sync_batch_norm(
    input: Tensor,
    residual: Tensor | None,
    process_group: Any | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    unbiased_running_var: bool,
    activation: str | None = None,
    param: float | None = None,
) -> Tensor:
    name = "sync_batch_norm"
    statistics = (running_mean, running_var, training, momentum, eps)
    local.check(name, input, weight, bias, *statistics, alone=False)
    argument = 0.0
    if activation is not None:
        argument = local.checked_then(name, input, residual, activation, param)
    if differentiates_forward() or are_transforms_active():
        raise RuntimeError(
            f"{name}: torch.func and forward-mode AD do not reach into other processes"
        )
    moved = (running_mean, running_var, momentum, eps, unbiased_running_var)
    then = (activation, argument, process_group)
    return SyncBatchNormFunction.call(input, weight, bias, residual, *moved, *then)[0]


class SyncBatchNormFunction(Function):
    """Normalization by the statistics of all processes, and what follows it."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        unbiased: bool,
        activation: str | None,
        param: float,
        group: Any | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, total = _merged(*local.batch_norm_stats_fwd(x), x.numel() // x.shape[1], group)
        share = (total > 0).to(total.dtype) * momentum  # an empty batch moves nothing
        if running_mean is not None:
            local.move(running_mean, mean, share)
        if running_var is not None:
            # of one value in all processes the variance is 0, not 0 * infinity
            unbiased_var = var * (total / (total - 1).clamp_min(1))
            local.move(running_var, unbiased_var if unbiased else var, share)
        then = (residual, activation, param)
        y = local.batch_norm_eval_fwd(x, weight, bias, mean, var, eps, *then)
        return y, mean, var, total

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, _, _, _, ctx.eps, _, *ctx.then, ctx.group = inputs
        y, mean, var, total = output
        ctx.mark_non_differentiable(mean, var, total)
        ctx.set_materialize_grads(False)
        kept = local.kept_for_backward(residual, y, ctx.then[0])
        ctx.save_for_backward(x, weight, bias, mean, var, total, kept)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 12
        if torch.is_grad_enabled():
            raise RuntimeError("sync_batch_norm: there is no second derivative over processes")
        x, weight, bias, mean, var, total, kept = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else opmath(weight)
        wanted = (False, True, True, ctx.then[0] is not None)
        saved = (x, scale, mean, var, ctx.eps)
        _, dweight, dbias, du = local.batch_norm_eval_bwd(dy, *saved, wanted, bias, kept, *ctx.then)
        assert dweight is not None
        assert dbias is not None
        du = dy if du is None else du
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([dbias, dweight])
            dist.all_reduce(sums, group=ctx.group)
            rstd = (var + ctx.eps).rsqrt()
            dx = local.batch_norm_dx_bwd(du, x, weight, mean, rstd, *(sums / total))
        gradients = (dx, _for(weight, dweight), _for(bias, dbias))
        dresidual = du if ctx.needs_input_grad[3] else None
        return *gradients, dresidual, *(None,) * 8


def _merged(
    mean: Tensor, var: Tensor, count: int, group: Any | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the biased variance and the number of values of all processes, in one gathering."""
    mine = torch.cat([mean, var, mean.new_full((1,), count)])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    means, variances, counts = torch.stack(gathered).split([len(mean), len(mean), 1], 1)
    total = counts.sum()
    shares = counts / total.clamp_min(1)
    # Means as distances from one of them, which are small: at a large mean digits would be lost.
    distances = means - means[0]
    shift = (shares * distances).sum(0)
    var = (shares * (variances + (distances - shift).square())).sum(0)
    return means[0] + shift, var, total


def _for(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if parameter is None else rounded(gradient, parameter)
