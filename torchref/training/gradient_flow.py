"""The gradient of each layer while a Trainer fits, read at every N-th step."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from torchref.diagnostics.gradient_flow import (
    GradientFlow,
    LayerFlow,
    Probe,
    Verdict,
    as_numbers,
    norm,
)
from torchref.training.checks import check_range


class GradientFlowCallback(Callback):
    r"""Read gradients, weights, steps and activations at every N-th step, and judge them.

    Like :func:`torchref.diagnostics.gradient_flow`, but the update-to-weight ratio is what the
    optimizer really changed, :math:`\lVert w_{t+1} - w_t \rVert / \lVert w_t \rVert`, which takes a
    copy of the weights during such a step. Units are dead if they were 0 for every sample that was
    read in this epoch. Between these steps nothing is installed and nothing runs; the numbers
    stay on the device up to the end of the epoch, and training is the same, bit for bit.

    - With gradient accumulation a reading sees all batches of its step.
    - Gradients are read before clipping, and without the factor of a GradScaler. A reading whose
      step the scaler left out is marked as ``skipped``.
    - With several processes the first one reads: gradients are those of all, activations its own.
    - Of what runs through :func:`torch.compile` there are no shares, and layers are in the order in
      which they were registered; the rest is read. It is compiled a second time, as the first step
      has hooks and the second has none, and no more after that.
    - Where weights are sharded over processes nothing is read, and ``off`` says so.

    Args:
        every: optimizer steps, >= 1.

    Attributes:
        rows: one dict for a layer and a reading: ``epoch``, ``step``, ``layer``, ``grad_norm``,
            ``weight_norm``, ``update_ratio``, ``saturated``, ``dead``, ``skipped``. They are saved
            in checkpoints, and each gradient norm is logged as ``grad_norm/<layer>``.
        off: why nothing is read, or None.

    Raises:
        ValueError: ``every`` is out of its range.

    Example:
        >>> from torchref.training.gradient_flow import GradientFlowCallback
        >>> GradientFlowCallback(every=100).verdict.reason
        '0 layers with a gradient; a comparison needs 2 or more'

    Source: the course, "The vanishing gradient problem"; the ratio: Karpathy, "CS231n: Neural
    networks, part 3", 2015.
    """

    def __init__(self, every: int = 50) -> None:
        check_range("every", every, ">= 1", every >= 1)
        self.every = every
        self.rows: list[dict[str, Any]] = []
        self.off: str | None = None
        self._probe: Probe | None = None
        self._before: dict[Tensor, Tensor] = {}  # weights before the step that is under way
        self._reading: list[tuple[nn.Module, dict[str, Any]]] = []  # of that step
        self._unread: list[dict[str, Any]] = []  # rows whose numbers are on the device
        self._step = 0
        self._logged = 0
        self._resumed: list[Any] = []  # units that were alive in the epoch of the checkpoint

    @property
    def flow(self) -> GradientFlow:
        """The medians over the last epoch that was read, without skipped steps."""
        rows = [row for row in self.rows if row["epoch"] == self.rows[-1]["epoch"]]
        rows = [row for row in rows if not row["skipped"]] or rows
        layers: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            layers.setdefault(row["layer"], []).append(row)
        return GradientFlow(tuple(_summary(name, of) for name, of in layers.items()))

    @property
    def verdict(self) -> Verdict:
        """See :class:`torchref.diagnostics.GradientFlow`."""
        return self.flow.verdict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = 0
        self._log(trainer)  # the checkpoint's rows: a resumed run's logger begins anew

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.off = None
        if any(hasattr(p, "full_tensor") for p in pl_module.parameters()):
            self.off = "weights are sharded over processes"
        reads = trainer.is_global_zero and self.off is None
        self._probe = Probe(pl_module) if reads else None
        if self._probe is not None:
            self._probe.set_alive_units(self._resumed, pl_module.device)
        self._resumed = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._probe is not None and trainer.global_step % self.every == 0:
            self._probe.detach()  # from a batch that was left in the middle
            self._probe.attach()
            self._step = trainer.global_step  # several optimizers each add to it

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._probe is None or not self._probe.attached:
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = {p: p.grad for p in params if p.grad is not None and p not in self._before}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        place = {"epoch": trainer.current_epoch, "step": self._step}
        for layer, row in self._probe.rows(grads):
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                row["grad_norm"] /= scaler.scale(torch.ones_like(row["grad_norm"]))
            self._reading.append((layer, {**place, **row, "skipped": scaler is not None}))
        self._before |= {w: w.detach().clone() for w in grads if w.ndim > 1}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._probe is None or not self._probe.attached:
            return
        self._probe.detach()
        if not self._reading:  # a batch of several whose gradients add up
            return
        for layer, row in self._reading:
            weights = [w for w in self._probe.weights[layer] if w in self._before]
            change = norm([w - self._before[w] for w in weights])
            self._unread.append({**row, "update_ratio": change / row["weight_norm"]})
        self._before.clear()
        self._reading.clear()
        self._probe.flat.clear()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read()
        self._log(trainer)
        if self._probe is not None:
            self._probe.alive.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {
            "rows": self.rows,
            "alive": [] if self._probe is None else self._probe.alive_units(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self._resumed = state_dict.get("alive", [])

    def _stop(self) -> None:
        if self._probe is not None:
            self._probe.detach()
        self._probe = None
        self._before.clear()
        self._reading.clear()

    def _read(self) -> None:
        rows = [as_numbers(row) for row in self._unread]
        self._unread.clear()
        overflowed = {row["step"] for row in rows if not math.isfinite(row["grad_norm"])}
        for row in rows:  # with a scaler an overflow is no explosion: it takes a smaller scale
            row["skipped"] = row["skipped"] and row["step"] in overflowed
        self.rows += rows

    def _log(self, trainer: Trainer) -> None:
        steps: dict[int, dict[str, float]] = {}
        for row in self.rows[self._logged :]:
            steps.setdefault(row["step"], {})[f"grad_norm/{row['layer']}"] = row["grad_norm"]
        for logger in trainer.loggers:
            for step, norms in steps.items():
                logger.log_metrics(norms, step)
        self._logged = len(self.rows)


def _summary(layer: str, rows: Sequence[Mapping[str, Any]]) -> LayerFlow:
    def middle(name: str) -> Any:
        values = [row[name] for row in rows if row[name] is not None]
        return median(values) if values else None

    dead = [row["dead"] for row in rows if row["dead"] is not None]
    norms = {name: middle(name) for name in ("grad_norm", "weight_norm", "update_ratio")}
    # fewer with each reading of an epoch, as a unit that was alive once counts as alive
    least = min(dead, default=None)
    return LayerFlow(layer, **norms, saturated=middle("saturated"), dead=least)
