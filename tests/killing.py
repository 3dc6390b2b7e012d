"""Processes killed at a chosen moment, a full disk, and what two runs must have in common."""

import contextlib
import csv
import json
import multiprocessing
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from torchref.training import checkpoint as writing
from torchref.training import read_checkpoint

# Where: a hook of Lightning's, or a step of writing a checkpoint.
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
RARE_HOOKS = ("on_validation_batch_start", "on_train_epoch_end", "on_test_batch_start")
SYSTEM_CALLS = ("fsync", "link", "replace")
KILLED = -signal.SIGKILL  # an exit code


class Witness(Callback):
    """Writes down each batch of training as it is after augmentation."""

    def __init__(self, root: Path, rank: int = 0) -> None:
        self.path = root / f"batches-{rank}.txt"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        numbers = [x.double().sum().item() for x in batch]
        with open(self.path, "a") as file:
            file.write(f"{trainer.current_epoch} {batch_idx} {len(batch[1])} {numbers}\n")


class Trouble(Callback):
    """A signal, or without one an error, when a hook or a system call comes for the n-th time."""

    def __init__(self, place: str, count: int, number: int | None = signal.SIGKILL) -> None:
        self.left, self.number = count, number
        if place in SYSTEM_CALLS:
            call = getattr(os, place)

            def counted(*args, **kwargs):
                self.count()
                return call(*args, **kwargs)

            setattr(writing.os, place, counted)
        else:
            setattr(self, place, lambda *args, **kwargs: self.count())

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            if self.number is None:
                raise RuntimeError("its own")
            os.kill(os.getpid(), self.number)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files end at that many bytes, which is how a system without root can refuse to write.

    No longer than for what is tried: pytest's own output may go to a file, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fork_server() -> Any:
    """Starts processes that have imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchref.training", "sklearn.datasets", "kornia"])
    return context


def drawn(draw: random.Random, batches: int, writes: bool = True) -> tuple[str, int]:
    """A place, and how often it comes before the kill, in an epoch of so many batches."""
    rare = draw.random() < 0.2
    place = draw.choice(RARE_HOOKS if rare else HOOKS + (SYSTEM_CALLS if writes else ()))
    return place, draw.randint(1, 2 if rare else 2 * batches)


def generator() -> random.Random:
    """Another one each time; TORCHREF_SEED repeats what was printed."""
    seed = int(os.environ.get("TORCHREF_SEED", random.randrange(10**6)))
    print(f"TORCHREF_SEED={seed}")
    return random.Random(seed)


def assert_same(root: Path, whole: Path, ranks: int = 1) -> None:
    """Weights, optimizer, metrics, files and batches are those of the whole run."""
    for name in ("best.ckpt", "last.ckpt"):
        found, expected = (read_checkpoint(r / "run" / name) for r in (root, whole))
        for key in ("state_dict", "optimizer_states", "epoch", "global_step", "ExactResume"):
            assert same(found.get(key), expected.get(key)), (name, key)
        for key, value in expected.get("callbacks", {}).items():
            assert same(found["callbacks"][key], value), (name, key)
    assert metrics(root) == metrics(whole)
    assert table(root) == table(whole)
    for rank in range(ranks):
        assert set(batches(root, rank)) == set(batches(whole, rank))


def same(a: Any, b: Any) -> bool:
    """Bit by bit; of other types than tensors a NaN equals a NaN."""
    if isinstance(a, torch.Tensor):
        flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*flat)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def metrics(root: Path) -> dict[str, Any]:
    found = json.loads((root / "run" / "metrics.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


def ended(root: Path) -> bool:
    """Whether the run came to its end; a kill may come behind it, while the file is flushed."""
    return (root / "run" / "metrics.json").exists() and "unfinished" not in metrics(root)


def table(root: Path) -> dict[str, dict[str, str]]:
    """By step, for a resumed run logs what it knows of an epoch in one row."""
    found: dict[str, dict[str, str]] = {}
    with open(root / "run" / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["step"], {}).update({k: v for k, v in row.items() if v})
    return found


def batches(root: Path, rank: int = 0) -> list[str]:
    return (root / f"batches-{rank}.txt").read_text().splitlines()
