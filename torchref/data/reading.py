"""What is asked of a file before it is read, so that none takes all memory or waits forever."""

import stat
from pathlib import Path

HARMLESS = 2**28  # bytes that any machine has room for
RATIO = 100  # data to file, at most: digits packed by gzip have 5, zeros 1,032


def check_file(path: Path) -> None:
    """Refuse what is neither file nor folder.

    Raises:
        ValueError: it is a pipe, whose other end may never write, or a device, which may not end.
        FileNotFoundError: there is no such file.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, `open` says that it is one
        raise ValueError(f"{path}: expected a file, got a pipe, a socket or a device")


def check_size(path: Path, size: int) -> None:
    """Refuse a file that stands for far more data than it holds, before room is made for them.

    Raises:
        ValueError: ``size`` bytes are too many for it.
    """
    held = path.stat().st_size
    if size > max(HARMLESS, RATIO * held):
        raise ValueError(f"{path}: {size:,} bytes of data in a file of {held:,}")
