"""The nearest training images of samples: what a model that has learned by heart gives away.

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
"""How many tables of distances exist at once while the smallest of one are found."""
MAX_TILE = 4096


@dataclass(frozen=True)
class Neighbours:
    """The k nearest training images of N samples, nearest first.

    Attributes:
        index: int64 [N, k], of training images.
        distance: float64 [N, k].
        duplicate: int64 [N], the first training image with the very same pixels, or -1.
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
    """Return the nearest training images of each sample; each training image is read once.

    Args:
        samples: uint8 [N, C, H, W], N >= 1.
        training: uint8 [M, C, H, W], or a source of them, M >= k.
        k: how many are found for each.
        extractor: compare features, not pixels.
        max_bytes: about what the comparison takes besides images and features.

    Raises:
        ValueError: fewer training images than k, no sample, images of different shapes or not
            uint8, or what the extractor raises.
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
    """Return what is compared, [B, D]: pixels as they are, or float32 features."""
    return images.flatten(1) if extractor is None else features_of(images, extractor)


def _tile(width: int, max_bytes: int) -> int:
    """Return the most rows t of float64, of each side, with 8 (TABLES t^2 + 2 t width) bytes."""
    root = math.isqrt(width * width + TABLES * max_bytes // 8)
    return min(MAX_TILE, max(1, (root - width) // TABLES))


def _mean_squares(a: Tensor, b: Tensor) -> Tensor:
    """float64 [N, D], [M, D] -> [N, M], (|a|^2 + |b|^2 - 2 a.b) / D, at least 0."""
    squares = (a @ b.T).mul_(-2)
    squares += a.square().sum(1)[:, None]
    squares += b.square().sum(1)
    return squares.clamp_(min=0).div_(a.shape[1])


def _keys(images: Tensor) -> Iterator[bytes]:
    """Yield a hash of each image's pixels."""
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
    """Return a row for each sample: itself, then its neighbours with their distances.

    A neighbour with the very same pixels has "same" in the place of its distance.

    Args:
        samples: uint8 [N, 1 or 3, H, W], those that the neighbours were found for.
        training: the images that they were found in.
        found: the neighbours.
        names: of the samples, by default their numbers.
        zoom: side of the square that a pixel becomes.

    Raises:
        ValueError: another number of samples or names, or what ``make_grid`` refuses.
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
