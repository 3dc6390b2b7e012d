"""One training run, from its configuration to the files it leaves."""

import json
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Iterable
from dataclasses import Field, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

import torchref
from torchref.data.datasets import load_dataset
from torchref.data.normalize import Scaler
from torchref.training.checks import check_range
from torchref.training.convert import SyncBatchNormPlugin
from torchref.training.curves import plot_learning_curves
from torchref.training.data_module import ClassificationData
from torchref.training.early_stopping import EarlyStopping
from torchref.training.history import History, RandomState
from torchref.training.module import MLPClassifier
from torchref.training.parity import Parity
from torchref.training.progress import EpochProgress

FILES = (
    "best.ckpt",
    "last.ckpt",
    "config.yaml",
    "hparams.yaml",
    "metrics.json",
    "metrics.csv",
    "learning_curves.png",
)
NETWORK = (
    "depth",
    "width",
    "activation",
    "dropout",
    "batch_norm",
    "init",
    "optimizer",
    "lr",
    "l1",
    "l2",
    "normalize",
)
SMALL_LAYER = 2**16  # elements of an activation
FIXED_ON_RESUME = (*NETWORK, "dataset", "batch_size", "seed")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; each field is a flag of ``scripts/train.py`` and a YAML key.

    Ranges are checked where the values are used, by :class:`Run`.

    Example:
        >>> Config(lr=0.01).width
        128
    """

    dataset: str = _option("digits", "digits, breast_cancer, wine, iris or csv:PATH (class last)")
    lr: float = _option(2e-3, "learning rate, > 0")
    epochs: int = _option(100, "most passes over the training split, > 0")
    batch_size: int | Literal["full"] = _option(
        64, "samples in a step: full is batch, 1 stochastic gradient descent; for each process"
    )
    depth: int = _option(2, "hidden layers, >= 0; 0 is softmax regression")
    width: int = _option(128, "neurons in a hidden layer, > 0")
    activation: str = _option("relu", "relu, leaky_relu, sigmoid, tanh, elu, selu, gelu or silu")
    init: str = _option(
        "auto", "auto (by activation: He for relu), he, xavier, lecun, normal, zeros"
    )
    optimizer: str = _option("adam", "sgd, momentum, rmsprop, adam or adamw")
    dropout: float = _option(0.1, "probability that a neuron is dropped, in [0, 1)")
    l1: float = _option(0.0, "weight of the sum of |w|, >= 0")
    l2: float = _option(1e-4, "weight of the sum of w^2, >= 0; half of a weight_decay")
    batch_norm: bool = _option(True, "batch norm in each hidden layer")
    patience: int = _option(15, "epochs without a better val_loss before it stops, >= 1")
    normalize: str = _option(
        "standard", "features by the training split: standard, minmax, robust or none"
    )
    seed: int = _option(0, "of the split, the weights, the order and dropout")
    name: str | None = _option(None, "folder under runs/, replaced if it exists; default: dataset")
    accelerator: str = _option("auto", "Lightning's: auto, cpu, gpu, ...")
    devices: int | str = _option(1, "Lightning's: how many, which (0,1), or auto")
    strategy: str = _option("auto", "Lightning's: auto, ddp, ...")
    num_nodes: int = _option(1, "machines, under a launcher on each")
    precision: int | str = _option("32", "Lightning's: 32, 64, 16-mixed, bf16-mixed, ...")
    threads: int | Literal["auto"] = _option(
        "auto", "CPU threads; auto is 1 for a small network, faster there, else torch's choice"
    )
    compile: bool = _option(False, "run the network through torch.compile")
    backend: str = _option("auto", "torchref's: auto, reference, compiled or triton")
    parity: bool = _option(True, "train the torch twin beside it and compare losses")

    @property
    def folder(self) -> str:
        """``name``, or the dataset's: ``digits``, or ``csv-`` and the stem of a CSV file."""
        default = (
            f"csv-{Path(self.dataset[4:]).stem}" if self.dataset[:4] == "csv:" else self.dataset
        )
        folder = default if self.name is None else self.name
        plain = Path(folder).name == folder and folder not in ("", ".", "..")
        check_range("name", folder, "a plain folder name", plain)
        return folder


