"""What makes a resumed training equal the uninterrupted one bit for bit, in the middle of an epoch.

Lightning restores weights, optimizer, schedules and counts. Here is the rest: the random generators
and the metrics of every process, and which batches of the epoch are done.
"""

import random
import warnings
from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchmetrics import Metric

from torchref.training.checks import check_integer, check_range

KEY = "ExactResume"  # of its state in a checkpoint
WORDS = 624  # of a Mersenne Twister
# what comes of reading a state that is none, or of giving it to a generator of the three libraries
DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class ExactResume(Callback):
    """Put random generators and metrics back where the checkpoint left them.

    Generators of torch, NumPy and Python on the CPU and torch's on GPUs; of metrics those of
    torchmetrics that the module holds and that have seen a batch. Together with a
    :class:`ResumableDataLoader` a resumed run draws the dropout masks and augmentations, takes
    the batches and logs the values of the uninterrupted run. Each of several processes has a state
    of its own. With another number of them the shares of the samples are others: the epoch that
    the checkpoint is of begins anew, from the weights of the checkpoint, with the first process's
    generators and empty metrics.

    Not covered: the mean over an epoch that Lightning takes of a plain tensor logged with
    ``on_epoch=True`` has the batches since the resume alone (log a metric of torchmetrics instead);
    metrics that count beyond their epoch, and what a metric keeps besides its states; gradients
    half accumulated; ``ReduceLROnPlateau`` by epochs, which Lightning steps after the checkpoint
    of the epoch's end; and the generators that a data set has to itself. A warning tells where a
    checkpoint has no such state, or generators of other GPUs than there are.

    Raises:
        ValueError: what the checkpoint holds of it is damaged. Nothing is put back then.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume()], logger=False, accelerator="cpu")
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.precision == "64-true":
            # Lightning would make float64 of the weights after it has filled them
            trainer.precision_plugin.convert_module(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # after its last batch an epoch's metrics are done with
        metrics = {} if trainer.is_last_batch else _metrics(pl_module)
        own = {"generators": _generators(), "metrics": metrics}
        states: list[Any] = [own]
        if _processes() > 1:  # every one of them makes a checkpoint, one saves it
            states *= _processes()
            distributed.all_gather_object(states, own)
        checkpoint[KEY] = states

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if KEY not in checkpoint:
            warnings.warn(
                "ExactResume: the checkpoint was saved without it: random numbers and metrics are "
                "other than those of the uninterrupted run",
                stacklevel=2,
            )
            return
        check_exact(checkpoint, pl_module)
        states = checkpoint[KEY]
        same = len(states) == _processes()
        state = states[_rank() if same else 0]
        _set_generators(state["generators"])
        if same:
            _set_metrics(pl_module, state["metrics"])
        else:
            _begin_epoch_anew(checkpoint["loops"]["fit_loop"])


def check_exact(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Refuse what :class:`ExactResume` could not put back.

    Raises:
        ValueError: there is nothing of it, or other than it saves.
    """
    states = checkpoint.get(KEY)
    if not isinstance(states, list) or not states:
        raise ValueError(f"{KEY}: expected a state of each process, got {states!r:.40}")
    for state in states:
        try:
            # on generators that nobody uses
            others = torch.Generator(), np.random.RandomState(), random.Random()
            _set_cpu_generators(state["generators"], *others)
            _check_cuda_generators(state["generators"])
            _check_metrics(state["metrics"], module)
        except DAMAGE as error:
            raise ValueError(f"{KEY}: damaged: {type(error).__name__}: {error}") from None


