"""One progress bar for the whole of training."""

import sys
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

SHOWN = ("train_loss", "val_loss", "val_accuracy", "val_rmse")


class EpochProgress(ProgressBar):
    """A bar over all steps on a terminal; elsewhere a line for every tenth of the epochs."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None

    def disable(self) -> None:
        """Lightning calls it on every process but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._enabled and sys.stderr.isatty():
            total = int(trainer.estimated_stepping_batches)
            done = trainer.global_step
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        shown = [f"{name} {metrics[name]:.4f}" for name in SHOWN if name in metrics]
        epoch, last = trainer.current_epoch, trainer.max_epochs or 1
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}", refresh=False)
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
        elif self._enabled and epoch % max(last // 10, 1) == 0:
            with suppress(OSError):  # a training goes on without its reader
                print(f"epoch {epoch:>4}/{last}  {'  '.join(shown)}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
