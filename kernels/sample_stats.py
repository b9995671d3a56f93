r"""Operation ``sample_stats``, the dynamic threshold and the rescale factor of whole images.

    dynamic_threshold = the threshold-quantile of |x0|, in [1, max(clip, 1)]
    rescale_factor    = phi std(out[lane_cond]) / std(out) + 1 - phi

(Saharia et al. 2022, section 2.3; Lin et al. 2023, eq. 15 and 16.) A slot is the place of one image
in a batch, a lane one evaluation of the network, a row the coefficients of one step. The factor is
1 where std(out) is 0; squares are float32's, so outputs beyond 1e19 have no factor but NaN.

One program a slot, sums and counts in a fixed order. It ends at once where the row asks for
neither. Bytes for each element, most from the L2 cache: each pass reads the slot's lanes, itemsize
each; rescaling takes two passes, the threshold five with x besides (4). The quantile is exact:
numbers without a sign are in the order of their bits, so three passes of a histogram over 8 bits
and one over 7 find the number of the wanted rank, and the fifth its successor.

The results are not exact (bits that do not depend on the device): sums of a whole image depend on
their order. One program an image is slow where images are large and few: at 64 of them half of an
H100's multiprocessors wait.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.examples import of_slots, on_step
from flashddpm.kernels.launch import channels_last, doubled_channels, launch, runs_triton
from flashddpm.kernels.operation import LEARNED, Arguments, Budget, ByteCase, Op, variant
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
    CLIP,
    COLUMNS,
    INF_BITS,
    RESCALE,
    THRESHOLD,
    guided_output,
    is_guided,
    lane_elements,
    unclipped_x0,
)
from flashddpm.kernels.tables import FLOATS, Column
from flashddpm.kernels.validation import check_output, check_rows, check_slots, check_state

BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _magnitudes(
    x,
    out,
    cond,
    uncond,
    guides,
    weight,
    factor,
    row,
    start,
    n,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the bits of |x0| of a block, int32 [BLOCK], and which elements exist."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n - start
    at, lane = lane_elements(start, offsets, n, C)
    o = guided_output(out, cond, uncond, guides, weight, at, lane, mask) * factor
    x_t = tl.load(x + start + offsets, mask=mask, other=0)
    x0 = unclipped_x0(x_t, o, row, BLOCK)
    return x0.to(tl.int32, bitcast=True) & 0x7FFFFFFF, mask


@triton.jit
def _factor(out, cond, uncond, guides, weight, phi, n, C: tl.constexpr, BLOCK: tl.constexpr):
    """Return phi std(cond) / std(out) + 1 - phi, from sums of squares about the means.

    An output that is the same everywhere has no deviation to bring back: its ratio is 1.
    """
    offsets = tl.arange(0, BLOCK)
    count = n.to(tl.float32)
    sum_c = tl.zeros([BLOCK], tl.float32)
    sum_o = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        mask = offsets < n - start
        at, lane = lane_elements(start, offsets, n, C)
        sum_c += tl.load(out + cond * lane + at, mask=mask, other=0).to(tl.float32)
        sum_o += guided_output(out, cond, uncond, guides, weight, at, lane, mask)
    mean_c = tl.div_rn(tl.sum(sum_c, axis=0), count)
    mean_o = tl.div_rn(tl.sum(sum_o, axis=0), count)
    squares_c = tl.zeros([BLOCK], tl.float32)
    squares_o = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        mask = offsets < n - start
        at, lane = lane_elements(start, offsets, n, C)
        c = tl.load(out + cond * lane + at, mask=mask, other=0).to(tl.float32) - mean_c
        o = guided_output(out, cond, uncond, guides, weight, at, lane, mask) - mean_o
        squares_c += tl.where(mask, c * c, 0.0)
        squares_o += tl.where(mask, o * o, 0.0)
    total = tl.sum(squares_o, axis=0)
    ratio = tl.where(total == 0, 1.0, tl.div_rn(tl.sum(squares_c, axis=0), total))
    return phi * tl.sqrt_rn(ratio) + (1.0 - phi)


@triton.jit
def _rank(q, last):
    """Return the whole part of q last, int64, and the rest, float32; q in (0, 1], last < 2^34.

    q is m 2^-shift with m < 2^24, so m last is exact in 64 bits, and none of it lies above bit 58.
    """
    bits = q.to(tl.int32, bitcast=True)
    shift = tl.minimum(150 - (bits >> 23), 126)
    product = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64) * last
    whole = tl.minimum(shift, 62).to(tl.int64)
    k = product >> whole
    rest = product - (k << whole)
    unit = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    return k, rest.to(tl.float32) * unit


@triton.jit
def _quantile(
    x, out, cond, uncond, guides, weight, factor, row, n, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the quantile of |x0| that the row's threshold names, as torch.quantile has it."""
    last = n - 1
    k, fraction = _rank(tl.load(row + THRESHOLD), last)

    found = tl.zeros([], tl.int32)  # the bits known so far of the number of rank k
    rank = k  # its rank among the numbers that begin with them
    for shift in tl.static_range(24, -8, -8):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, n, BLOCK):
            bits, mask = _magnitudes(
                x, out, cond, uncond, guides, weight, factor, row, start, n, C, BLOCK
            )
            mask &= (bits >> shift >> 8) == (found >> shift >> 8)
            counts += tl.histogram((bits >> shift) & 0xFF, 256, mask)
        below = tl.cumsum(counts, axis=0) <= rank
        found |= tl.sum(below.to(tl.int32), axis=0) << shift
        rank -= tl.sum(tl.where(below, counts, 0), axis=0)

    at_most = tl.zeros([], tl.int64)
    successor = tl.full([], 0x7FFFFFFF, tl.int32)
    largest = tl.zeros([], tl.int32)
    for start in range(0, n, BLOCK):
        bits, mask = _magnitudes(
            x, out, cond, uncond, guides, weight, factor, row, start, n, C, BLOCK
        )
        at_most += tl.sum((mask & (bits <= found)).to(tl.int32), axis=0)
        above = tl.where(mask & (bits > found), bits, 0x7FFFFFFF)
        successor = tl.minimum(successor, tl.min(above, axis=0))
        largest = tl.maximum(largest, tl.max(tl.where(mask, bits, 0), axis=0))
    if at_most > tl.minimum(k + 1, last):
        successor = found
    low = found.to(tl.float32, bitcast=True)
    high = successor.to(tl.float32, bitcast=True)
    step = high - low
    value = tl.where(fraction < 0.5, low + fraction * step, high - (1.0 - fraction) * step)
    return tl.where(largest > INF_BITS, float("nan"), value)


