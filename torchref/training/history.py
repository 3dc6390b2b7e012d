"""Every epoch's metrics, in memory and in the checkpoint."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class History(Callback):
    """Every epoch's metrics in memory, and in the checkpoint.

    ``rows`` holds one dict an epoch: ``epoch``, ``step`` and each logged metric. While it trains
    and afterwards the module has the same list as ``history``. A resumed run logs the rows of its
    checkpoint again, so the logger's file has each epoch once.

    Example:
        >>> History().rows
        []
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        setattr(pl_module, "history", self.rows)  # noqa: B010  whatever module it is
        for row in self.rows:
            for logger in trainer.loggers:
                metrics = {name: value for name, value in row.items() if name != "step"}
                logger.log_metrics(metrics, step=int(row["step"]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        step = trainer.global_step - 1  # as Lightning's loggers count
        self.rows.append({"epoch": trainer.current_epoch, "step": step, **metrics})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
