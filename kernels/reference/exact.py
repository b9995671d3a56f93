r"""Functions of float32 products and sums, each rounded, with the same bits on every device.

Logarithm, sine, cosine and exponential by the polynomials of Cephes (logf, sinf, cosf, expf): their
coefficients, Horner's rule and the exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Coefficients of Horner's rule, highest power first.
LN = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
LN2_LOW, LN2_HIGH = -2.12194440e-4, 0.693359375
ANGLE = 1.462918e-9  # pi/2 2^-30, to seven digits: part of the stream
LOG2_E = 1.44269504
ROUNDER = 12582912.0  # 1.5 2^23: adding it leaves the nearest integer in the low bits
EXP_MIN, EXP_MAX = -86.0, 88.0  # beyond, the result is 0 or infinite


def horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return the value of a polynomial at x by Horner's rule, float32, of x's shape.

    Args:
        x: float32, any shape.
        coefficients: the polynomial's coefficients, highest power first, at least two
            (IndexError for fewer).
    """
    y = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


def exp(x: Tensor) -> Tensor:
    """Return e^x, float32 of x's shape, to a relative error of 1.5e-7.

    It is 0 below EXP_MIN = -86 and infinite above EXP_MAX = 88. x = n ln 2 + r with |r| <= ln 2 /
    2, so e^x = 2^n (1 + r + r^2 p(r)).

    Args:
        x: float32, any shape and values; NaN gives NaN.
    """
    k = x * LOG2_E + ROUNDER
    n = k - ROUNDER
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = horner(r, EXP) * (r * r) + r + 1
    scale = ((k.view(torch.int32) << 23) + 0x3F800000).view(torch.float32)
    return torch.where(x < EXP_MIN, 0.0, torch.where(x > EXP_MAX, torch.inf, y * scale))