@triton.jit
def _sample_stats_kernel(
    dynamic_threshold,  # float32 [S], written where the row has a threshold
    rescale_factor,  # float32 [S], written where the row rescales and the slot is guided
    x,  # float32 [S, n], rows of stride x_stride
    out,  # [L, n], or [L, 2n] of 2C channels
    idx,  # int64 [S]
    guidance,  # float32 [S]
    lane_cond,  # int32 [S]
    lane_uncond,  # int32 [S], -1 for none
    rows,  # float32 [R, COLUMNS]
    next,  # int64 [R]
    n,  # elements of an image
    x_stride,
    C: tl.constexpr,  # channels of an image if out has 2C, else 0
    BLOCK: tl.constexpr,
):
    n = tl.cast(n, tl.int64)
    slot = tl.program_id(0).to(tl.int64)
    i = tl.load(idx + slot)
    if tl.load(next + i) == i:
        return
    row = rows + i * COLUMNS
    cond = tl.load(lane_cond + slot).to(tl.int64)
    uncond = tl.load(lane_uncond + slot).to(tl.int64)
    guides = is_guided(uncond, row)
    weight = tl.load(guidance + slot)
    phi = tl.load(row + RESCALE)
    factor = tl.full([], 1.0, tl.float32)
    if phi != 0:
        if guides:
            factor = _factor(out, cond, uncond, guides, weight, phi, n, C, BLOCK)
            tl.store(rescale_factor + slot, factor)
    if tl.load(row + THRESHOLD) != 0:
        image = x + slot * x_stride
        bound = _quantile(image, out, cond, uncond, guides, weight, factor, row, n, C, BLOCK)
        cap = tl.maximum(tl.load(row + CLIP), 1.0)
        at = dynamic_threshold + slot
        tl.store(at, tl.clamp(bound, 1.0, cap, propagate_nan=tl.PropagateNan.ALL))


@torch.library.custom_op(
    "flashddpm::sample_stats",
    mutates_args=StepStatistics._fields,
    schema=tensor_schema(FLAT[:-1], StepStatistics._fields),
)
def _sample_stats(*tensors: Any) -> None:
    state, out, slots, statistics, table, _ = grouped((*tensors, None))
    x = state.x
    if not runs_triton(x):
        reference.sample_stats(state, out, slots, statistics, table)
    elif x.numel():
        n = x[0].numel()
        block = min(triton.next_power_of_2(max(n, 16)), BLOCK)
        launch(
            _sample_stats_kernel, (len(x),), x,
            *statistics, x, channels_last(out), slots.idx, slots.guidance,
            slots.lane_cond, slots.lane_uncond, table.rows, table.next,
            n, x.stride(0), doubled_channels(out, x), block, num_warps=NUM_WARPS,
        )  # fmt: skip


@_sample_stats.register_fake
def _sample_stats_fake(*tensors: Any) -> None:
    return None


