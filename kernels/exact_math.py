"""Logarithm and exponential in Triton, with the reference's bits on every device.

They are exact in that they consist only of float32 products and sums, each rounded, and moves of
bits (Cephes' logf and expf).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashddpm.kernels import reference

ROUNDER = tl.constexpr(reference.exact.ROUNDER)
EXP_MIN = tl.constexpr(reference.exact.EXP_MIN)
EXP_MAX = tl.constexpr(reference.exact.EXP_MAX)


@triton.jit
def ln(v, SCALE: tl.constexpr):
    """Return the natural logarithm of v 2^-SCALE, the same bits as of the product itself, float32.

    v is held as m 2^e with m in [sqrt .5, sqrt 2); e is held times 2^23, where it stands in v's
    bits.

    Args:
        v: float32, any shape, positive and normal; anything else, NaN too, gives some number.
        SCALE: the negative power of two in the product, an integer.
    """
    i = v.to(tl.int32, bitcast=True)
    e = (i - (0x3F3504F3 + (SCALE << 23))) & -0x800000
    m = (i - e - (SCALE << 23)).to(tl.float32, bitcast=True)
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
    y = y + exponent * (-2.12194440e-4 * 2.0**-23)
    y = tl.fma(z, -0.5, y)  # half of z is exact: nothing is left for the fusion to round
    return x + y + exponent * (0.693359375 * 2.0**-23)


@triton.jit
def exp(x):
    """Return e^x to a relative error of 1.5e-7, float32: 0 below x = -86, infinite above 88.

    Args:
        x: float32, any shape and values; NaN gives NaN.
    """
    k = x * 1.44269504 + ROUNDER
    n = k - ROUNDER
    r = x - n * 0.693359375
    r = r - n * -2.12194440e-4
    y = r * 1.9875691500e-4 + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * (r * r) + r + 1.0
    scale = ((k.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(x < EXP_MIN, 0.0, tl.where(x > EXP_MAX, float("inf"), y * scale))
