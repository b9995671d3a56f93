"""`from_dataset`: any map-style Dataset of PyTorch as a source of training images."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from flashddpm import arguments
from flashddpm.data.pictures import MODES
from flashddpm.data.source import ImageSource, check_classes, check_index, check_multiple, digest
from flashddpm.errors import DataError
from flashddpm.host import ints, isolated


@isolated(grad=False)
def from_dataset(
    dataset: Any, multiple: int = 1, *, labels: bool = True, num_classes: int | None = None
) -> ImageSource:
    """Wrap a map-style Dataset as an `ImageSource`.

    The first item is checked now, every other one when it is fetched. Items are fetched one after
    the other, in a thread of the loader. A run can be repeated only if item i is the same at every
    call: leave random transforms out (the loader itself can mirror images).

    Args:
        dataset: an object with ``len`` and indexing, whose items are (image, label) or image. An
            image is a PIL picture of mode L or RGB, or a uint8 tensor or array [C, H, W] with 1 or
            3 channels; a label is an integer in 0..num_classes-1.
        multiple: height and width must be multiples of this number of pixels; at least 1.
        labels: whether the labels of the items are used; the first item shows whether they have
            any (a label of None is none).
        num_classes: the number of classes of labelled items; None for as many as
            ``dataset.classes`` (a list of strings) names, which torchvision's data sets have.

    Returns:
        A source of ``len(dataset)`` images, whose class names are those of ``dataset.classes``, or
        None where the dataset has no such list or labels are not used.

    Raises:
        ValueError: if the dataset is not map-style, if ``multiple`` or ``num_classes`` is no
            integer of at least 1, if items have labels but there is no number of classes, if
            num_classes is given without labels, or if it is not the number of names in
            ``dataset.classes``.
        DataError: if the data set is empty, or the first item is not as described above, or its
            size is no multiple of ``multiple``.
    """
    if isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise ValueError(
            f"dataset={type(dataset).__name__}: must be map-style, with __len__ and __getitem__"
        )
    arguments.integer("multiple", multiple, 1)
    return _Wrapped(dataset, multiple, labels, num_classes)


class _Wrapped:
    """An ``ImageSource`` that fetches from a Dataset."""

    def __init__(self, dataset: Any, multiple: int, labels: bool, num_classes: int | None) -> None:
        self._dataset, self._name = dataset, type(dataset).__name__
        self._count = len(dataset)
        if not self._count:
            raise DataError(f"{self._name}: is empty; must hold at least one image")
        image, label = self._parts(0, dataset[0])
        C, H, W = self._pixels(0, image).shape
        self.shape = C, H, W
        check_multiple(self._name, H, W, multiple)
        self.num_classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        if labels and label is not None:
            self._find_classes(num_classes)
            self._label(0, label)
        elif num_classes is not None:
            raise ValueError(f"num_classes={num_classes}: without labels there are no classes")

    def _find_classes(self, num_classes: int | None) -> None:
        names = getattr(self._dataset, "classes", None)
        if isinstance(names, Sequence) and all(isinstance(name, str) for name in names):
            self.class_names = tuple(names)
        if num_classes is not None:
            self.num_classes = arguments.integer("num_classes", num_classes, 1)
        elif self.class_names is not None:
            self.num_classes = len(self.class_names)
        else:
            raise ValueError(
                f"num_classes=None: {self._name} has labels and no list `classes`; must be given"
            )
        check_classes(self.num_classes, self.class_names)

    def __len__(self) -> int:
        return self._count

    @isolated(grad=False)
    def fetch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the images, uint8 [B, C, H, W], and labels, int64 [B] or None, on the CPU.

        Args:
            index: int64 [B] on the CPU, the numbers of the items, each in 0..len-1.

        Raises:
            DataError: if an item is of another kind or shape than the first.
            ValueError: if the index is of another dtype or shape, or out of range.
        """
        check_index(index, self._count)
        images = np.empty((len(index), *self.shape), np.uint8)
        labels = []
        for row, position in enumerate(index.tolist()):
            image, label = self._parts(position, self._dataset[position])
            pixels = self._pixels(position, image)
            if pixels.shape != self.shape:
                raise DataError(
                    f"{self._name}[{position}]: has shape {list(pixels.shape)}; must be "
                    f"{list(self.shape)}, as the first has"
                )
            images[row] = pixels
            if self.num_classes is not None:
                labels.append(self._label(position, label))
        found = None if self.num_classes is None else ints(labels)
        return torch.from_numpy(images), found

    def fingerprint(self) -> str:
        """Return "sha256:..." of the length, the shape and the classes.

        The items are left out, as reading all of them may take hours.
        """
        return digest(self, ())

    def _parts(self, position: int, item: Any) -> tuple[Any, Any]:
        """Return the image and the label of an item; the label is None if it has none."""
        if not isinstance(item, (tuple, list)):
            return item, None
        if len(item) != 2:
            raise DataError(
                f"{self._name}[{position}]: has {len(item)} parts; must be an image or "
                "(image, label)"
            )
        return item[0], item[1]

    def _pixels(self, position: int, image: Any) -> np.ndarray:
        """Return the pixels of an item's image, uint8 [C, H, W]."""
        mode = getattr(image, "mode", None)
        if mode in MODES:
            pixels = np.asarray(image)
            return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if isinstance(image, Tensor):
            image = image.numpy(force=True)
        if isinstance(image, np.ndarray):
            if image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in MODES.values():
                return image
            kind = f"{image.dtype} {list(image.shape)}"
        else:
            kind = f"mode {mode}" if isinstance(mode, str) else type(image).__name__
        raise DataError(
            f"{self._name}[{position}]: is {kind}; must be a picture of mode L or RGB, or uint8 "
            "[C, H, W] with 1 or 3 channels (torchvision's ToTensor gives floats; leave it out)"
        )

    def _label(self, position: int, label: Any) -> int:
        try:
            if isinstance(label, bool):
                raise TypeError
            value = operator.index(label)
        except TypeError:
            value = -1
        if not 0 <= value < (self.num_classes or 0):
            raise DataError(
                f"{self._name}[{position}]: has the label {label!r}; must be an integer in "
                f"0..{(self.num_classes or 0) - 1}"
            )
        return value
