"""Search hyperparameters: what varies, how it is tried, and what is left of it."""

import csv
import errno
import io
import math
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from torchref.data.augment import image, tabular, text
from torchref.data.datasets import Dataset
from torchref.data.normalize import SCALERS
from torchref.diagnostics.drawing import new_figure
from torchref.training.checkpoint import alone, write_text
from torchref.training.checks import check_choice, check_range
from torchref.training.config import NETWORK, Config, options, read_mapping
from torchref.training.curves import COLORS, LABELS
from torchref.training.fingerprint import FINGERPRINT, check_fingerprint, keep_fingerprint
from torchref.training.mlp import ACTIVATIONS, INITIALIZERS, OPTIMIZERS
from torchref.training.run import Run, load

if TYPE_CHECKING:
    import optuna

METHODS = ("grid", "random", "bayes")
ENGINES = {"optuna": "train", "ray": "ray"}  # and what installs each
DEFAULT = (
    "lr=1e-4:1e-1:log",
    "batch_size=16,32,64,128",
    "depth=1:4",
    "width=16:256:log",
    "activation=relu,sigmoid,tanh",
    "init=auto,he,xavier",
    "optimizer=sgd,momentum,rmsprop,adam",
    "dropout=0:0.5",
    "l1=1e-8:1e-3:log",
    "l2=1e-6:1e-1:log",
)
SEARCHED = (*NETWORK, "batch_size", "epochs", "patience")
AUGMENT = tuple(dict.fromkeys((*image.OPTIONS, *text.OPTIONS, *tabular.OPTIONS)))
TYPES: dict[str, Any] = {option.name: option.type for option in options()} | {"batch_size": int}
WORDS = {
    "activation": tuple(ACTIVATIONS),
    "init": tuple(INITIALIZERS),
    "optimizer": tuple(OPTIMIZERS),
    "normalize": ("auto", *SCALERS),
}
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
LARGEST_GRID = 10**6
BUSY = 60  # seconds that one waits while another writes to study.db
UNPRUNED = 5  # the first trials, and the first epochs of each: a median of less says little
FILES = (
    "study.db",
    "study.db-journal",  # left by a kill, it would be played back into the next study.db
    "search.yaml",
    FINGERPRINT,
    "best.yaml",
    "trials.csv",
    "history.png",
    "importance.png",
    "sweep.png",
)
FOLDERS = ("trials", "ray")
RESUMABLE = {"optuna": ("name", "trials", "prune"), "ray": ("name",)}  # may be others than before

Report = Callable[[int, float], None]


# What varies.


@dataclass(frozen=True)
class Choices:
    """A hyperparameter that is one of some values."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high``, both included; an integer where these are integers.

    It is drawn uniformly, uniformly in its logarithm, or from ``low, low + step, ...``.
    """

    name: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int)


