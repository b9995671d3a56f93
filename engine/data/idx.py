"""IDX files of 8-bit images (LeCun's format, as MNIST's), plain or gzipped."""

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
    """Return the uint8 array in an IDX file.

    Raises:
        DataError: the file cannot be read, is no IDX file of bytes, is empty, or is shorter or
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
    """Return the IDX file of images that ``data`` names: itself, or the training one in a folder.

    Raises:
        DataError: there is none, or more than one.
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
    """Return the file of labels next to the images, plain or gzipped whichever the images are."""
    if IMAGES not in path.name:
        return None
    beside = path.with_name(path.name.replace(IMAGES, LABELS))
    plain = beside.with_suffix("") if beside.suffix == ".gz" else beside
    zipped = plain.with_name(plain.name + ".gz")
    return next((file for file in (beside, plain, zipped) if file.exists()), None)


@isolated(grad=False)
def load_idx(data: str | PathLike[str], multiple: int = 1, *, labels: bool = True) -> ImageData:
    """Load images, and labels from the file beside them if it exists.

    Args:
        data: an IDX file of images, or a folder with one (train-images-idx3-ubyte[.gz]).
        multiple: height and width must be multiples of this (2 to the number of down-samplings).
        labels: False leaves a file of labels alone.

    Raises:
        DataError: naming the file and what is wrong with it.
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
