"""One training run, from its configuration to the files it leaves."""

import contextlib
import copy
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

import torchref
from torchref.data.augment.image import save_picture
from torchref.data.datasets import Dataset, load_dataset
from torchref.data.normalize import Fitted
from torchref.data.reading import check_file
from torchref.training.augment import build_augment, oversample
from torchref.training.checkpoint import (
    AtomicCheckpointIO,
    LastCheckpoint,
    alone,
    previous,
    read_checkpoint,
    write_text,
)
from torchref.training.checks import check_choice, check_range
from torchref.training.config import DATA, NETWORK, Config, read_mapping, versions
from torchref.training.convert import SyncBatchNormPlugin
from torchref.training.curves import plot_learning_curves
from torchref.training.data_module import DataModule
from torchref.training.early_stopping import EarlyStopping
from torchref.training.fingerprint import check_same_data
from torchref.training.gradient_flow import GradientFlowCallback
from torchref.training.history import History
from torchref.training.lost_process import EndTogether, set_timeout, told_when_lost
from torchref.training.mlp import build_normalizer
from torchref.training.module import MLPClassifier, MLPRegressor
from torchref.training.non_finite import StopOnNonFinite
from torchref.training.parity import Parity
from torchref.training.progress import EpochProgress
from torchref.training.resume import DAMAGE, ExactResume, check_exact

FILES = (
    "best.ckpt",
    "best.ckpt.previous",
    "last.ckpt",
    "last.ckpt.previous",
    "config.yaml",
    "hparams.yaml",
    "metrics.json",
    "metrics.csv",
    "learning_curves.png",
    "augmented.png",
    "report.html",
)
SMALL_LAYER = 2**16  # elements of an activation
THREADS = torch.get_num_threads()  # before a run changes them
FIXED_ON_RESUME = (*NETWORK, *DATA)


@dataclass(frozen=True)
class Earlier:
    """Of what a run resumes: how often it opened its test part, and how long it took."""

    test_opened: int = 0
    seconds: float = 0.0


