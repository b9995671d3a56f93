r"""Operation ``philox``, normal noise by Philox4x32-10, and ``draw``, the same noise in registers.

The noise is that of equations S2, S4 and S5 of docs/math.md; w_a and w_b are words of one Philox
call:

    words  = philox(key = seed, counter = (element // 4, purpose, low and high word of the key))
    u      = float(w_a) 2^-32 + 2^-33 in (0, 1],   r = sqrt(-2 ln u)
    angle  = 2 pi w_b 2^-32 - pi/4,                 normals r cos(angle), r sin(angle)

(Salmon et al. 2011; Box & Muller 1958; ln, sin, cos by Cephes' polynomials.) Only float32 products
and sums, each rounded, and a correctly rounded root: the same bits on every device. The formula as
it stands, in PyTorch: ``reference/noise.py``; here it takes fewer instructions to the same bits.

``philox`` writes 4 bytes for each element and reads none; the other kernels call ``draw`` and write
none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.exact_math import ln
from flashddpm.kernels.examples import ExampleDraws
from flashddpm.kernels.launch import launch_blocks, place, runs_triton
from flashddpm.kernels.operation import Arguments, Budget, ByteCase, Op, Shape, variant
from flashddpm.kernels.tables import Purpose
from flashddpm.kernels.validation import check_purpose, check_vectors


@triton.jit
def _flip(value, word):
    """Return the value, its sign changed where bit 31 of the word is set."""
    bits = value.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _cos_sin(word):
    """Return cosine and sine of 2 pi word / 2^32 - pi/4: a multiple of pi/2, and at most pi/4.

    Bits 31 and 30 are the quadrant; the others, four times as large, are counted from the middle.
    """
    middle = ((word << 2) + 0x80000000).to(tl.int32, bitcast=True)
    a = middle.to(tl.float32) * (1.462918e-9 / 4)
    z = a * a
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * a + a
    c = z * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = tl.fma(z, -0.5, c * z * z) + 1.0
    swap = (word & 0x40000000) != 0
    cos = _flip(tl.where(swap, s, c), word ^ (word << 1))
    sin = _flip(tl.where(swap, c, s), word)
    return cos, sin


@triton.jit
def _box_muller(wa, wb):
    r = tl.sqrt_rn(ln(wa.to(tl.float32) + 0.5, 32) * -2.0)  # u 2^32, rounded as u is
    cos, sin = _cos_sin(wb)
    return r * cos, r * sin


@triton.jit
def _halves(value):
    """Return the low and the high word of 64 bits."""
    value = value.to(tl.uint64, bitcast=True)
    return (value & 0xFFFFFFFF).to(tl.uint32), (value >> 32).to(tl.uint32)


@triton.jit
def _words(seed, key, group, PURPOSE: tl.constexpr):
    """Return the four words of each call of Philox4x32-10.

    A round's two products are taken whole, 64 bits each: one instruction where ``tl.philox`` takes
    two, one for either half.
    """
    k0, k1 = _halves(seed)
    c2, c3 = _halves(key)
    c0, c1, c2, c3 = group, group * 0 + PURPOSE, group * 0 + c2, group * 0 + c3
    for _ in tl.static_range(10):
        low0, high0 = _halves(c0.to(tl.uint64) * 0xD2511F53)
        low1, high1 = _halves(c2.to(tl.uint64) * 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _normals(seed, key, group, PURPOSE: tl.constexpr):
    """Return the four normals of each group of four elements."""
    w0, w1, w2, w3 = _words(seed, key, group, PURPOSE)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def draw(seed, key, block, like, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the standard normal noise of one block of an image, float32 [BLOCK].

    A thread draws as many neighbours as it moves at a time to or from ``like``: 4 elements of 32
    bits or 8 of 16, by one or two Philox calls.

    Args:
        seed, key: int64 scalars, the seed of the image's noise and its key (the upper 64 bits of
            the noise counter).
        block: the block's index in its image: it holds the elements block * BLOCK + [0, BLOCK) in
            channels-last order.
        like: a pointer to elements of 16 or 32 bits, which the kernel moves at the same offsets.
        PURPOSE: what the noise is for (``Purpose``), an integer in 0..2^32-1.
        BLOCK: the elements of a block, a power of two, at least 8.
    """
    first = (block * (BLOCK // 4)).to(tl.uint32)
    if like.dtype.element_ty.primitive_bitwidth == 16:
        group = first + tl.arange(0, BLOCK // 8).to(tl.uint32) * 2
        a0, a1, a2, a3 = _normals(seed, key, group, PURPOSE)
        b0, b1, b2, b3 = _normals(seed, key, group + 1, PURPOSE)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    else:
        group = first + tl.arange(0, BLOCK // 4).to(tl.uint32)
        z0, z1, z2, z3 = _normals(seed, key, group, PURPOSE)
        even, odd = tl.join(z0, z2), tl.join(z1, z3)
    return tl.reshape(tl.join(even, odd), [BLOCK])


@triton.jit
def _philox_kernel(
    out,  # float32 [B, n], written
    seeds,  # int64 [B]
    keys,  # int64 [B]
    n,  # elements of an image
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, block, offsets, mask, n = place(n, BLOCK)
    z = draw(tl.load(seeds + image), tl.load(keys + image), block, out, PURPOSE, BLOCK)
    tl.store(out + image * n + block * BLOCK + offsets, z, mask=mask)


@torch.library.custom_op("flashddpm::philox", mutates_args=())
def _philox(seeds: Tensor, keys: Tensor, C: int, H: int, W: int, purpose: int) -> Tensor:
    out = _philox_fake(seeds, keys, C, H, W, purpose)
    if not runs_triton(seeds):
        return out.copy_(reference.philox(seeds, keys, (C, H, W), purpose))
    if out.numel():
        launch_blocks(_philox_kernel, out, out, seeds, keys, C * H * W, purpose)
    return out


@_philox.register_fake
def _philox_fake(seeds: Tensor, keys: Tensor, C: int, H: int, W: int, purpose: int) -> Tensor:
    shape = (len(seeds), C, H, W)
    return torch.empty(
        shape, dtype=torch.float32, device=seeds.device, memory_format=torch.channels_last
    )


def philox(
    seeds: Tensor, keys: Tensor, shape: tuple[int, int, int], purpose: int = Purpose.INITIAL
) -> Tensor:
    """Return standard normal noise for a batch of images, a pure function of seed, key and purpose.

    An element of an image depends on them and on its place in (h, w, c) order only.

    Args:
        seeds, keys: int64 [B], the seed of each image's noise and its key (the upper 64 bits of the
            noise counter); any values.
        shape: (C, H, W) of one image, below 2^34 elements.
        purpose: what the noise is for, in 0..2^32-1 (``Purpose``): the second word of the noise
            counter.

    Returns:
        float32 [B, C, H, W], channels-last, on the device of ``seeds``.

    Raises:
        ValueError: if shape is not three numbers >= 0 with a product below 2^34; if seeds or keys
            is not a contiguous int64 vector, or keys is not of the size and device of seeds; or if
            purpose is not an integer in range.
    """
    if len(shape) != 3 or min(shape) < 0 or math.prod(shape) >= 2**34:
        raise ValueError(f"shape={tuple(shape)}: must be (C, H, W) with below 2^34 elements")
    C, H, W = shape
    check_vectors(seeds, torch.int64, seeds.numel(), seeds=seeds, keys=keys)
    return _philox(seeds, keys, C, H, W, check_purpose(purpose))


# The record of the operation, for tests, gates, counts of bytes and benchmarks.


def _example(device, dtype: torch.dtype, shape: Shape, batch: int, seed: int) -> Arguments:
    draws = ExampleDraws(device, seed)
    return {"seeds": draws.seeds(batch), "keys": draws.keys(batch), "shape": shape}


def _bytes_moved(args: Arguments) -> int:
    return 4 * len(args["seeds"]) * math.prod(args["shape"])


def _plain(seeds: Tensor, shape: Shape, **_: Any) -> Tensor:
    """Draw noise."""
    return torch.randn(len(seeds), *shape)


DRAWN = "a Philox call and two Box-Muller transforms for 4 elements, 4 calls a thread side by side"
"""What a budget is spent on where a kernel calls ``draw``."""

OP = Op(
    name="philox",
    fast=philox,
    reference=reference.philox,
    example=_example,
    bytes_moved=_bytes_moved,
    kernels=(
        variant(
            "philox",
            _philox_kernel,
            {4: Budget(46, 0, 51.0, DRAWN)},
            ("out",),
            {"out": "*fp32:16"},
            PURPOSE=Purpose.INITIAL,
        ),
    ),
    cases=(ByteCase("philox", lambda args: {}, ("philox",), _plain),),
)
