"""Early stopping that keeps what it found."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor

from torchref.training.checks import check_range


class EarlyStopping(callbacks.EarlyStopping):
    """Stop when a metric no longer improves, go back to the best weights, and say why.

    Lightning's callback stops; this one also keeps a copy of the best weights and buffers, puts it
    back when fitting ends for whatever reason, and words the reason. A NaN or infinite metric stops
    training and is never the best. Copy and counters are part of the checkpoint. Epochs count from
    0, as Lightning's do.

    Args:
        monitor: a logged metric.
        patience: validation checks without improvement before it stops, >= 1.
        min_delta: an improvement is larger than this, >= 0.
        mode: ``min`` or ``max``.

    Raises:
        ValueError: ``patience`` or ``min_delta`` is out of its range.

    Example:
        >>> stopping = EarlyStopping("val_loss", patience=5)
        >>> stopping.reason
        'not started'

    Source: the course, "Early stopping"; Prechelt, "Early stopping - but when?", 1998.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 10,
        min_delta: float = 0.0,
        mode: str = "min",
    ) -> None:
        check_range("patience", patience, ">= 1", patience >= 1)
        check_range("min_delta", min_delta, ">= 0", min_delta >= 0)
        # After validation, not at the end of the training epoch: patience then counts checks.
        super().__init__(monitor, min_delta, patience, mode=mode, check_on_train_epoch_end=False)
        self.best_epoch: int | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.reason = "not started"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_score
        super().on_validation_end(trainer, pl_module)
        if self.best_score is not before:
            self.best_epoch = trainer.current_epoch
            state = pl_module.state_dict()
            self.best_state = {name: value.detach().clone() for name, value in state.items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reason = self._explain(trainer)
        if self.best_state is not None:
            pl_module.load_state_dict(self.best_state)

    def _explain(self, trainer: Trainer) -> str:
        best = "no best weights to restore"
        if self.best_epoch is not None:
            best = f"best {self.best_score.item():.4f} at epoch {self.best_epoch}"
        if self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED:
            checks = "epoch" if trainer.check_val_every_n_epoch == 1 else "validation check"
            plural = "s" if self.wait_count > 1 else ""
            return f"{self.monitor} did not improve for {self.wait_count} {checks}{plural}; {best}"
        if self.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
            value = trainer.callback_metrics[self.monitor]
            became = "NaN" if value.isnan() else "infinite"
            return f"{self.monitor} became {became} at epoch {self.stopped_epoch}; {best}"
        limit = (
            "max_epochs" if trainer.current_epoch == trainer.max_epochs else "the Trainer's limit"
        )
        return f"reached {limit}; {best}"

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience  # a resumed run may be more patient than it was
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.best_epoch = state_dict["best_epoch"]
        self.best_state = state_dict["best_state"]
