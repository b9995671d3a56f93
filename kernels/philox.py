r"""Noise in registers: Philox4x32-10 words to normals by exact operations (noise of S2, S4, S5).

    words  = philox(key = seed, counter = (element // 4, purpose, low and high word of the key))
    u      = float(w_a) 2^-32 + 2^-33 in (0, 1],   r = sqrt(-2 ln u)
    angle  = 2 pi w_b 2^-32 - pi/4,                 normals r cos(angle), r sin(angle)

(Salmon et al. 2011; Box & Muller 1958; ln, sin, cos by Cephes' polynomials.) Only float32 products
and sums, each rounded, and a correctly rounded root: the same bits on every device. The formula in
PyTorch: ``reference.py``.

``philox`` writes 4 bytes an element and reads none; the other kernels call ``draw`` and write none.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.contract import Purpose
from flashddpm.kernels.launch import (
    block_size,
    check_purpose,
    check_vector,
    launch,
    runs_triton,
)


@triton.jit
def _ln(u):
    """Natural logarithm of u in (0, 1]."""
    i = u.to(tl.int32, bitcast=True)
    e = (i - 0x3F3504F3) >> 23
    m = (i - (e << 23)).to(tl.float32, bitcast=True)
    exponent = e.to(tl.float32)
    x = m - 1.0
    z = x * x
    y = x * 7.0376836292e-2 + -1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x + -1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x + -1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x + -2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * z
    y = y + exponent * -2.12194440e-4
    y = y - z * 0.5
    return x + y + exponent * 0.693359375


@triton.jit
def _cos_sin(word):
    """Cosine and sine of 2 pi word / 2^32 - pi/4: a multiple of pi/2, and at most pi/4."""
    quadrant = word >> 30
    a = ((word & 0x3FFFFFFF).to(tl.int32) - 536870912).to(tl.float32) * 1.462918e-9
    z = a * a
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * a + a
    c = z * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - z * 0.5 + 1.0
    swap = (quadrant & 1) == 1
    cos = tl.where(swap, s, c)
    sin = tl.where(swap, c, s)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = tl.where(quadrant >= 2, -sin, sin)
    return cos, sin


@triton.jit
def _box_muller(wa, wb):
    u = wa.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    r = tl.sqrt_rn(_ln(u) * -2.0)
    cos, sin = _cos_sin(wb)
    return r * cos, r * sin


@triton.jit
def draw(seed, key, block, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the normals of elements block * BLOCK + [0, BLOCK) of one image, float32 [BLOCK].

    seed, key: int64 scalars. A thread makes one Philox call for 4 neighbouring elements.
    """
    group = (block * (BLOCK // 4)).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    key = key.to(tl.uint64, bitcast=True)
    low = group * 0 + (key & 0xFFFFFFFF).to(tl.uint32)
    high = group * 0 + (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, group * 0 + PURPOSE, low, high)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])


@triton.jit
def _philox_kernel(
    out,  # float32 [B, n], written
    seeds,  # int64 [B]
    keys,  # int64 [B]
    n,  # elements of an image
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.cast(n, tl.int64)  # 64 bits, and n = 1 arrives as a constant
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // blocks
    block = pid % blocks
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n - block * BLOCK
    z = draw(tl.load(seeds + sample), tl.load(keys + sample), block, PURPOSE, BLOCK)
    tl.store(out + sample * n + block * BLOCK + offsets, z, mask=mask)


@torch.library.custom_op("flashddpm::philox", mutates_args=())
def _philox(seeds: Tensor, keys: Tensor, C: int, H: int, W: int, purpose: int) -> Tensor:
    out = _philox_fake(seeds, keys, C, H, W, purpose)
    n = C * H * W
    if not runs_triton(seeds):
        return out.copy_(reference.philox(seeds, keys, (C, H, W), purpose))
    if out.numel():
        block = block_size(n)
        grid = len(seeds) * triton.cdiv(n, block)
        launch(_philox_kernel, grid, out, out, seeds, keys, n, purpose, block)
    return out


@_philox.register_fake
def _philox_fake(seeds: Tensor, keys: Tensor, C: int, H: int, W: int, purpose: int) -> Tensor:
    shape = (len(seeds), C, H, W)
    return torch.empty(shape, device=seeds.device, memory_format=torch.channels_last)


def philox(
    seeds: Tensor, keys: Tensor, shape: tuple[int, int, int], purpose: int = Purpose.INITIAL
) -> Tensor:
    """Return standard normal noise, float32 [B, C, H, W], channels-last.

    Args:
        seeds, keys: int64 [B].
        shape: (C, H, W) of one image, below 2^34 elements.
        purpose: what the noise is for.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    if len(shape) != 3 or min(shape) < 0 or math.prod(shape) >= 2**34:
        raise ValueError(f"shape={tuple(shape)}: must be (C, H, W) with below 2^34 elements")
    C, H, W = shape
    check_vector("seeds", seeds, seeds.numel(), torch.int64, seeds)
    check_vector("keys", keys, seeds.numel(), torch.int64, seeds)
    return _philox(seeds, keys, C, H, W, check_purpose(purpose))
