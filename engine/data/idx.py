"""IDX files of 8-bit images (LeCun's format, in which MNIST comes), plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from flashddpm.data.source import ImageData, check_multiple
from flashddpm.errors import DataError
from flashddpm.host import isolated

IMAGES, LABELS = "images-idx3", "labels-idx1"


def read_idx(path: Path) -> np.ndarray:
    """Return the array in an IDX file: uint8, of 1 to 4 dimensions, read-only.

    Args:
        path: the file, which is gzipped if its name ends in .gz.

    Raises:
        DataError: if the file cannot be read, is no IDX file of bytes, is empty, or is shorter or
            longer than its header says.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or not 1 <= content[3] <= 4:
        raise DataError(f"{path}: is not an IDX file of bytes (it must start with 00 00 08)")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path}: ends inside its header, of {start} bytes")
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape) or 0 in shape:
        raise DataError(
            f"{path}: holds {len(content) - start} bytes; its header says {shape}, not empty"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def find_images(data: str | PathLike[str]) -> Path:
    """Return the path of the IDX file of images that a path names.

    Args:
        data: a file, which is returned unread; or a folder, of whose files with "images-idx3" in
            the name the one with "train" in it, or else the only one, is returned.

    Raises:
        DataError: if there is no such file or folder, or the folder has none or several to choose.
    """
    path = Path(data)
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = sorted(f for f in path.iterdir() if IMAGES in f.name)
    training = [f for f in found if "train" in f.name] or found
    if len(training) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise DataError(f"{path}: must hold one *{IMAGES}* file to train on; found {names}")
    return training[0]


def _labels_beside(path: Path) -> Path | None:
    """Return the file of labels next to a file of images, gzipped or not; None if there is none."""
    if IMAGES not in path.name:
        return None
    beside = path.with_name(path.name.replace(IMAGES, LABELS))
    plain = beside.with_suffix("") if beside.suffix == ".gz" else beside
    zipped = plain.with_name(plain.name + ".gz")
    return next((file for file in (beside, plain, zipped) if file.exists()), None)


@isolated(grad=False)
def load_idx(data: str | PathLike[str], multiple: int = 1, *, labels: bool = True) -> ImageData:
    """Load the images of an IDX file, and labels from the file beside them if it exists.

    The file of labels has "labels-idx1" in its name where that of the images has "images-idx3", and
    may be gzipped or not.

    Args:
        data: an IDX file of images, uint8 [N, H, W], or a folder with one
            (train-images-idx3-ubyte[.gz]).
        multiple: height and width must be multiples of this number of pixels (2 to the number of
            the network's down-samplings); at least 1, not checked here.
        labels: whether a file of labels is read.

    Returns:
        The images, uint8 [N, 1, H, W], and the labels, int64 [N], with as many classes as the
        largest label + 1; no labels and classes (None) where there are none.

    Raises:
        DataError: if a file is missing or broken, if images have not three dimensions, if their
            size is no multiple of ``multiple``, or if there are not as many labels as images; the
            text names the file.
    """
    path = find_images(data)
    images = read_idx(path)
    if images.ndim != 3:
        raise DataError(f"{path}: has shape {images.shape}; must be [N, H, W]")
    check_multiple(path, images.shape[1], images.shape[2], multiple)
    tensor = torch.from_numpy(images.copy())[:, None]
    beside = _labels_beside(path) if labels else None
    if beside is None:
        return ImageData(tensor, None, None)
    kinds = read_idx(beside)
    if kinds.shape != images.shape[:1]:
        raise DataError(f"{beside}: has shape {kinds.shape}; must be ({len(images)},)")
    return ImageData(tensor, torch.from_numpy(kinds.astype(np.int64)), int(kinds.max()) + 1)
