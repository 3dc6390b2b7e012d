"""Swap the modules and optimizers of a LightningModule as the Trainer sets it up."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import distributed, nn

import torchref
import torchref.optim
from torchref.convert import Report
from torchref.nn import SyncBatchNorm
from torchref.optim.convert import OURS
from torchref.training.checks import check_type


class ConvertCallback(Callback):
    """Run :func:`torchref.convert` on the LightningModule, and swap its optimizers, in a Trainer.

    Modules become ours in ``setup``, before the strategy wraps the model and before
    ``configure_model``; what is made there is converted by ``torchref.convert(self)`` at its end,
    before any ``fully_shard``. Optimizers become ours when fitting starts, with their schedulers,
    where their class is exactly torch's; others stay. Nothing of it is in a checkpoint: one that
    was saved with the callback loads without it, and the other way round.

    Args:
        exclude, functional, fuse: as in :func:`torchref.convert`.
        optimizers: whether optimizers are swapped, too.

    Attributes:
        report: what the conversion did, None before; a later ``setup`` that finds nothing to swap
            leaves it.

    Raises:
        TypeError: ``exclude`` is no list, or one of the others neither True nor False.

    Example:
        >>> callback = ConvertCallback(exclude=["head.*"])
        >>> callback.report is None
        True
    """

    def __init__(
        self,
        *,
        exclude: Iterable[str | type[nn.Module] | nn.Module] = (),
        functional: bool = False,
        fuse: bool = False,
        optimizers: bool = True,
    ) -> None:
        if isinstance(exclude, str) or not isinstance(exclude, Iterable):
            raise TypeError(f"ConvertCallback: expected a list as `exclude`, got {exclude!r}")
        options = {"functional": functional, "fuse": fuse, "optimizers": optimizers}
        for name, value in options.items():
            check_type(name, value, "True or False", bool)
        self.exclude = tuple(exclude)
        self.functional = functional
        self.fuse = fuse
        self.optimizers = optimizers
        self.report: Report | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.report is not None and _is_sharded(pl_module):
            return  # in a test after a fit, which leaves FSDP2's classes where they are
        options = {"functional": self.functional, "fuse": self.fuse}
        report = torchref.convert(pl_module, exclude=self.exclude, **options)
        if self.report is None or report.swapped:
            self.report = report

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.optimizers:
            # Assigned, so that Lightning wraps them anew, by their new classes.
            trainer.optimizers = [
                torchref.optim.convert(optimizer) if type(optimizer) in OURS else optimizer
                for optimizer in trainer.optimizers
            ]


class SyncBatchNormPlugin(LayerSync):
    """Batch norm over all processes while fitting: ``Trainer(plugins=[SyncBatchNormPlugin()])``.

    Every batch norm, torch's or ours, is a :class:`torchref.nn.SyncBatchNorm` from the strategy's
    setup to its teardown, in place, and then of its own class again.
    ``Trainer(sync_batchnorm=True)`` would make torch's of them, which refuse tensors on a CPU and
    drop the activation of a :class:`torchref.nn.BatchNormAct2d`. DDP calls it; strategies that run
    one process do not.

    Args:
        process_group: as in :class:`torchref.nn.SyncBatchNorm`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> plugin = SyncBatchNormPlugin()
        >>> type(plugin.apply(net)[1])
        <class 'torchref.nn.sync_batch_norm.SyncBatchNorm'>
        >>> type(plugin.revert(net)[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """

    def __init__(self, process_group: Any | None = None) -> None:
        self.process_group = process_group
        self._before: dict[nn.Module, tuple[type, dict[str, Any]]] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        before = {module: (type(module), _group(module)) for module in model.modules()}
        SyncBatchNorm.convert_sync_batchnorm(model, self.process_group)
        for module, (cls, group) in before.items():
            if type(module) is not cls:
                self._before[module] = (cls, group)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if module in self._before:
                module.__class__, group = self._before.pop(module)
                vars(module).pop("process_group")
                vars(module).update(group)
        return model


def _group(module: nn.Module) -> dict[str, Any]:
    """The attribute that torch's SyncBatchNorm has and a plain batch norm has not."""
    return {name: value for name, value in vars(module).items() if name == "process_group"}


def _is_sharded(model: nn.Module) -> bool:
    if not distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
