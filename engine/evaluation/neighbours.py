"""The nearest training images of samples, by which a model is found out that has memorised them.

The distance of two images is the root of their mean squared difference: over the pixels, in levels
of 0..255, or over features. In pixels all sums are of integers below 2^53, so float64 is exact.

``picture`` shows each sample and, beside it, its neighbours, nearest first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.data import to_float
from flashddpm.evaluation.features import Features, Images, features_of, fetch
from flashddpm.host import ints, isolated
from flashddpm.io.images import make_grid

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 256 << 20
TABLES = 4
"""The number of tables of distances that exist at once while the smallest of one are found."""
MAX_TILE = 4096


@dataclass(frozen=True)
class Neighbours:
    """The k nearest training images of each of N samples, nearest first; tensors are on the CPU.

    Attributes:
        index: int64 [N, k], the numbers of the training images, from 0.
        distance: float64 [N, k], root mean squared differences of pixels (0..255) or of features.
        duplicate: int64 [N], the number of the first training image with the very same pixels, or
            -1.
    """

    index: Tensor
    distance: Tensor
    duplicate: Tensor


@isolated(grad=False)
def nearest(
    samples: Tensor,
    training: Images,
    k: int = 5,
    extractor: Features | None = None,
    max_bytes: int = MAX_BYTES,
) -> Neighbours:
    """Find the k nearest training images of each sample; each training image is read once.

    Args:
        samples: uint8 [N, C, H, W], N at least 1, on any device.
        training: uint8 [M, C, H, W], or a data source of M such images; M at least k.
        k: the number of neighbours of each sample, at least 1.
        extractor: the extractor whose features are compared; None to compare pixels.
        max_bytes: about how many bytes of memory the comparison may take besides the images and
            features, at least 1.

    Raises:
        ValueError: if k or max_bytes is below 1, if there are fewer training images than k or no
            sample, if images are not uint8 [N, C, H, W] or of different shapes, or if the extractor
            fails or returns what is not finite.
        DataError: if a data source cannot read an image.
    """
    arguments.integer("k", k, 1)
    arguments.integer("max_bytes", max_bytes, 1)
    if len(training) < k:
        raise ValueError(f"training: holds {len(training)} images; k={k} needs at least {k}")
    if not len(samples):
        raise ValueError("samples: holds none; must hold at least one")
    ours, shape = (tuple(fetch(x, 0, 1).shape[1:]) for x in (samples, training))
    if ours != shape:
        raise ValueError(f"samples of shape {ours}: must be as the training images are, {shape}")
    samples = samples.cpu()
    queries = _rows(samples, extractor)
    # While they are read, images take a byte a pixel, and rows eight a feature.
    tile = _tile(max(math.prod(shape) // 8, queries.shape[1]), max_bytes)
    keys = list(_keys(samples))
    first: dict[bytes, int] = {}
    index = torch.full((len(samples), k), -1, dtype=torch.int64, device="cpu")
    squares = torch.full((len(samples), k), torch.inf, dtype=torch.float64, device="cpu")
    for start in range(0, len(training), tile):
        part = fetch(training, start, min(start + tile, len(training)))
        for offset, key in enumerate(_keys(part)):
            first.setdefault(key, start + offset)
        rows = _rows(part, extractor).double()
        for low in range(0, len(samples), tile):
            these = slice(low, low + tile)
            tiled = _mean_squares(queries[these].double(), rows)
            near, where = tiled.topk(min(k, len(part)), largest=False)
            merged = torch.cat((squares[these], near), 1).sort(dim=1, stable=True)
            both = torch.cat((index[these], where + start), 1)
            squares[these] = merged.values[:, :k]
            index[these] = both.gather(1, merged.indices[:, :k])
    duplicate = ints([first.get(key, -1) for key in keys])
    return Neighbours(index, squares.sqrt(), duplicate)


def _rows(images: Tensor, extractor: Features | None) -> Tensor:
    """Return what is compared, a row for each image, [B, D]: uint8 pixels, or float32 features."""
    return images.flatten(1) if extractor is None else features_of(images, extractor)


def _tile(width: int, max_bytes: int) -> int:
    """Return the largest number t of rows so that 8 (TABLES t^2 + 2 t width) <= max_bytes."""
    root = math.isqrt(width * width + TABLES * max_bytes // 8)
    return min(MAX_TILE, max(1, (root - width) // TABLES))


def _mean_squares(a: Tensor, b: Tensor) -> Tensor:
    """float64 [N, D], [M, D] -> [N, M], (|a|^2 + |b|^2 - 2 a.b) / D, at least 0."""
    squares = (a @ b.T).mul_(-2)
    squares += a.square().sum(1)[:, None]
    squares += b.square().sum(1)
    return squares.clamp_(min=0).div_(a.shape[1])


def _keys(images: Tensor) -> Iterator[bytes]:
    """Yield the SHA-256 hash of each image's pixels."""
    for image in images.cpu().contiguous().numpy():
        yield hashlib.sha256(image).digest()


@isolated(grad=False)
def picture(
    samples: Tensor,
    training: Images,
    found: Neighbours,
    names: Sequence[str] | None = None,
    zoom: int = 2,
) -> Image:
    """Draw a PIL image with a row for each sample: itself, then its neighbours and distances.

    A neighbour with the very same pixels has the caption "same" instead of its distance.

    Args:
        samples: uint8 [N, C, H, W] with 1 to 4 channels, the samples that the neighbours were found
            for.
        training: the images that they were found in: uint8 [M, C, H, W], or a data source.
        found: the neighbours of the N samples, as ``nearest`` returns them.
        names: N captions of the samples; None for their numbers, from 0.
        zoom: the side, in pixels, of the square that a pixel becomes, at least 1.

    Raises:
        ValueError: if there are not as many samples or names as ``found`` has rows, if there is no
            sample, if images have not 1 to 4 channels, or if zoom is below 1.
    """
    count, k = found.index.shape
    names = [str(i) for i in range(count)] if names is None else list(names)
    for name, given in (("samples", len(samples)), ("names", len(names))):
        if given != count:
            raise ValueError(f"{name}: {given} for the neighbours of {count} samples")
    cells: list[Tensor] = []
    captions: list[str] = []
    for i in range(count):
        sample = fetch(samples, i, i + 1)
        cells.append(sample)
        captions.append(names[i])
        for j, distance in zip(found.index[i].tolist(), found.distance[i].tolist(), strict=True):
            near = fetch(training, j, j + 1)
            cells.append(near)
            captions.append("same" if torch.equal(near, sample) else f"{distance:.3g}")
    return make_grid(to_float(torch.cat(cells)), k + 1, captions, zoom)
