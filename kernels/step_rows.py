"""Triton functions that evaluate a row (the coefficients of one step): output, x0, next state.

A slot is the place of one image in a batch; a lane is one evaluation of the network, of which a
guided image takes two. All functions are called by kernels, on a block of one slot's elements.
"""

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
    """Return the offsets of a block's elements within a lane of ``out``, and the lane's size.

    Args:
        start: the element of the image at which the block begins, int64 scalar.
        offsets: int32 [BLOCK], the elements of the block, from 0.
        n: the elements of an image, int64 scalar.
        C: 0 if a lane (one evaluation of the network) has the image's channels; the image's
            channels if a lane has 2C channels, the first C of each pixel being these elements.

    Returns:
        int64 [BLOCK], the offsets within the lane, and the number of a lane's elements, n or 2n.
    """
    if C == 0:
        return start + offsets, n
    element = start + offsets
    return element + element // C * C, n * 2


@triton.jit
def is_guided(uncond, row):
    """Return whether the slot is guided: it has an unconditional lane and its row is not unguided.

    Args:
        uncond: the index of the slot's unconditional lane (one evaluation of the network), int64
            scalar; -1 for none.
        row: pointer to the first column of the slot's row (its step's coefficients), float32.
    """
    guides = uncond >= 0
    if guides:
        guides = tl.load(row + UNGUIDED) == 0
    return guides


@triton.jit
def guided_output(out, cond, uncond, guides, weight, at, lane, mask):
    """Return the network's output of a slot's block, with classifier-free guidance where it guides.

    (Ho & Salimans 2022.)

    Args:
        out: pointer to the network's output, [L, lane].
        cond, uncond: the indices of the slot's conditional and unconditional lanes (evaluations of
            the network), int64 scalars.
        guides: whether the slot has both lanes and its row is not unguided (``is_guided``).
        weight: the guidance weight w, float32 scalar.
        at: int64 [BLOCK], the block's offsets within a lane.
        lane: the number of elements of a lane.
        mask: bool [BLOCK], which elements exist; the others are 0 in each lane.

    Returns:
        float32 [BLOCK]: cond, or uncond + w (cond - uncond) where it guides.
    """
    o = tl.load(out + cond * lane + at, mask=mask, other=0).to(tl.float32)
    if guides:
        u = tl.load(out + uncond * lane + at, mask=mask, other=0).to(tl.float32)
        o = u + weight * (o - u)
    return o


@triton.jit
def unclipped_x0(x_t, o, row, BLOCK: tl.constexpr):
    """Return the predicted x0 before clipping, x0_xt x_t + x0_out o, float32 [BLOCK].

    Args:
        x_t: float32 [BLOCK], the slot's state.
        o: float32 [BLOCK], the network's output of the slot.
        row: pointer to the first column of the slot's row (its step's coefficients), float32.
    """
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
    """Return x0 after the row's clipping, float32 [BLOCK].

    Where the row has a threshold, x0 is clipped to the slot's dynamic threshold and divided by it;
    else, where its clip is not 0, it is clipped to [-clip, clip]. NaN stays NaN.

    Args:
        x0: float32 [BLOCK], the predicted x0.
        row: pointer to the first column of the slot's row (its step's coefficients), float32.
        dynamic_threshold: pointer to float32 [S], read at ``slot`` where the row has a threshold.
        slot: the slot's index, int64 scalar.
    """
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
    """Return the next state without its noise, c_x0 x0 + c_xt x_t + c_out o + c_hist hist.

    Args:
        x0, x_t, o: float32 [BLOCK], the clipped x0, the state and the network's output.
        hist: pointer to the history, float32 [S, n] with a stride of hist_stride between slots;
            read only where c_hist is not 0.
        slot: the slot's index, int64 scalar.
        hist_stride: elements between two slots' histories.
        start: the element of the image at which the block begins.
        offsets: int32 [BLOCK], the elements of the block, from 0.
        row: pointer to the first column of the slot's row (its step's coefficients), float32.
        mask: bool [BLOCK], which elements exist.

    Returns:
        float32 [BLOCK].
    """
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
