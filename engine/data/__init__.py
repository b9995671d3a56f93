"""Training data: IDX files, folders of pictures, .npz archives and PyTorch's data sets.

Each is read as an `ImageSource`: numbered 8-bit images of one shape, checked before training.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from flashddpm import arguments
from flashddpm.data.dataset import from_dataset
from flashddpm.data.folders import ImageFolder
from flashddpm.data.idx import IMAGES, find_images, load_idx, read_idx
from flashddpm.data.npz import load_npz
from flashddpm.data.pictures import SUFFIXES
from flashddpm.data.source import ImageData, ImageSource, to_float
from flashddpm.errors import DataError
from flashddpm.host import isolated

__all__ = [
    "ImageData",
    "ImageFolder",
    "ImageSource",
    "find_images",
    "from_dataset",
    "load_data",
    "load_idx",
    "load_npz",
    "read_idx",
    "to_float",
]


@isolated(grad=False)
def load_data(
    path: str | PathLike[str],
    multiple: int = 1,
    *,
    labels: bool = True,
    memory_mb: int = 4096,
) -> ImageSource:
    """Load the images to train on from an IDX file, a .npz archive or a folder of pictures.

    Args:
        path: an IDX file or a folder with one (`load_idx`), a .npz (`load_npz`), or a folder that
            holds pictures, or one folder of pictures for each class (`ImageFolder`).
        multiple: height and width must be multiples of this number of pixels (2 to the number of
            the network's down-samplings); at least 1.
        labels: whether labels are loaded, where there are some.
        memory_mb: a limit in MiB, at least 0: pictures of a folder that need more are decoded at
            each fetch instead of once; a .npz that needs more is refused. IDX files are not
            limited.

    Returns:
        An `ImageFolder` for pictures, else the images and labels in memory, an `ImageData`.

    Raises:
        DataError: if the data are missing, broken, of mixed or of wrong sizes; the text names the
            file or folder, what is wrong with it and what is allowed.
        ValueError: if ``multiple`` or ``memory_mb`` is no integer or below its minimum.
    """
    arguments.integer("multiple", multiple, 1)
    arguments.integer("memory_mb", memory_mb, 0)
    path = Path(path)
    if path.is_dir():
        if next(path.glob(f"*{IMAGES}*"), None):
            return load_idx(path, multiple, labels=labels)
        return ImageFolder(path, multiple, labels=labels, memory_mb=memory_mb)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in SUFFIXES:
        raise DataError(f"{path}: is one picture; must be a folder of them")
    if path.is_file() and suffix == ".npz":
        return load_npz(path, multiple, labels=labels, memory_mb=memory_mb)
    return load_idx(path, multiple, labels=labels)
