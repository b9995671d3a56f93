"""Image statistics, the reverse step and the advance of rows, in plain PyTorch.

(Equations S5 and S6 of docs/math.md.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flashddpm.kernels.reference.exact import exp
from flashddpm.kernels.reference.noise import philox
from flashddpm.kernels.step_arguments import StepSlots, StepState, StepStatistics, StepTable
from flashddpm.kernels.tables import Column, Purpose

Selection = slice | list[int] | None
"""Which slots or lanes are meant: a slice, their indices, or None for all of them."""


def _select(index: list[int], count: int) -> Selection:
    """Return these indices of ``count``: as None if all, as a slice if they count up from 0."""
    n = len(index)
    if index != list(range(n)):
        return index
    return None if n == count else slice(n)


def _take(tensor: Tensor, which: Selection) -> Tensor:
    return tensor if which is None else tensor[which]


def _put(tensor: Tensor, which: Selection, value: Tensor) -> None:
    if which is None:
        tensor.copy_(value)
    else:
        tensor[which] = value.to(tensor.dtype)


def _flag(nonfinite: Tensor, slots: Selection, values: Tensor, row: int) -> None:
    """Note the row of the slots whose values are not all finite, and that have no note yet."""
    if not math.isfinite(values.sum()):  # some may not be finite, or the sum alone overflowed
        flag = _take(nonfinite, slots)
        bad = ~torch.isfinite(values).flatten(1).all(1)
        _put(nonfinite, slots, torch.where(bad & (flag == 0), row, flag))


def combine(cond: Tensor, uncond: Tensor, guidance: Tensor) -> Tensor:
    """Return the guided output of classifier-free guidance, uncond + w (cond - uncond).

    (Ho & Salimans 2022.)

    Args:
        cond, uncond: [S, C, H, W], the conditional and unconditional outputs, float32, float16 or
            bfloat16.
        guidance: the guidance weight w, float32, [S] or a single element for all; any value.

    Returns:
        float32 [S, C, H, W].
    """
    cond, uncond = cond.float(), uncond.float()
    return uncond + guidance.reshape(-1, 1, 1, 1) * (cond - uncond)


def _sum(*terms: tuple[float | Tensor, Tensor]) -> Tensor:
    """Return the sum of c v from left to right, without the terms whose c is 0; -0 if none is left.

    -0 is where a sum starts (-0 + p is p, its sign included), so the first term is p itself.
    """
    total = None
    for c, v in terms:
        if isinstance(c, Tensor) or c:
            total = v * c if total is None else total.add_(v * c)
    return torch.full_like(terms[0][1], -0.0) if total is None else total


def predict_x0(x: Tensor, out: Tensor, row: list[float], dynamic_threshold: Tensor) -> Tensor:
    """Return the predicted x0 = x0_xt x + x0_out out, clipped as the row (one step) says.

    Args:
        x: float32 [S, C, H, W], the states x_t.
        out: float32 [S, C, H, W], the network's output.
        row: the coefficients of one step, a number for each ``Column``; where its threshold is 0,
            x0 is clipped to [-clip, clip], or not at all for clip 0.
        dynamic_threshold: float32 [S], the bound of |x0|, read where the row has a threshold: x0 is
            clipped to it and divided by it.

    Returns:
        float32 [S, C, H, W].
    """
    x0 = _sum((row[Column.X0_XT], x), (row[Column.X0_OUT], out))
    if row[Column.THRESHOLD]:
        s = dynamic_threshold.reshape(-1, 1, 1, 1)
        return x0.clamp_(-s, s).div_(s)
    return x0.clamp_(-row[Column.CLIP], row[Column.CLIP]) if row[Column.CLIP] else x0


def quantile(values: Tensor, q: float) -> Tensor:
    """Return the q-quantile of each row of a matrix as torch.quantile does, float32 [S].

    Between the two ranks next to q (n - 1) the quantile is interpolated linearly. A row with a NaN
    gives NaN. (torch.quantile itself takes no more than 2^24 values.)

    Args:
        values: float32 [S, n], n >= 1.
        q: the quantile in (0, 1]; the range is not checked.

    Raises:
        IndexError: if n is 0.
    """
    ordered = values.sort(1).values
    last = ordered.shape[1] - 1
    rank = q * last
    k = int(rank)
    below, above = ordered[:, k], ordered[:, min(k + 1, last)]
    between = _between(below, above, rank - k)
    return torch.where(ordered[:, -1].isnan(), torch.nan, between)


def _between(below: Tensor, above: Tensor, weight: float) -> Tensor:
    """Return the point between two values at a weight in [0, 1], computed from the nearer one."""
    step = above - below
    return below + weight * step if weight < 0.5 else above - (1 - weight) * step


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
    points at itself, are left untouched. Arguments are not checked.

    Args:
        state: only ``x``, float32 [S, C, H, W], is read.
        out: [L, C or 2C, H, W], the network's output in its L lanes (a lane is one evaluation of
            the network), float32, float16 or bfloat16.
        slots: each slot's row, guidance weight and lanes, which are read; its seeds are not.
        statistics: the vectors that are written: dynamic_threshold where the row has a threshold,
            rescale_factor where the row rescales and the slot is guided.
        table: the rows of coefficients and the row that follows each, which are read.
    """
    x, rows = state.x, table.rows
    C = x.shape[1]
    if not x[:1].numel() or not (rows[:, [Column.THRESHOLD, Column.RESCALE]] != 0).any():
        return
    cond, uncond = slots.lane_cond.tolist(), slots.lane_uncond.tolist()
    for s, i in enumerate(slots.idx.tolist()):
        row = rows[i].tolist()
        if int(table.next[i]) == i:
            continue
        o = out[cond[s], None, :C].float()
        if uncond[s] >= 0 and not row[Column.UNGUIDED]:
            o = combine(o, out[uncond[s], None, :C], slots.guidance[s])
            if row[Column.RESCALE]:
                factor = _rescale(out[cond[s], :C].float(), o, row[Column.RESCALE])
                statistics.rescale_factor[s] = factor
                o = o * statistics.rescale_factor[s]
        if row[Column.THRESHOLD]:
            x0 = _sum((row[Column.X0_XT], x[s, None]), (row[Column.X0_OUT], o))
            bound = quantile(x0.abs().reshape(1, -1), row[Column.THRESHOLD])
            statistics.dynamic_threshold[s] = bound[0].clamp(1.0, max(row[Column.CLIP], 1.0))