class Run:
    """Train, restore the best weights, open the test set once, and write ``root/<name>/``.

    ======================= ==================================================================
    ``best.ckpt``           the best weights, the normalizer and the hyperparameters
    ``last.ckpt``           all that training needs to go on bit for bit, for ``resume``; the one
                            before it is ``last.ckpt.previous``
    ``metrics.json``        what :meth:`execute` returns
    ``metrics.csv``         each epoch's metrics, by Lightning's CSVLogger
    ``learning_curves.png`` the same as a picture
    ``config.yaml``         the configuration, usable as ``--config``
    ======================= ==================================================================

    A new run replaces these files of an older run of the same name, and nothing else in the folder.

    Args:
        config: see :class:`Config`.
        resume: continue the run of that name from its ``"last"`` checkpoint or the ``"previous"``
            one: what comes of it is, bit for bit, what the uninterrupted run gives. Epochs,
            patience and where it runs may change; data, network and optimizer may not.
        root: where runs are kept.
        dataset: what ``config.dataset`` names, where it is loaded already.
        parts: indices of the training, validation and test parts, instead of a split.
        callbacks: Lightning's, besides the run's own.
        progress: whether a bar, or lines, tell how far training is.

    Raises:
        ValueError: a value is out of its range, malformed data, or a resumed run differs.
        FileNotFoundError: there is no such data file, or nothing to resume.
        RuntimeError: the backend or the accelerator cannot run here.
    """

    def __init__(
        self,
        config: Config,
        resume: Literal["last", "previous"] | None = None,
        root: str | Path = "runs",
        *,
        dataset: Dataset | None = None,
        parts: Sequence[Tensor] | None = None,
        callbacks: Iterable[Callback] = (),
        progress: bool = True,
    ) -> None:
        if resume is not None:
            check_choice("resume", resume, ("last", "previous"))
        check_range("epochs", config.epochs, "> 0", config.epochs > 0)
        check_range("seed", config.seed, "in [0, 4294967295]", 0 <= config.seed < 2**32)
        check_range(
            "start_from_epoch",
            config.start_from_epoch,
            f"below epochs, {config.epochs}",
            config.start_from_epoch < config.epochs,
        )
        folder = config.folder
        if config.batch_size == 1 and config.batch_norm and config.depth:
            raise ValueError(
                "batch_size: batch norm needs two samples or more, got 1; add --no-batch_norm"
            )
        self.config = config
        self.path = Path(root) / folder
        self.resume = resume
        self.dataset = load(config) if dataset is None else dataset
        self.data = data_module(config, self.dataset, parts)
        self.data.fingerprint = self.dataset.fingerprint
        full = config.batch_size == "full"
        _set_threads(config, len(self.data.train) if full else int(config.batch_size))
        inputs = _inputs(self.dataset, config)
        normalize = build_normalizer(config.normalize, inputs)
        if isinstance(normalize, Fitted):
            self.data.fit(normalize)  # of the other parts it sees nothing
        features = normalize(self.data.train.x[:1]).shape[1]
        self.model = self._model(features, inputs, normalize, "torchref")
        self.parity = None
        if config.parity:
            self.parity = Parity(self._model(features, inputs, normalize, "torch"))
        if config.smote:
            self.data.resample(oversample(self.dataset, config.seed))
        self.data.augment = build_augment(config.augment, self.dataset, self.data.train)
        check_range(
            "augment_picture",
            config.augment_picture,
            "--augment and images",
            not config.augment_picture or bool(config.augment and self.dataset.shape),
        )
        self.stopping = EarlyStopping(
            "val_loss", patience=config.patience, start_from_epoch=config.start_from_epoch
        )
        self.finite = StopOnNonFinite()
        self.history = History()
        self.gradients = GradientFlowCallback()
        self.before = Earlier()
        if resume:
            self._check_resume()
        seed_everything(config.seed, verbose=False)
        # Last, so that it holds what the other callbacks know by then.
        callbacks = (*callbacks, LastCheckpoint(self.path, config.save_every))
        try:
            self.trainer = self._trainer(callbacks, progress)
        except TypeError as error:  # Lightning's, for devices that are no devices
            raise ValueError(f"devices: {error}") from None
        set_timeout(self.trainer, config.timeout)
        if str(config.precision) in ("16", "16-mixed") and self.trainer.precision == "bf16-mixed":
            raise ValueError("precision: 16-mixed needs a GPU; use bf16-mixed")
        launched, joined = _launched(), self.trainer.world_size
        if launched > joined:  # each would train a network of its own into the same folder
            raise ValueError(
                f"devices: the launcher started {launched} processes, `devices` and `num_nodes` "
                f"say {joined}"
            )
        share = math.ceil(len(self.data.train) / joined)
        enough = share > 1 or config.batch_size == 1
        check_range("devices", joined, "two training samples for each process", enough)
        if config.compile:
            self.model.compile_net()
        torchref.set_backend(config.backend)  # last: what is refused leaves it as it was

    def _model(
        self, features: int, inputs: dict[str, Any], normalize: torch.nn.Module, library: str
    ) -> MLPClassifier | MLPRegressor:
        seed_everything(self.config.seed, verbose=False)  # the twin starts from the same numbers
        network = {name: getattr(self.config, name) for name in NETWORK}
        if self.dataset.classes is None:
            model = MLPRegressor(features, library, inputs=inputs, **network)
            model.scale.fit(self.data.train.y[:, None])  # pyright: ignore[reportCallIssue]
        else:
            model = MLPClassifier(features, self.dataset.classes, library, inputs=inputs, **network)
        model.normalize.load_state_dict(normalize.state_dict())
        return model

    def _check_resume(self) -> None:
        path, saved = self._checkpoint()
        before = read_mapping(self.path / "config.yaml")
        self._check_same(before, FIXED_ON_RESUME, self.path)
        try:
            done = _find(saved, int, "loops", "fit_loop", "epoch_progress", "current", "processed")
            data = _find(saved, object, type(self.data).__qualname__, "fingerprint")
            waited = _find(saved, int, "callbacks", self.stopping.state_key, "wait_count")
            broken = _find(saved, object, "callbacks", self.finite.state_key, "reason")
            trained = _find(saved, dict, "hyper_parameters")
        except ValueError as error:
            raise ValueError(f"resume: {path} is no run's checkpoint: {error}") from None
        self._check_same(trained, NETWORK, path)  # config.yaml may have been edited since
        check_same_data(self.path, self.config.dataset, data, self.dataset.fingerprint)
        try:
            self._check_states(saved)
        except ValueError as error:
            raise ValueError(f"resume: {path} does not fit this run: {error}") from None
        self.before, finished = _earlier(self.path / "metrics.json")
        if finished:  # else there is something left to do: the scores
            if broken:
                raise ValueError(f"resume: {self.path} had stopped: {broken}")
            epochs, patience = self.config.epochs, self.config.patience
            check_range("epochs", epochs, f"more than the {done} done", epochs > done)
            expected = f"more than the {waited} epochs it has waited"
            check_range("patience", patience, expected, patience > waited)

    def _check_same(self, before: dict[str, Any], names: Iterable[str], where: Path) -> None:
        for name in names:
            was = before.get(name, getattr(Config, name))  # a run may be older than an option
            now = getattr(self.config, name)
            if was != now:
                raise ValueError(f"resume: {name} was {was!r} in {where}, got {now!r}")

    def _check_states(self, saved: dict[str, Any]) -> None:
        """Refuse what training could not load, before it has changed anything."""
        _check_shapes(saved, self.model, "state_dict")
        _find(saved, list, "lr_schedulers")
        states = _find(saved, list, "optimizer_states")
        check_range("optimizer_states", len(states), "the state of one optimizer", len(states) == 1)
        try:
            self.model.configure_optimizers().load_state_dict(states[0])
        except DAMAGE as error:
            raise ValueError(f"optimizer_states: {type(error).__name__}: {error}") from None
        self._check_callbacks(saved)
        check_exact(saved, self.model)
        if len(saved["ExactResume"]) == 1:  # of several processes each had another loader
            loader: Any = self.data.train_dataloader()
            for state in _find(saved, list, "loops", "fit_loop", "state_dict", "combined_loader"):
                loader.load_state_dict(state)

    def _check_callbacks(self, saved: dict[str, Any]) -> None:
        for callback in (self.finite, self.stopping, self.history, self.gradients):
            state = _find(saved, dict, "callbacks", callback.state_key)
            try:
                copy.deepcopy(callback).load_state_dict(state)
            except DAMAGE as error:
                name = type(callback).__name__
                raise ValueError(f"{name}: {type(error).__name__}: {error}") from None
        best = "callbacks", self.stopping.state_key, "best_state"
        if _find(saved, object, *best) is not None:
            _check_shapes(saved, self.model, *best)

    def _checkpoint(self) -> tuple[Path, dict[str, Any]]:
        """The one to go on from; what is wrong with it, and whether there is another."""
        path = self._resumed_from
        if not path.exists():
            raise FileNotFoundError(f"resume: no checkpoint {path}{_hint(path)}")
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            raise ValueError(f"resume: {error}{_hint(path)}") from None

    @property
    def _resumed_from(self) -> Path:
        last = self.path / "last.ckpt"
        return previous(last) if self.resume == "previous" else last

    def _trainer(self, more: Iterable[Callback], progress: bool) -> Trainer:
        quiet()
        config = self.config
        # first, for no other callback is to see gradients that are not finite
        callbacks: list[Callback] = [self.finite, self.stopping, self.history, self.gradients]
        callbacks.append(ExactResume())
        callbacks.append(EndTogether())
        if progress:
            callbacks.append(EpochProgress())
        if self.parity:
            callbacks.append(self.parity)
        callbacks += more
        return Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy=config.strategy,
            num_nodes=config.num_nodes,
            plugins=[SyncBatchNormPlugin(), AtomicCheckpointIO()],
            precision=config.precision,  # pyright: ignore[reportArgumentType]
            max_epochs=config.epochs,
            logger=self._loggers(),
            callbacks=callbacks,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_progress_bar=progress,
            enable_model_summary=False,
            use_distributed_sampler=False,  # DataModule has its own
        )

    def _loggers(self) -> list[Logger]:
        place = {"save_dir": self.path.parent, "name": self.path.name, "version": ""}
        loggers: list[Logger] = [CSVLogger(**place)]
        if find_spec("tensorboard") is not None:
            loggers.append(TensorBoardLogger(**place))
        return loggers

    def execute(self, test: bool = True) -> dict[str, Any]:
        """Train and test; return and write the contents of ``metrics.json``.

        ``test_accuracy`` and ``test_f1`` (macro), or ``test_rmse``, ``test_mae`` and ``test_r2``;
        ``test_loss``, ``test_opened`` (how often, by this run and what it resumes),
        ``best_val_loss``, ``best_epoch`` (from 0), ``epochs`` (how many), ``stop_reason``,
        ``parity_max_loss_diff`` (null where it is off), ``seconds``, ``seed``, ``versions``.

        Args:
            test: whether the test part is opened; its scores are left out otherwise.

        Raises:
            RuntimeError: it was executed before.
            OSError: the folder cannot be written, or another run is writing to it.
            ConnectionError: another process of this run ended or did not answer in time.
        """
        if self.trainer.state.status != TrainerStatus.INITIALIZING:
            raise RuntimeError("Run: it was executed before; make another one, or resume")
        with self._alone(), told_when_lost(self.trainer):
            return self._execute(test)

    def _execute(self, test: bool) -> dict[str, Any]:
        begin = time.perf_counter()
        self._clear()
        resumed = {"ckpt_path": self._resumed_from} if self.resume else {}
        self.trainer.fit(self.model, datamodule=self.data, weights_only=True, **resumed)
        best_epoch = self.stopping.best_epoch
        best = None if best_epoch is None else self.stopping.best_score.item()
        if best_epoch is not None:
            self.trainer.save_checkpoint(self.path / "best.ckpt", weights_only=True)
        metrics = {
            **(self._test() if test else {}),
            "test_opened": self.before.test_opened + self.data.test_opened,
            "best_val_loss": best,
            "best_epoch": best_epoch,
            "epochs": len(self.history.rows),
            "stop_reason": self.finite.reason or self.stopping.reason,
            "parity_max_loss_diff": self.parity.max_loss_diff if self.parity else None,
            "seconds": round(self.before.seconds + time.perf_counter() - begin, 2),
            "seed": self.config.seed,
            "versions": versions(),
        }
        metrics = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()  # JSON knows neither NaN nor infinity
        }
        self._write(metrics)
        return metrics

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep other runs out of the folder."""
        if not self.trainer.is_global_zero:
            return contextlib.nullcontext()
        return alone(self.path / ".lock", "run")

    def _test(self) -> dict[str, Any]:
        self.trainer.test(self.model, datamodule=self.data, verbose=False)
        found = self.trainer.callback_metrics
        names = [*map(str, self.model.test_scores.keys()), "test_loss"]
        return {name: found[name].item() for name in names}

    @rank_zero_only
    def _clear(self) -> None:
        config = yaml.safe_dump(asdict(self.config), sort_keys=False)
        self.path.mkdir(parents=True, exist_ok=True)
        if self.resume:  # what came of the earlier part is not what comes of the whole
            for name in ("report.html", "learning_curves.png"):
                (self.path / name).unlink(missing_ok=True)
            self._write_metrics({**asdict(self.before), "unfinished": True})
        else:
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
            for events in self.path.glob("events.out.tfevents.*"):  # TensorBoard's
                events.unlink()
        write_text(self.path / "config.yaml", config)

    @rank_zero_only
    def _write(self, metrics: dict[str, Any]) -> None:
        if self.config.augment_picture:
            self._draw_augmented()
        picture = self.path / "learning_curves.png"
        plot_learning_curves(self.history.rows, picture, metrics["best_epoch"])
        self._write_metrics(metrics)  # last: with it the run is finished

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        text = json.dumps(metrics, indent=2, allow_nan=False)
        write_text(self.path / "metrics.json", text + "\n")

    def _draw_augmented(self) -> None:
        augment, data = self.data.augment, self.dataset
        assert augment is not None
        assert data.shape is not None
        x: Any = self.data.train.x[:8]

        def of_images(images: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            rows, y = augment(images.flatten(1), y)
            return rows.reshape(images.shape), y

        images, y = x.unflatten(1, data.shape), self.data.train.y[:8]
        save_picture(of_images, images, y, self.path / "augmented.png", data.high)


def _launched() -> int:
    """How many processes a launcher started."""
    size = os.environ.get("WORLD_SIZE", "1")
    check_range("WORLD_SIZE", size, "a number", size.isdecimal())
    return int(size)


def load(config: Config) -> Dataset:
    """The data set that a configuration names."""
    return load_dataset(
        config.dataset,
        root=config.root,
        image_size=config.image_size,
        task=config.task,
        target=config.target,
        categories=config.categories or (),
        drop=config.drop or (),
        missing=config.missing,
        group=config.group,
        time=config.time,
    )


def data_module(
    config: Config, dataset: Dataset, parts: Sequence[Tensor] | None = None
) -> DataModule:
    """The parts of a data set that a configuration asks for."""
    return DataModule(
        dataset.x,
        dataset.y,
        split=config.split,
        ratios=config.ratios or "auto",
        gap=config.gap,
        groups=dataset.groups,
        times=dataset.times,
        test=dataset.test,
        parts=parts,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _inputs(dataset: Dataset, config: Config) -> dict[str, Any]:
    """What a model keeps about its samples, in types that a checkpoint may hold."""
    if dataset.kind == "image":
        return {"kind": "image", "shape": list(dataset.shape or ()), "high": dataset.high}
    if dataset.kind == "text":
        return {"kind": "text"}
    columns = dataset.columns and [
        [column.name, column.categories and list(column.categories)] for column in dataset.columns
    ]
    return {"kind": "table", "missing": config.missing == "impute", "columns": columns}


def _find(saved: Any, kind: type, *names: str) -> Any:
    """What a checkpoint holds there."""
    for name in names:
        if not isinstance(saved, dict) or name not in saved:
            raise ValueError(f"no {name!r}")
        saved = saved[name]
    if not isinstance(saved, kind):
        raise ValueError(f"{names[-1]!r} is of type {type(saved).__name__}")
    return saved


def _check_shapes(saved: dict[str, Any], module: torch.nn.Module, *names: str) -> None:
    """Whether the module can load the weights and buffers that a checkpoint holds there."""
    state, expected = _find(saved, dict, *names), module.state_dict()
    for name in {**expected, **state}:
        values = state.get(name), expected.get(name)
        found, shape = (tuple(x.shape) if isinstance(x, Tensor) else None for x in values)
        text = f"shape {shape}" if name in expected else "nothing of that name"
        check_range(f"{names[-1]}: {name}", found, text, name in expected and found == shape)


def _earlier(metrics: Path) -> tuple[Earlier, bool]:
    """What is known of the run before, and whether it came to its end."""
    if not metrics.exists():
        return Earlier(), False
    check_file(metrics)
    try:
        found = json.loads(metrics.read_text())
        before = Earlier(int(found["test_opened"]), float(found["seconds"]))
        if before.test_opened < 0 or not 0 <= before.seconds < math.inf:
            raise ValueError
        return before, not found.get("unfinished", False)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise ValueError(f"resume: {metrics} is damaged") from None


def _hint(path: Path) -> str:
    """Whether the checkpoint before this one would do."""
    try:
        saved = read_checkpoint(previous(path))
        place = f"epoch {saved['epoch']}, step {saved['global_step']}"
    except (OSError, ValueError, KeyError):
        return ""
    return f"; {previous(path)} is whole ({place}): --resume previous goes on from there"


def _set_threads(config: Config, samples: int) -> None:
    """Threads wait for each other longer than they compute where a layer's output is small."""
    if config.threads != "auto":
        check_range("threads", config.threads, "> 0 or auto", 0 < config.threads < 2**15)
        torch.set_num_threads(config.threads)
    elif samples * config.width < SMALL_LAYER:
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(THREADS)


def quiet() -> None:
    """Keep Lightning's notices and tips off the terminal; errors and other warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers",  # the data is in memory
        "Experiment logs directory .* exists and is not empty",  # History logs it again
        "Checkpoint directory .* exists and is not empty",
        ".*LeafSpec",  # Lightning 2.6 on torch's newer pytree
        "Be aware that when using `ckpt_path`",  # a resumed run may leave out its parity check
    ):
        warnings.filterwarnings("ignore", message=message)
