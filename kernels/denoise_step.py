r"""One reverse step of every slot, each by a row of its own (the formula: tables.py; S5, S6).

    out    = out[lane_cond],  or  out[lane_uncond] + w (out[lane_cond] - out[lane_uncond])
    x0     = x0_xt x_t + x0_out out, clipped
    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist hist + sigma z

z is drawn in registers. Bytes an element: x read and written (8), each lane of the slot read and
the next network input written (2 x itemsize each), history read and written where used (4 each),
the variance's channels of the conditional lane where the row takes them (itemsize).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.exact_math import exp
from flashddpm.kernels.examples import of_slots, on_step
from flashddpm.kernels.launch import (
    OPTIONS,
    WARPS_2C,
    channels_last,
    doubled_channels,
    launch_blocks,
    minus_zeros,
    place,
    runs_triton,
)
from flashddpm.kernels.operation import LEARNED, Arguments, Budget, ByteCase, Op, variant
from flashddpm.kernels.philox import DRAWN, draw
from flashddpm.kernels.step_rows import (
    C_HIST,
    C_OUT,
    C_X0,
    C_XT,
    CLIP,
    COLUMNS,
    INF_BITS,
    LOG_SIGMA,
    RESCALE,
    SIGMA,
    THRESHOLD,
    guided_output,
    is_guided,
    lane_elements,
    unclipped_x0,
)
from flashddpm.kernels.tables import FLOATS, REST, Column, Purpose
from flashddpm.kernels.validation import (
    check_float32,
    check_image,
    check_in_place,
    check_output,
    check_table,
    check_vector,
)

REVERSE_STEP = tl.constexpr(int(Purpose.REVERSE_STEP))


@triton.jit
def _flag(nonfinite, values, i):
    """Note row i if some value is not finite and nothing is noted yet."""
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    if largest >= INF_BITS:  # and above them NaN
        if tl.load(nonfinite) == 0:
            tl.store(nonfinite, i.to(tl.int32))


@triton.jit
def _denoise_step_kernel(  # noqa: C901, PLR0915  one kernel, whose branches are those of a row
    x,  # float32 [S, n], rows of stride x_stride, read and written
    hist,  # float32 [S, n], rows of stride hist_stride, read and written where used
    net_in,  # [L, n], written at the slot's lanes
    nonfinite,  # int32 [S], written where the output is not finite
    out,  # [L, n], or [L, 2n] of 2C channels: the network's output
    idx,  # int64 [S], row of each slot
    seeds,  # int64 [S]
    guidance,  # float32 [S]
    lane_cond,  # int32 [S]
    lane_uncond,  # int32 [S], -1 for none
    bounds,  # float32 [S], read where the row has a threshold
    factors,  # float32 [S], read where the row rescales and the slot is guided
    rows,  # float32 [R, COLUMNS]
    keys,  # int64 [R]
    next,  # int64 [R]
    noise,  # float32 [S, n] if HAS_NOISE
    n,  # elements of an image
    x_stride,
    hist_stride,
    HAS_NOISE: tl.constexpr,
    C: tl.constexpr,  # channels of an image if out has 2C, else 0
    BLOCK: tl.constexpr,
):
    slot, block, offsets, mask, n = place(n, BLOCK)
    i = tl.load(idx + slot)
    follow = tl.load(next + i)
    if follow == i:
        return
    start = block * BLOCK
    row = rows + i * COLUMNS

    cond = tl.load(lane_cond + slot).to(tl.int64)
    uncond = tl.load(lane_uncond + slot).to(tl.int64)
    at, lane = lane_elements(start, offsets, n, C)
    guides = is_guided(uncond, row)
    o = guided_output(out, cond, uncond, guides, tl.load(guidance + slot), at, lane, mask)
    if tl.load(row + RESCALE) != 0:
        if guides:
            o *= tl.load(factors + slot)
    _flag(nonfinite + slot, o, i)

    x_t = tl.load(x + slot * x_stride + start + offsets, mask=mask, other=0)
    x0 = unclipped_x0(x_t, o, row, BLOCK)
    c = tl.load(row + CLIP)
    if tl.load(row + THRESHOLD) != 0:
        c = tl.load(bounds + slot)
        x0 = tl.div_rn(tl.clamp(x0, -c, c, propagate_nan=tl.PropagateNan.ALL), c)
    elif c != 0:
        x0 = tl.clamp(x0, -c, c, propagate_nan=tl.PropagateNan.ALL)

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
    c = tl.load(row + SIGMA)
    if c != 0:
        if HAS_NOISE:
            z = tl.load(noise + slot * n + start + offsets, mask=mask, other=0)
        else:
            z = draw(tl.load(seeds + slot), tl.load(keys + i), block, out, REVERSE_STEP, BLOCK)
        if C != 0:
            v = out + cond * lane + C + at
            x_next += z * _sigma(v, nonfinite + slot, c, i, row, mask, BLOCK)
        else:
            x_next += z * c

    tl.store(x + slot * x_stride + start + offsets, x_next, mask=mask)
    if tl.load(rows + follow * COLUMNS + C_HIST) != 0:
        tl.store(hist + slot * hist_stride + start + offsets, x0, mask=mask)
    inp = x_next.to(net_in.dtype.element_ty)
    tl.store(net_in + cond * n + start + offsets, inp, mask=mask)
    if uncond >= 0:
        tl.store(net_in + uncond * n + start + offsets, inp, mask=mask)


@triton.jit
def _sigma(variance, nonfinite, c, i, row, mask, BLOCK: tl.constexpr):
    """Return sigma e^(log_sigma v) of each element, where sigma is c and v is read if needed."""
    sigma = tl.zeros([BLOCK], tl.float32) + c
    log_sigma = tl.load(row + LOG_SIGMA)
    if log_sigma != 0:
        v = tl.load(variance, mask=mask, other=0).to(tl.float32)
        _flag(nonfinite, v, i)
        sigma = c * exp(log_sigma * v)
    return sigma


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
    bounds: Tensor,
    factors: Tensor,
    rows: Tensor,
    keys: Tensor,
    next: Tensor,
    noise: Tensor | None,
) -> None:
    if not runs_triton(x):
        reference.denoise_step(
            x, hist, net_in, nonfinite, out, idx, seeds, guidance,
            lane_cond, lane_uncond, bounds, factors, rows, keys, next, noise,
        )  # fmt: skip
    elif x.numel():
        n, C = x[0].numel(), doubled_channels(out, x)
        given = x if noise is None else channels_last(noise)
        launch_blocks(
            _denoise_step_kernel, x,
            x, hist, net_in, nonfinite, channels_last(out), idx, seeds, guidance,
            lane_cond, lane_uncond, bounds, factors, rows, keys, next, given,
            n, x.stride(0), hist.stride(0), noise is not None, C,
            num_warps=WARPS_2C if C else OPTIONS["num_warps"],
        )  # fmt: skip


@_denoise_step.register_fake
def _denoise_step_fake(
    x, hist, net_in, nonfinite, out, idx, seeds, guidance,
    lane_cond, lane_uncond, bounds, factors, rows, keys, next, noise,
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
    bounds: Tensor,
    factors: Tensor,
    rows: Tensor,
    keys: Tensor,
    next: Tensor,
    noise: Tensor | None = None,
) -> None:
    """Apply row idx[s] to every slot s, in place.

    Slots whose row points at itself are left untouched. What a row, a lane or a column is:
    tables.py. Indices are not checked, for that would wait.

    Args:
        x: float32 [S, C, H, W], the state x_t; becomes x_next. It, hist and net_in must not
            overlap: not checked.
        hist: float32 [S, C, H, W], the previous x0; written where the next row reads it.
        net_in: [L, C, H, W], float32, float16 or bfloat16: x_next goes to each lane of the slot.
        nonfinite: int32 [S]; becomes idx[s] where it is 0 and the slot's output is not finite.
        out: [L, C or 2C, H, W], the network's output, float32, float16 or bfloat16, any layout;
            log_sigma is of effect where it has 2C channels.
        idx: int64 [S], each slot's row.
        seeds: int64 [S].
        guidance: float32 [S], read where lane_uncond is not negative.
        lane_cond, lane_uncond: int32 [S], the slot's lanes; lane_uncond is -1 where unguided.
        bounds, factors: float32 [S], of ``sample_stats``, read where the row asks.
        rows: float32 [R, len(Column)].
        keys, next: int64 [R].
        noise: float32 [S, C, H, W] to use for z, or None to draw it.

    Raises:
        ValueError: a shape, dtype, layout or device that does not fit.
    """
    S = len(x)
    for name, buffer in (("x", x), ("hist", hist)):
        check_in_place(name, buffer, like=x)
        check_float32(name, buffer)
    check_in_place("net_in", net_in)
    check_output(out, net_in, lanes=len(net_in))
    if net_in.shape[1:] != x.shape[1:] or not net_in.is_contiguous(
        memory_format=torch.channels_last
    ):
        raise ValueError(f"net_in of shape {tuple(net_in.shape)}: must be dense [L, *x.shape[1:]]")
    for name, vector, dtype in (
        ("idx", idx, torch.int64),
        ("seeds", seeds, torch.int64),
        ("guidance", guidance, torch.float32),
        ("bounds", bounds, torch.float32),
        ("factors", factors, torch.float32),
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
        check_float32("noise", noise)
    _denoise_step(
        x, hist, net_in, nonfinite, out, idx, seeds, guidance,
        lane_cond, lane_uncond, bounds, factors, rows, keys, next, noise,
    )  # fmt: skip


def _bytes_moved(args: Arguments) -> int:
    n = args["x"][:1].numel()
    lane = args["out"].itemsize + args["net_in"].itemsize
    rows, follow = args["rows"].tolist(), args["next"].tolist()
    learns = doubled_channels(args["out"], args["x"])
    total = 0
    for i, uncond in zip(args["idx"].tolist(), args["lane_uncond"].tolist(), strict=True):
        if follow[i] == i:
            continue
        total += 8 * n + lane * n * (2 if uncond >= 0 else 1)
        total += 4 * n * (rows[i][Column.C_HIST] != 0)
        total += 4 * n * (rows[follow[i]][Column.C_HIST] != 0)
        if rows[i][Column.SIGMA] != 0:
            total += 4 * n * (args.get("noise") is not None)
            total += args["out"].itemsize * n * (learns and rows[i][Column.LOG_SIGMA] != 0)
    return total


def _given(args: Arguments) -> Arguments:
    """Noise that is handed in."""
    return on_step(**_ANCESTRAL)(args) | {"noise": args["hist"].clone()}


def _learned(args: Arguments) -> Arguments:
    """An output of 2C channels, the second half of which says how large the noise is."""
    changed = on_step(**_ANCESTRAL, log_sigma=0.5)(args)
    return changed | {"out": channels_last(torch.cat([changed["out"]] * 2, 1))}


def _plain(x: Tensor, out: Tensor, **_: Any) -> Tensor:
    """DDPM's step: x0 from the output, clipped; the posterior's mean; noise; the next input."""
    x0 = ((x - 0.6 * out[: len(x)].float()) / 0.8).clamp(-1, 1)
    x_next = 0.3 * x0 + 0.68 * x + 0.2 * torch.randn_like(x)
    return x_next.to(out.dtype)


def _plain_guided(x: Tensor, out: Tensor, guidance: Tensor, **_: Any) -> Tensor:
    """The same of two outputs combined; both lanes get the next input."""
    cond, uncond = out.chunk(2)
    combined = uncond + guidance.to(out.dtype).reshape(-1, 1, 1, 1) * (cond - uncond)
    return torch.cat([_plain(x, combined)] * 2)


def _plain_multistep(x: Tensor, hist: Tensor, out: Tensor, **_: Any) -> Tensor:
    """DPM-Solver++(2M)'s step: x0, which the next step reads; x0 extrapolated; the next input."""
    x0 = (x - 0.6 * out[: len(x)].float()) / 0.8
    x_next = 0.6 * x + 0.4 * (1.5 * x0 - 0.5 * hist)
    return x_next.to(out.dtype)