def _rescale(cond: Tensor, out: Tensor, phi: float) -> Tensor:
    """Return phi std(cond) / std(out) + 1 - phi, or 1 where out has no deviation."""
    squares, total = [(o - o.mean()).square().sum() for o in (cond, out)]
    ratio = torch.where(total == 0, 1.0, squares / total)
    return phi * ratio.sqrt() + (1 - phi)


def _moving(
    slots: StepSlots, table: StepTable, lanes: int
) -> Iterator[tuple[int, int, list[float], Selection, Selection, list[int]]]:
    """Yield the slots that take a step, by row and by whether they are guided.

    Yields:
        The row's number and that of the next, the row's columns, the slots, their conditional lanes
        of so many, and their lanes for no label: none where they are not guided.
    """
    cond, uncond = slots.lane_cond.tolist(), slots.lane_uncond.tolist()
    index = slots.idx.tolist()
    for i in sorted(set(index)):
        follow = int(table.next[i])
        if follow == i:
            continue
        row = table.rows[i].tolist()
        for guided in (False, True):
            here = [s for s, j in enumerate(index) if j == i and (uncond[s] >= 0) == guided]
            if here:
                which = _select(here, len(index)), _select([cond[s] for s in here], lanes)
                yield i, follow, row, *which, [uncond[s] for s in here if guided]


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
    Arguments are not checked.

    Args:
        state: what the step changes: ``x`` becomes x_next; ``hist`` becomes x0 where the next row
            reads the history; x_next goes to ``net_in`` at each lane (one evaluation of the
            network) of the slot; ``nonfinite`` notes the row where the network's output is not
            finite.
        out: [L, C or 2C, H, W], the network's output, float32, float16 or bfloat16; only with 2C
            channels, the second C of which are v, is the column log_sigma used.
        slots: each slot's row, noise seed, guidance weight and lanes.
        statistics: what ``sample_stats`` wrote: dynamic_threshold, read where the row has a
            threshold, and rescale_factor, read where the row rescales and the slot is guided.
        table: the rows, the key of each row's noise and the row that follows each.
        noise: float32 [S, C, H, W], standard normal noise z to use; None draws it from the slot's
            seed and the row's key.
    """
    x, hist, net_in, nonfinite = state
    _, C, H, W = x.shape
    prediction = out if out.shape[1] == C else out[:, :C]
    for i, follow, row, which, lanes, lanes_u in _moving(slots, table, out.shape[0]):
        o = _take(prediction, lanes).float()
        if lanes_u and not row[Column.UNGUIDED]:
            o = combine(o, _take(prediction, lanes_u), _take(slots.guidance, which))
            if row[Column.RESCALE]:
                o = o * _take(statistics.rescale_factor, which).reshape(-1, 1, 1, 1)
        _flag(nonfinite, which, o, i)

        x_t = _take(x, which)
        x0 = predict_x0(x_t, o, row, _take(statistics.dynamic_threshold, which))
        sigma: float | Tensor = row[Column.SIGMA]
        z = o  # not read where sigma is 0
        if sigma:
            z = _take(slots.seeds if noise is None else noise, which)
            if noise is None:
                z = philox(z, table.keys[i].expand(len(z)), (C, H, W), Purpose.REVERSE_STEP)
            if row[Column.LOG_SIGMA] and prediction is not out:
                v = _take(out, lanes)[:, C:].float()
                _flag(nonfinite, which, v, i)
                sigma = sigma * exp(row[Column.LOG_SIGMA] * v)
        x_next = _sum(
            (row[Column.C_X0], x0),
            (row[Column.C_XT], x_t),
            (row[Column.C_OUT], o),
            (row[Column.C_HIST], _take(hist, which)),
            (sigma, z),
        )

        _put(x, which, x_next)
        if table.rows[follow].tolist()[Column.C_HIST]:
            _put(hist, which, x0)
        _put(net_in, lanes, x_next)
        if lanes_u:
            _put(net_in, lanes_u, x_next)


def advance(slots: StepSlots, table: StepTable) -> None:
    """Move every slot (the place of one image in a batch) to its next row, idx[s] = next[idx[s]].

    A row is the coefficients of one step; a row that points at itself (next[i] = i) keeps its
    slots. Shapes and dtypes are not checked.

    Args:
        slots: only ``idx``, int64 [S] in [0, R), is used; it is changed in place.
        table: only ``next``, int64 [R], the row that follows each row, is read.

    Raises:
        IndexError: if an entry of idx lies outside [0, R), on the CPU.
    """
    slots.idx.copy_(table.next.index_select(0, slots.idx))
