"""Checkpoints that are whole or not there, and that tell when they are damaged."""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from torchref.data.reading import check_file
from torchref.training.checks import check_integer

MARK = b"sha256:"
END_SIZE = 2 + len(MARK) + hashlib.sha256().digest_size * 2  # its length, and the comment
KEY = "AtomicCheckpointIO"  # of what is saved: where it is, the file ends with a sum
CHUNK = 2**20


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that whatever happens a whole one is there, and check what is read.

    A plugin for Lightning's Trainer. A checkpoint is written beside its place, flushed to the disk
    and renamed, so that neither a killed process nor a full disk damages the one that is there;
    that one stays, as ``<name>.previous``. The file is torch's own, a zip archive, whose comment
    holds the SHA-256 of what comes before it; :func:`torch.load` reads it, but does not notice a
    changed byte. What is saved also says, as ``checkpoint["AtomicCheckpointIO"]``, that there is a
    sum: a file that lost it is damaged, too. Files that never had one, such as Lightning's, are
    read. Paths of remote file systems, with a ``://``, are left to Lightning.

    Raises:
        OSError: the file cannot be written, on a full disk say.
        ValueError: the file that is read was damaged, or is compressed, which torch's never are.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded: Path | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # the one that the training came from stays: what it would give way to may be damaged
        keep = None if self._loaded == previous(path) else previous(path)
        write_file(path, lambda file: _save(checkpoint, file), keep)
        self._loaded = None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, *args, **kwargs)
        path = Path(path)
        has_sum = _check_archive(path)
        found = _without_key(super().load_checkpoint(path, *args, **kwargs), path, has_sum)
        self._loaded = path
        return found


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or compressed, or holds other than tensors, numbers, text and
            their containers.
    """
    path = Path(path)
    has_sum = _check_archive(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:  # a damaged file may raise anything
        found = None
    if isinstance(found, dict):
        return _without_key(found, path, has_sum)
    why = "holds other than names and tensors" if has_sum else "is damaged: it is no checkpoint"
    raise ValueError(f"{path} {why}")


def previous(path: Path) -> Path:
    """Where the checkpoint is that another one replaced."""
    return path.with_name(f"{path.name}.previous")


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` at the end of each epoch, and after every so many batches.

    Not after a batch that a validation follows, or whose gradients wait for others.

    Args:
        folder: where.
        every: batches, >= 1; None writes at the ends alone.

    Raises:
        ValueError: ``every`` is out of its range.
        TypeError: it is no integer.

    Example:
        >>> LastCheckpoint("runs/digits", every=100).filename
        'last'
    """

    def __init__(self, folder: str | Path, every: int | None = None) -> None:
        if every is not None:
            check_integer("save_every", every, 1)
        super().__init__(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        self.path = Path(folder) / "last.ckpt"
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        done = batch_idx + 1
        if not self.every or done % self.every != 0 or done >= trainer.num_training_batches:
            return
        # Lightning would resume behind the validation that follows, and without gradients that
        # have not led to a step.
        check = trainer.val_check_batch
        if (check is None or done % check != 0) and done % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {}  # a folder may have another name by the time it is resumed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def write_text(path: Path, text: str) -> None:
    """Replace a file, which is the old one or the new one at any time."""
    write_file(path, lambda file: file.write(text.encode()))


def write_file(path: Path, write: Callable[[IO[bytes]], object], keep: Path | None = None) -> None:
    """Replace a file by what ``write`` writes; the old one becomes ``keep``."""
    new = _beside(path)
    temporary = [new]
    try:
        with open(new, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            temporary.append(_beside(keep))
            _copy(path, _beside(keep))
            os.replace(_beside(keep), keep)
        os.replace(new, path)
        _flush_folder(path.parent)
    except BaseException as error:
        for file in temporary:
            with contextlib.suppress(OSError):
                file.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Keep others out of the folder of a lock file; ``what`` is what both they and we are.

    Raises:
        OSError: the folder cannot be written, or another one is at work there.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        text = f"another {what} is writing to it; --name names another folder"
        raise OSError(errno.EBUSY, text, str(lock.parent)) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows unlinks no open file
            lock.unlink()  # while it is held: nobody waits for it
        held.release()


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    handled = sys.exception()  # what a checkpoint of an interrupted training is written for
    try:
        torch.save({**checkpoint, KEY: "sha256"}, file)
    except RuntimeError as error:
        if error.__context__ is None or error.__context__ is handled:
            raise
        raise error.__context__ from None  # what torch says is unexpected: a full disk, Ctrl-C
    size = file.tell() - 2  # the length of the archive's comment, 0, comes last
    end = _end(file, size)
    file.seek(size)
    file.write(end)


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


def _check_archive(path: Path) -> bool:
    """Whether there is a sum, which then is right; what torch would not have written is refused."""
    check_file(path)
    with open(path, "rb") as file:
        has_sum = _check_sum(path, file)
        file.seek(0)
        if file.read(2) == b"PK":
            _check_members(path, file)
    return has_sum


def _check_sum(path: Path, file: IO[bytes]) -> bool:
    size = os.fstat(file.fileno()).st_size - END_SIZE
    if size < 0:
        return False
    file.seek(size)
    end = file.read()
    if not end.startswith(MARK, 2):
        return False
    if end != _end(file, size):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return True


def _check_members(path: Path, file: IO[bytes]) -> None:
    """Torch would unpack a compressed member, however large it becomes."""
    try:
        members = zipfile.ZipFile(file).infolist()
    except Exception:  # a damaged file may raise anything
        raise ValueError(f"{path} is damaged: it ends too early, or lists no contents") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: {member.filename!r} is compressed, which torch never does")


def _without_key(found: dict[str, Any], path: Path, has_sum: bool) -> dict[str, Any]:
    """What was saved, if the sum is there where it should be."""
    if found.pop(KEY, None) and not has_sum:
        raise ValueError(f"{path} is damaged: its checksum is missing")
    return found


def _end(file: IO[bytes], size: int) -> bytes:
    """Length and text of the archive's comment: the SHA-256 of the file's first bytes."""
    file.seek(0)
    found = hashlib.sha256()
    for start in range(0, size, CHUNK):
        found.update(file.read(min(CHUNK, size - start)))
    comment = MARK + found.hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment
