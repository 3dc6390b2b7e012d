"""The LightningModules: a network, its normalizer, loss, penalties, optimizer and metrics."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import (
    MeanAbsoluteError,
    MeanSquaredError,
    Metric,
    MetricCollection,
    R2Score,
)
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import torchref
import torchref.optim
from torchref._checks import require_number
from torchref.autograd import opmath
from torchref.data.normalize import Standard
from torchref.nn.functional import softmax
from torchref.nn.penalty import weight_penalty
from torchref.training.checks import check_choice, check_integer, check_range
from torchref.training.decision import decide
from torchref.training.mlp import LIBRARIES, build_mlp, build_normalizer, optimizer_factory

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Supervised(LightningModule):
    r"""Train any network on samples with targets; :class:`Classifier` and :class:`Regressor`.

    The cost of a batch of m samples is

    .. math::
        J = \frac{1}{m} \sum_i L(z_i, y_i) + \lambda_1 \sum_w |w| + \lambda_2 \sum_w w^2

    with the penalties of :func:`torchref.nn.weight_penalty`: ``l2`` is half of torch's
    ``weight_decay`` under plain SGD. The loss is logged without them, once an epoch, as
    ``train_loss``, ``val_loss`` and ``test_loss``.

    Args:
        net: samples to outputs.
        loss: of outputs and targets.
        scores: metrics of predictions and targets; each is logged as ``val_...`` and ``test_...``,
            the first as ``train_...``, too.
        normalize: applied to samples first and saved with the network; a fitted
            :class:`torchref.data.Standard`, say.
        optimizer: parameters to optimizer; Adam with rate 0.001 by default.
        l1: :math:`\lambda_1`, finite, >= 0.
        l2: :math:`\lambda_2`, finite, >= 0.

    Raises:
        ValueError: a penalty is out of its range.
        TypeError: it is no number.

    Source: the course, "Backpropagation" and "L1 and L2 regularization".
    """

    score: str
    """The metric that is shown beside the loss."""
    history: list[dict[str, float]]
    """Every epoch's metrics, from :class:`History`."""

    def __init__(
        self,
        net: nn.Module,
        loss: nn.Module,
        scores: MetricCollection,
        *,
        normalize: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("l1", l1), ("l2", l2)):
            require_number(type(self).__name__, name, value)
            check_range(name, value, "finite and >= 0", 0 <= value < float("inf"))
        self.net = net
        self.normalize = normalize or nn.Identity()
        self.loss = loss
        self.optimizer_factory = optimizer or partial(torchref.optim.Adam, lr=1e-3)
        self.l1, self.l2 = l1, l2
        self.history = []
        self._compiled: tuple[Callable[[Tensor], Tensor], ...] = ()
        self.train_loss = _MeanLoss()
        self.train_score = scores[self.score].clone()
        self.val_scores = scores.clone(prefix="val_")
        self.test_scores = scores.clone(prefix="test_")

    @property
    def compiled(self) -> bool:
        """Whether :meth:`compile_net` was called."""
        return bool(self._compiled)

    def compile_net(self) -> None:
        """Run the network through :func:`torch.compile`; the keys of the state stay as they are."""
        self._compiled = (torch.compile(self.net),)  # in a tuple, so that it is no submodule

    def forward(self, x: Any) -> Tensor:
        net = self._compiled[0] if self._compiled else self.net
        z = self.normalize(x)
        if z.is_floating_point():  # after training in another precision buffers may be of another
            z = z.to(next(self.net.parameters(), z).dtype)
        return net(z)

    def cost(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, without penalties, and the outputs."""
        output = self(x)
        return self.loss(output, y), output

    def penalty(self) -> Tensor:
        """The L1 and L2 terms of the cost."""
        return weight_penalty(self.net, self.l1, self.l2)

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int = 0) -> Tensor:
        loss, output = self.cost(*batch)
        self._update(self.train_score, output, batch[1])
        options = {"on_step": False, "on_epoch": True, "batch_size": len(batch[1])}
        self.train_loss.update(loss, len(batch[1]))
        self.log("train_loss", self.train_loss, **options)
        self.log(f"train_{self.score}", self.train_score, **options)
        return loss + self.penalty()

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int = 0) -> None:
        self._evaluate_batch("val", self.val_scores, batch)

    def test_step(self, batch: tuple[Any, Tensor], batch_idx: int = 0) -> None:
        self._evaluate_batch("test", self.test_scores, batch)

    def _evaluate_batch(
        self, stage: str, scores: MetricCollection, batch: tuple[Any, Tensor]
    ) -> None:
        loss, output = self.cost(*batch)
        self._update(scores, output, batch[1])
        size = len(batch[1])
        self.log(f"{stage}_loss", loss, sync_dist=True, batch_size=size)
        self.log_dict(scores, batch_size=size)  # pyright: ignore[reportArgumentType]

    def _update(self, scores: Any, output: Tensor, y: Tensor) -> None:
        """Show a batch to metrics."""
        scores.update(output, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_factory(self.net.parameters())

    def predict(self, x: Any) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def _evaluate(self, x: Any) -> Tensor:
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return self(x)
        finally:
            for module, mode in modes:
                module.training = mode


class Classifier(Supervised):
    r"""Train any network that turns samples into logits, and predict with it.

    It logs what :class:`Supervised` does, and ``accuracy`` and ``f1`` (macro). Targets are classes
    or, from mixup say, probabilities, whose largest the metrics take as the class.

    Args:
        net: samples to logits (samples, classes).
        classes: number of classes, >= 2.
        loss: of logits and labels; mean cross-entropy by default.
        normalize, optimizer, l1, l2: see :class:`Supervised`.

    Raises:
        ValueError: a penalty or ``classes`` is out of its range.
        TypeError: one of them is no number.

    Example:
        >>> model = Classifier(torch.nn.Linear(4, 3), classes=3, l2=1e-4)
        >>> model.predict(torch.zeros(2, 4)).shape
        torch.Size([2])

    Source: the course, "Softmax regression".
    """

    score = "accuracy"

    def __init__(
        self, net: nn.Module, classes: int, *, loss: nn.Module | None = None, **options: Any
    ) -> None:
        classes = check_integer("classes", classes, 2)
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )
        super().__init__(net, loss or torchref.nn.CrossEntropyLoss(), scores, **options)

    def _update(self, scores: Any, output: Tensor, y: Tensor) -> None:
        scores.update(output, y.argmax(-1) if y.is_floating_point() else y)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return self.predict_proba(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def predict_proba(self, x: Any) -> Tensor:
        """Probabilities (samples, classes): the softmax of the logits, in evaluation mode."""
        return softmax(self._evaluate(x), dim=-1)

    def predict(self, x: Any, threshold: float | Tensor | None = None) -> Tensor:
        """The class of each sample, or -1 where the network is not confident enough.

        Softmax keeps order, so without a threshold the largest logit decides.

        Args:
            x: (samples, features), before normalization, or texts.
            threshold: see :func:`torchref.training.decide`; None never abstains.

        Returns:
            (samples,) int64.

        Raises:
            ValueError: ``threshold`` is out of its range.
        """
        logits = self._evaluate(x)
        return logits.argmax(-1) if threshold is None else decide(softmax(logits, -1), threshold)


class Regressor(Supervised):
    r"""Train any network that turns samples into values, and predict with it.

    The network's outputs are in units of the targets' scale, so that one learning rate serves
    targets of any size: the loss, the mean of squares, is 1 for whoever predicts the mean.
    ``rmse``, ``mae`` and ``r2`` are of predictions in the targets' own units. The gradient of the
    course's squared loss, :math:`\frac{1}{2} (y - \hat{y})^2`, is half as large.

    Args:
        net: samples to (samples, 1).
        loss: of outputs and scaled targets; the mean of squares by default.
        scale: fitted on the training part's targets, (samples, 1); none by default.
        normalize, optimizer, l1, l2: see :class:`Supervised`.

    Raises:
        ValueError: a penalty is out of its range.
        TypeError: it is no number.

    Example:
        >>> model = Regressor(torch.nn.Linear(4, 1))
        >>> model.predict(torch.zeros(2, 4)).shape
        torch.Size([2])

    Source: the course, "MSE in backpropagation" and "L1 and L2 regularization".
    """

    score = "rmse"

    def __init__(
        self,
        net: nn.Module,
        *,
        loss: nn.Module | None = None,
        scale: nn.Module | None = None,
        **options: Any,
    ) -> None:
        scores = MetricCollection(
            {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError(), "r2": _R2()},
            compute_groups=False,  # of metrics that share no state
        )
        super().__init__(net, loss or torchref.nn.MSELoss(), scores, **options)
        self.scale = scale or nn.Identity()

    def forward(self, x: Any) -> Tensor:
        return super().forward(x).squeeze(-1)

    def cost(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        output = self(x)
        return self.loss(output, self._scaled(y)), output

    def _update(self, scores: Any, output: Tensor, y: Tensor) -> None:
        if opmath(y) is not y:  # Lightning made the sums half, too, where squares are infinite
            scores.set_dtype(torch.float32)
        output, y = opmath(output.detach()), opmath(y)
        in_units = (self._in_units(output), y)
        if not isinstance(scores, MetricCollection):
            return scores.update(*in_units)
        for name, metric in scores.items(keep_base=True, copy_state=False):
            # R2 is the same of scaled values, whose sums of squares do not cancel
            metric.update(*((output, self._scaled(y)) if name == "r2" else in_units))

    def _scaled(self, y: Tensor) -> Tensor:
        return self.scale(y[:, None])[:, 0]

    def _in_units(self, output: Tensor) -> Tensor:
        if isinstance(self.scale, Standard):
            return self.scale.inverse(opmath(output)[:, None])[:, 0]
        return output

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return self.predict(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def predict(self, x: Any) -> Tensor:
        """The value of each sample, (samples,), in evaluation mode."""
        return self._in_units(self._evaluate(x))


class _MeanLoss(Metric):
    """The mean over samples: a NaN stays one, and in the middle of an epoch it can be saved.

    Of torchmetrics' own the one that keeps a NaN forgets the weights, and Lightning's mean of what
    is logged has no state that a checkpoint could hold.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, count: int) -> None:
        loss = opmath(loss.detach())
        # Lightning may have made the sums half, too
        self.total = self.total.to(loss.dtype) + loss * count
        self.count = self.count.to(loss.dtype) + count

    def compute(self) -> Tensor:
        return self.total / self.count


