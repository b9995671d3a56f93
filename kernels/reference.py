r"""Every kernel in plain PyTorch, under the same name and signature: what the fast path must equal.

Noise: Philox4x32-10 (Salmon et al. 2011) with the image's 64-bit seed as key and the counter
(element // 4, purpose, low and high word of the noise key); element in channels-last order
(h, w, c) of one image. The four words of a call give four normals by the Box-Muller transform,
written with exact float32 operations only, each rounded separately, so that every device draws
the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashddpm.kernels.contract import Column, Purpose

MASK = 0xFFFFFFFF

# Cephes logf, sinf and cosf: the coefficients of Horner's rule, highest power first.
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
LN2_LOW, LN2_HIGH = -2.12194440e-4, 0.693359375
ANGLE = 1.462918e-9  # pi/2 2^-30, to seven digits: part of the stream


def philox_words(
    seeds: Tensor, keys: Tensor, purpose: int, groups: int, rounds: int = 10, first: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of each of ``groups`` calls, int64 [B, groups] < 2^32.

    Args:
        seeds, keys: int64 [B].
        purpose: the counter's second word.
        groups: number of calls for each image.
        rounds: 10; a test tells 7 from 10.
        first: number of the first call.
    """
    c0 = torch.arange(first, first + groups, device=seeds.device).expand(len(seeds), groups)
    c1 = torch.full_like(c0, purpose)
    c2 = (keys & MASK)[:, None].expand_as(c0)
    c3 = (keys >> 32 & MASK)[:, None].expand_as(c0)
    k0, k1 = (seeds & MASK)[:, None], (seeds >> 32 & MASK)[:, None]
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 & MASK ^ c1 ^ k0, p1 & MASK, p0 >> 32 & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def _uniform(seeds: Tensor, keys: Tensor, purpose: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return u in (0, 1], float32, and the angle's word, int64, each [B, groups, 2]."""
    w0, w1, w2, w3 = philox_words(seeds, keys, purpose, groups)
    u = torch.stack([w0, w2], -1).float() * 2.0**-32 + 2.0**-33
    return u, torch.stack([w1, w3], -1)


def _split(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return e and the bits of m in [sqrt .5, sqrt 2) with u = m 2^e, both int32."""
    e = (bits - 0x3F3504F3) >> 23
    return e, bits - (e << 23)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


def _box_muller(m: Tensor, e: Tensor, word: Tensor) -> Tensor:
    """Return the normals r cos, r sin of each pair, float32 [B, groups, 4]."""
    exponent = e.float()
    x = m - 1
    z = x * x
    y = _horner(x, LN) * x * z
    y = y + exponent * LN2_LOW
    y = y - z * 0.5
    ln_u = x + y + exponent * LN2_HIGH
    # torch.sqrt on float32 may be off by an ulp on the CPU; through float64 it is exact.
    r = torch.sqrt((ln_u * -2).double()).float()

    quadrant = word >> 30
    a = ((word & 0x3FFFFFFF) - 2**29).float() * ANGLE
    z = a * a
    s = _horner(z, SIN) * z * a + a
    c = _horner(z, COS) * z * z - z * 0.5 + 1
    swap = (quadrant & 1) == 1
    cos, sin = torch.where(swap, s, c), torch.where(swap, c, s)
    cos = torch.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = torch.where(quadrant >= 2, -sin, sin)
    return torch.stack([r * cos, r * sin], -1).flatten(-2)


def philox(
    seeds: Tensor, keys: Tensor, shape: tuple[int, int, int], purpose: int = Purpose.INITIAL
) -> Tensor:
    """Return standard normal noise, float32 [B, C, H, W], channels-last.

    Args:
        seeds, keys: int64 [B].
        shape: (C, H, W) of one image.
        purpose: what the noise is for.
    """
    return philox_in_pieces(PIECES, seeds, keys, shape, purpose)


PIECES = (_uniform, _split, _box_muller)


def philox_in_pieces(
    pieces: tuple[Callable, Callable, Callable],
    seeds: Tensor,
    keys: Tensor,
    shape: tuple[int, int, int],
    purpose: int,
) -> Tensor:
    """Return ``philox``'s noise by the given forms of ``PIECES``, casts of bits between them."""
    uniform, split, box_muller = pieces
    C, H, W = shape
    n = C * H * W
    u, word = uniform(seeds, keys, int(purpose), (n + 3) // 4)
    e, m_bits = split(u.view(torch.int32))
    z = box_muller(m_bits.view(torch.float32), e, word)
    return z.flatten(1)[:, :n].reshape(len(seeds), H, W, C).permute(0, 3, 1, 2)


def add_noise(
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    purpose: int = Purpose.TRAINING,
) -> Tensor:
    """Return x_t = rows[t, 0] x0 + rows[t, 1] eps in x0's dtype, computed in float32   (S2, S4).

    Args:
        x0: [B, C, H, W], float32, float16 or bfloat16.
        t: int64 [B], the row of each image.
        seeds, keys: int64 [B].
        rows: float32 [T, 2].
        purpose: what the noise is for.
    """
    a, b = rows[t].reshape(-1, 2, 1, 1, 1).unbind(1)
    _, C, H, W = x0.shape
    eps = philox(seeds, keys, (C, H, W), purpose)
    return (_term(a, x0.float()) + _term(b, eps)).to(x0.dtype)


def _term(coefficient: Tensor, value: Tensor) -> Tensor:
    """Return coefficient x value, and exactly 0 where the coefficient is 0."""
    return torch.where(coefficient == 0, 0.0, coefficient * value)


def diffusion_loss(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    """Return w mean((out - (k0 x0 + k1 eps))^2) for each image, float32 [B]   (S7).

    (k0, k1, w) = rows[t]; eps is the noise that ``add_noise`` drew for the same seeds and keys.
    float64 inputs are computed in float64 (for gradient checks). Gradient for ``out`` only.

    Args:
        out: the network's output, [B, C, H, W], float32, float16 or bfloat16.
        x0: [B, C, H, W], float32, float16 or bfloat16.
        t: int64 [B], the row of each image.
        seeds, keys: int64 [B].
        rows: float32 [T, 3].
    """
    error, weight = _loss_error(out, x0, t, seeds, keys, rows)
    return weight.flatten() * (error * error).flatten(1).mean(1)


def diffusion_loss_backward(
    d_loss: Tensor, out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    """Return 2 w d_loss / n (out - target), the gradient for ``out``, in its dtype.

    Args:
        d_loss: float32 [B], the gradient of the loss; the others as for ``diffusion_loss``.
    """
    error, weight = _loss_error(out, x0, t, seeds, keys, rows)
    scale = 2 * weight * d_loss.reshape(-1, 1, 1, 1) / max(out.shape[1:].numel(), 1)
    return (scale * error).to(out.dtype)


def _loss_error(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return out - (k0 x0 + k1 eps) and the weight, [B, 1, 1, 1]."""
    dtype = torch.float64 if out.dtype is torch.float64 else torch.float32
    k0, k1, weight = rows[t].to(dtype).reshape(-1, 3, 1, 1, 1).unbind(1)
    _, C, H, W = x0.shape
    eps = philox(seeds, keys, (C, H, W), Purpose.TRAINING).to(dtype)
    return out.to(dtype) - (_term(k0, x0.detach().to(dtype)) + _term(k1, eps)), weight


def _take(tensor: Tensor, index: list[int]) -> Tensor:
    """Return tensor[index]; without a copy where the index counts up from 0."""
    n = len(index)
    if index != list(range(n)):
        return tensor[index]
    return tensor if n == len(tensor) else tensor[:n]


def _put(tensor: Tensor, index: list[int], value: Tensor) -> None:
    if index == list(range(len(index))):
        _take(tensor, index).copy_(value)
    else:
        tensor[index] = value.to(tensor.dtype)


def combine(cond: Tensor, uncond: Tensor, guidance: Tensor) -> Tensor:
    """Return uncond + w (cond - uncond) in float32 (Ho & Salimans 2022)."""
    cond, uncond = cond.float(), uncond.float()
    return uncond + guidance.reshape(-1, 1, 1, 1) * (cond - uncond)


def _sum(*terms: tuple[float, Tensor]) -> Tensor:
    """Return the sum of c v from left to right, without the terms whose c is 0; -0 if none is left.

    -0 is where a sum starts (-0 + p is p, its sign included), so the first term is p itself.
    """
    total = None
    for c, v in terms:
        if c:
            total = v * c if total is None else total.add_(v * c)
    return torch.full_like(terms[0][1], -0.0) if total is None else total


def predict_x0(x: Tensor, out: Tensor, row: list[float]) -> Tensor:
    """Return x0 = x0_xt x + x0_out out, clipped as the row says; float32, like ``x``."""
    x0 = _sum((row[Column.X0_XT], x), (row[Column.X0_OUT], out))
    return x0.clamp_(-row[Column.CLIP], row[Column.CLIP]) if row[Column.CLIP] else x0


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
    """Apply row idx[s] to every slot s, in place (the formula stands in contract.py; S5).

    Args:
        x: float32 [S, C, H, W], the state x_t; becomes x_next.
        hist: float32 [S, C, H, W], the previous x0; written where the next row reads it.
        net_in: [L, C, H, W], float32, float16 or bfloat16: x_next goes to each lane of the slot.
        nonfinite: int32 [S]; becomes idx[s] where it is 0 and the slot's output is not finite.
        out: [L, C, H, W], the network's output, float32, float16 or bfloat16.
        idx: int64 [S], each slot's row; slots whose row points at itself are left untouched.
        seeds: int64 [S].
        guidance: float32 [S], read where lane_uncond is not negative.
        lane_cond, lane_uncond: int32 [S], the slot's lanes; lane_uncond is -1 where unguided.
        rows: float32 [R, len(Column)]; keys, next: int64 [R].
        noise: float32 [S, C, H, W] to use for z, or None to draw it.
    """
    cond, uncond, index = lane_cond.tolist(), lane_uncond.tolist(), idx.tolist()
    for i in sorted(set(index)):
        follow = int(next[i])
        if follow == i:
            continue
        row = rows[i].tolist()
        for guided in (False, True):
            slots = [s for s, j in enumerate(index) if j == i and (uncond[s] >= 0) == guided]
            if not slots:
                continue
            lanes = [cond[s] for s in slots]
            o = _take(out, lanes).float()
            if guided:
                lanes_u = [uncond[s] for s in slots]
                o = combine(o, _take(out, lanes_u), _take(guidance, slots))
            if not math.isfinite(o.sum()):  # some may not be finite, or the sum alone overflowed
                flag = _take(nonfinite, slots)
                bad = ~torch.isfinite(o).flatten(1).all(1)
                _put(nonfinite, slots, torch.where(bad & (flag == 0), i, flag))

            x_t = _take(x, slots)
            x0 = predict_x0(x_t, o, row)
            z = o  # not read where sigma is 0
            if row[Column.SIGMA]:
                if noise is None:
                    key = keys[i].expand(len(slots))
                    shape = (x.shape[1], x.shape[2], x.shape[3])
                    z = philox(_take(seeds, slots), key, shape, Purpose.REVERSE_STEP)
                else:
                    z = _take(noise, slots)
            x_next = _sum(
                (row[Column.C_X0], x0),
                (row[Column.C_XT], x_t),
                (row[Column.C_OUT], o),
                (row[Column.C_HIST], _take(hist, slots)),
                (row[Column.SIGMA], z),
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