class ResumableDataLoader(DataLoader):
    """A :class:`torch.utils.data.DataLoader` that goes on where the checkpoint's epoch stopped.

    The order of the samples is a function of ``seed`` and the epoch, and so are the seeds of the
    workers. Its state counts the batches handed out; Lightning saves and loads it. After a resume
    the batches that were done are not loaded without workers; with workers they are, and dropped,
    so that the workers' random generators are where they were. For training: Lightning replaces
    the sampler of a loader that it predicts with, and under ``overfit_batches``, and is refused.

    Args:
        dataset: with a length.
        batch_size: >= 1.
        shuffle: as torch's.
        seed: of the order and the workers, >= 0.
        num_replicas: processes that share the samples, each as many; by default all that
            ``torch.distributed`` knows.
        rank: of this process.
        options: torch's others; ``sampler``, ``batch_sampler``, ``generator`` and
            ``persistent_workers`` are taken.

    Raises:
        ValueError: an iterable data set, an option that is taken, or a value out of its range;
            from ``load_state_dict``, a state of other batches than these.
        TypeError: ``batch_size`` or ``seed`` is no integer.

    Example:
        >>> loader = ResumableDataLoader(torch.arange(6), batch_size=2, seed=1)
        >>> batches = iter(loader)
        >>> done, state = next(batches), loader.state_dict()
        >>> loader.load_state_dict(state)
        >>> [batch.tolist() for batch in loader] == [batch.tolist() for batch in batches]
        True
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        shuffle: bool = True,
        *,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        iterable = isinstance(dataset, IterableDataset)
        check_range("dataset", type(dataset).__name__, "one with a length", not iterable)
        batch_size = check_integer("batch_size", batch_size, 1)
        seed = check_integer("seed", seed, 0)
        for name in ("sampler", "batch_sampler", "generator", "persistent_workers"):
            check_range(name, options.get(name), "nothing: it is taken", not options.get(name))
        share = _Share(
            dataset,
            _processes() if num_replicas is None else num_replicas,
            _rank() if rank is None else rank,
            shuffle,
            seed,
        )
        super().__init__(dataset, batch_size, sampler=share, generator=torch.Generator(), **options)
        self._share = share
        self._handed_out = 0
        self._resume: dict[str, int] = {}

    def __iter__(self) -> Iterator[Any]:
        # Nothing happens before the first batch is asked for: by then Lightning has set the epoch.
        share, resume = self._share, self._resume
        self._resume = {}
        done = resume["batches"] if resume.get("epoch") == share.epoch else 0
        self._handed_out = done
        # an epoch's own draws, in all processes others
        seeds = random.Random(f"{share.seed} {share.epoch} {share.rank}")
        cast(torch.Generator, self.generator).manual_seed(seeds.getrandbits(63))
        share.skip = 0 if self.num_workers else done * cast(int, self.batch_size)
        batches = super().__iter__()
        for _ in range(done if self.num_workers else 0):
            next(batches, None)
        for batch in batches:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._share.epoch, "batches": self._handed_out, **self._order()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        check_range("state_dict", state_dict, "names and numbers", isinstance(state_dict, dict))
        for name, expected in self._order().items():  # else the batches done had other samples
            found = state_dict.get(name)
            fits = type(found) is type(expected) and found == expected
            check_range(f"state_dict: {name}", found, repr(expected), fits)
        epoch, batches, most = state_dict.get("epoch"), state_dict.get("batches"), len(self)
        fits = type(epoch) is int and epoch >= 0
        check_range("state_dict: epoch", epoch, "an integer >= 0", fits)
        fits = type(batches) is int and 0 <= batches <= most
        check_range("state_dict: batches", batches, f"an integer in [0, {most}]", fits)
        self._resume = dict(state_dict)

    def _order(self) -> dict[str, int]:
        """What decides which samples a batch has, besides the epoch and the rank."""
        share = self._share
        return {
            "samples": len(cast(Sized, self.dataset)),
            "batch_size": int(cast(int, self.batch_size)),
            "shuffle": bool(share.shuffle),
            "seed": int(share.seed),
            "num_replicas": share.num_replicas,
        }


class _Share(DistributedSampler):
    """What a process takes of the samples, but for the first ``skip`` of an epoch."""

    skip = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.skip, None)


def _processes() -> int:
    several = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if several else 1


def _rank() -> int:
    return distributed.get_rank() if _processes() > 1 else 0


def _generators() -> dict[str, Any]:
    """In types that a checkpoint may hold."""
    kind, words, *counts = cast(tuple[Any, ...], np.random.get_state())
    version, numbers, last = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(words.astype(np.int64)), *counts],
        "python": [version, torch.tensor(numbers), last],
    }


def _set_generators(states: dict[str, Any]) -> None:
    _set_cpu_generators(states, torch.default_generator, np.random, random)
    saved, there = len(states["cuda"]), torch.cuda.device_count()
    if saved == there:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    elif saved or torch.cuda.is_initialized():
        warnings.warn(
            f"ExactResume: the checkpoint has generators of {saved} GPUs, there are {there}: what "
            "they draw is other than in the uninterrupted run",
            stacklevel=2,
        )


def _set_cpu_generators(states: dict[str, Any], of_torch: Any, of_numpy: Any, python: Any) -> None:
    """Generators, or the modules that stand for the global ones."""
    of_torch.set_state(states["torch"].cpu())
    kind, words, place, *normal = states["numpy"]
    # NumPy would read beyond its words
    check_range("numpy", place, f"a place in [0, {WORDS}]", 0 <= place <= WORDS)
    of_numpy.set_state((kind, words.cpu().numpy(), place, *normal))
    version, numbers, last = states["python"]
    python.setstate((version, tuple(numbers.tolist()), last))


def _check_cuda_generators(states: dict[str, Any]) -> None:
    for state in states["cuda"]:
        fits = isinstance(state, Tensor) and state.dtype == torch.uint8
        check_range("cuda", state, "bytes", fits)


def _begin_epoch_anew(fit_loop: dict[str, Any]) -> None:
    """Take back the batches of an epoch that are done, in Lightning's counts and its loaders."""
    fit_loop["state_dict"].pop("combined_loader", None)
    counts = fit_loop["epoch_loop.batch_progress"]["current"]
    done = counts["ready"]
    for name in counts:  # `completed` is still behind by the batch whose hook saved
        counts[name] -= done


def _metrics(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {key: _copied(value, "cpu") for key, value in metric.metric_state.items()}
        for name, metric in module.named_modules()
        if isinstance(metric, Metric) and metric.update_called
    }


def _check_metrics(states: dict[str, dict[str, Any]], module: nn.Module) -> None:
    for name, metric in module.named_modules():
        if isinstance(metric, Metric):
            for key, value in states.get(name, {}).items():
                tensors = value if isinstance(value, list) else [value]
                fits = key in metric.metric_state and all(isinstance(x, Tensor) for x in tensors)
                check_range(name, key, "tensors, of a state that the metric has", fits)


def _set_metrics(module: nn.Module, states: dict[str, dict[str, Any]]) -> None:
    for name, metric in module.named_modules():
        if isinstance(metric, Metric):
            for key, value in states.get(name, {}).items():
                setattr(metric, key, _copied(value, metric.device))


def _copied(value: Tensor | list[Tensor], device: torch.device | str) -> Tensor | list[Tensor]:
    if isinstance(value, list):
        return [x.detach().to(device, copy=True) for x in value]
    return value.detach().to(device, copy=True)
