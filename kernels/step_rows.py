"""What a step's row says, in jit functions: a slot's output, its x_0, its next state."""

from __future__ import annotations

import triton
import triton.language as tl

from flashddpm.kernels.launch import minus_zeros
from flashddpm.kernels.tables import Column

COLUMNS = tl.constexpr(len(Column))
X0_XT = tl.constexpr(int(Column.X0_XT))
X0_OUT = tl.constexpr(int(Column.X0_OUT))
C_X0 = tl.constexpr(int(Column.C_X0))
C_XT = tl.constexpr(int(Column.C_XT))
C_OUT = tl.constexpr(int(Column.C_OUT))
C_HIST = tl.constexpr(int(Column.C_HIST))
SIGMA = tl.constexpr(int(Column.SIGMA))
LOG_SIGMA = tl.constexpr(int(Column.LOG_SIGMA))
CLIP = tl.constexpr(int(Column.CLIP))
THRESHOLD = tl.constexpr(int(Column.THRESHOLD))
RESCALE = tl.constexpr(int(Column.RESCALE))
UNGUIDED = tl.constexpr(int(Column.UNGUIDED))
INF_BITS = tl.constexpr(0x7F800000)


@triton.jit
def lane_elements(start, offsets, n, C: tl.constexpr):
    """Return where a lane of ``out`` has these elements, and how many elements a lane has.

    C is 0 if the lane has nothing else; of 2C channels, each pixel's first C are these.
    """
    if C == 0:
        return start + offsets, n
    element = start + offsets
    return element + element // C * C, n * 2


@triton.jit
def is_guided(uncond, row):
    """Return whether the slot has a lane for no label, and its row is not unguided."""
    guides = uncond >= 0
    if guides:
        guides = tl.load(row + UNGUIDED) == 0
    return guides


@triton.jit
def guided_output(out, cond, uncond, guides, weight, at, lane, mask):
    """Return the slot's output, combined with that of no label where the row guides.

    (Ho & Salimans 2022.) guides: whether the slot has both lanes, and its row is not unguided.
    """
    o = tl.load(out + cond * lane + at, mask=mask, other=0).to(tl.float32)
    if guides:
        u = tl.load(out + uncond * lane + at, mask=mask, other=0).to(tl.float32)
        o = u + weight * (o - u)
    return o


@triton.jit
def unclipped_x0(x_t, o, row, BLOCK: tl.constexpr):
    """Return x0_xt x_t + x0_out o."""
    x0 = minus_zeros(BLOCK)
    c = tl.load(row + X0_XT)
    if c != 0:
        x0 = x_t * c
    c = tl.load(row + X0_OUT)
    if c != 0:
        x0 += o * c
    return x0


@triton.jit
def clipped(x0, row, dynamic_threshold, slot):
    """Return x0 within the slot's threshold, over it, or within the row's clip."""
    c = tl.load(row + CLIP)
    if tl.load(row + THRESHOLD) != 0:
        c = tl.load(dynamic_threshold + slot)
        x0 = tl.div_rn(tl.clamp(x0, -c, c, propagate_nan=tl.PropagateNan.ALL), c)
    elif c != 0:
        x0 = tl.clamp(x0, -c, c, propagate_nan=tl.PropagateNan.ALL)
    return x0


@triton.jit
def without_noise(
    x0, x_t, o, hist, slot, hist_stride, start, offsets, row, mask, BLOCK: tl.constexpr
):
    """Return c_x0 x0 + c_xt x_t + c_out out + c_hist hist."""
    x_next = minus_zeros(BLOCK)
    c = tl.load(row + C_X0)
    if c != 0:
        x_next = x0 * c
    c = tl.load(row + C_XT)
    if c != 0:
        x_next += x_t * c
    c = tl.load(row + C_OUT)
    if c != 0:
        x_next += o * c
    c = tl.load(row + C_HIST)
    if c != 0:
        x_next += tl.load(hist + slot * hist_stride + start + offsets, mask=mask, other=0) * c
    return x_next