@dataclass(frozen=True)
class Search:
    """The hyperparameters that a search varies, and what each may be.

    ========================  ======================================================
    ``name=a,b,c``            one of these
    ``name=low:high``         a number between them, an integer for integer settings
    ``name=low:high:log``     the same, uniform in its logarithm
    ``name=low:high:step``    ``low``, ``low + step`` and so on, up to ``high``
    ========================  ======================================================

    A name is a setting of the network, ``batch_size``, ``epochs``, ``patience``, or
    ``augment.NAME``.

    Example:
        >>> search = Search.parse(["lr=1e-4:1e-1:log", "activation=relu,tanh"])
        >>> search.parameters[0]
        Range(name='lr', low=0.0001, high=0.1, log=True, step=None)
        >>> search.apply(Config(), {"lr": 0.01, "activation": "tanh"}).activation
        'tanh'

    Source: the course, "Hyperparameters of a neural network".
    """

    parameters: tuple[Choices | Range, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Read what ``--search`` is given.

        Raises:
            ValueError: a name is unknown or given twice, or what follows it is no such range.
        """
        parameters = tuple(_parse(text) for text in texts)
        names = [parameter.name for parameter in parameters]
        check_range("search", names, "a hyperparameter or more", bool(names))
        for name in names:
            check_range(f"search: {name}", names, "the name once", names.count(name) == 1)
        return cls(parameters)

    def apply(self, config: Config, params: dict[str, Any]) -> Config:
        """The configuration with these values."""
        plain = {name: value for name, value in params.items() if "." not in name}
        nested = {name.partition(".")[2]: v for name, v in params.items() if "." in name}
        if nested:
            plain["augment"] = {**(config.augment or {}), **nested}
        return replace(config, **plain)

    def grid(self, most: int, seed: int) -> list[dict[str, Any]]:
        """Combinations of the choices, each once, in an order by the seed.

        Args:
            most: how many there are to be, if there are so many.
            seed: of the order, >= 0.

        Raises:
            ValueError: a hyperparameter has a range, or there are more than a million combinations.
        """
        choices = [parameter for parameter in self.parameters if isinstance(parameter, Choices)]
        for parameter in self.parameters:
            if isinstance(parameter, Range):
                raise ValueError(f"search: {parameter.name}: a grid needs values, as a,b,c")
        sizes = [len(parameter.values) for parameter in choices]
        count = math.prod(sizes)
        check_range("search", count, f"up to {LARGEST_GRID} combinations", count <= LARGEST_GRID)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        places = zip(*np.unravel_index(order[:most].numpy(), sizes), strict=True)
        return [
            {p.name: p.values[i] for p, i in zip(choices, place, strict=True)} for place in places
        ]


def _parse(text: str) -> Choices | Range:
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    check_range("search", text, "name=values", bool(equals))
    if name.startswith("augment."):
        check_choice("search: augment", name.removeprefix("augment."), AUGMENT)
    else:
        check_choice("search", name, (*SEARCHED, "augment.NAME"))
    if ":" in values:
        return _range(name, values)
    found = tuple(_value(name, value.strip()) for value in values.split(","))
    check_range(f"search: {name}", values, "each value once", len(set(found)) == len(found))
    return Choices(name, found)


def _value(name: str, text: str) -> Any:
    kind = TYPES.get(name, float)
    if name in WORDS:
        check_choice(f"search: {name}", text, WORDS[name])
        return text
    if kind is bool:
        check_choice(f"search: {name}", text.lower(), BOOLEANS)
        return BOOLEANS[text.lower()]
    if (name, text) == ("batch_size", "full"):
        return text
    return _number(name, text)


def _number(name: str, text: str) -> float:
    kind = TYPES.get(name, float)
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    check_range(f"search: {name}", text, f"{kind.__name__}", math.isfinite(number))
    return number


def _range(name: str, text: str) -> Range:
    check_range(f"search: {name}", text, "values, as a,b,c", TYPES.get(name, float) in (int, float))
    low, high, *rest = text.split(":")
    found = Range(name, _number(name, low), _number(name, high))
    check_range(f"search: {name}", text, "low < high", found.low < found.high)
    if not rest:
        return found
    check_range(f"search: {name}", text, "low:high, low:high:log or low:high:step", len(rest) == 1)
    if rest == ["log"]:
        check_range(f"search: {name}", text, "0 < low, for log", found.low > 0)
        return replace(found, log=True)
    step = _number(name, rest[0])
    width = found.high - found.low
    check_range(f"search: {name}", text, "0 < step <= high - low", 0 < step <= width)
    check_range(f"search: {name}", text, "up to 2**53 steps", width <= step * 2**53)
    exact_low, exact_high, exact_step = (Decimal(str(x)) for x in (found.low, found.high, step))
    last = exact_low + (exact_high - exact_low) // exact_step * exact_step
    return replace(found, high=type(found.high)(last), step=step)


# One trial.


@dataclass(frozen=True)
class Outcome:
    """What came of a trial that was not pruned: a loss, or the reason why there is none."""

    value: float | None = None
    train_loss: float | None = None
    epochs: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Trial:
    """One set of hyperparameters that was tried.

    Attributes:
        number: from 0, in the order of their starts; its files are in ``trials/<number>/``.
        state: ``complete``, ``pruned``, ``failed``, or ``killed`` with the search and tried again.
        value: the best validation loss; of a pruned trial, up to then.
        train_loss: in the epoch of that loss.
        params: the hyperparameters.
        seconds: from start to end.
        epochs: how many were trained.
        error: why it failed.
    """

    number: int
    state: str
    value: float | None
    train_loss: float | None
    params: dict[str, Any]
    seconds: float | None = None
    epochs: int = 0
    error: str | None = None


Objective = Callable[[Config, Path, Report], Outcome]


class Training:
    """What a trial does: a :class:`Run` that never opens its test part.

    A combination that cannot run, as batch norm on batches of one sample, or one too large for
    the memory of the GPU, is an outcome with an error; what is wrong with all trials raises.
    """

    def __init__(self, dataset: Dataset | None = None) -> None:
        self.dataset = dataset

    def __reduce__(self) -> Any:
        return Training, ()  # a worker loads the data by itself, sooner than through a pipe

    def __call__(self, config: Config, root: Path, report: Report) -> Outcome:
        if self.dataset is None:
            self.dataset = load(config)
        callbacks = [_Reporter(report)]
        try:
            run = Run(config, root=root, dataset=self.dataset, callbacks=callbacks, progress=False)
            metrics = run.execute(test=False)
        except (ValueError, torch.OutOfMemoryError) as error:
            return Outcome(error=" ".join(str(error).split()))
        if metrics["best_epoch"] is None:
            return Outcome(epochs=metrics["epochs"], error="val_loss was never finite")
        train_loss = run.history.rows[metrics["best_epoch"]]["train_loss"]
        return Outcome(metrics["best_val_loss"], train_loss, metrics["epochs"])


class _Reporter(Callback):
    """Tell each epoch's validation loss to a pruner, which may raise."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report(trainer.current_epoch, trainer.callback_metrics["val_loss"].item())


def try_once(objective: Objective, config: Config, root: Path, report: Report) -> Outcome:
    """What comes of a trial, where a loss that is not finite is none and no pruner hears of it."""

    def report_finite(epoch: int, loss: float) -> None:
        if math.isfinite(loss):
            report(epoch, loss)

    outcome = objective(config, root, report_finite)
    if outcome.value is None or math.isfinite(outcome.value):
        return outcome
    return replace(outcome, value=None, error=f"its loss is {outcome.value}")


# The search.


@dataclass(frozen=True)
class Plan:
    """A search as its engine needs to know it."""

    config: Config
    search: Search
    method: str
    trials: int
    jobs: int
    prune: bool
    path: Path

    def trial_config(self, params: dict[str, Any], number: int) -> Config:
        """What a trial runs: without the twin, and on one thread, unless the search has a number.

        With as many threads as there are jobs, its loss would depend on their number.
        """
        config = replace(self.search.apply(self.config, params), name=str(number), parity=False)
        return replace(config, threads=1) if config.threads == "auto" else config

    def grid(self) -> list[dict[str, Any]]:
        """What a grid tries, as many as there may be trials; nothing for the other methods."""
        if self.method != "grid":
            return []
        return self.search.grid(self.trials, self.config.seed)

    @property
    def total(self) -> int:
        return len(self.grid()) or self.trials


@dataclass(frozen=True)
class Results:
    """What a search found.

    Attributes:
        path: the folder of its files.
        trials: all of them, by number.
        best: the complete trial of the smallest validation loss, None where none is complete.
        importance: share of each hyperparameter in the variance of the loss, largest first.
        no_importance: why there is none.
    """

    path: Path
    trials: list[Trial]
    best: Trial | None
    importance: dict[str, float] | None
    no_importance: str | None


def tune(
    config: Config,
    search: Sequence[str] = DEFAULT,
    *,
    method: str = "bayes",
    trials: int = 30,
    jobs: int = 1,
    prune: bool | None = None,
    engine: str = "optuna",
    resume: bool = False,
    root: str | Path = "runs",
    objective: Objective | None = None,
) -> Results:
    """Try hyperparameters, each in a run of its own, for the smallest validation loss.

    The folder is ``root/<name>/``, by default ``root/tune-<dataset>/``:

    ===================  =====================================================================
    ``best.yaml``        the configuration of the best trial, for ``train.py --config``
    ``trials.csv``       a row for each trial
    ``history.png``      the loss of each trial, and the best so far
    ``importance.png``   how much of the loss's variance each hyperparameter explains
    ``sweep.png``        training and validation loss against a single numeric hyperparameter
    ``search.yaml``      what was asked for, usable as ``--config``
    ``fingerprint.txt``  of the data, for ``resume``
    ``trials/``          the files of each trial's :class:`Run`
    ===================  =====================================================================

    and the engine's own: ``study.db`` or ``ray/``. A new search replaces these of an older one of
    the same name, and nothing else in the folder. The test part stays closed: no trial has seen
    it, and the best configuration is still to be judged on it, once.

    Args:
        config: what all trials have in common.
        search: what varies, see :class:`Search`. By default the hyperparameters of the course but
            for the number of epochs, which early stopping decides.
        method: ``grid``, the combinations of listed values; ``random``; or ``bayes``, where a
            model of the losses so far proposes the next (a tree-structured Parzen estimator).
        trials: how many are to end, >= 1; a grid may have less.
        jobs: how many are trained at once, >= 1, in processes of their own if more than 1. Each
            has one thread, unless the configuration says how many.
        prune: whether a trial stops when its loss is above the median of the others at the same
            epoch; by default for all but a grid, whose losses are compared as they are.
        engine: ``optuna`` or ``ray``.
        resume: continue the search of that name. It may have more trials and other jobs, all else
            stays, and so do the data. Trials that were under way are tried again. Of an earlier
            version of torchref, which left no fingerprint, the data are taken to be the same.
        root: where runs are kept.
        objective: what a trial does instead of training. It is called with the configuration, the
            folder for its files and a function that takes epoch and loss, and returns an
            :class:`Outcome`. A trial whose loss is not finite has failed.

    Raises:
        ValueError: an argument is out of its range, malformed data, or a resumed search differs.
        FileNotFoundError: there is no such data file, or nothing to resume.
        OSError: the folder cannot be written, or another search is writing to it.
        ImportError: the engine is not installed.

    Source: the course, "Hyperparameters of a neural network" and "Choosing the regularization
    rate"; Bergstra and Bengio, "Random search for hyper-parameter optimization", 2012; Bergstra et
    al., "Algorithms for hyper-parameter optimization", 2011.
    """
    plan = _plan(config, search, method, trials, jobs, prune, root)
    _check_engine(engine)
    fingerprint = None  # another objective may have other data
    if objective is None:
        dataset = load(config)  # wrong data are told before older files go
        objective, fingerprint = Training(dataset), dataset.fingerprint
    asked = {"search": list(search), "method": method, "engine": engine}
    asked |= {"trials": trials, "prune": plan.prune, **asdict(config)}
    text = yaml.safe_dump(asked, sort_keys=False)
    if resume and not (plan.path / "search.yaml").exists():
        raise FileNotFoundError(f"resume: no search in {plan.path}")
    with alone(plan.path / ".search.lock", "search"):
        if resume:
            _check_resume(plan.path, asked, fingerprint)
        else:
            _clear(plan.path)
            if fingerprint is not None:
                keep_fingerprint(plan.path, fingerprint)
        (plan.path / "trials").mkdir(exist_ok=True)
        write_text(plan.path / "search.yaml", text)
        if engine == "ray":
            from torchref.training.tune_ray import run_ray

            return write_results(plan, run_ray(plan, objective, resume))
        return write_results(plan, run_optuna(plan, objective))


def search_folder(config: Config) -> str:
    """Where under ``runs/`` a search is: ``name``, or ``tune-`` and the data set's."""
    return config.folder if config.name is not None else f"tune-{config.folder}"


def _plan(
    config: Config,
    search: Sequence[str],
    method: str,
    trials: int,
    jobs: int,
    prune: bool | None,
    root: str | Path,
) -> Plan:
    check_choice("method", method, METHODS)
    check_range("trials", trials, ">= 1", trials >= 1)
    check_range("jobs", jobs, ">= 1", jobs >= 1)
    check_range("seed", config.seed, "in [0, 4294967295]", 0 <= config.seed < 2**32)
    one = str(config.devices).rstrip(",")  # `1` is how many, `3,` is which
    single = one == "1" or (str(config.devices) != one and one.isdigit())
    check_range("devices", config.devices, "1, or one device's number and a comma", single)
    check_range("num_nodes", config.num_nodes, "1, for a search", config.num_nodes == 1)
    prune = method != "grid" if prune is None else prune
    path = Path(root) / search_folder(config)
    plan = Plan(config, Search.parse(search), method, trials, jobs, prune, path)
    plan.grid()  # raises where it is none
    return plan


def _check_engine(engine: str) -> None:
    check_choice("engine", engine, ENGINES)
    for package in dict.fromkeys(("optuna", engine)):  # importances are Optuna's in any case
        if find_spec(package) is None:
            raise ImportError(
                f"engine: {package} is missing: pip install 'torchref-triton[{ENGINES[package]}]'"
            )
    _quiet_optuna()


def _quiet_optuna() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not its line for each trial


def _check_resume(path: Path, asked: dict[str, Any], fingerprint: str | None) -> None:
    before = read_mapping(path / "search.yaml")
    for name, value in asked.items():
        was = before.get(name, getattr(Config, name, None))  # it may be older than an option
        if name not in RESUMABLE[asked["engine"]] and was != value:
            raise ValueError(f"resume: {name} was {was!r} in {path}, got {value!r}")
    if fingerprint is not None:
        check_fingerprint(path, asked["dataset"], fingerprint)
    if asked["engine"] == "optuna":
        _check_study(path / "study.db")


def _clear(path: Path) -> None:
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    for name in FOLDERS:
        if (path / name).exists():
            shutil.rmtree(path / name)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The complete trial of the smallest loss, the first of those that have it."""
    return min(_complete(trials), key=_loss, default=None)


def _complete(trials: Iterable[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state == "complete"]


def _loss(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value


def tell_progress(trial: Trial, best: Trial | None, done: int, total: int) -> None:
    """A line on stderr for a trial that ended."""
    ended = "" if trial.value is None else f"val_loss {trial.value:.4f}"
    if trial.state == "pruned":
        ended += f", pruned after {trial.epochs} epochs"
    if trial.state == "failed":
        ended = f"failed: {trial.error}"
    so_far = f"best {best.value:.4f} of trial {best.number}  " if best else ""
    print(
        f"{done:>{len(str(total))}}/{total}  trial {trial.number}: {ended}  {so_far}"
        f"{describe_params(trial.params)}",
        file=sys.stderr,
        flush=True,
    )


def describe_params(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in params.items()
    )


# Optuna.


def run_optuna(plan: Plan, objective: Objective) -> list[Trial]:
    """Let Optuna ask until enough trials have ended; what ``study.db`` knows is kept."""
    from optuna.exceptions import StorageInternalError

    storage = _storage(plan)
    try:
        study = _open_study(plan, storage)
        _mark_killed(study)
        run = _in_process if plan.jobs == 1 else _in_workers
        for trial, outcome in run(plan, objective, _asked(plan, study)):
            _tell(study, trial, outcome)
            known = _records(study)
            done = [t for t in known if t.state not in ("killed", "running")]
            tell_progress(known[trial.number], best_of(known), len(done), plan.total)
        return _records(study)
    except StorageInternalError as error:  # on a full disk say; it tells neither file nor cause
        cause = getattr(error.__cause__, "orig", error)
        raise OSError(errno.EIO, str(cause), str(plan.path / "study.db")) from None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _check_study(path: Path) -> None:
    """Refuse a file without a search; Optuna would make it one that has tried nothing."""
    import sqlite3

    if not path.exists():
        raise FileNotFoundError(f"resume: {path} is missing, and with it what was tried")
    try:
        with closing(sqlite3.connect(path, timeout=BUSY)) as database:
            known = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'studies'")
            found = known.fetchone() and database.execute("SELECT 1 FROM studies").fetchone()
    except sqlite3.OperationalError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    except sqlite3.DatabaseError as error:
        raise ValueError(f"resume: {path} is damaged: {error}") from None
    if not found:
        raise ValueError(f"resume: {path} is damaged: it holds no search")


def _storage(plan: Plan) -> "optuna.storages.RDBStorage":
    import optuna
    from sqlalchemy import URL
    from sqlalchemy.exc import DatabaseError, OperationalError

    path = plan.path / "study.db"
    try:
        # not f"sqlite:///...", which takes what follows a ? in a folder's name for options
        return optuna.storages.RDBStorage(
            str(URL.create("sqlite", database=str(path))),
            engine_kwargs={"connect_args": {"timeout": BUSY}},
        )
    except OperationalError as error:
        raise OSError(errno.EIO, str(error.orig), str(path)) from None
    except DatabaseError as error:
        raise ValueError(f"resume: {path} is damaged: {error.orig}") from None


def _open_study(plan: Plan, storage: "optuna.storages.RDBStorage") -> "optuna.Study":
    import optuna

    pruner = (
        optuna.pruners.MedianPruner(UNPRUNED, UNPRUNED)
        if plan.prune
        else optuna.pruners.NopPruner()
    )
    names = [study.study_name for study in storage.get_all_studies()]
    name = names[0] if names else plan.path.name  # the folder may have been renamed since
    return optuna.create_study(storage=storage, study_name=name, pruner=pruner, load_if_exists=True)


def _mark_killed(study: "optuna.Study") -> None:
    """Trials that are under way when a search begins were so when it was killed."""
    import optuna

    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        optuna.trial.Trial(study, trial._trial_id).set_user_attr("killed", True)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _asked(plan: Plan, study: "optuna.Study") -> Iterator["optuna.Trial"]:
    """New trials, up to the number that is to end."""
    import optuna

    distributions = {p.name: _distribution(p) for p in plan.search.parameters}
    points = plan.grid()
    while True:
        known = study.get_trials(deepcopy=False)
        begun = [t for t in known if t.state != optuna.trial.TrialState.WAITING]
        taken = [t.params for t in begun if "killed" not in t.user_attrs]
        if len(taken) >= (len(points) or plan.trials):
            return
        killed = [t.params for t in begun if "killed" in t.user_attrs]
        again = [params for params in killed if len(params) == len(distributions)]
        ahead = next((params for params in points or again if params not in taken), None)
        if ahead is not None and len(begun) == len(known):
            study.enqueue_trial(ahead)
        # The draw depends on how many there are, so a resumed search goes on as if uninterrupted.
        study.sampler = _sampler(plan, len(taken))
        yield study.ask(distributions)


def _sampler(plan: Plan, position: int) -> "optuna.samplers.BaseSampler":
    import optuna

    seed = int(np.random.SeedSequence((plan.config.seed, position)).generate_state(1)[0])
    if plan.method == "bayes":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _distribution(parameter: Choices | Range) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(parameter, Choices):
        return CategoricalDistribution(parameter.values)
    low, high = parameter.low, parameter.high
    if parameter.is_integer:
        return IntDistribution(int(low), int(high), parameter.log, int(parameter.step or 1))
    return FloatDistribution(low, high, parameter.log, parameter.step)


def _run_trial(
    plan: Plan, objective: Objective, trial: "optuna.Trial", params: dict[str, Any]
) -> Outcome | None:
    """What came of it, or None where it was pruned."""
    import optuna

    def report(epoch: int, loss: float) -> None:
        trial.report(loss, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        config = plan.trial_config(params, trial.number)
        return try_once(objective, config, plan.path / "trials", report)
    except optuna.TrialPruned:
        return None


def _tell(study: "optuna.Study", trial: "optuna.Trial", outcome: Outcome | None) -> None:
    from optuna.trial import TrialState

    if outcome is None:
        study.tell(trial, state=TrialState.PRUNED)
        return
    for name in ("train_loss", "epochs", "error"):
        trial.set_user_attr(name, getattr(outcome, name))
    if outcome.value is None:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, outcome.value)


def _records(study: "optuna.Study") -> list[Trial]:
    return [_record(trial) for trial in study.get_trials(deepcopy=False)]


def _record(trial: "optuna.trial.FrozenTrial") -> Trial:
    state = {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
    attributes = trial.user_attrs
    losses = trial.intermediate_values
    ended = "killed" not in attributes
    return Trial(
        trial.number,
        state if ended else "killed",
        min(losses.values(), default=None) if state == "pruned" else trial.value,
        attributes.get("train_loss"),
        trial.params,
        round(trial.duration.total_seconds(), 2) if trial.duration and ended else None,
        attributes.get("epochs", len(losses)),
        attributes.get("error"),
    )


def _in_process(
    plan: Plan, objective: Objective, asked: Iterator["optuna.Trial"]
) -> Iterator[tuple["optuna.Trial", Outcome | None]]:
    for trial in asked:
        yield trial, _run_trial(plan, objective, trial, trial.params)


def _in_workers(
    plan: Plan, objective: Objective, asked: Iterator["optuna.Trial"]
) -> Iterator[tuple["optuna.Trial", Outcome | None]]:
    count = min(plan.jobs, plan.total)
    busy: dict[Connection, tuple[BaseProcess, optuna.Trial | None]] = {}
    idle: list[tuple[BaseProcess, Connection]] = []
    try:
        while True:
            while len(busy) + len(idle) < count:  # at first, and after one died
                process, connection = _start_worker(plan, objective)
                busy[connection] = process, None
            while idle and (trial := next(asked, None)) is not None:
                process, connection = idle.pop()
                busy[connection] = process, trial
                connection.send(trial._trial_id)
            if idle and not any(trial for _, trial in busy.values()):
                return
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, trial = busy.pop(connection)
                outcome = _receive(process, connection)
                if process.is_alive():
                    idle.append((process, connection))
                elif trial is None:
                    raise RuntimeError(f"jobs: a worker ended at its start: {process.exitcode}")
                if trial is not None:
                    yield trial, outcome
    finally:
        for process in [*(process for process, _ in idle), *(p for p, _ in busy.values())]:
            process.kill()
            process.join()


def _receive(process: BaseProcess, connection: Connection) -> Outcome | None:
    try:
        outcome = connection.recv()
    except (EOFError, ConnectionError):
        process.join()  # the system may have killed it for its memory: the others go on
        return Outcome(error=f"its process ended with {process.exitcode}")
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _start_worker(plan: Plan, objective: Objective) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")  # a fork of torch's threads may hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(plan, objective, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return process, ours


def _work(plan: Plan, objective: Objective, connection: Connection) -> None:
    """Run the trials that come through a pipe until the search, at its other end, is gone."""
    import optuna

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the search ends its workers
    _quiet_optuna()
    study = _open_study(plan, _storage(plan))
    connection.send(None)  # ready: the time that it took to come this far is no trial's
    while True:
        try:
            trial = optuna.trial.Trial(study, connection.recv())
        except EOFError:
            return
        try:
            outcome = _run_trial(plan, objective, trial, trial.params)
        except Exception as error:
            outcome = error
        connection.send(outcome)


# What is left of it.


def write_results(plan: Plan, trials: list[Trial]) -> Results:
    """Write what the trials of either engine have shown."""
    best = best_of(trials)
    _write_table(plan, trials, plan.path / "trials.csv")
    if best is not None:
        tried = plan.trial_config(best.params, best.number)
        found = replace(tried, name=None, parity=plan.config.parity)
        write_text(plan.path / "best.yaml", yaml.safe_dump(asdict(found), sort_keys=False))
    for name in ("history.png", "importance.png", "sweep.png"):
        (plan.path / name).unlink(missing_ok=True)  # of the search before it was resumed
    importance, reason = None, None
    try:
        importance = measure_importance(plan.search, trials)
        plot_importance(importance, plan.path / "importance.png")
    except ValueError as error:
        reason = str(error)
    if best is not None:
        plot_history(trials, plan.path / "history.png")
        name = _swept(plan.search)
        if name is not None:
            plot_sweep(trials, name, plan.path / "sweep.png")
    return Results(plan.path, trials, best, importance, reason)


def _write_table(plan: Plan, trials: Iterable[Trial], path: Path) -> None:
    names = [parameter.name for parameter in plan.search.parameters]
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["number", "state", "value", "train_loss", *names, "seconds", "epochs_trained"])
    for trial in trials:
        begin = [trial.number, trial.state, trial.value, trial.train_loss]
        params = [trial.params.get(name) for name in names]
        out.writerow([*begin, *params, trial.seconds, trial.epochs])
    write_text(path, text.getvalue())


def measure_importance(search: Search, trials: Iterable[Trial]) -> dict[str, float]:
    """The share of each hyperparameter in the variance of the loss, largest first.

    Raises:
        ValueError: the complete trials do not tell: there are less than two, they have the same
            loss, or only one hyperparameter varies.

    Source: Hutter, Hoos and Leyton-Brown, "An efficient approach for assessing hyperparameter
    importance", 2014.
    """
    import optuna

    complete = _complete(trials)
    if len(complete) < 2:
        raise ValueError("two complete trials are needed")
    if len({trial.value for trial in complete}) == 1:
        raise ValueError("all complete trials have the same loss")
    names = list(complete[0].params)
    varied = [name for name in names if len({trial.params[name] for trial in complete}) > 1]
    if len(varied) < 2:
        raise ValueError("only one hyperparameter varies")
    distributions = {p.name: _distribution(p) for p in search.parameters if p.name in varied}
    study = optuna.create_study()
    for trial in complete:
        params = {name: trial.params[name] for name in varied}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=trial.value)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items()}


def plot_history(trials: Iterable[Trial], path: str | Path) -> None:
    """Draw the loss of each trial, and the best so far, into a file."""
    trials = list(trials)
    complete = _complete(trials)
    pruned = [trial for trial in trials if trial.state == "pruned" and trial.value is not None]
    figure, axes = _figure("search", "trial", (8, 4))
    for some, marker, color, label in (
        (complete, "o", COLORS["train"], "complete"),
        (pruned, "x", "0.5", "pruned"),
    ):
        if some:
            numbers, values = [t.number for t in some], [_loss(t) for t in some]
            axes.plot(numbers, values, marker, color=color, label=label, markersize=5)
    best = np.minimum.accumulate([_loss(trial) for trial in complete])
    numbers = [trial.number for trial in complete]
    last = max(trial.number for trial in trials)  # the line goes on to the end
    axes.step([*numbers, last], [*best, best[-1]], where="post", color=COLORS["val"], label="best")
    if _spans_decades([_loss(trial) for trial in (*complete, *pruned)]):
        axes.set_yscale("log")
    axes.set_ylabel("validation loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_importance(importance: dict[str, float], path: str | Path) -> None:
    """Draw the share of each hyperparameter in the variance of the loss into a file."""
    names = list(importance)[::-1]
    height = 1.2 + 0.35 * len(names)
    figure, axes = _figure(
        "importance", "share in the variance of the validation loss", (8, height)
    )
    bars = axes.barh(names, [importance[name] for name in names], color=COLORS["train"])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.05)
    axes.grid(visible=False, axis="y")
    figure.savefig(path, dpi=120)


def plot_sweep(trials: Iterable[Trial], name: str, path: str | Path) -> None:
    """Draw training and validation loss against one hyperparameter into a file.

    Left of the best value the network overfits and right of it underfits, or the other way round:
    the distance of the two curves tells.

    Source: the course, "Choosing the regularization rate".
    """
    complete = _complete(trials)
    complete.sort(key=lambda trial: trial.params[name])
    values = [trial.params[name] for trial in complete]
    figure, axes = _figure("loss", name, (8, 4))
    losses = {"train": [t.train_loss for t in complete], "val": [t.value for t in complete]}
    for part, color in COLORS.items():
        axes.plot(values, losses[part], color=color, label=LABELS[part], marker="o", markersize=4)
    best = best_of(complete)
    assert best is not None
    label = f"best ({best.params[name]:.4g})"
    axes.axvline(best.params[name], color="0.4", linestyle="--", linewidth=1, label=label)
    positive = [value for value in values if value > 0]
    if _spans_decades(positive) and min(values) > 0:
        axes.set_xscale("log")
    elif _spans_decades(positive) and min(values) == 0:  # a log has no 0
        axes.set_xscale("symlog", linthresh=min(positive))
        axes.set_xlim(-0.2 * min(positive), 1.5 * max(values))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _swept(search: Search) -> str | None:
    """The name of the hyperparameter where it is the only one, and a number."""
    first, *others = search.parameters
    values = first.values if isinstance(first, Choices) else (first.low,)
    numeric = all(isinstance(value, int | float) and value is not True for value in values)
    return first.name if numeric and not others else None


def _spans_decades(values: Sequence[float]) -> bool:
    return bool(values) and 0 < 100 * min(values) <= max(values)


def _figure(title: str, label: str, size: tuple[float, float]) -> tuple[Any, Any]:
    figure, axes = new_figure(size)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_axisbelow(True)
    return figure, axes
