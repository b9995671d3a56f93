"""`ImageFolder`: folders of pictures to train on, all in one folder or in one folder a class."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.data.pictures import MODES, SUFFIXES, Found, look
from flashddpm.data.source import check_index, check_multiple, digest, listed
from flashddpm.errors import DataError
from flashddpm.host import ints, isolated

log = logging.getLogger(__name__)

THREADS = min(8, os.cpu_count() or 1)
CHUNK = 64


class ImageFolder:
    """An `ImageSource` of the pictures in a folder, decoded once if they fit in memory.

    Every file is read, hashed and decoded once when the source is made, so that a broken one shows
    before the first step and not in the middle of a run. Names that start with a dot are left out,
    and so are files that are no pictures, with a line in the log. Links are followed. A picture is
    taken as it is stored: its EXIF orientation is not applied.

    Args:
        folder: a folder that holds either pictures (no labels), or one folder of pictures for each
            class (labels 0, 1, ... in the order of the folders' names). A picture is a .png, .jpg,
            .jpeg, .bmp or .webp; all are of one size, and all of mode L (C = 1) or all RGB (C = 3).
        multiple: height and width must be multiples of this number of pixels; at least 1.
        labels: whether class folders give labels.
        memory_mb: a limit in MiB, at least 0: pictures that need more are decoded at each fetch.

    Attributes:
        folder: the folder, a Path.
        shape: (C, H, W) of every image, in pixels.
        num_classes: the number of classes; None without labels.
        class_names: the names of the class folders, a tuple; None without labels.

    Raises:
        DataError: if the folder cannot be read, if it or a class folder holds no picture, if
            pictures lie beside class folders or folders in these, if files are broken, if sizes or
            modes are mixed or not allowed, or if the size is no multiple of ``multiple``.
        ValueError: if ``multiple`` or ``memory_mb`` is no integer or below its minimum.
    """

    @isolated(grad=False)
    def __init__(
        self,
        folder: str | os.PathLike[str],
        multiple: int = 1,
        *,
        labels: bool = True,
        memory_mb: int = 4096,
    ) -> None:
        arguments.integer("multiple", multiple, 1)
        arguments.integer("memory_mb", memory_mb, 0)
        self.folder = Path(folder)
        self._files, kinds, names = list_files(self.folder)
        named = labels and names is not None
        self.class_names = names if named else None
        self.num_classes = len(names) if named and names is not None else None
        self._labels = ints(kinds) if named else None
        heads = (look(self.folder / file, None)[0] for file in self._files)
        self.shape = next((head for head in heads if not head.error), Found()).shape
        check_multiple(self.folder, *self.shape[1:], multiple)
        size = len(self) * int(np.prod(self.shape))
        self._pixels: Tensor | None = None
        if size <= memory_mb << 20:
            self._pixels = torch.empty((len(self), *self.shape), dtype=torch.uint8, device="cpu")
        how = "at each fetch" if self._pixels is None else "into memory"
        log.info("%s: decoding %d pictures, %s", self.folder, len(self), how)
        with self._pool() as pool:
            found = [f for part in pool.map(self._look, range(0, len(self), CHUNK)) for f in part]
        self._check(found)
        self._hashes = [f.sha256 for f in found]

    def __len__(self) -> int:
        return len(self._files)

    @isolated(grad=False)
    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return copies of images, uint8 [B, C, H, W], and labels, int64 [B] or None, on the CPU.

        Args:
            index: int64 [B] on the CPU, the numbers of the images, each in 0..len-1.

        Raises:
            DataError: if a file that is decoded at each fetch has gone, or no longer has its shape.
            ValueError: if the index is of another dtype or shape, or out of range.
        """
        check_index(index, len(self))
        labels = None if self._labels is None else self._labels[index]
        if self._pixels is not None:
            return self._pixels[index], labels
        images = np.empty((len(index), *self.shape), np.uint8)
        with self._pool() as pool:
            for row, pixels in enumerate(pool.map(self._decode, index.tolist())):
                images[row] = pixels
        return torch.from_numpy(images), labels

    def fingerprint(self) -> str:
        """Return "sha256:..." of the shape, the classes, and of every file's name and bytes.

        The bytes are those that the files had when the source was made.
        """
        names = (os.fsencode(file) for file in self._files)
        pairs = zip(names, self._hashes, strict=True)
        return digest(self, (part for pair in pairs for part in pair))

    def _look(self, start: int) -> list[Found]:
        """Hash and decode CHUNK files from number ``start`` on; store pixels if they are kept."""
        files = self._files[start : start + CHUNK]
        result = []
        for number, file in enumerate(files, start):
            found, pixels = look(self.folder / file, self.shape, hashed=True)
            if pixels is not None and self._pixels is not None:
                self._pixels.numpy()[number] = pixels
            result.append(found)
        return result

    def _decode(self, number: int) -> np.ndarray:
        """Return the pixels of a picture, uint8 [C, H, W]."""
        path = self.folder / self._files[number]
        found, pixels = look(path, self.shape)
        if pixels is None:
            now = found.error or f"is {found.mode} {found.height}x{found.width}"
            raise DataError(f"{path}: {now}; was {list(self.shape)} when it was first read")
        return pixels

    @staticmethod
    @contextmanager
    def _pool() -> Iterator[ThreadPoolExecutor]:
        """Run a block with threads that decode; an error cancels the decoding that waits."""
        pool = ThreadPoolExecutor(THREADS, "flashddpm-decode")
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)

    def _check(self, found: list[Found]) -> None:
        """Refuse broken files, modes other than L and RGB, and mixed modes or sizes, in order."""
        pairs = list(zip(self._files, found, strict=True))
        broken = [f"{file} ({f.error})" for file, f in pairs if f.error]
        if broken:
            raise DataError(
                f"{self.folder}: {len(broken)} of {len(found)} files are no pictures that can be "
                f"read: {listed(broken)}"
            )
        other = [f"{file} ({f.mode})" for file, f in pairs if f.mode not in MODES]
        if other:
            raise DataError(
                f"{self.folder}: {len(other)} of {len(found)} pictures are not of mode L or RGB: "
                f"{listed(other)}; convert them, with Pillow's convert('RGB') for instance"
            )
        for what, values in (
            ("mode", [f.mode for f in found]),
            ("size", [f"{f.height}x{f.width}" for f in found]),
        ):
            counts = Counter(values)
            if len(counts) > 1:
                kinds = [
                    f"{value} ({count}, such as {self._files[values.index(value)]})"
                    for value, count in counts.most_common()
                ]
                raise DataError(
                    f"{self.folder}: must hold pictures of one {what}; holds {listed(kinds)}"
                )


