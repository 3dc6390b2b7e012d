"""The same training, made of torch.nn and torch.optim, beside the real one."""

from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import torchref
from torchref.training.checks import check_range
from torchref.training.module import Supervised


class Parity(Callback):
    """Train a twin on the same batches with the same random numbers and compare losses.

    Before each step the twin takes its own, from the same state of the random generator, which is
    then put back: dropout masks agree. ``max_loss_diff`` is the largest absolute difference of
    the two losses over all steps.

    The twin starts from its own seed and, every ``sync_every`` steps, again from the weights,
    buffers and optimizer state of the model. A wrong formula, gradient or update shows within a few
    steps. Rounding needs more to grow, but free-running it does: where a gradient is zero but for
    rounding, as batch norm makes it for inputs constant over a batch, Adam scales it up to a
    full step, and two runs of torch itself on different hardware part just as far.

    Where the comparison would not be of like with like it is off, and ``off`` says why: several
    processes, a precision other than 32, a compiled network, or dropout on a GPU or under the
    compiled backend, whose masks torch and torchref draw differently.

    Args:
        twin: the same network from the same seed, ``library="torch"``.
        sync_every: steps, >= 2.

    Raises:
        ValueError: ``sync_every`` is out of its range.

    Example:
        >>> from torchref.training import MLPClassifier, Parity
        >>> Parity(MLPClassifier(4, ["no", "yes"], library="torch")).off is None
        True
    """

    def __init__(self, twin: Supervised, sync_every: int = 20) -> None:
        # With 1 no update of the twin would ever be compared.
        check_range("sync_every", sync_every, ">= 2", sync_every >= 2)
        self.twin = twin
        self.sync_every = sync_every
        self.optimizer = twin.configure_optimizers()
        self.off: str | None = None
        self._max: Tensor | None = None
        self._loss: Tensor | None = None
        self._resumed: dict[str, Any] = {}

    @property
    def max_loss_diff(self) -> float | None:
        """None where no step was compared."""
        return None if self._max is None else self._max.item()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.off = _why_off(trainer, pl_module)
        if self.off:
            self._max = None
            return
        self.twin.to(pl_module.device)
        if self._resumed:  # here, for an optimizer's state goes to where its parameters are
            self.twin.load_state_dict(self._resumed["twin"])
            self.optimizer.load_state_dict(self._resumed["optimizer"])
            self._resumed = {}
        elif trainer.global_step > 0:  # from a checkpoint without a twin
            self._sync(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.off:
            return
        if trainer.global_step > 0 and trainer.global_step % self.sync_every == 0:
            self._sync(trainer, pl_module)
        x, y = batch
        device = y.device  # x may be texts
        with torch.random.fork_rng([device] if y.is_cuda else [], device_type=device.type):
            loss = self.twin.cost(x, y)[0] + self.twin.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self._loss = loss.detach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.off or self._loss is None:
            return
        diff = (outputs["loss"].detach() - self._loss).abs()
        self._max = diff if self._max is None else torch.maximum(self._max, diff)

    def _sync(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.twin.load_state_dict(pl_module.state_dict())
        # A copy: load_state_dict keeps the tensors it is given, and both would update them.
        self.optimizer.load_state_dict(deepcopy(trainer.optimizers[0].state_dict()))

    def state_dict(self) -> dict[str, Any]:
        if self.off:
            return {"max": self._max}
        return {
            "max": self._max,
            "twin": self.twin.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._max = state_dict["max"]
        self._resumed = state_dict if "twin" in state_dict else {}


def _why_off(trainer: Trainer, module: LightningModule) -> str | None:
    if trainer.world_size > 1:
        return "it compares a single process"
    if trainer.precision != "32-true":
        return f"it compares precision 32, not {trainer.precision}"
    if getattr(module, "compiled", False):
        return "a compiled network draws other dropout masks"
    drops = any(isinstance(layer, torch.nn.Dropout) for layer in module.modules())
    if drops and module.device.type != "cpu":
        return "dropout masks on a GPU differ from torch's (--dropout 0 compares)"
    if drops and torchref.get_backend() == "compiled":
        return "the compiled backend draws other dropout masks than torch (--dropout 0 compares)"
    return None
