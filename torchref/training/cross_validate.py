"""Cross-validation of a configuration: each fold is a run of its own."""

import csv
import io
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import yaml
from torch import Tensor

from torchref.data import kfold
from torchref.data.datasets import Dataset
from torchref.data.reading import check_file
from torchref.training.checkpoint import alone, write_text
from torchref.training.checks import check_choice, check_range
from torchref.training.config import Config, read_mapping, versions
from torchref.training.fingerprint import FINGERPRINT, check_fingerprint, keep_fingerprint
from torchref.training.run import FILES, Run, data_module

SPLIT_OF = {"time": "chronological", "grouped": "grouped"}  # no other method goes with these
METHOD_OF = {"chronological": "time", "grouped": "grouped", "random": "plain"}
OWN_FILES = ("cross_validation.yaml", FINGERPRINT, "folds.csv", "cross_validation.json")

Parts = tuple[Tensor, Tensor, Tensor]
Row = dict[str, Any]


class CrossValidation:
    """Score a configuration on ``folds`` parts of the samples, each by a model that never saw it.

    The test part of the configuration is held out and never opened: it is for the one model that
    is chosen in the end. The folds share out what is left, its training and validation parts. For
    each fold a :class:`Run` trains on the others: scalers, imputation, SMOTE and augmentation know
    nothing else. Early stopping looks at an inner validation part, cut from the others by the
    configuration's kind of split, not at the fold: the epoch would be chosen for its score on
    the fold, and that score would be too good. The fold is opened once, as the run's test part.

    =========================  ===============================================================
    ``fold-1/``, ...           the files of each :class:`Run`
    ``folds.csv``              a row for each fold: samples, epochs, scores
    ``cross_validation.json``  what :meth:`execute` returns
    ``cross_validation.yaml``  the configuration, written before any fold, for ``resume``
    ``fingerprint.txt``        of the data, for the same
    =========================  ===============================================================

    They are in ``root/<name>/``, by default of the name ``cv-`` and the configuration's folder. A
    fold has one thread, unless ``config.threads`` is a number, and no torch twin beside it.

    Args:
        config: see :class:`Config`. ``split="auto"`` becomes ``chronological`` or ``grouped`` with
            the methods of that kind; ``gap`` is left out before each fold, too.
        folds: from 2 to the number of samples, or of the rarest class, or of groups.
        method: ``stratified``, ``plain``, ``time``, ``grouped`` as in
            :func:`torchref.data.folds`, or ``auto``: by ``config.split``, where ``auto`` is
            ``stratified`` for classes and ``plain`` for values.
        repeats: >= 1, so many times ``folds`` folds, shared out anew; 1 for ``time``, ``grouped``.
        root: where runs are kept.

    Raises:
        ValueError: a value is out of its range, the method does not go with the split, or a part
            would be too small.
        FileNotFoundError: there is no such data file.
        RuntimeError: the backend or the accelerator cannot run here.

    Example:
        >>> cv = CrossValidation(Config(dataset="iris"), folds=4)
        >>> cv.method, len(cv.held_out), [len(part) for part in cv.parts[0]]
        ('stratified', 22, [79, 17, 32])

    Source: the course, "K-fold cross-validation"; Cawley and Talbot, "On Over-fitting in Model
    Selection and Subsequent Selection Bias in Performance Evaluation", 2010, for the inner part.
    """

    def __init__(
        self,
        config: Config,
        folds: int = 5,
        method: str = "auto",
        repeats: int = 1,
        root: str | Path = "runs",
    ) -> None:
        config = _for_folds(config, method)
        self.path = Path(root) / folder_of(config)
        whole = Run(config, root=root)  # refuses what cannot run before anything is written
        size = whole.trainer.world_size
        check_range("devices", size, "one process for a fold", size == 1)
        self.config, self.dataset = config, whole.dataset
        self.scores = [*map(str, whole.model.test_scores.keys()), "test_loss"]
        self.folds, self.repeats = folds, repeats
        self.method = _method(method, config, self.dataset)
        train, val, self.held_out = whole.data.parts
        self.rest = torch.cat([train, val])
        if self.method != "time":  # else they are in order of time
            self.rest = self.rest.sort().values
        self.parts = self._share_out()

    def _share_out(self) -> list[Parts]:
        """Training, inner validation and test part of each fold."""
        rest = self.rest
        groups = self.dataset.groups if self.method == "grouped" else None
        pairs = kfold.folds(
            self.dataset.y[rest] if self.method == "stratified" else len(rest),
            self.folds,
            method=self.method,  # pyright: ignore[reportArgumentType]
            repeats=self.repeats,
            groups=None if groups is None else groups[rest],
            gap=self.config.gap,
            seed=self.config.seed,
        )
        found = []
        for number, (others, fold) in enumerate(pairs, 1):
            try:
                found.append((*self._cut(rest[others]), rest[fold]))
            except ValueError as error:
                raise ValueError(f"fold {number}: {error}") from None
        return found

    def _cut(self, others: Tensor) -> tuple[Tensor, Tensor]:
        """Training and inner validation part, in the proportion that the configuration has."""
        outside = torch.ones(len(self.dataset.y), dtype=torch.bool)
        outside[others] = False
        dataset = replace(self.dataset, test=outside.nonzero().flatten())
        train, val, _ = data_module(self.config, dataset).parts
        return train, val

    def execute(
        self, jobs: int = 1, resume: bool = False, report: Callable[[Row], None] | None = None
    ) -> dict[str, Any]:
        """Run the folds; return and write the contents of ``cross_validation.json``.

        ``scores``: for each, ``test_accuracy`` and so on, its ``values``, one for each fold, their
        ``mean``, standard deviation ``std``, and the 95% interval from ``low`` to ``high`` of
        :func:`torchref.data.mean_and_interval`; null where a fold's score is not finite. Then
        ``folds``, ``method``, ``repeats``, ``samples`` (that the folds share), ``test_samples``
        (not opened), ``config``, ``versions``.

        Args:
            jobs: >= 1, folds at a time, each in a process of its own, which changes no result. A
                script has to call this under ``if __name__ == "__main__"`` where it is not 1.
            resume: take over the folds that a stopped cross-validation of that name, and of the
                same configuration and data, has finished. Of an earlier version of torchref, which
                left no fingerprint, the data are taken to be the same.
            report: called with the row of ``folds.csv`` of each fold that is finished.

        Raises:
            ValueError: ``jobs`` is out of its range, the configuration or the data were others,
                or what a fold left is damaged.
            FileNotFoundError: there is nothing to resume.
            OSError: the folder cannot be written, or another cross-validation is writing to it.
        """
        check_range("jobs", jobs, ">= 1", jobs >= 1)
        if resume and not (self.path / "cross_validation.yaml").exists():
            raise FileNotFoundError(f"resume: no cross-validation in {self.path}")
        with alone(self.path / ".cross_validation.lock", "cross-validation"):
            if resume:
                self._check_resume()
            else:
                self._clear()
            return self._execute(jobs, report)

    def _execute(self, jobs: int, report: Callable[[Row], None] | None) -> dict[str, Any]:
        rows = []
        with closing(self._results(jobs)) as results:
            for number, metrics in results:
                rows.append(self._row(number, metrics))
                if report is not None:
                    report(rows[-1])
        return self._write(sorted(rows, key=lambda row: row["fold"]))

    def _own(self) -> dict[str, Any]:
        return {"folds": self.folds, "method": self.method, "repeats": self.repeats}

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.config), **self._own()}

    def _clear(self) -> None:
        """Leave nothing of an older one that could be taken for a fold of this one."""
        settings = yaml.safe_dump(self._settings(), sort_keys=False)
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
        for folder in self.path.glob("fold-*"):
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds something else
                folder.rmdir()
        keep_fingerprint(self.path, self.dataset.fingerprint)
        write_text(self.path / "cross_validation.yaml", settings)

    def _check_resume(self) -> None:
        before = read_mapping(self.path / "cross_validation.yaml")
        for name, value in self._settings().items():
            same = str(before.get(name)) == str(value)  # precision may be 32 or "32"
            if not same and name != "name":  # that is the folder's, which is the same
                raise ValueError(
                    f"resume: {name} was {before.get(name)!r} in {self.path}, got {value!r}"
                )
        check_fingerprint(self.path, self.config.dataset, self.dataset.fingerprint)

    def _results(self, jobs: int) -> Generator[tuple[int, Row]]:
        """Number and metrics of each fold, as they come."""
        paths = {i: self.path / f"fold-{i}" / "metrics.json" for i in range(1, len(self.parts) + 1)}
        finished = {number: _finished(path, self.scores) for number, path in paths.items()}
        left = [number for number, metrics in finished.items() if metrics is None]
        for number, metrics in finished.items():
            if metrics is not None:
                yield number, metrics
        if jobs == 1:
            for number in left:
                yield number, _run(*self._task(number), self.dataset)
        elif left:
            tasks = {number: self._task(number) for number in left}
            yield from _in_processes(tasks, min(jobs, len(left)))

    def _task(self, number: int) -> tuple[Config, Path, list[Any]]:
        # As NumPy's arrays, which are sent to a process without shared memory.
        parts = [part.numpy() for part in self.parts[number - 1]]
        return replace(self.config, name=f"fold-{number}"), self.path, parts

    def _row(self, number: int, metrics: Row) -> Row:
        train, val, fold = map(len, self.parts[number - 1])
        return {
            "fold": number,
            "repeat": (number - 1) // self.folds + 1,
            "train_samples": train,
            "val_samples": val,
            "fold_samples": fold,
            "epochs": metrics["epochs"],
            "best_epoch": metrics["best_epoch"],
            "best_val_loss": metrics["best_val_loss"],
            **{name: metrics[name] for name in self.scores},
            "seconds": metrics["seconds"],
        }

    def _write(self, rows: list[Row]) -> dict[str, Any]:
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "folds.csv", table.getvalue())
        trained = sum(len(train) + len(val) for train, val, _ in self.parts)
        ratio = sum(len(fold) for _, _, fold in self.parts) / trained
        result = {
            "scores": {name: _summary([row[name] for row in rows], ratio) for name in self.scores},
            **self._own(),
            "samples": len(self.rest),
            "test_samples": len(self.held_out),
            "config": asdict(self.config),
            "versions": versions(),
        }
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_text(self.path / "cross_validation.json", text)
        return result


