"""Statistics of a sample, the step and the advance, in plain PyTorch (S5, S6)."""

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
"""Of slots or lanes; None for all of them."""


def _select(index: list[int], count: int) -> Selection:
    """Return these of ``count``: as all, or as a view, if they count up from 0."""
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
    """Return uncond + w (cond - uncond) in float32 (Ho & Salimans 2022)."""
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
    """Return x0 = x0_xt x + x0_out out, clipped as the row says; float32, like ``x``.

    Args:
        x, out: float32 [S, C, H, W].
        row: one row of the table.
        dynamic_threshold: float32 [S], read where the row has a threshold.
    """
    x0 = _sum((row[Column.X0_XT], x), (row[Column.X0_OUT], out))
    if row[Column.THRESHOLD]:
        s = dynamic_threshold.reshape(-1, 1, 1, 1)
        return x0.clamp_(-s, s).div_(s)
    return x0.clamp_(-row[Column.CLIP], row[Column.CLIP]) if row[Column.CLIP] else x0


def quantile(values: Tensor, q: float) -> Tensor:
    """Return the q-quantile of each row, float32 [S], as torch.quantile does; NaN if one is NaN.

    Between the two ranks about q (n - 1) the quantile is on a line. torch.quantile itself takes no
    more than 2^24 values.

    Args:
        values: float32 [S, n], n >= 1.
        q: in (0, 1].
    """
    ordered = values.sort(1).values
    last = ordered.shape[1] - 1
    rank = q * last
    k = int(rank)
    below, above = ordered[:, k], ordered[:, min(k + 1, last)]
    between = _between(below, above, rank - k)
    return torch.where(ordered[:, -1].isnan(), torch.nan, between)


def _between(below: Tensor, above: Tensor, weight: float) -> Tensor:
    """Return a point of the line, from its nearer end."""
    step = above - below
    return below + weight * step if weight < 0.5 else above - (1 - weight) * step


def sample_stats(
    state: StepState,
    out: Tensor,
    slots: StepSlots,
    statistics: StepStatistics,
    table: StepTable,
) -> None:
    """Compute what a slot's row asks of its whole image, in place (tables.py).

    Args:
        state: whose x it reads.
        out: [L, C or 2C, H, W], the network's output, float32, float16 or bfloat16.
        slots: whose rows, guidance and lanes it reads.
        statistics: what it writes, where the row asks.
        table: whose rows it reads, and those that follow.
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
) -> Iterator[tuple[int, list[float], Selection, Selection, list[int]]]:
    """Yield the slots that take a step, by row and by whether they are guided.

    Yields:
        The row's number, its columns, the slots, their conditional lanes of so many, and their
        lanes for no label: none where they are not guided.
    """
    cond, uncond = slots.lane_cond.tolist(), slots.lane_uncond.tolist()
    index = slots.idx.tolist()
    for i in sorted(set(index)):
        if int(table.next[i]) == i:
            continue
        row = table.rows[i].tolist()
        for guided in (False, True):
            here = [s for s, j in enumerate(index) if j == i and (uncond[s] >= 0) == guided]
            if here:
                which = _select(here, len(index)), _select([cond[s] for s in here], lanes)
                yield i, row, *which, [uncond[s] for s in here if guided]


def denoise_step(
    state: StepState,
    out: Tensor,
    slots: StepSlots,
    statistics: StepStatistics,
    table: StepTable,
    noise: Tensor | None = None,
) -> None:
    """Apply row idx[s] to every slot s, in place (the formula: tables.py; S5).

    Slots whose row points at itself are left untouched.

    Args:
        state: what the step changes: x, hist, net_in and nonfinite.
        out: [L, C or 2C, H, W], the network's output, float32, float16 or bfloat16.
        slots: each slot's row, seed, guidance and lanes.
        statistics: of ``sample_stats``, read where the row asks.
        table: rows, keys and the rows that follow.
        noise: float32 [S, C, H, W] to use for z, or None to draw it.
    """
    x, hist, net_in, nonfinite = state
    _, C, H, W = x.shape
    prediction = out if out.shape[1] == C else out[:, :C]
    for i, row, which, lanes, lanes_u in _moving(slots, table, len(out)):
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
        if table.rows[int(table.next[i])].tolist()[Column.C_HIST]:
            _put(hist, which, x0)
        _put(net_in, lanes, x_next)
        if lanes_u:
            _put(net_in, lanes_u, x_next)


def advance(slots: StepSlots, table: StepTable) -> None:
    """Set idx[s] = next[idx[s]] for every slot, in place."""
    slots.idx.copy_(table.next.index_select(0, slots.idx))
