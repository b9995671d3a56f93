r"""One reverse step of every slot, each by a row of its own (the formula: contract.py; S5, S6).

    out    = out[lane_cond],  or  out[lane_uncond] + w (out[lane_cond] - out[lane_uncond])
    x0     = x0_xt x_t + x0_out out, clipped
    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist hist + sigma z

z is drawn in registers. Bytes an element: x read and written (8), each lane of the slot read and
the next network input written (2 x itemsize each), history read and written where used (4 each).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.contract import Column, Purpose
from flashddpm.kernels.launch import (
    FLOATS,
    block_size,
    channels_last,
    check_image,
    check_in_place,
    check_table,
    check_vector,
    launch,
    runs_triton,
)
from flashddpm.kernels.philox import draw

COLUMNS = tl.constexpr(len(Column))
X0_XT = tl.constexpr(int(Column.X0_XT))
X0_OUT = tl.constexpr(int(Column.X0_OUT))
C_X0 = tl.constexpr(int(Column.C_X0))
C_XT = tl.constexpr(int(Column.C_XT))
C_OUT = tl.constexpr(int(Column.C_OUT))
C_HIST = tl.constexpr(int(Column.C_HIST))
SIGMA = tl.constexpr(int(Column.SIGMA))
CLIP = tl.constexpr(int(Column.CLIP))
REVERSE_STEP = tl.constexpr(int(Purpose.REVERSE_STEP))


@triton.jit
def _minus_zeros(BLOCK: tl.constexpr):
    """Return -0.0, float32 [BLOCK], where a sum starts; tl.full would make it +0.0."""
    return tl.full([BLOCK], -2147483648, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _denoise_step_kernel(
    x,  # float32 [S, n], rows of stride x_stride, read and written
    hist,  # float32 [S, n], rows of stride hist_stride, read and written where used
    net_in,  # [L, n], written at the slot's lanes
    nonfinite,  # int32 [S], written where the output is not finite
    out,  # [L, n], the network's output
    idx,  # int64 [S], row of each slot
    seeds,  # int64 [S]
    guidance,  # float32 [S]
    lane_cond,  # int32 [S]
    lane_uncond,  # int32 [S], -1 for none
    rows,  # float32 [R, COLUMNS]
    keys,  # int64 [R]
    next,  # int64 [R]
    noise,  # float32 [S, n] if HAS_NOISE
    n,  # elements of an image
    x_stride,
    hist_stride,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.cast(n, tl.int64)  # 64 bits, and n = 1 arrives as a constant
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    slot = pid // blocks
    block = pid % blocks
    i = tl.load(idx + slot)
    follow = tl.load(next + i)
    if follow == i:
        return
    offsets = tl.arange(0, BLOCK)
    start = block * BLOCK
    mask = offsets < n - start
    row = rows + i * COLUMNS

    cond = tl.load(lane_cond + slot).to(tl.int64) * n + start
    uncond = tl.load(lane_uncond + slot).to(tl.int64)
    o = tl.load(out + cond + offsets, mask=mask, other=0).to(tl.float32)
    if uncond >= 0:
        u = tl.load(out + uncond * n + start + offsets, mask=mask, other=0).to(tl.float32)
        o = u + tl.load(guidance + slot) * (o - u)
    bad = tl.where(tl.abs(o) < float("inf"), 0, 1)  # NaN compares false
    if tl.max(bad, axis=0) != 0:
        if tl.load(nonfinite + slot) == 0:
            tl.store(nonfinite + slot, i.to(tl.int32))

    x_t = tl.load(x + slot * x_stride + start + offsets, mask=mask, other=0)
    x0 = _minus_zeros(BLOCK)
    c = tl.load(row + X0_XT)
    if c != 0:
        x0 += x_t * c
    c = tl.load(row + X0_OUT)
    if c != 0:
        x0 += o * c
    c = tl.load(row + CLIP)
    if c != 0:
        x0 = tl.clamp(x0, -c, c, propagate_nan=tl.PropagateNan.ALL)

    x_next = _minus_zeros(BLOCK)
    c = tl.load(row + C_X0)
    if c != 0:
        x_next += x0 * c
    c = tl.load(row + C_XT)
    if c != 0:
        x_next += x_t * c
    c = tl.load(row + C_OUT)
    if c != 0:
        x_next += o * c
    c = tl.load(row + C_HIST)
    if c != 0:
        x_next += tl.load(hist + slot * hist_stride + start + offsets, mask=mask, other=0) * c
    c = tl.load(row + SIGMA)
    if c != 0:
        if HAS_NOISE:
            z = tl.load(noise + slot * n + start + offsets, mask=mask, other=0)
        else:
            z = draw(tl.load(seeds + slot), tl.load(keys + i), block, REVERSE_STEP, BLOCK)
        x_next += z * c

    tl.store(x + slot * x_stride + start + offsets, x_next, mask=mask)
    if tl.load(rows + follow * COLUMNS + C_HIST) != 0:
        tl.store(hist + slot * hist_stride + start + offsets, x0, mask=mask)
    inp = x_next.to(net_in.dtype.element_ty)
    tl.store(net_in + cond + offsets, inp, mask=mask)
    if uncond >= 0:
        tl.store(net_in + uncond * n + start + offsets, inp, mask=mask)


@torch.library.custom_op(
    "flashddpm::denoise_step", mutates_args=("x", "hist", "net_in", "nonfinite")
)
def _denoise_step(
    x: Tensor,
    hist: Tensor,
    net_in: Tensor,
    nonfinite: Tensor,
    out: Tensor,
    idx: Tensor,
    seeds: Tensor,
    guidance: Tensor,
    lane_cond: Tensor,
    lane_uncond: Tensor,
    rows: Tensor,
    keys: Tensor,
    next: Tensor,
    noise: Tensor | None,
) -> None:
    if not runs_triton(x):
        reference.denoise_step(
            x, hist, net_in, nonfinite, out, idx, seeds, guidance,
            lane_cond, lane_uncond, rows, keys, next, noise,
        )  # fmt: skip
    elif x.numel():
        n = x[0].numel()
        block = block_size(n)
        given = x if noise is None else channels_last(noise)
        launch(
            _denoise_step_kernel, len(x) * triton.cdiv(n, block), x,
            x, hist, net_in, nonfinite, channels_last(out), idx, seeds, guidance,
            lane_cond, lane_uncond, rows, keys, next, given,
            n, x.stride(0), hist.stride(0), noise is not None, block,
        )  # fmt: skip


@_denoise_step.register_fake
def _denoise_step_fake(
    x, hist, net_in, nonfinite, out, idx, seeds, guidance,
    lane_cond, lane_uncond, rows, keys, next, noise,
) -> None:  # fmt: skip
    return None


def denoise_step(
    x: Tensor,
    hist: Tensor,
    net_in: Tensor,
    nonfinite: Tensor,
    out: Tensor,
    idx: Tensor,
    seeds: Tensor,
    guidance: Tensor,
    lane_cond: Tensor,
    lane_uncond: Tensor,
    rows: Tensor,
    keys: Tensor,
    next: Tensor,
    noise: Tensor | None = None,
) -> None:
    """Apply row idx[s] to every slot s, in place.

    Slots whose row points at itself are left untouched. What a row, a lane or a column is:
    contract.py. Indices are not checked, for that would wait.

    Args:
        x: float32 [S, C, H, W], the state x_t; becomes x_next.
        hist: float32 [S, C, H, W], the previous x0; written where the next row reads it.
        net_in: [L, C, H, W], float32, float16 or bfloat16: x_next goes to each lane of the slot.
        nonfinite: int32 [S]; becomes idx[s] where it is 0 and the slot's output is not finite.
        out: [L, C, H, W], the network's output, float32, float16 or bfloat16, any layout.
        idx: int64 [S], each slot's row.
        seeds: int64 [S].
        guidance: float32 [S], read where lane_uncond is not negative.
        lane_cond, lane_uncond: int32 [S], the slot's lanes; lane_uncond is -1 where unguided.
        rows: float32 [R, len(Column)].
        keys, next: int64 [R].
        noise: float32 [S, C, H, W] to use for z, or None to draw it.

    Raises:
        ValueError: a shape, dtype, layout or device that does not fit.
    """
    S = len(x)
    for name, buffer in (("x", x), ("hist", hist)):
        check_in_place(name, buffer, like=x)
        if buffer.dtype is not torch.float32:
            raise ValueError(f"{name} of {buffer.dtype}: must be float32")
    check_in_place("net_in", net_in)
    check_image("out", out, like=net_in)
    if net_in.shape[1:] != x.shape[1:] or not net_in.is_contiguous(
        memory_format=torch.channels_last
    ):
        raise ValueError(f"net_in of shape {tuple(net_in.shape)}: must be dense [L, *x.shape[1:]]")
    for name, vector, dtype in (
        ("idx", idx, torch.int64),
        ("seeds", seeds, torch.int64),
        ("guidance", guidance, torch.float32),
        ("lane_cond", lane_cond, torch.int32),
        ("lane_uncond", lane_uncond, torch.int32),
        ("nonfinite", nonfinite, torch.int32),
    ):
        check_vector(name, vector, S, dtype, x)
    check_table("rows", rows, len(Column), x)
    check_vector("keys", keys, len(rows), torch.int64, x)
    check_vector("next", next, len(rows), torch.int64, x)
    if noise is not None:
        check_image("noise", noise, like=x)
        if noise.dtype is not FLOATS[0]:
            raise ValueError(f"noise of {noise.dtype}: must be float32")
    _denoise_step(
        x, hist, net_in, nonfinite, out, idx, seeds, guidance,
        lane_cond, lane_uncond, rows, keys, next, noise,
    )  # fmt: skip