def folder_of(config: Config) -> str:
    return config.folder if config.name is not None else f"cv-{config.folder}"


def is_score(name: str) -> bool:
    """Whether a column of ``folds.csv`` is a score of the fold."""
    return name.startswith("test_") and name != "test_opened"


def _for_folds(config: Config, method: str) -> Config:
    """With the split that goes with the method: the test part is to come after folds in time."""
    check_choice("method", method, ("auto", *kfold.METHODS))
    split = config.resolved_split
    split = SPLIT_OF.get(method, "auto") if split == "auto" else split
    others = ("plain", "stratified")
    fitting = (METHOD_OF[split],) if split in SPLIT_OF.values() else others
    check_choice(f"method, for split {split}", method, ("auto", *fitting))
    threads = 1 if config.threads == "auto" else config.threads  # sums depend on their number
    return replace(config, split=split, parity=False, threads=threads)


def _method(method: str, config: Config, dataset: Dataset) -> str:
    if method == "auto":
        usual = "plain" if dataset.classes is None else "stratified"
        return METHOD_OF.get(config.split, usual)
    if dataset.classes is None:
        check_choice("method, for values", method, ("plain", "time", "grouped"))
    return method


def _finished(path: Path, scores: Sequence[str]) -> Row | None:
    """What a fold came to, None where it is to be run.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        check_file(path)
        metrics = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # killed before or while it was written
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"resume: {path} is damaged: {error}") from None
    if not isinstance(metrics, dict):
        raise ValueError(f"resume: {path} is damaged: expected names and values")
    kinds = {"epochs": (int,), "best_epoch": (int, NoneType), "seconds": (float,)}
    kinds |= dict.fromkeys(("best_val_loss", *scores), (float, NoneType))
    for name, kind in kinds.items():
        value = metrics.get(name, "missing")
        if type(value) not in kind or (type(value) is float and not math.isfinite(value)):
            raise ValueError(f"resume: {path} is damaged: {name} is {value!r:.40}")
    return metrics


def _summary(values: list[float | None], test_to_train: float) -> Row:
    scores = [math.nan if value is None else value for value in values]
    found = asdict(kfold.mean_and_interval(scores, test_to_train))
    return {
        "values": values,
        **{name: value if math.isfinite(value) else None for name, value in found.items()},
    }


def _run(config: Config, root: Path, parts: list[Any], dataset: Dataset | None = None) -> Row:
    """Train and test on one fold."""
    indices = [torch.from_numpy(part) for part in parts]
    return Run(config, root=root, dataset=dataset, parts=indices, progress=False).execute()


def _in_processes(tasks: dict[int, Any], jobs: int) -> Generator[tuple[int, Row]]:
    """Folds in new processes, which load the data themselves and end with this one."""
    before = set(active_children())
    with ProcessPoolExecutor(jobs, get_context("spawn"), _follow_parent) as pool:
        with _without_interrupt():
            futures = {pool.submit(_run, *task): number for number, task in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C, or a fold's error: nobody waits for the others
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - before:
                process.kill()
            raise


@contextmanager
def _without_interrupt() -> Generator[None]:
    """A terminal sends Ctrl-C to all processes; those that start here inherit that they ignore it.

    One of them answers for all, and none prints where it was.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _follow_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # killed: a process of the pool would wait for its next task forever
