"""`load_npz`: images and labels from NumPy's .npz archives, zips of one .npy file for each array.

No pickle is read. Every size is checked before memory is taken: the header of an array against the
length that the zip states, and the sum against what is allowed. zipfile never returns more bytes
than that length.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from flashddpm.data.source import ImageData, check_multiple
from flashddpm.errors import DataError
from flashddpm.host import isolated

IMAGE_NAMES, LABEL_NAMES = ("images", "arr_0"), ("labels", "arr_1")
CHANNELS = (1, 3)
MAX_CLASSES = 1 << 20
CHUNK = 1 << 20


@isolated(grad=False)
def load_npz(
    path: Path, multiple: int = 1, *, labels: bool = True, memory_mb: int = 4096
) -> ImageData:
    """Load the images of a .npz archive, and its labels if it has some.

    Args:
        path: a .npz with an array ``images`` or ``arr_0``, uint8 [N, H, W], [N, H, W, C] or
            [N, C, H, W] with 1 or 3 channels, and maybe ``labels`` or ``arr_1``, integers [N] in
            0..2^20-1.
        multiple: height and width must be multiples of this number of pixels; at least 1, not
            checked here.
        labels: whether labels are read.
        memory_mb: the largest size of the arrays together, uncompressed, in MiB; an int of at least
            0, not checked here.

    Returns:
        The images, uint8 [N, C, H, W], and the labels, int64 [N], with as many classes as the
        largest label + 1; no labels and classes (None) where there are none.

    Raises:
        DataError: if the file is missing or broken, an array is missing, of another dtype or shape
            or empty, labels are out of range, the arrays are larger than ``memory_mb``, or the size
            of images is no multiple of ``multiple``; the text names the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {i.filename.removesuffix(".npy") for i in archive.infolist()}
            wanted = [_the_one(names, IMAGE_NAMES, "images")]
            if labels and not names.isdisjoint(LABEL_NAMES):
                wanted.append(_the_one(names, LABEL_NAMES, "labels"))
            size = sum(archive.getinfo(f"{name}.npy").file_size for name in wanted)
            if size > memory_mb << 20:
                raise DataError(f"holds {size >> 20} MiB; must be at most memory_mb={memory_mb}")
            arrays = [_read(archive, name) for name in wanted]
        images = _images(wanted[0], arrays[0])
        check_multiple(wanted[0], images.shape[2], images.shape[3], multiple)
        if len(arrays) == 1:
            return ImageData(images, None, None)
        kinds = _labels(wanted[1], arrays[1], len(images))
        return ImageData(images, kinds, int(kinds.max()) + 1)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # what zipfile and numpy raise on a broken file has no end
        raise DataError(f"{path}: cannot be read: {error}") from error


def _the_one(names: set[str], allowed: tuple[str, str], what: str) -> str:
    found = [name for name in allowed if name in names]
    if len(found) != 1:
        raise DataError(
            f"has {' and '.join(found) or 'no ' + what}; one array must be named "
            f"{allowed[0]} or {allowed[1]}"
        )
    return found[0]


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array of integers from the archive, C-contiguous."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        shape, fortran, dtype = _header(file)
        if dtype.kind not in "iu":
            raise DataError(f"{name} is of {dtype}; must be of integers")
        size = math.prod(shape) * dtype.itemsize
        if file.tell() + size != info.file_size or 0 in shape:
            raise DataError(
                f"{name} has {info.file_size - file.tell()} bytes; its header says {shape} of "
                f"{dtype}, not empty"
            )
        content = np.empty(size, np.uint8)
        for start in range(0, size, CHUNK):
            part = file.read(min(CHUNK, size - start))
            content[start : start + len(part)] = np.frombuffer(part, np.uint8)
        file.read(1)  # the end: where zipfile compares length and checksum
    return np.ascontiguousarray(content.view(dtype).reshape(shape, order="F" if fortran else "C"))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return (shape, whether in Fortran order, dtype) from the header of a .npy file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise DataError(f"has .npy version {version}; must be (1, 0) or (2, 0)")


def _images(name: str, array: np.ndarray) -> Tensor:
    """Return images, uint8 [N, C, H, W]; refuse an array whose layout is ambiguous."""
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(
            f"{name} is {array.dtype} {list(array.shape)}; must be uint8 [N, H, W], "
            "[N, H, W, C] or [N, C, H, W]"
        )
    tensor = torch.from_numpy(array)
    if array.ndim == 3:
        return tensor[:, None]
    first, last = array.shape[1] in CHANNELS, array.shape[3] in CHANNELS
    if first == last:
        raise DataError(
            f"{name} has shape {list(array.shape)}; either axis 1 or axis 3 must be 1 or 3 "
            "channels, and not both"
        )
    return tensor if first else tensor.permute(0, 3, 1, 2).contiguous()


def _labels(name: str, array: np.ndarray, count: int) -> Tensor:
    if array.shape != (count,):
        raise DataError(f"{name} has shape {list(array.shape)}; must be [{count}]")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(f"{name} are in {low}..{high}; must be in 0..{MAX_CLASSES - 1}")
    return torch.from_numpy(array.astype(np.int64))
