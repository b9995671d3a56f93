"""Hypothesis strategies of the arguments that kernels fail on: shapes, layouts, dtypes and seeds.

They draw plain numbers or functions, never tensors, so that failures print short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from flashddpm.kernels.tables import FLOATS, Column

PRIMES = (5, 7, 11, 13, 17, 31, 127)
BAD = (math.nan, math.inf, -math.inf)

Layout = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """One case of ``check_op``, handed to ``arguments`` after the device.

    Attributes:
        dtype: the dtype under test.
        shape: the shape of one sample, without the batch.
        batch: the number of samples.
        seed: a signed 64-bit seed, by which the arguments' values are drawn.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    batch: int = 2
    seed: int = 0


def sizes(block: int = 1024) -> SearchStrategy[int]:
    """Return a strategy of the size of one dimension, an int.

    It draws 0, 1, 2, 3, 16, primes up to 127, and block - 1, block and block + 1.

    Args:
        block: the number of elements that one program of the kernel handles.
    """
    return st.sampled_from([1, 0, 2, 3, *PRIMES, 16, block - 1, block, block + 1])


def shapes(
    dims: int = 3, channels: Sequence[int] = (1, 3), block: int = 1024
) -> SearchStrategy[tuple[int, ...]]:
    """Return a strategy of the shape of one sample, a tuple: (n,), (H, W) or (C, H, W).

    It draws shapes without elements, sizes 1, 2, 3 and primes, 17 x 17, and such of about ``block``
    elements.

    Args:
        dims: the number of dimensions: 1, 2 or 3.
        channels: the numbers of channels C that are drawn where there are three dimensions.
        block: the number of elements that one program of the kernel handles.

    Raises:
        ValueError: if dims is not 1, 2 or 3.
    """
    if dims not in (1, 2, 3):
        raise ValueError(f"dims={dims}: must be 1, 2 or 3")
    if dims == 1:
        return sizes(block).map(lambda n: (n,))
    flat = sizes(block).map(lambda n: (1, n))
    small = st.integers(1, 9)
    side = math.isqrt(block)
    images = st.one_of(
        st.sampled_from([(1, 1), (17, 17), (0, 4), (4, 0), (side, block // side), (8, 8), (7, 5)]),
        flat,
        st.tuples(small, small),
    )
    if dims == 2:
        return images
    return st.builds(lambda C, size: (C, *size), st.sampled_from(list(channels)), images)


def batches(largest: int = 4) -> SearchStrategy[int]:
    """Return a strategy of the number of samples, an int from 1 to ``largest``.

    A batch without samples is not drawn, for ``check_op`` has a check of its own for it. If
    ``largest`` is below 1, drawing raises hypothesis' InvalidArgument.
    """
    return st.integers(1, largest)


def dtypes(allowed: Sequence[torch.dtype] = FLOATS) -> SearchStrategy[torch.dtype]:
    """Return a strategy of an allowed dtype, by default float32, float16 and bfloat16."""
    return st.sampled_from(list(allowed))


def seeds() -> SearchStrategy[int]:
    """Return a strategy of a signed 64-bit seed: any int, and the edges of 32 and 64 bits."""
    edges = [0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, -(2**31), 2**63 - 1, -(2**63)]
    return st.one_of(st.sampled_from(edges), st.integers(-(2**63), 2**63 - 1))


def noise_keys() -> SearchStrategy[int]:
    """Return a strategy of a noise key (upper half of the noise counter), a signed 64-bit int.

    It draws timesteps 0..999, numbers past 32 bits, or any 64 bits.
    """
    return st.one_of(st.integers(0, 999), st.integers(2**32, 2**40), seeds())


def coefficients(limit: float = 4.0) -> SearchStrategy[float]:
    """Return a strategy of a float that float32 holds, in [-limit, limit], often 0, -0, 1 or -1.

    Args:
        limit: the largest absolute value, at least 1, a number that float32 holds.
    """
    numbers = st.floats(-limit, limit, width=32, allow_subnormal=False)
    return st.one_of(st.sampled_from([0.0, 1.0, -0.0, -1.0]), numbers)


def step_rows() -> SearchStrategy[list[float]]:
    """Return a strategy of the coefficients of one sampling step, as ``denoise_step`` takes them.

    It draws lists of floats, in the order of ``flashddpm.kernels.Column``; any column may be 0.
    Columns whose meaning implies a sign or a range keep to it: sigma and the clip are not negative,
    a quantile is in [0, 1] (0: none).
    """
    positive = coefficients().map(abs)
    share = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=32))
    meant = {
        "SIGMA": positive,
        "CLIP": st.one_of(st.just(0.0), st.floats(0.125, 4, width=32)),
        "THRESHOLD": share,
        "RESCALE": share,
        "TIMESTEP": st.integers(0, 999).map(float),
    }
    columns = [meant.get(column.name, coefficients()) for column in Column]
    return st.tuples(*(st.one_of(st.just(0.0), column) for column in columns)).map(list)


def noising_rows() -> SearchStrategy[list[float]]:
    """Return a strategy of the coefficients [a, b] of a x0 + b noise (the operation ``add_noise``).

    It draws lists of two floats: those of a noising process, a^2 + b^2 = 1, or any two coefficients
    in [-4, 4].
    """
    angles = st.floats(0, math.pi / 2).map(lambda angle: [math.cos(angle), math.sin(angle)])
    ends = st.sampled_from([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    return st.one_of(ends, angles, st.tuples(coefficients(), coefficients()).map(list))


def nonfinite(shape: Sequence[int]) -> SearchStrategy[tuple[tuple[int, ...], float]]:
    """Return a strategy of where to put which non-finite number: (index, NaN, Inf or -Inf).

    Args:
        shape: the shape of the tensor that the index, a tuple of ints, is within.

    Raises:
        ValueError: if the shape has no element.
    """
    if 0 in shape:
        raise ValueError(f"shape={tuple(shape)}: must have an element")
    index = st.tuples(*(st.integers(0, size - 1) for size in shape))
    return st.tuples(index, st.sampled_from(BAD))


def contiguous(x: Tensor) -> Tensor:
    """Return the tensor in contiguous layout: the last dimension has stride 1."""
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Return a tensor [B, C, H, W] in channels-last layout: its memory in (b, h, w, c) order."""
    return x.contiguous(memory_format=torch.channels_last)


def offset(x: Tensor) -> Tensor:
    """Return a copy, same strides, that begins one element into memory: not aligned to 16 bytes."""
    return _placed(x, x.stride(), 1)


def spaced(x: Tensor) -> Tensor:
    """Return a copy that lies in every second sample of a batch twice as long.

    The strides within a sample stay as they are. The tensor has at least one dimension.
    """
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))
    return _placed(x, (2 * max(x.stride(0), extent), *x.stride()[1:]), 0)


def strided(x: Tensor) -> Tensor:
    """Return a copy that lies in every second element of a last dimension twice as long.

    The tensor has at least one dimension.
    """
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    """Return a tensor of the same values, the last two dimensions exchanged in memory.

    The tensor has at least two dimensions.
    """
    return x.mT.contiguous().mT


def padded(x: Tensor) -> Tensor:
    """Return a copy that lies within a last dimension three elements longer, one of them before it.

    The tensor has at least one dimension.
    """
    return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]


def _placed(x: Tensor, strides: Sequence[int], start: int) -> Tensor:
    extent = start + 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True) if n)
    memory = torch.zeros(extent, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, strides, start).copy_(x)


LAYOUTS: dict[Layout, int] = {
    strided: 1,
    offset: 1,
    spaced: 1,
    contiguous: 1,
    padded: 1,
    transposed: 2,
    channels_last: 4,
}
"""Each layout, a function of a tensor, and the number of dimensions that a tensor needs for it, or,
for ``channels_last``, must have."""


def layouts_of(dims: int) -> list[Layout]:
    """Return the layouts that a tensor of ``dims`` dimensions can have; none for dims = 0.

    They are functions of this module from a tensor to one of the same values in that layout.
    """
    return [f for f, needed in LAYOUTS.items() if dims >= needed and (needed != 4 or dims == 4)]


def layouts(dims: int = 4) -> SearchStrategy[Layout]:
    """Return a strategy of a function from a tensor to one of the same values in another layout.

    Args:
        dims: the number of dimensions of the tensor, at least 1.

    Raises:
        ValueError: if dims is below 1.
    """
    if dims < 1:
        raise ValueError(f"dims={dims}: must be at least 1")
    return st.sampled_from(layouts_of(dims))


def cases(
    dtypes: SearchStrategy[torch.dtype],
    shapes: SearchStrategy[tuple[int, ...]],
    batches: SearchStrategy[int],
) -> SearchStrategy[Case]:
    """Return a strategy of the cases that ``check_op`` draws; their seeds are any 64-bit integers.

    Args:
        dtypes: a strategy of the dtype.
        shapes: a strategy of the shape of one sample.
        batches: a strategy of the number of samples.
    """
    return st.builds(Case, dtypes, shapes, batches, seeds())
