"""The LightningModule: a network, its normalizer, loss, penalties, optimizer and metrics."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import torchref
import torchref.optim
from torchref.data.normalize import SCALERS
from torchref.nn.functional import softmax
from torchref.training.checks import check_choice, check_range
from torchref.training.mlp import build_mlp, build_optimizer

LIBRARIES = {"torchref": (torchref.nn, torchref.optim), "torch": (torch.nn, torch.optim)}


class Classifier(LightningModule):
    r"""Train any network that turns samples into logits, and predict with it.

    The cost of a batch of m samples is

    .. math::
        J = \frac{1}{m} \sum_i L(z_i, y_i) + \lambda_1 \sum_w |w| + \lambda_2 \sum_w w^2

    where w runs over the weights: parameters of two dimensions or more, so neither biases nor the
    gain of a normalization layer. The gradient of the last term is :math:`2 \lambda_2 w`:
    ``l2`` is half of torch's ``weight_decay`` under plain SGD.

    It logs ``train_loss`` (without penalties), ``train_accuracy``, ``val_loss``, ``val_accuracy``,
    ``val_f1`` (macro), ``test_loss``, ``test_accuracy`` and ``test_f1``, once an epoch.

    Args:
        net: samples to logits (samples, classes).
        classes: number of classes.
        normalize: applied to samples first and saved with the network; a fitted
            :class:`torchref.data.Standard`, say.
        loss: of logits and labels; mean cross-entropy by default.
        optimizer: parameters to optimizer; Adam with rate 0.001 by default.
        l1: :math:`\lambda_1`, finite, >= 0.
        l2: :math:`\lambda_2`, finite, >= 0.

    Raises:
        ValueError: a penalty is out of its range.

    Example:
        >>> model = Classifier(torch.nn.Linear(4, 3), classes=3, l2=1e-4)
        >>> model.predict(torch.zeros(2, 4)).shape
        torch.Size([2])

    Source: the course, "Softmax regression" and "L1 and L2 regularization".
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int,
        *,
        normalize: nn.Module | None = None,
        loss: nn.Module | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        check_range("l1", l1, "finite and >= 0", 0 <= l1 < float("inf"))
        check_range("l2", l2, "finite and >= 0", 0 <= l2 < float("inf"))
        self.net = net
        self.normalize = normalize or nn.Identity()
        self.loss = loss or torchref.nn.CrossEntropyLoss()
        self.optimizer_factory = optimizer or partial(torchref.optim.Adam, lr=1e-3)
        self.l1, self.l2 = l1, l2
        self._compiled: tuple[Callable[[Tensor], Tensor], ...] = ()
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )
        self.val_scores = scores.clone(prefix="val_")
        self.test_scores = scores.clone(prefix="test_")

    @property
    def compiled(self) -> bool:
        """Whether :meth:`compile_net` was called."""
        return bool(self._compiled)

    def compile_net(self) -> None:
        """Run the network through :func:`torch.compile`; the keys of the state stay as they are."""
        self._compiled = (torch.compile(self.net),)  # in a tuple, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        net = self._compiled[0] if self._compiled else self.net
        return net(self.normalize(x))

    def penalty(self) -> Tensor | float:
        """The L1 and L2 terms of the cost."""
        weights = [p for p in self.net.parameters() if p.ndim > 1]
        l1 = self.l1 * sum(w.abs().sum() for w in weights) if self.l1 else 0.0
        l2 = self.l2 * sum(w.square().sum() for w in weights) if self.l2 else 0.0
        return l1 + l2

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = self.loss(logits, y)
        self.train_accuracy(logits, y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss + self.penalty()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        self._score("val", self.val_scores, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        self._score("test", self.test_scores, batch)

    def _score(self, stage: str, scores: MetricCollection, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = self(x)
        scores.update(logits, y)
        loss = self.loss(logits, y)
        self.log(f"{stage}_loss", loss, sync_dist=True, batch_size=len(y))
        self.log_dict(scores, batch_size=len(y))  # pyright: ignore[reportArgumentType]

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return self.predict_proba(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_factory(self.net.parameters())

    def predict_proba(self, x: Tensor) -> Tensor:
        """Probabilities (samples, classes): the softmax of the logits, in evaluation mode."""
        return softmax(self._evaluate(x), dim=-1)

    def predict(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """The class of each sample, or -1 where the network is not confident enough.

        Softmax keeps order, so the largest logit decides.

        Args:
            x: (samples, features), before normalization.
            threshold: abstain below this probability, in [0, 1]; None never abstains.

        Returns:
            (samples,) int64.

        Raises:
            ValueError: ``threshold`` is out of its range.
        """
        logits = self._evaluate(x)
        labels = logits.argmax(-1)
        if threshold is None:
            return labels
        check_range("threshold", threshold, "in [0, 1]", 0 <= threshold <= 1)
        confident = softmax(logits, dim=-1).amax(-1) >= threshold  # False for NaN
        return labels.masked_fill(~confident, -1)

    @torch.no_grad()
    def _evaluate(self, x: Tensor) -> Tensor:
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return self(x)
        finally:
            for module, mode in modes:
                module.training = mode


class MLPClassifier(Classifier):
    """A :class:`Classifier` that its hyperparameters rebuild, so that a checkpoint is enough.

    Args:
        features: length of a sample.
        classes: names of the classes.
        depth, width, activation, dropout, batch_norm, init: see :func:`build_mlp`.
        optimizer, lr: see :func:`build_optimizer`.
        l1, l2: see :class:`Classifier`.
        normalize: ``standard``, ``minmax``, ``robust`` or ``none``.
        library: ``torchref``, or ``torch`` for the twin made of torch.nn and torch.optim.

    Example:
        >>> model = MLPClassifier(features=4, classes=["no", "yes"], depth=1, width=8)
        >>> model.hparams["width"]
        8
    """

    def __init__(
        self,
        features: int,
        classes: list[str],
        depth: int = 2,
        width: int = 128,
        activation: str = "relu",
        dropout: float = 0.1,
        batch_norm: bool = True,
        init: str = "auto",
        optimizer: str = "adam",
        lr: float = 1e-3,
        l1: float = 0.0,
        l2: float = 0.0,
        normalize: str = "standard",
        library: str = "torchref",
    ) -> None:
        check_choice("normalize", normalize, SCALERS)
        layers, _ = LIBRARIES[library]
        net = build_mlp(
            features,
            len(classes),
            depth=depth,
            width=width,
            activation=activation,
            dropout=dropout,
            batch_norm=batch_norm,
            init=init,
            library=layers,
        )
        super().__init__(
            net,
            len(classes),
            normalize=SCALERS[normalize](),
            loss=layers.CrossEntropyLoss(),
            l1=l1,
            l2=l2,
        )
        self.save_hyperparameters()
        self.configure_optimizers()  # a wrong rate or name is an error here, not after the data

    def configure_optimizers(self) -> torch.optim.Optimizer:
        _, optimizers = LIBRARIES[self.hparams["library"]]
        name, lr = self.hparams["optimizer"], self.hparams["lr"]
        return build_optimizer(name, self.net.parameters(), lr, optimizers)
