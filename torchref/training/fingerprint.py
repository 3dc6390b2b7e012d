"""What tells whether a run, a search or a cross-validation goes on with its own data."""

from pathlib import Path

from torchref.data.reading import check_file
from torchref.training.checkpoint import write_text

FINGERPRINT = "fingerprint.txt"


def keep_fingerprint(folder: Path, fingerprint: str) -> None:
    write_text(folder / FINGERPRINT, fingerprint + "\n")


def check_fingerprint(folder: Path, dataset: str, fingerprint: str) -> None:
    """Refuse other data than those of before; what an earlier version left has no fingerprint.

    Raises:
        ValueError: the data have changed.
    """
    path = folder / FINGERPRINT
    if not path.exists():
        return
    check_file(path)
    check_same_data(folder, dataset, path.read_text(errors="replace").strip(), fingerprint)


def check_same_data(folder: Path, dataset: str, before: object, now: str) -> None:
    """Refuse a fingerprint other than the one of before.

    Raises:
        ValueError: the data have changed.
    """
    if before != now:
        raise ValueError(
            f"resume: the samples, targets or names of {dataset} are other than those of {folder} "
            f"(fingerprint {before!s:.40}, now {now})"
        )