class _R2(R2Score):
    """NaN where a single sample has no variance to explain."""

    def compute(self) -> Tensor:
        if self.total < 2:
            return torch.full_like(self.residual, torch.nan).squeeze()
        return super().compute()


class MLPClassifier(Classifier):
    """A :class:`Classifier` that its hyperparameters rebuild, so that a checkpoint is enough.

    Args:
        features: length of a sample as the network sees it.
        classes: names of the classes.
        library: ``torchref``, or ``torch`` for the twin made of torch.nn and torch.optim.
        options: ``depth``, ``width``, ``activation``, ``dropout``, ``batch_norm``, ``init`` as in
            :func:`build_mlp`; ``optimizer`` ("adam") and ``lr`` (0.001) as in
            :func:`build_optimizer`; ``l1`` and ``l2`` (0); ``normalize`` ("auto") and ``inputs`` as
            in :func:`build_normalizer`.

    Example:
        >>> model = MLPClassifier(features=4, classes=["no", "yes"], depth=1, width=8)
        >>> model.hparams["width"]
        8
    """

    def __init__(
        self, features: int, classes: list[str], library: str = "torchref", **options: Any
    ) -> None:
        check_choice("library", library, LIBRARIES)
        loss = LIBRARIES[library][0].CrossEntropyLoss()
        parts = _mlp_parts(features, len(classes), library, **options)
        super().__init__(classes=len(classes), loss=loss, **parts)
        self.save_hyperparameters()


