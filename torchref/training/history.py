"""What a resumed run needs besides weights: the epochs so far and the state of the randomness."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed


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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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


class RandomState(Callback):
    """Put torch's random generators back where the checkpoint left them.

    With it, and an order of samples that depends on seed and epoch alone, a run resumed at the end
    of an epoch draws the dropout masks and augmentations that the uninterrupted run drew. Of
    several processes each has a state of its own; a run that goes on with another number of them
    begins anew from the first one's.
    """

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        own = {"cpu": torch.get_rng_state(), "cuda": cuda}
        if not (distributed.is_available() and distributed.is_initialized()):
            return {"processes": [own]}
        states: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(states, own)  # every process makes a checkpoint, one saves it
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["processes"]
        several = distributed.is_available() and distributed.is_initialized()
        same = several and len(states) == distributed.get_world_size()
        state = states[distributed.get_rank() if same else 0]
        torch.set_rng_state(state["cpu"].cpu())
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in state["cuda"]])