def list_files(folder: Path) -> tuple[list[str], list[int], tuple[str, ...] | None]:
    """List the pictures in a folder, or in the class folders in it; no file is opened.

    A picture is a file whose name ends in .png, .jpg, .jpeg, .bmp or .webp, in any case. Names that
    start with a dot are left out silently, other files with one warning in the log.

    Args:
        folder: a folder that holds either pictures, or one folder of pictures for each class.

    Returns:
        Three parts: a list of the pictures' paths relative to the folder, strings ("a.png", or
        "CLASS/a.png"), sorted by class and then by name; a list of the class number of each, ints
        in the order of the class folders, all 0 without these; and the sorted names of the class
        folders, a tuple, or None without them.

    Raises:
        DataError: if the folder cannot be read or holds no picture, if a class folder holds none or
            has a folder in it, or if there are pictures both beside and in class folders.
    """
    pictures, folders, other = _entries(folder)
    if not pictures and not folders:
        raise DataError(
            f"{folder}: holds no pictures ({', '.join(SUFFIXES)}), class folders or "
            "*images-idx3* file"
        )
    if pictures and folders:
        raise DataError(
            f"{folder}: holds pictures ({listed(pictures)}) beside folders ({listed(folders)}); "
            "must hold pictures only, or one folder a class only"
        )
    kinds = [0] * len(pictures)
    for kind, name in enumerate(folders):
        inside, deeper, more = _entries(folder / name)
        if deeper:
            raise DataError(
                f"{folder / name}: holds folders ({listed(deeper)}); a class folder must hold "
                "pictures only"
            )
        if not inside:
            raise DataError(
                f"{folder / name}: holds no pictures ({', '.join(SUFFIXES)}); every class must "
                "have some"
            )
        pictures += [f"{name}/{file}" for file in inside]
        other += [f"{name}/{file}" for file in more]
        kinds += [kind] * len(inside)
    if other:
        log.warning("%s: left out what is no picture: %s", folder, listed(other))
    return pictures, kinds, tuple(folders) or None


def _entries(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the sorted names of pictures, of folders and of other files in a folder."""
    pictures, folders, other = [], [], []
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error}") from error
    for name in names:
        if name.startswith("."):
            continue
        if (folder / name).is_dir():
            folders.append(name)
        elif name.lower().endswith(SUFFIXES):
            pictures.append(name)
        else:
            other.append(name)
    return pictures, folders, other