class MLPRegressor(Regressor):
    """A :class:`Regressor` that its hyperparameters rebuild, so that a checkpoint is enough.

    Args:
        features, library, options: see :class:`MLPClassifier`.

    Example:
        >>> model = MLPRegressor(features=4, depth=1, width=8)
        >>> model.hparams["width"]
        8
    """

    def __init__(self, features: int, library: str = "torchref", **options: Any) -> None:
        check_choice("library", library, LIBRARIES)
        parts = _mlp_parts(features, 1, library, **options)
        super().__init__(loss=LIBRARIES[library][0].MSELoss(), scale=Standard(), **parts)
        self.save_hyperparameters()


def _mlp_parts(
    features: int,
    outputs: int,
    library: str,
    *,
    optimizer: str = "adam",
    lr: float = 1e-3,
    l1: float = 0.0,
    l2: float = 0.0,
    normalize: str = "auto",
    inputs: dict[str, Any] | None = None,
    **network: Any,
) -> dict[str, Any]:
    layers, optimizers = LIBRARIES[library]
    return {
        "net": build_mlp(features, outputs, library=layers, **network),
        "normalize": build_normalizer(normalize, inputs),
        "optimizer": optimizer_factory(optimizer, lr, optimizers),
        "l1": l1,
        "l2": l2,
    }