def _plain_learned(x: Tensor, out: Tensor, **_: Any) -> Tensor:
    """DDPM's step with a learned range: the noise's size is the exponential of a mix."""
    prediction, v = out.chunk(2, dim=1)
    fraction = (v.float() + 1) / 2
    sigma = torch.exp(0.5 * (fraction * -2.0 + (1 - fraction) * -3.0))
    x0 = ((x - 0.6 * prediction.float()) / 0.8).clamp(-1, 1)
    x_next = 0.3 * x0 + 0.68 * x + sigma * torch.randn_like(x)
    return x_next.to(out.dtype)


_REASON = f"{DRAWN}; every term of the formula, a branch each; the most live values of all kernels"
_GIVEN = "every term of the formula, a branch each; the noise is read"
_LEARNED = f"{DRAWN}; every term and an exponential; 2C channels of 3 are read one by one"
_ANCESTRAL = dict(x0_xt=1.25, x0_out=-0.75, clip=1.0, c_x0=0.3, c_xt=0.68, sigma=0.2)
_MULTISTEP = on_step(following=True, x0_xt=1.25, x0_out=-0.75, c_x0=0.6, c_xt=0.6, c_hist=-0.2)
_STATE = ("x", "hist", "net_in")
OP = Op(
    name="denoise_step",
    fast=denoise_step,
    reference=reference.denoise_step,
    example=of_slots,
    bytes_moved=_bytes_moved,
    kernels=(
        variant(
            "denoise_step",
            _denoise_step_kernel,
            {
                4: Budget(78, 8, 101.5, _REASON, memory_bound=True),
                2: Budget(96, 2048, 106.5, _REASON, memory_bound=True),
            },
            (*_STATE, "out"),
            HAS_NOISE=0,
            C=0,
        ),
        variant(
            "denoise_step_given",
            _denoise_step_kernel,
            {
                4: Budget(76, 8, 53.5, _GIVEN, memory_bound=True),
                2: Budget(80, 2048, 59.5, _GIVEN, memory_bound=True),
            },
            (*_STATE, "out", "noise"),
            HAS_NOISE=1,
            C=0,
        ),
        variant(
            "denoise_step_learned",
            _denoise_step_kernel,
            {
                4: Budget(71, 16, 176.5, _LEARNED, width=4),
                2: Budget(76, 4096, 186.0, _LEARNED, width=2),
            },
            _STATE,
            HAS_NOISE=0,
            **LEARNED,
        ),
    ),
    cases=(
        ByteCase("denoise_step", on_step(**_ANCESTRAL), ("denoise_step",), _plain),
        ByteCase(
            "denoise_step guided",
            on_step(guided=True, **_ANCESTRAL),
            ("denoise_step",),
            _plain_guided,
        ),
        ByteCase("denoise_step multistep", _MULTISTEP, ("denoise_step",), _plain_multistep),
        ByteCase("denoise_step given", _given, ("denoise_step_given",)),
        ByteCase("denoise_step learned", _learned, ("denoise_step_learned",), _plain_learned),
    ),
    mutates=("x", "hist", "net_in", "nonfinite"),
    dtypes=FLOATS,
    index="idx",
    all_work=(Column.SIGMA,),
    alike={"next": REST, "lane_uncond": -1},  # no next row reads the history, nothing is guided
)
