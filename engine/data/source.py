"""`ImageSource`: numbered 8-bit images of one shape to train on, with labels or without."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flashddpm.errors import DataError
from flashddpm.host import isolated

LISTED = 10


class ImageSource(Protocol):
    """The protocol of training data: images numbered 0..len-1, all of one shape.

    ``len(source)`` is the number of images. ``fetch`` may be called from a thread of its own.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image, ints in pixels."""
        ...

    @property
    def num_classes(self) -> int | None:
        """The number K of classes: labels are in 0..K-1; None where there are no labels."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The name of each class, num_classes strings; None where they have no names."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the images and labels of these numbers, in memory that nobody else writes.

        Args:
            index: int64 [B] on the CPU, the numbers of the images, each in 0..len-1.

        Returns:
            The images, uint8 [B, C, H, W], contiguous, and the labels, int64 [B] in
            0..num_classes-1, or None where there are none; both on the CPU.

        Raises:
            DataError: if an image cannot be read.
            ValueError: if the index is of another dtype or shape, or out of range.
        """
        ...

    def fingerprint(self) -> str:
        """Return the fingerprint of the data: "sha256:...", a hash, the same on every machine.

        It covers what can be hashed cheaply; a run is resumed only with data of the same one.
        """
        ...


@dataclass(frozen=True)
class ImageData:
    """An `ImageSource` of images and labels in memory.

    Attributes:
        images: uint8 [N, C, H, W] on the CPU, none of these sizes 0.
        labels: int64 [N] in 0..num_classes-1 on the CPU, or None.
        num_classes: the number of classes, at least 1; None without labels.
        class_names: the name of each class, num_classes strings, or None.

    Raises:
        ValueError: if images or labels are of another shape or dtype, there is no image, a label is
            out of range, num_classes is below 1, given without labels or missing beside them, or
            there are not as many names as classes. That they are on the CPU is not checked.
    """

    images: Tensor
    labels: Tensor | None
    num_classes: int | None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype is not torch.uint8 or images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"images: {images.dtype} {list(images.shape)}; must be uint8 [N, C, H, W], "
                "not empty"
            )
        check_classes(self.num_classes, self.class_names)
        if (self.labels is None) != (self.num_classes is None):
            raise ValueError("num_classes: must be given with labels, and only with them")
        if self.labels is None or self.num_classes is None:
            return
        if self.labels.dtype is not torch.int64 or self.labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels: {self.labels.dtype} {list(self.labels.shape)}; "
                f"must be int64 [{len(images)}]"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"labels: are in {low}..{high}; with {self.num_classes} classes they must be "
                f"in 0..{self.num_classes - 1}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image, ints in pixels."""
        C, H, W = self.images.shape[1:]
        return C, H, W

    def __len__(self) -> int:
        return len(self.images)

    @isolated(grad=False)
    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return copies of images, uint8 [B, C, H, W], and labels, int64 [B] or None, on the CPU.

        Args:
            index: int64 [B] on the CPU, the numbers of the images, each in 0..len-1.

        Raises:
            ValueError: if the index is of another dtype or shape, or out of range.
        """
        check_index(index, len(self))
        images = self.images[index].contiguous()
        return images, None if self.labels is None else self.labels[index]

    def fingerprint(self) -> str:
        """Return "sha256:..." of the shape, every pixel, the labels and the classes."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = [self.images, *([] if self.labels is None else [self.labels])]
        contents = (part.numpy().reshape(-1).view(np.uint8).data for part in parts)
        return digest(self, contents)


def check_classes(num_classes: int | None, class_names: Sequence[str] | None) -> None:
    """Refuse a number of classes below 1, or another number of class names than of classes.

    Args:
        num_classes: the number of classes, or None for no labels.
        class_names: the names of the classes, or None for no names.

    Raises:
        ValueError: if num_classes is below 1, if there are not as many names, or if there are names
            and num_classes is None.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: must be at least 1")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(
            f"class_names: {len(class_names)} for {num_classes} classes; must be one each"
        )


def check_index(index: Tensor, count: int) -> None:
    """Refuse numbers of images that are not int64 [B] in 0..count-1: -1 would be the last image.

    Args:
        index: the numbers of the images; B may be 0. Its device is not checked.
        count: the number of images, an int.

    Raises:
        ValueError: if the dtype or the number of dimensions is another, or a number out of range.
    """
    if index.dtype is not torch.int64 or index.ndim != 1:
        raise ValueError(f"index: {index.dtype} {list(index.shape)}; must be int64 [B]")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(
            f"index: is in {int(index.min())}..{int(index.max())}; must be in 0..{count - 1}"
        )


def check_multiple(where: object, height: int, width: int, multiple: int) -> None:
    """Refuse a size of images that cannot be halved as often as the network does.

    Args:
        where: the file, folder or name of the data; its str() begins the error's text.
        height: the height of the images in pixels.
        width: the width of the images in pixels.
        multiple: the number that must divide both, 2 to the number of the network's
            down-samplings; at least 1 (not checked).

    Raises:
        DataError: if height or width is no multiple of it.
    """
    if height % multiple or width % multiple:
        raise DataError(
            f"{where}: images are {height}x{width}; "
            f"height and width must be multiples of {multiple}"
        )


def listed(names: Sequence[str]) -> str:
    """Return the first ten names joined by commas, and how many more there are, as a text."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def digest(source: ImageSource, contents: Iterable[bytes | memoryview]) -> str:
    """Return "sha256:..." of a source's length, shape and classes, and of contents, in order.

    Args:
        source: the source, of which no image is fetched.
        contents: what else is hashed: byte strings, each with its length before it, so that the
            same bytes cut into other strings give another hash.
    """
    about = [len(source), source.shape, source.num_classes, source.class_names]
    sha = hashlib.sha256(json.dumps(about).encode())
    for content in contents:
        sha.update(len(content).to_bytes(8, "little"))  # so that no two lists join to the same
        sha.update(content)
    return f"sha256:{sha.hexdigest()}"


def to_float(images: Tensor) -> Tensor:
    """Return 8-bit images as float32 in [-1, 1]: x / 127.5 - 1, with the same bits on every device.

    Args:
        images: uint8, of any shape.

    Returns:
        float32 of the same shape, on the same device.
    """
    # The divisor is a tensor: CUDA multiplies by a number's reciprocal, which rounds otherwise.
    return images.float() / torch.full((), 127.5, dtype=torch.float32, device=images.device) - 1