class Run:
    """Train, restore the best weights, open the test set once, and write ``root/<name>/``.

    ======================  ==================================================================
    ``best.ckpt``           the best weights, the normalizer and the hyperparameters
    ``last.ckpt``           the last epoch with optimizer and callbacks, for ``resume``
    ``metrics.json``        what :meth:`execute` returns
    ``metrics.csv``         each epoch's metrics, by Lightning's CSVLogger
    ``learning_curves.png`` the same as a picture
    ``config.yaml``         the configuration, usable as ``--config``
    ======================  ==================================================================

    A new run replaces these files of an older run of the same name, and nothing else in the folder.

    Args:
        config: see :class:`Config`.
        resume: continue after the last epoch of the run of that name. Epochs, patience and where it
            runs may change; data, network and optimizer may not.
        root: where runs are kept.

    Raises:
        ValueError: a value is out of its range, malformed data, or a resumed run differs.
        FileNotFoundError: there is no such data file, or nothing to resume.
        RuntimeError: the backend or the accelerator cannot run here.
    """

    def __init__(self, config: Config, resume: bool = False, root: str | Path = "runs") -> None:
        check_range("epochs", config.epochs, "> 0", config.epochs > 0)
        check_range("seed", config.seed, "in [0, 4294967295]", 0 <= config.seed < 2**32)
        folder = config.folder
        if config.batch_size == 1 and config.batch_norm and config.depth:
            raise ValueError(
                "batch_size: batch norm needs two samples or more, got 1; add --no-batch_norm"
            )
        self.config = config
        self.path = Path(root) / folder
        self.resume = resume
        torchref.set_backend(config.backend)
        data = load_dataset(config.dataset)
        self.data = ClassificationData(
            data.x, data.y, batch_size=config.batch_size, seed=config.seed
        )
        full = config.batch_size == "full"
        _set_threads(config, len(self.data.train) if full else int(config.batch_size))
        self.model = self._model(data.x.shape[1], data.classes, "torchref")
        normalize = self.model.normalize
        if isinstance(normalize, Scaler):
            normalize.fit(self.data.train.tensors[0])  # of the other splits it sees nothing
        self.parity = None
        if config.parity:
            twin = self._model(data.x.shape[1], data.classes, "torch")
            twin.normalize.load_state_dict(normalize.state_dict())
            self.parity = Parity(twin)
        self.stopping = EarlyStopping("val_loss", patience=config.patience)
        self.history = History()
        if resume:
            self._check_resume()
        seed_everything(config.seed, verbose=False)
        try:
            self.trainer = self._trainer()
        except TypeError as error:  # Lightning's, for devices that are no devices
            raise ValueError(f"devices: {error}") from None
        if str(config.precision) in ("16", "16-mixed") and self.trainer.precision == "bf16-mixed":
            raise ValueError("precision: 16-mixed needs a GPU; use bf16-mixed")
        launched, joined = int(os.environ.get("WORLD_SIZE", 1)), self.trainer.world_size
        if launched > joined:  # each would train a network of its own into the same folder
            raise ValueError(
                f"devices: the launcher started {launched} processes, `devices` and `num_nodes` "
                f"say {joined}"
            )
        if config.compile:
            self.model.compile_net()

    def _model(self, features: int, classes: list[str], library: str) -> MLPClassifier:
        seed_everything(self.config.seed, verbose=False)  # the twin starts from the same numbers
        network = {name: getattr(self.config, name) for name in NETWORK}
        return MLPClassifier(features, classes, **network, library=library)

    def _check_resume(self) -> None:
        last = self.path / "last.ckpt"
        if not last.exists():
            raise FileNotFoundError(f"resume: no checkpoint {last}")
        before = yaml.safe_load((self.path / "config.yaml").read_text())
        for name in FIXED_ON_RESUME:
            was = before.get(name, getattr(Config, name))  # a run may be older than an option
            if was != getattr(self.config, name):
                raise ValueError(
                    f"resume: {name} was {was!r} in {self.path}, got {getattr(self.config, name)!r}"
                )
        try:
            done = torch.load(last, map_location="cpu", weights_only=True)["epoch"] + 1
        except Exception:  # a damaged file may raise anything
            raise ValueError(f"resume: {last} is damaged") from None
        epochs = self.config.epochs
        check_range("epochs", epochs, f"more than the {done} done", epochs > done)

    def _trainer(self) -> Trainer:
        quiet()
        config = self.config
        callbacks: list[Callback] = [self.stopping, self.history, RandomState(), EpochProgress()]
        if self.parity:
            callbacks.append(self.parity)
        # Saved last in the epoch, so that it holds what the other callbacks know by then.
        last = ModelCheckpoint(
            self.path, "last", save_on_train_epoch_end=True, enable_version_counter=False
        )
        return Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy=config.strategy,
            num_nodes=config.num_nodes,
            plugins=[SyncBatchNormPlugin()],
            precision=config.precision,  # pyright: ignore[reportArgumentType]
            max_epochs=config.epochs,
            logger=CSVLogger(self.path.parent, name=self.path.name, version=""),
            callbacks=[*callbacks, last],
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_model_summary=False,
            use_distributed_sampler=False,  # ClassificationData has its own
        )

    def execute(self) -> dict[str, Any]:
        """Train and test; return and write the contents of ``metrics.json``.

        ``test_accuracy``, ``test_f1`` (macro), ``best_val_loss``, ``best_epoch`` (from 0),
        ``epochs`` (how many), ``stop_reason``, ``parity_max_loss_diff`` (null where it is off),
        ``seconds``, ``seed``, ``versions``.
        """
        begin = time.perf_counter()
        self._clear()
        resumed = {"ckpt_path": self.path / "last.ckpt"} if self.resume else {}
        self.trainer.fit(self.model, datamodule=self.data, weights_only=True, **resumed)
        best_epoch = self.stopping.best_epoch
        best = None if best_epoch is None else self.stopping.best_score.item()
        if best_epoch is not None:
            self.trainer.save_checkpoint(self.path / "best.ckpt", weights_only=True)
        self.trainer.test(self.model, datamodule=self.data, verbose=False)
        test = self.trainer.callback_metrics
        metrics = {
            "test_accuracy": test["test_accuracy"].item(),
            "test_f1": test["test_f1"].item(),
            "best_val_loss": best,
            "best_epoch": best_epoch,
            "epochs": len(self.history.rows),
            "stop_reason": self.stopping.reason,
            "parity_max_loss_diff": self.parity.max_loss_diff if self.parity else None,
            "seconds": round(time.perf_counter() - begin, 2),
            "seed": self.config.seed,
            "versions": versions(),
        }
        metrics = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()  # JSON knows neither NaN nor infinity
        }
        self._write(metrics)
        return metrics

    @rank_zero_only
    def _clear(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.resume:
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(asdict(self.config), sort_keys=False))

    @rank_zero_only
    def _write(self, metrics: dict[str, Any]) -> None:
        (self.path / "metrics.json").write_text(
            json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        )
        picture = self.path / "learning_curves.png"
        plot_learning_curves(self.history.rows, picture, metrics["best_epoch"])


def _set_threads(config: Config, samples: int) -> None:
    """Threads wait for each other longer than they compute where a layer's output is small."""
    if config.threads != "auto":
        check_range("threads", config.threads, "> 0 or auto", config.threads > 0)
        torch.set_num_threads(config.threads)
    elif samples * config.width < SMALL_LAYER:
        torch.set_num_threads(1)


def options() -> Iterable[Field[Any]]:
    """The fields of :class:`Config`, whose ``metadata["help"]`` says what each is."""
    return fields(Config)


def versions() -> dict[str, str]:
    """What a result depends on besides the configuration."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
        "torchmetrics": metadata.version("torchmetrics"),
        "torchref": torchref.__version__,
    }


def quiet() -> None:
    """Keep Lightning's notices and tips off the terminal; errors and other warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers",  # the data is in memory
        "Experiment logs directory .* exists and is not empty",  # History logs it again
        "Checkpoint directory .* exists and is not empty",
        ".*LeafSpec",  # Lightning 2.6 on torch's newer pytree
    ):
        warnings.filterwarnings("ignore", message=message)
