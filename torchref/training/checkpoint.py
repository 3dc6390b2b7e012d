"""Checkpoints that are whole or not there, and that tell when they are damaged."""

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from torchref.training.checks import check_range

MARK = b"sha256:"
SUM_SIZE = len(MARK) + hashlib.sha256().digest_size * 2
CHUNK = 2**20


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that whatever happens a whole one is there, and check what is read.

    A plugin for Lightning's Trainer. A checkpoint is written beside its place, flushed to the disk
    and renamed, so that neither a killed process nor a full disk damages the one that is there;
    that one stays, as ``<name>.previous``. The file is torch's own, a zip archive, whose comment
    holds the SHA-256 of what comes before it; :func:`torch.load` reads it, but does not notice a
    changed byte. Files without a sum, such as Lightning's, are read, too. Paths of remote file
    systems, with a ``://``, are left to Lightning.

    Raises:
        OSError: the file cannot be written, on a full disk say.
        ValueError: the file that is read was damaged.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        archive = buffer.getbuffer()[:-2]  # the length of the comment, 0, comes last
        comment = MARK + hashlib.sha256(archive).hexdigest().encode()
        end = len(comment).to_bytes(2, "little") + comment
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(path), archive, end, keep=previous(Path(path)))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" not in str(path) and os.path.isfile(path):
            _check_sum(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or holds other than tensors, numbers, text and their containers.
    """
    path = Path(path)
    _check_sum(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file may raise anything
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no checkpoint")
    return found


def previous(path: Path) -> Path:
    """Where the checkpoint is that another one replaced."""
    return path.with_name(f"{path.name}.previous")


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` at the end of each epoch, and after every so many batches.

    Args:
        folder: where.
        every: batches, >= 1; None writes at the ends alone.

    Raises:
        ValueError: ``every`` is out of its range.

    Example:
        >>> LastCheckpoint("runs/digits", every=100).filename
        'last'
    """

    def __init__(self, folder: str | Path, every: int | None = None) -> None:
        check_range("save_every", every, ">= 1", every is None or every >= 1)
        super().__init__(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        self.path = Path(folder) / "last.ckpt"
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # After the last batch Lightning would resume behind the validation that follows.
        done = batch_idx + 1
        if self.every and done % self.every == 0 and done < trainer.num_training_batches:
            trainer.save_checkpoint(self.path)


def write_text(path: Path, text: str) -> None:
    """Replace a file, which is the old one or the new one at any time."""
    write_file(path, text.encode())


def write_file(path: Path, *parts: bytes | memoryview, keep: Path | None = None) -> None:
    """Replace a file by the parts in a row; the old one becomes ``keep``."""
    new = _beside(path)
    temporary = [new]
    try:
        with open(new, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            temporary.append(_beside(keep))
            _copy(path, _beside(keep))
            os.replace(_beside(keep), keep)
        os.replace(new, path)
        _flush_folder(path.parent)
    except OSError as error:
        for file in temporary:
            with contextlib.suppress(OSError):
                file.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _copy(path: Path, other: Path) -> None:
    """A second name for a file, or a copy where the file system has no such names."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _flush_folder(folder: Path) -> None:
    """Make a new name last, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_sum(path: Path) -> None:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - SUM_SIZE - 2
        if size < 0:
            return
        file.seek(size + 2)
        comment = file.read()
        if not comment.startswith(MARK):
            return
        file.seek(0)
        found = hashlib.sha256()
        for chunk in _chunks(file, size):
            found.update(chunk)
    if comment != MARK + found.hexdigest().encode():
        raise ValueError(f"{path} is damaged: its checksum does not match")


def _chunks(file: io.BufferedReader, size: int) -> Iterator[bytes]:
    for start in range(0, size, CHUNK):
        yield file.read(min(CHUNK, size - start))
