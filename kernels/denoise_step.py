r"""Operation ``denoise_step``, one reverse step of every slot, each by its own row.

(Equations S5 and S6 of docs/math.md.) A slot is the place of one image in a batch, a row the
coefficients of one step (in full: tables.py, docs/math.md), a lane one evaluation of the network,
of which a guided image takes two.

    out    = out[lane_cond],  or  out[lane_uncond] + w (out[lane_cond] - out[lane_uncond])
    x0     = x0_xt x_t + x0_out out, clipped
    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist hist + sigma z

z is drawn in registers. Bytes for each element: x read and written (8), each lane of the slot read
and the next network input written (2 x itemsize each), history read and written where used (4
each), the variance's channels of the conditional lane where the row takes them (itemsize).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.exact_math import exp
from flashddpm.kernels.examples import learned_range, of_slots, on_step
from flashddpm.kernels.launch import (
    OPTIONS,
    WARPS_2C,
    channels_last,
    doubled_channels,
    launch_blocks,
    place,
    runs_triton,
)
from flashddpm.kernels.operation import LEARNED, Arguments, Budget, ByteCase, Op, variant
from flashddpm.kernels.philox import DRAWN, draw
from flashddpm.kernels.step_arguments import (
    FLAT,
    StepSlots,
    StepState,
    StepStatistics,
    StepTable,
    by_tensor,
    grouped,
    tensor_schema,
)
from flashddpm.kernels.step_rows import (
    C_HIST,
    COLUMNS,
    INF_BITS,
    LOG_SIGMA,
    RESCALE,
    SIGMA,
    clipped,
    guided_output,
    is_guided,
    lane_elements,
    unclipped_x0,
    without_noise,
)
from flashddpm.kernels.tables import FLOATS, IDLE, Column, Purpose
from flashddpm.kernels.validation import (
    check_float32,
    check_image,
    check_in_place,
    check_output,
    check_rows,
    check_slots,
    check_state,
    check_vectors,
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
def _denoise_step_kernel(
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
    dynamic_threshold,  # float32 [S], read where the row has a threshold
    rescale_factor,  # float32 [S], read where the row rescales and the slot is guided
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
            o *= tl.load(rescale_factor + slot)
    _flag(nonfinite + slot, o, i)

    x_t = tl.load(x + slot * x_stride + start + offsets, mask=mask, other=0)
    x0 = clipped(unclipped_x0(x_t, o, row, BLOCK), row, dynamic_threshold, slot)
    x_next = without_noise(x0, x_t, o, hist, slot, hist_stride, start, offsets, row, mask, BLOCK)
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
    "flashddpm::denoise_step",
    mutates_args=StepState._fields,
    schema=tensor_schema(FLAT, StepState._fields, optional=("noise",)),
)
def _denoise_step(*tensors: Any) -> None:
    state, out, slots, statistics, table, noise = grouped(tensors)
    x = state.x
    if not runs_triton(x):
        reference.denoise_step(state, out, slots, statistics, table, noise)
    elif x.numel():
        C = doubled_channels(out, x)
        given = x if noise is None else channels_last(noise)
        flat = (*state, channels_last(out), *slots, *statistics, *table, given)
        sizes = (x[0].numel(), x.stride(0), state.hist.stride(0))
        warps = WARPS_2C if C else OPTIONS["num_warps"]
        arguments = (*flat, *sizes, noise is not None, C)
        launch_blocks(_denoise_step_kernel, x, *arguments, num_warps=warps)


@_denoise_step.register_fake
def _denoise_step_fake(*tensors: Any) -> None:
    return None


def denoise_step(
    state: StepState,
    out: Tensor,
    slots: StepSlots,
    statistics: StepStatistics,
    table: StepTable,
    noise: Tensor | None = None,
) -> None:
    """Apply one reverse step to every slot (the place of one image in a batch), in place.

    Slot s follows row idx[s] (the coefficients of one step, a column for each ``Column``):

        x0     = x0_xt x + x0_out out, clipped to [-clip, clip] (clip 0: not), or, where the row has
                 a threshold, clipped to the dynamic threshold and divided by it
        x_next = c_x0 x0 + c_xt x + c_out out + c_hist hist + sigma e^(log_sigma v) z

    with out the slot's conditional output, or for a guided slot uncond + w (cond - uncond), times
    the rescale factor where the row rescales. A slot is guided if it has an unconditional lane and
    its row's column unguided is 0. Slots whose row points at itself (``table.next``) are untouched.

    Args:
        state: what the step changes: ``x`` becomes x_next; ``hist`` becomes x0 where the next row
            reads the history; x_next goes to ``net_in`` at each lane (one evaluation of the
            network) of the slot; ``nonfinite`` notes the row where the network's output is not
            finite. net_in must be dense.
        out: [L, C or 2C, H, W], the network's output, float32, float16 or bfloat16, any layout;
            only with 2C channels, the second C of which are v, is the column log_sigma used.
        slots: each slot's row, noise seed, guidance weight and lanes.
        statistics: what ``sample_stats`` wrote: dynamic_threshold, read where the row has a
            threshold, and rescale_factor, read where the row rescales and the slot is guided.
        table: the rows, the key of each row's noise and the row that follows each.
        noise: float32 [S, C, H, W], standard normal noise z to use, any layout; None draws it from
            the slot's seed and the row's key.

    Raises:
        ValueError: if a tensor has another shape, dtype, layout or device than its group
            (``StepState``, ...) or this docstring says; the message begins with its name. Values of
            rows and lanes are not checked.
    """
    x, net_in = state.x, state.net_in
    check_state(x=x, hist=state.hist)
    check_in_place("net_in", net_in)
    check_output(out, net_in, lanes=len(net_in))
    if net_in.shape[1:] != x.shape[1:] or not net_in.is_contiguous(
        memory_format=torch.channels_last
    ):
        raise ValueError(f"net_in of shape {tuple(net_in.shape)}: must be dense [L, *x.shape[1:]]")
    check_slots(x, slots, statistics)
    check_vectors(x, torch.int64, len(x), seeds=slots.seeds)
    check_vectors(x, torch.int32, len(x), nonfinite=state.nonfinite)
    check_rows(x, table)
    check_vectors(x, torch.int64, len(table.rows), keys=table.keys)
    if noise is not None:
        check_image("noise", noise, like=x)
        check_float32("noise", noise)
    _denoise_step(*state, out, *slots, *statistics, *table, noise)


# The record of the operation, for tests, gates, counts of bytes and benchmarks.


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


def _plain(x: Tensor, out: Tensor, sigma: Tensor | float = 0.2, **_: Any) -> Tensor:
    """DDPM's step: x0 from the output, clipped; the posterior's mean; noise; the next input."""
    x0 = ((x - 0.6 * out[: len(x)].float()) / 0.8).clamp(-1, 1)
    x_next = 0.3 * x0 + 0.68 * x + sigma * torch.randn_like(x)
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
    prediction, log_variance = learned_range(out)
    return _plain(x, prediction, torch.exp(0.5 * log_variance))


_DRAWN = f"{DRAWN}; every term of the formula, a branch each; the most live values of all kernels"
_GIVEN = "every term of the formula, a branch each; the noise is read"
_LEARNED = f"{DRAWN}; every term and an exponential; 2C channels of 3 are read one by one"
_BUDGETS = {
    "denoise_step": {
        4: Budget(78, 8, 101.5, _DRAWN, memory_bound=True),
        2: Budget(96, 2048, 106.5, _DRAWN, memory_bound=True),
    },
    "denoise_step_given": {
        4: Budget(76, 8, 53.5, _GIVEN, memory_bound=True),
        2: Budget(80, 2048, 59.5, _GIVEN, memory_bound=True),
    },
    "denoise_step_learned": {
        4: Budget(71, 16, 176.5, _LEARNED, width=4),
        2: Budget(76, 4096, 186.0, _LEARNED, width=2),
    },
}
_STATE = ("x", "hist", "net_in")
_VARIANTS: dict[str, dict[str, Any]] = {
    "denoise_step": {"images": (*_STATE, "out"), "HAS_NOISE": 0, "C": 0},
    "denoise_step_given": {"images": (*_STATE, "out", "noise"), "HAS_NOISE": 1, "C": 0},
    "denoise_step_learned": {"images": _STATE, "HAS_NOISE": 0, **LEARNED},
}
_ANCESTRAL: dict[str, Any] = dict(
    x0_xt=1.25, x0_out=-0.75, clip=1.0, c_x0=0.3, c_xt=0.68, sigma=0.2
)
_MULTISTEP = on_step(following=True, x0_xt=1.25, x0_out=-0.75, c_x0=0.6, c_xt=0.6, c_hist=-0.2)
_GUIDED = on_step(guided=True, **_ANCESTRAL)
OP = Op(
    name="denoise_step",
    fast=by_tensor(denoise_step),
    reference=by_tensor(reference.denoise_step),
    example=of_slots,
    bytes_moved=_bytes_moved,
    kernels=tuple(
        variant(name, _denoise_step_kernel, _BUDGETS[name], **options)
        for name, options in _VARIANTS.items()
    ),
    cases=(
        ByteCase("denoise_step", on_step(**_ANCESTRAL), ("denoise_step",), _plain),
        ByteCase("denoise_step guided", _GUIDED, ("denoise_step",), _plain_guided),
        ByteCase("denoise_step multistep", _MULTISTEP, ("denoise_step",), _plain_multistep),
        ByteCase("denoise_step given", _given, ("denoise_step_given",)),
        ByteCase("denoise_step learned", _learned, ("denoise_step_learned",), _plain_learned),
    ),
    mutates=StepState._fields,
    dtypes=FLOATS,
    index="idx",
    all_work=(Column.SIGMA,),
    alike={"next": IDLE, "lane_uncond": -1},  # no next row reads the history, nothing is guided
)
