r"""The noise in plain PyTorch, a pure function of (seed, purpose, key, element).

Philox4x32-10 (Salmon et al. 2011) with the image's 64-bit seed as Philox key and the counter
(element // 4, purpose, low and high word of the noise key); element in channels-last order
(h, w, c) of one image. The four words of a call give four normals by the Box-Muller transform,
written with exact float32 operations only, each rounded separately, so that every device draws
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashddpm.kernels.reference.exact import ANGLE, COS, LN, LN2_HIGH, LN2_LOW, SIN, horner
from flashddpm.kernels.tables import Purpose

MASK = 0xFFFFFFFF
# The round's multipliers, less 2^32: no product of a word overflows int64, on which compilers rely.
M0, M1 = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32


def philox_words(
    seeds: Tensor, keys: Tensor, purpose: int, groups: int, rounds: int = 10, first: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four random 32-bit words of each Philox call, as four int64 [B, groups].

    Each word is in [0, 2^32). The counter of a call is (number of the call, purpose, low and high
    32 bits of the key). Arguments are not checked.

    Args:
        seeds, keys: int64 [B], the seed of each image's noise and its key (the upper 64 bits of the
            counter).
        purpose: what the noise is for, in 0..2^32-1 (``Purpose``): the counter's second word.
        groups: the number of calls for each image, one for each group of four elements.
        rounds: the number of Philox rounds; the noise uses 10 (tests use others too).
        first: the number of the first call, in [0, 2^32); the others count up from it.
    """
    # The mask changes nothing, but Inductor would fold the first product into arange's step, int32.
    calls = torch.arange(first, first + groups, dtype=torch.int64, device=seeds.device) & MASK
    c0 = calls.expand(len(seeds), groups)
    c1 = torch.full_like(c0, purpose)
    c2 = (keys & MASK)[:, None].expand_as(c0)
    c3 = (keys >> 32 & MASK)[:, None].expand_as(c0)
    k0, k1 = (seeds & MASK)[:, None], (seeds >> 32 & MASK)[:, None]
    for _ in range(rounds):
        p0, p1 = c0 * M0, c2 * M1
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2  # of the products with 2^32 more
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & MASK, high0 ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def _uniform(seeds: Tensor, keys: Tensor, purpose: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return u in (0, 1], float32, and the angle's word, int64, each [B, groups, 2]."""
    w0, w1, w2, w3 = philox_words(seeds, keys, purpose, groups)
    u = torch.stack([w0, w2], -1).float() * 2.0**-32 + 2.0**-33
    return u, torch.stack([w1, w3], -1)


def _split(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return e and the bits of m in [sqrt .5, sqrt 2) with u = m 2^e, both int32."""
    e = (bits - 0x3F3504F3) >> 23
    return e, bits - (e << 23)


def _box_muller(m: Tensor, e: Tensor, word: Tensor) -> Tensor:
    """Return the normals r cos, r sin of each pair, float32 [B, groups, 4]."""
    exponent = e.float()
    x = m - 1
    z = x * x
    y = horner(x, LN) * x * z
    y = y + exponent * LN2_LOW
    y = y - z * 0.5
    ln_u = x + y + exponent * LN2_HIGH
    # torch.sqrt on float32 may be off by an ulp on the CPU; through float64 it is exact.
    r = torch.sqrt((ln_u * -2).double()).float()

    quadrant = word >> 30
    a = ((word & 0x3FFFFFFF) - 2**29).float() * ANGLE
    z = a * a
    s = horner(z, SIN) * z * a + a
    c = horner(z, COS) * z * z - z * 0.5 + 1
    swap = (quadrant & 1) == 1
    cos, sin = torch.where(swap, s, c), torch.where(swap, c, s)
    cos = torch.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = torch.where(quadrant >= 2, -sin, sin)
    return torch.stack([r * cos, r * sin], -1).flatten(-2)


def philox(
    seeds: Tensor, keys: Tensor, shape: tuple[int, int, int], purpose: int = Purpose.INITIAL
) -> Tensor:
    """Return standard normal noise for a batch of images, a pure function of seed, key and purpose.

    An element of an image depends on them and on its place in (h, w, c) order only. Arguments are
    not checked.

    Args:
        seeds, keys: int64 [B], the seed of each image's noise and its key (the upper 64 bits of the
            noise counter).
        shape: (C, H, W) of one image.
        purpose: what the noise is for, in 0..2^32-1 (``Purpose``): the counter's second word.

    Returns:
        float32 [B, C, H, W], channels-last, on the device of ``seeds``.
    """
    return philox_in_pieces(PIECES, seeds, keys, shape, purpose)


PIECES = (_uniform, _split, _box_muller)


def philox_in_pieces(
    pieces: tuple[Callable, Callable, Callable],
    seeds: Tensor,
    keys: Tensor,
    shape: tuple[int, int, int],
    purpose: int,
) -> Tensor:
    """Return the noise of ``philox``, computed by given forms of its three pieces.

    A group is four neighbouring elements of an image in (h, w, c) order, which one Philox call
    serves: groups = ceil(C H W / 4). A word is a random 32-bit number of that call, in [0, 2^32).
    Between the pieces, float32 bits are reinterpreted as int32 and back. Arguments are not checked.

    Args:
        pieces: three functions, such as compiled forms of those of ``PIECES``:
            uniform(seeds, keys, purpose, groups) -> (u, word): two uniform numbers in (0, 1] a
            group, float32 [B, groups, 2], and the two words of their angles, int64 [B, groups, 2].
            split(bits) -> (e, m_bits): from the bits of u, int32 [B, groups, 2], the exponent e and
            the bits of the float32 m in [sqrt(1/2), sqrt(2)) with u = m 2^e, both int32 of the same
            shape.
            box_muller(m, e, word) -> normals: from m, float32, e, int32, and word, int64, each [B,
            groups, 2], the standard normal numbers, float32 [B, groups, 4].
        seeds, keys: int64 [B], the seed of each image's noise and its key (the upper 64 bits of the
            noise counter).
        shape: (C, H, W) of one image.
        purpose: what the noise is for, in 0..2^32-1 (``Purpose``): the counter's second word.

    Returns:
        float32 [B, C, H, W], channels-last, on the device of ``seeds``.
    """
    uniform, split, box_muller = pieces
    C, H, W = shape
    n = C * H * W
    u, word = uniform(seeds, keys, int(purpose), (n + 3) // 4)
    e, m_bits = split(u.view(torch.int32))
    z = box_muller(m_bits.view(torch.float32), e, word)
    return z.flatten(1)[:, :n].reshape(len(seeds), H, W, C).permute(0, 3, 1, 2)