def sample_stats(
    state: StepState,
    out: Tensor,
    slots: StepSlots,
    statistics: StepStatistics,
    table: StepTable,
) -> None:
    """Compute the statistics of whole images that ``denoise_step`` will read, in place.

    For each slot (the place of one image in a batch) they are, where its row (the coefficients of
    one step) asks for them, the dynamic threshold: the quantile of |x0| that the row's threshold
    names, in [1, max(clip, 1)], of the predicted x0 before clipping; and the factor that rescales
    its guidance: phi std(cond) / std(guided) + 1 - phi, of its conditional and its guided output,
    with phi the row's rescale (1 where std(guided) is 0). A slot is guided if it has an
    unconditional lane and its row's column unguided is 0. Slots whose row asks for neither, or
    points at itself, are left untouched.

    Args:
        state: only ``x``, float32 [S, C, H, W], channels-last, is read and checked.
        out: [L, C or 2C, H, W], the network's output in its L lanes (a lane is one evaluation of
            the network), float32, float16 or bfloat16, any layout.
        slots: each slot's row, guidance weight and lanes, which are read; its seeds are not.
        statistics: the vectors that are written: dynamic_threshold where the row has a threshold,
            rescale_factor where the row rescales and the slot is guided.
        table: the rows of coefficients and the row that follows each, which are read.

    Raises:
        ValueError: if a tensor has another shape, dtype, layout or device than its group
            (``StepState``, ...) or this docstring says, or an image has 2^31 or more elements; the
            message begins with the name of the tensor. Values of rows and lanes are not checked.
    """
    x = state.x
    check_state(x)
    check_output(out, x)
    if x[:1].numel() >= 2**31:
        raise ValueError(f"x of shape {tuple(x.shape)}: an image must be below 2^31 for its ranks")
    check_slots(x, slots, statistics)
    check_rows(x, table)
    _sample_stats(*state, out, *slots, *statistics, *table)


# The record of the operation, for tests, gates, counts of bytes and benchmarks.


def _example(*case: Any) -> Arguments:
    """The tensors of a step, every slot on the row that asks for both, or idle."""
    args = of_slots(*case)
    return args | {"idx": torch.where(args["idx"] != 0, len(args["rows"]) - 1, 0)}


def _bytes_moved(args: Arguments) -> int:
    """Of every pass: two over the lanes for the factor, five over lanes and x for the bound."""
    n, item = args["x"][:1].numel(), args["out"].itemsize
    index, lanes = args["idx"].tolist(), args["lane_uncond"].tolist()
    total = 0
    for row, i, uncond in zip(args["rows"][args["idx"]].tolist(), index, lanes, strict=True):
        if args["next"][i] == i:
            continue
        guided = uncond >= 0
        # The factor's passes read the conditional lane for itself and for the combination.
        total += 2 * 3 * item * n * (row[Column.RESCALE] != 0 and guided)
        total += 5 * (4 + item * (2 if guided else 1)) * n * (row[Column.THRESHOLD] != 0)
    return total


def _plain(x: Tensor, out: Tensor, guidance: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """The threshold: a quantile of |x0|, clamped; the factor: a ratio of deviations, mixed with 1.

    Coefficients are those of the example's row that asks for both. The first lanes are the
    conditional ones, the last the others; of fewer than two an image (the example guides every
    second) some are both.
    """
    cond, uncond = out[: len(x)], out[-len(x) :]
    combined = uncond + guidance.to(out.dtype).reshape(-1, 1, 1, 1) * (cond - uncond)
    ratio = cond.std(dim=(1, 2, 3)) / combined.std(dim=(1, 2, 3))
    factors = 0.7 * ratio.float() + 0.3
    x0 = (x - 0.6 * factors.reshape(-1, 1, 1, 1) * combined.float()) / 0.8
    ordered = x0.abs().flatten(1).sort(1).values  # torch.quantile is not traced by torch 2.11
    place = 0.9 * (ordered.shape[1] - 1)
    low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
    thresholds = torch.lerp(low, high, place % 1)
    return thresholds.clamp(1.0, 1.5), factors


_REASON = "loops over a whole sample; a histogram of 256 counts in shared memory"
_BUDGETS = {4: Budget(64, 1024, None, _REASON), 2: Budget(58, 1024, None, _REASON)}
_LEARNED_BUDGETS = {
    4: Budget(72, 1024, None, _REASON, width=4),
    2: Budget(74, 1024, None, _REASON, width=2),
}
_COUNTED = on_step(guided=True, x0_xt=1.25, x0_out=-0.75, clip=1.5, threshold=0.9, rescale=0.7)
_SUMS: dict[str, Any] = {"exact": False, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
_learned = LEARNED | _SUMS
OP = Op(
    name="sample_stats",
    fast=by_tensor(sample_stats),
    reference=by_tensor(reference.sample_stats),
    example=_example,
    bytes_moved=_bytes_moved,
    kernels=(
        variant("sample_stats", _sample_stats_kernel, _BUDGETS, ("x", "out"), C=0, **_SUMS),
        variant("sample_stats_learned", _sample_stats_kernel, _LEARNED_BUDGETS, ("x",), **_learned),
    ),
    cases=(ByteCase("sample_stats", _COUNTED, ("sample_stats",), _plain),),
    mutates=StepStatistics._fields,
    dtypes=FLOATS,
    index="idx",
    all_work=(Column.THRESHOLD, Column.RESCALE),
    read_again=("x", "out"),
)
