"""Early stopping that keeps what it found, and keeping what was found without it."""

from numbers import Real
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor

from torchref.training.checks import check_choice, check_integer, check_range, check_type


class RestoreBest(Callback):
    """Train to the end, then go back to the weights and buffers that scored best.

    For runs of a fixed length; :class:`EarlyStopping` does it, too. A NaN or infinite metric is
    never the best. The copy is part of the checkpoint; a new fit begins without one.

    Args:
        monitor: a logged metric.
        mode: ``min`` or ``max``.

    Raises:
        ValueError: ``mode`` is unknown.
        TypeError: ``monitor`` is no text.

    Example:
        >>> best = RestoreBest("val_accuracy", mode="max")
        >>> best.epoch is None
        True

    Source: the course, "Early stopping".
    """

    def __init__(self, monitor: str = "val_loss", mode: str = "min") -> None:
        check_type("monitor", monitor, "a metric's name", str)
        check_choice("mode", mode, ("min", "max"))
        self.monitor, self.mode = monitor, mode
        self.score: float | None = None
        self.epoch: int | None = None
        self.state: dict[str, Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # a checkpoint comes later
            self.score = self.epoch = self.state = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(trainer.callback_metrics)
            raise RuntimeError(
                f"RestoreBest: no metric {self.monitor!r} is logged; there is {known}"
            )
        score = float(trainer.callback_metrics[self.monitor])
        worst = torch.inf if self.mode == "min" else -torch.inf
        best = worst if self.score is None else self.score
        if (score < best if self.mode == "min" else score > best) and abs(score) < torch.inf:
            self.score, self.epoch = score, trainer.current_epoch
            self.state = copied_state(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.state is not None:
            pl_module.load_state_dict(self.state)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch, "state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.epoch, self.state = (state_dict[k] for k in ("score", "epoch", "state"))


class EarlyStopping(callbacks.EarlyStopping):
    """Stop when a metric no longer improves, go back to the best weights, and say why.

    Lightning's callback stops; this one also keeps a copy of the best weights and buffers, puts it
    back when fitting ends for whatever reason, and words the reason. A NaN or infinite metric stops
    training and is never the best. Copy and counters are part of the checkpoint, and training that
    had stopped stops again when it is resumed, unless it may be more patient by then; a new fit
    begins without them. Epochs count from 0, as Lightning's do.

    Args:
        monitor: a logged metric.
        patience: validation checks without improvement before it stops, >= 1.
        min_delta: an improvement is larger than this, finite and >= 0.
        mode: ``min`` or ``max``.
        start_from_epoch: checks before this epoch neither count nor are the best, >= 0; for a
            warmup, or a metric that is good by chance at first.

    Raises:
        ValueError: ``patience``, ``min_delta`` or ``start_from_epoch`` is out of its range.
        TypeError: one of them is no number, or ``monitor`` no text.

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
        start_from_epoch: int = 0,
    ) -> None:
        check_type("monitor", monitor, "a metric's name", str)
        patience = check_integer("patience", patience, 1)
        check_type("min_delta", min_delta, "a number", Real)
        check_range("min_delta", min_delta, "finite and >= 0", 0 <= min_delta < torch.inf)
        self.start_from_epoch = check_integer("start_from_epoch", start_from_epoch, 0)
        # After validation, not at the end of the training epoch: patience then counts checks.
        super().__init__(monitor, min_delta, patience, mode=mode, check_on_train_epoch_end=False)
        self._begin()

    def _begin(self) -> None:
        self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.best_epoch: int | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.wait_count = 0
        self.reason = "not started"
        self._keep_going()
        self._became = ""  # the metric that stopped it: NaN or infinite

    def _keep_going(self) -> None:
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message = None
        self.stopped_epoch = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # a checkpoint comes later
            self._begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:  # by the checkpoint
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch < self.start_from_epoch:
            return
        before = self.best_score
        super().on_validation_end(trainer, pl_module)
        if self.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
            value = trainer.callback_metrics[self.monitor]
            self._became = "NaN" if value.isnan() else "infinite"
        if self.best_score is not before:
            self.best_epoch = trainer.current_epoch
            self.best_state = copied_state(pl_module)

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
            return f"{self.monitor} became {self._became} at epoch {self.stopped_epoch}; {best}"
        limit = (
            "max_epochs" if trainer.current_epoch == trainer.max_epochs else "the Trainer's limit"
        )
        return f"reached {limit}; {best}"

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
            "became": self._became,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        patience = self.patience
        super().load_state_dict(state_dict)
        self.patience = patience  # a resumed run may be more patient than it was
        waits = self.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
        if waits and self.wait_count < patience:
            self._keep_going()
        self._became = state_dict.get("became", "")
        self.best_epoch = state_dict["best_epoch"]
        self.best_state = state_dict["best_state"]


def copied_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """The weights and buffers as they are now."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
