"""Images on disk: IDX files, as MNIST's, and folders with one subfolder for each class."""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from torchref.data.reading import check_file, check_size

IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # others may start a program: EPS does


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file, packed by gzip where its name ends in ``.gz``.

    Raises:
        ValueError: it is no IDX file, it is truncated, something follows the data, or what is
            packed is over a hundred times as large.
        FileNotFoundError: there is no such file.

    Source: LeCun, Cortes and Burges, "The MNIST database", its last section.
    """
    path = Path(path)
    check_file(path)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        try:
            return _parse_idx(file, path)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: truncated, or not packed by gzip: {error}") from None


def _parse_idx(file, path: Path) -> np.ndarray:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in IDX_TYPES or start[3] == 0:
        raise ValueError(f"{path}: not an IDX file: it begins with {start.hex(' ')}")
    sizes = file.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise ValueError(f"{path}: truncated in its header of {start[3]} sizes")
    shape = struct.unpack(f">{start[3]}I", sizes)
    dtype = np.dtype(IDX_TYPES[start[2]])
    expected = math.prod(shape) * dtype.itemsize
    if path.suffix == ".gz":
        check_size(path, expected)
    content = _read_at_most(file, expected + 1)
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise ValueError(
            f"{path}: {what}: shape {shape} of {dtype.name} is {expected} bytes of data, got "
            f"{len(content) if len(content) < expected else 'more'}"
        )
    return np.frombuffer(content, dtype).reshape(shape)


def _read_at_most(file, count: int) -> bytearray:
    """In pieces: a header that lies about the size must not reserve memory for it."""
    content = bytearray()
    while len(content) < count and (piece := file.read(min(count - len(content), 2**20))):
        content += piece
    return content


def find_idx(root: Path, stem: str) -> Path:
    """``stem`` or ``stem.gz`` in a folder.

    Raises:
        FileNotFoundError: neither is there.
    """
    for name in (stem, f"{stem}.gz"):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{root}: neither {stem} nor {stem}.gz; --root names another folder")


def read_folder(root: str | Path, size: int | None = None) -> tuple[np.ndarray, list[str]]:
    """Read the images of a folder's subfolders, whose names are the labels; not of hidden ones.

    Args:
        root: the folder.
        size: images are made squares of so many pixels; without it all must be of one size.

    Returns:
        (N, C, H, W) uint8 with one channel where every image is gray, else three; N labels.

    Raises:
        ValueError: there is no image, one cannot be read, or sizes differ; the file is named.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    files = [
        root / label / name
        for label in _names(root, _is_class)
        for name in _names(root / label, _is_image)
    ]
    if not files:
        raise ValueError(f"{root}: no images; expected one subfolder for each class")
    images = [_open_image(path, size) for path in files]
    return stack_images(images, map(str, files)), [path.parent.name for path in files]


def _names(folder: Path, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """In order; of what is not wanted, be it a million, nothing is kept."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if wanted(entry))


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")  # as Jupyter's checkpoints do


def _is_image(entry: os.DirEntry[str]) -> bool:
    return os.path.splitext(entry.name)[1].lower() in ENDINGS


def stack_images(images: list[np.ndarray], names: Iterable[str]) -> np.ndarray:
    """(H, W) and (H, W, 3) images of one size as (N, C, H, W)."""
    for image, name in zip(images, names, strict=True):
        if image.shape[:2] != images[0].shape[:2]:
            raise ValueError(
                f"{name}: {_size(image)} pixels, those before have {_size(images[0])}; "
                "--image_size gives all one size"
            )
    channels = max(1 if image.ndim == 2 else 3 for image in images)
    full = [np.repeat(i[..., None], channels, 2) if i.ndim == 2 else i for i in images]
    return np.stack(full).transpose(0, 3, 1, 2)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _open_image(path: Path, size: int | None) -> np.ndarray:
    from PIL import Image

    check_file(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            return as_pixels(image, size)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path}: not a readable image: {error}") from None


def as_pixels(image, size: int | None = None) -> np.ndarray:
    """A picture of PIL's as (H, W) where it is gray, else (H, W, 3), uint8."""
    if image.mode[0] in "IF":
        raise ValueError(f"expected 8 bits for each channel, got mode {image.mode}")
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if size is not None:
        image = image.resize((size, size))
    return np.asarray(image)
