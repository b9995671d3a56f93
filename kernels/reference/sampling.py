"""Statistics of a sample, the step and the advance, in plain PyTorch (S5, S6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashddpm.kernels.reference.exact import exp
from flashddpm.kernels.reference.noise import philox
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


def predict_x0(x: Tensor, out: Tensor, row: list[float], bounds: Tensor) -> Tensor:
    """Return x0 = x0_xt x + x0_out out, clipped as the row says; float32, like ``x``.

    Args:
        x, out: float32 [S, C, H, W].
        row: one row of the table.
        bounds: float32 [S], read where the row has a threshold.
    """
    x0 = _sum((row[Column.X0_XT], x), (row[Column.X0_OUT], out))
    if row[Column.THRESHOLD]:
        s = bounds.reshape(-1, 1, 1, 1)
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
    bounds: Tensor,
    factors: Tensor,
    x: Tensor,
    out: Tensor,
    idx: Tensor,
    guidance: Tensor,
    lane_cond: Tensor,
    lane_uncond: Tensor,
    rows: Tensor,
    next: Tensor,
) -> None:
    """Compute what a slot's row asks of its whole image, in place (tables.py).

    Args:
        bounds: float32 [S]; written where the row has a threshold.
        factors: float32 [S]; written where the row rescales and the slot is guided.
        x: float32 [S, C, H, W], the state x_t.
        out: [L, C or 2C, H, W], the network's output, float32, float16 or bfloat16.
        idx, guidance, lane_cond, lane_uncond, rows, next: as for ``denoise_step``.
    """
    C = x.shape[1]
    if not x[:1].numel() or not (rows[:, [Column.THRESHOLD, Column.RESCALE]] != 0).any():
        return
    index, cond, uncond = idx.tolist(), lane_cond.tolist(), lane_uncond.tolist()
    for s, i in enumerate(index):
        row = rows[i].tolist()
        if int(next[i]) == i:
            continue
        o = out[cond[s], None, :C].float()
        if uncond[s] >= 0 and not row[Column.UNGUIDED]:
            o = combine(o, out[uncond[s], None, :C], guidance[s])
            if row[Column.RESCALE]:
                factors[s] = _rescale(out[cond[s], :C].float(), o, row[Column.RESCALE])
                o = o * factors[s]
        if row[Column.THRESHOLD]:
            x0 = _sum((row[Column.X0_XT], x[s, None]), (row[Column.X0_OUT], o))
            bound = quantile(x0.abs().reshape(1, -1), row[Column.THRESHOLD])
            bounds[s] = bound[0].clamp(1.0, max(row[Column.CLIP], 1.0))


def _rescale(cond: Tensor, out: Tensor, phi: float) -> Tensor:
    """Return phi std(cond) / std(out) + 1 - phi, or 1 where out has no deviation."""
    squares, total = [(o - o.mean()).square().sum() for o in (cond, out)]
    ratio = torch.where(total == 0, 1.0, squares / total)
    return phi * ratio.sqrt() + (1 - phi)


def denoise_step(  # noqa: C901  the terms of a row, in the order of the kernel
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
    """Apply row idx[s] to every slot s, in place (the formula stands in tables.py; S5).

    Args:
        x: float32 [S, C, H, W], the state x_t; becomes x_next.
        hist: float32 [S, C, H, W], the previous x0; written where the next row reads it.
        net_in: [L, C, H, W], float32, float16 or bfloat16: x_next goes to each lane of the slot.
        nonfinite: int32 [S]; becomes idx[s] where it is 0 and the slot's output is not finite.
        out: [L, C or 2C, H, W], the network's output, float32, float16 or bfloat16.
        idx: int64 [S], each slot's row; slots whose row points at itself are left untouched.
        seeds: int64 [S].
        guidance: float32 [S], read where lane_uncond is not negative.
        lane_cond, lane_uncond: int32 [S], the slot's lanes; lane_uncond is -1 where unguided.
        bounds, factors: float32 [S], of ``sample_stats``, read where the row asks.
        rows: float32 [R, len(Column)]; keys, next: int64 [R].
        noise: float32 [S, C, H, W] to use for z, or None to draw it.
    """
    S, C, H, W = x.shape
    L = out.shape[0]
    prediction = out if out.shape[1] == C else out[:, :C]
    cond, uncond, index = lane_cond.tolist(), lane_uncond.tolist(), idx.tolist()
    for i in sorted(set(index)):
        follow = int(next[i])
        if follow == i:
            continue
        row = rows[i].tolist()
        for guided in (False, True):
            here = [s for s, j in enumerate(index) if j == i and (uncond[s] >= 0) == guided]
            if not here:
                continue
            slots, lanes = _select(here, S), _select([cond[s] for s in here], L)
            o = _take(prediction, lanes).float()
            lanes_u = [uncond[s] for s in here]
            if guided and not row[Column.UNGUIDED]:
                o = combine(o, _take(prediction, lanes_u), _take(guidance, slots))
                if row[Column.RESCALE]:
                    o = o * _take(factors, slots).reshape(-1, 1, 1, 1)
            _flag(nonfinite, slots, o, i)

            x_t = _take(x, slots)
            x0 = predict_x0(x_t, o, row, _take(bounds, slots))
            z, sigma = o, row[Column.SIGMA]  # z is not read where sigma is 0
            if sigma:
                z = _take(seeds if noise is None else noise, slots)
                if noise is None:
                    z = philox(z, keys[i].expand(len(z)), (C, H, W), Purpose.REVERSE_STEP)
                if row[Column.LOG_SIGMA] and prediction is not out:
                    v = _take(out, lanes)[:, C:].float()
                    _flag(nonfinite, slots, v, i)
                    sigma = sigma * exp(row[Column.LOG_SIGMA] * v)
            x_next = _sum(
                (row[Column.C_X0], x0),
                (row[Column.C_XT], x_t),
                (row[Column.C_OUT], o),
                (row[Column.C_HIST], _take(hist, slots)),
                (sigma, z),
            )

            _put(x, slots, x_next)
            if rows[follow].tolist()[Column.C_HIST]:
                _put(hist, slots, x0)
            _put(net_in, lanes, x_next)
            if guided:
                _put(net_in, lanes_u, x_next)


def advance(idx: Tensor, next: Tensor) -> None:
    """Set idx[s] = next[idx[s]] for every slot, in place; idx int64 [S], next int64 [R]."""
    idx.copy_(next.index_select(0, idx))
