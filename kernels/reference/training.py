"""Forward noising and the training losses, in plain PyTorch.

(Equations S2, S4, S7 and S10 of docs/math.md.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashddpm.kernels.reference.noise import philox
from flashddpm.kernels.tables import LossColumn, Purpose


def add_noise(
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    purpose: int = Purpose.TRAINING,
) -> Tensor:
    """Return the images with noise added, x_t = rows[t, 0] x0 + rows[t, 1] eps.

    eps is the standard normal noise that ``philox`` gives for the same seeds, keys and purpose.
    Computed in float32 whatever the dtype. Arguments are not checked.

    Args:
        x0: [B, C, H, W], the images, float32, float16 or bfloat16.
        t: int64 [B], the row of ``rows`` of each image, in [0, T).
        seeds, keys: int64 [B], the seed of each image's noise eps and its key (the upper 64 bits of
            the noise counter).
        rows: float32 [T, 2], the factors of x0 and of eps.
        purpose: what the noise is for, in 0..2^32-1 (``Purpose``): the second word of the noise
            counter.

    Returns:
        [B, C, H, W], in x0's dtype.
    """
    a, b = rows[t].reshape(-1, 2, 1, 1, 1).unbind(1)
    _, C, H, W = x0.shape
    eps = philox(seeds, keys, (C, H, W), purpose)
    return _sum(a, x0.float(), b, eps).to(x0.dtype)


def _sum(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return a x + b y; a term whose coefficient is 0 is 0, and b's is -0, which adds nothing."""
    return a * torch.where(a == 0, 0.0, x) + torch.where(b == 0, -0.0, b * y)


def diffusion_loss(
    out: Tensor,
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    loss: str = "mse",
    delta: float = 1.0,
) -> Tensor:
    """Return the training loss w mean(l(out - (k0 x0 + k1 eps))) of each image.

    (Equation S7 of docs/math.md.) (k0, k1, w) = rows[t], and l is the penalty ``loss``; eps is the
    noise that ``add_noise`` drew for the same seeds and keys. A float64 ``out`` is computed in
    float64 (for gradient checks). Differentiable with respect to ``out`` only. Arguments are not
    checked: another name of a loss counts as "huber".

    Args:
        out: the network's output, [B, C, H, W], float32, float16, bfloat16 or float64.
        x0: the clean images, [B, C, H, W], float32, float16 or bfloat16.
        t: int64 [B], the row of ``rows`` of each image, in [0, T).
        seeds, keys: int64 [B], the noise seeds and keys (the upper 64 bits of the noise counter)
            that ``add_noise`` got, with Purpose.TRAINING.
        rows: float32 [T, at least 3], whose first columns are the factors k0 and k1 of the target
            and the weight w.
        loss: the penalty of an error e: "mse" (e^2), "l1" (|e|) or "huber" (e^2 / 2 where |e| <=
            delta, delta (|e| - delta / 2) beyond).
        delta: the |e| where "huber" turns from a parabola to a line; above 0.

    Returns:
        float32 [B]; float64 for a float64 ``out``.
    """
    error, weight = _error(out, x0, t, seeds, keys, rows)
    return weight.flatten() * _penalty(error, loss, delta).flatten(1).mean(1)


def diffusion_loss_backward(
    d_loss: Tensor,
    out: Tensor,
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    loss: str = "mse",
    delta: float = 1.0,
) -> Tensor:
    """Return the gradient of ``diffusion_loss`` for ``out``: (w d_loss / n) l'(out - target).

    n is the number of elements of an image, the target is k0 x0 + k1 eps with (k0, k1, w) =
    rows[t], and l' is the derivative of the penalty l. A float64 ``out`` is computed in float64.
    Arguments are not checked: another name of a loss counts as "huber".

    Args:
        d_loss: float32 or float64 [B], the gradient with respect to the loss of each image.
        out: the network's output, [B, C, H, W], float32, float16, bfloat16 or float64.
        x0: the clean images, [B, C, H, W], float32, float16 or bfloat16.
        t: int64 [B], the row of ``rows`` of each image, in [0, T).
        seeds, keys: int64 [B], the seed of each image's noise eps and its key (the upper 64 bits of
            the noise counter).
        rows: float32 [T, at least 3], whose first columns are the factors k0 and k1 of the target
            and the weight w.
        loss: the penalty of an error e: "mse" (e^2), "l1" (|e|) or "huber" (e^2 / 2 where |e| <=
            delta, delta (|e| - delta / 2) beyond).
        delta: the |error| where "huber" turns from a parabola to a line; above 0.

    Returns:
        [B, C, H, W], in out's dtype.
    """
    error, weight = _error(out, x0, t, seeds, keys, rows)
    scale = weight * d_loss.reshape(-1, 1, 1, 1) / max(out.shape[1:].numel(), 1)
    return (scale * _slope(error, loss, delta)).to(out.dtype)


def _error(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return out - (k0 x0 + k1 eps) and the weight, [B, 1, 1, 1]."""
    dtype = torch.float64 if out.dtype is torch.float64 else torch.float32
    k0, k1, weight = rows[t, :3].to(dtype).reshape(-1, 3, 1, 1, 1).unbind(1)
    _, C, H, W = x0.shape
    eps = philox(seeds, keys, (C, H, W), Purpose.TRAINING).to(dtype)
    return out.to(dtype) - _sum(k0, x0.detach().to(dtype), k1, eps), weight


def _penalty(error: Tensor, loss: str, delta: float) -> Tensor:
    if loss == "mse":
        return error * error
    size = error.abs()
    if loss == "l1":
        return size
    return torch.where(size > delta, delta * (size - 0.5 * delta), 0.5 * error * error)


def _slope(error: Tensor, loss: str, delta: float) -> Tensor:
    """Return the derivative of the penalty; NaN where the error is."""
    if loss == "mse":
        return 2 * error
    if loss == "l1":
        return torch.where(error > 0, 1, torch.where(error < 0, -1, error))
    return error.clamp(-delta, delta)


def hybrid_loss(
    out: Tensor,
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    loss: str = "mse",
    delta: float = 1.0,
) -> Tensor:
    """Return the hybrid loss w mean(l(error)) + b mean(bound) of each image.

    (Equations S7 and S10 of docs/math.md; Nichol & Dhariwal 2021, eq. 16.) The first C channels of
    ``out`` are the prediction, whose error is e = prediction - (k0 x0 + k1 eps); the second, v, set
    the variance. The bound's term, in nats, has a gradient for v only. The log variance of the
    model over that of the posterior is d = offset + slope v, and the term is

        (d - 1 + exp(-d) (1 + (gain precision e)^2)) / 2     (the divergence of two normals)

    or, where half_bin is not 0, -ln of the probability of x0's bin, x0 +- half_bin, under a normal
    of deviation exp(d / 2) / precision about x0 + gain e, whose distribution function is computed
    to 3e-4; bins of the first and the last pixel value (|x0| > 0.999) are open. Arguments are not
    checked: another name of a loss counts as "huber".

    Args:
        out: the network's output, [B, 2C, H, W], float32, float16, bfloat16 or float64.
        x0: the clean images, [B, C, H, W], float32, float16 or bfloat16, in [-1, 1].
        t: int64 [B], the row of ``rows`` of each image, in [0, T).
        seeds, keys: int64 [B], the noise seeds and keys (the upper 64 bits of the noise counter)
            that ``add_noise`` got, with Purpose.TRAINING.
        rows: float32 [T, len(LossColumn)], the coefficients of each timestep, a column for each
            ``LossColumn``: k0 is the column x0, k1 eps, w weight, b bound_weight.
        loss: the penalty l of an error e: "mse" (e^2), "l1" (|e|) or "huber" (e^2 / 2 where |e| <=
            delta, delta (|e| - delta / 2) beyond).
        delta: the |e| where "huber" turns from a parabola to a line; above 0.

    Returns:
        float32 [B]; float64 for a float64 ``out``.
    """
    prediction, v = out.chunk(2, 1)
    error, weight = _error(prediction, x0, t, seeds, keys, rows)
    simple = weight.flatten() * _penalty(error, loss, delta).flatten(1).mean(1)
    bound_weight, *columns = _bound_columns(rows, t, error.dtype)
    bound = _bound(error.detach(), v.to(error.dtype), x0.to(error.dtype), *columns)
    return simple + bound_weight.flatten() * bound.flatten(1).mean(1)


def _bound_columns(rows: Tensor, t: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the columns from bound_weight on, [B, 1, 1, 1] each."""
    columns = rows[t].to(dtype).reshape(len(t), len(LossColumn), 1, 1, 1).unbind(1)
    return list(columns[int(LossColumn.BOUND_WEIGHT) :])


def _bound(
    error: Tensor,
    v: Tensor,
    x0: Tensor,
    offset: Tensor,
    slope: Tensor,
    gain: Tensor,
    precision: Tensor,
    half: Tensor,
) -> Tensor:
    """Return the term of the variational bound of each element, in nats."""
    shift = gain * precision * error
    d = offset + slope * v
    divergence = 0.5 * (d - 1 + torch.exp(-d) * (1 + shift * shift))
    upper, lower = _edges(d, shift, x0, half * precision)
    probability = _cdf(upper) - torch.where(x0.abs() > EDGE, 0.0, _cdf(lower))
    nll = -torch.log(probability.clamp(min=LEAST))
    return torch.where(half == 0, divergence, nll)


EDGE = 0.999  # pixels beyond are the first and the last: their bins have no outer edge
LEAST = 1e-12
FARTHEST = 12.0  # deviations; all of the mass lies within, to float32
CDF_SLOPE, CDF_CUBE = 1.5957691216, 0.044715  # 2 sqrt(2 / pi); Page 1977


def _cdf(y: Tensor) -> Tensor:
    """Return the normal distribution function to 3e-4, as Nichol & Dhariwal's loss does."""
    return torch.sigmoid(CDF_SLOPE * (y + CDF_CUBE * (y * y * y)))


def _edges(d: Tensor, shift: Tensor, x0: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of a pixel's bin, in deviations from the mean, or of its mirror image.

    The probability of [a, b] is that of [-b, -a]: of the two, the one nearer to minus infinity has
    values of the distribution function that do not cancel.
    """
    inverse = torch.exp(-0.5 * d)
    upper = ((half - shift) * inverse).clamp(-FARTHEST, FARTHEST)
    lower = ((-half - shift) * inverse).clamp(-FARTHEST, FARTHEST)
    mirrored = torch.where(x0.abs() > EDGE, x0 > 0, shift < 0)
    return torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)


def hybrid_loss_backward(
    d_loss: Tensor,
    out: Tensor,
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    loss: str = "mse",
    delta: float = 1.0,
) -> Tensor:
    """Return the gradient of ``hybrid_loss`` for ``out``.

    The first C channels (the prediction) have the gradient of the penalty, the second C (v, which
    sets the variance) that of the bound's term. A float64 ``out`` is computed in float64. Arguments
    are not checked: another name of a loss counts as "huber".

    Args:
        d_loss: float32 or float64 [B], the gradient with respect to the loss of each image.
        out: the network's output, [B, 2C, H, W], float32, float16, bfloat16 or float64.
        x0: the clean images, [B, C, H, W], float32, float16 or bfloat16, in [-1, 1].
        t: int64 [B], the row of ``rows`` of each image, in [0, T).
        seeds, keys: int64 [B], the seed of each image's noise eps and its key (the upper 64 bits of
            the noise counter).
        rows: float32 [T, len(LossColumn)], the coefficients of each timestep, a column for each
            ``LossColumn``.
        loss: the penalty of an error e: "mse" (e^2), "l1" (|e|) or "huber" (e^2 / 2 where |e| <=
            delta, delta (|e| - delta / 2) beyond).
        delta: the |error| where "huber" turns from a parabola to a line; above 0.

    Returns:
        [B, 2C, H, W], in out's dtype.
    """
    prediction, v = out.chunk(2, 1)
    error, weight = _error(prediction, x0, t, seeds, keys, rows)
    bound_weight, *columns = _bound_columns(rows, t, error.dtype)
    d_loss = d_loss.reshape(-1, 1, 1, 1) / max(x0.shape[1:].numel(), 1)
    d_v = _bound_slope(error, v.to(error.dtype), x0.to(error.dtype), *columns)
    d_v = d_loss * bound_weight * d_v
    return torch.cat([weight * d_loss * _slope(error, loss, delta), d_v], 1).to(out.dtype)


def _bound_slope(
    error: Tensor,
    v: Tensor,
    x0: Tensor,
    offset: Tensor,
    slope: Tensor,
    gain: Tensor,
    precision: Tensor,
    half: Tensor,
) -> Tensor:
    """Return the derivative for v of the term of the variational bound of each element."""
    shift = gain * precision * error
    d = offset + slope * v
    divergence = 1 - torch.exp(-d) * (1 + shift * shift)
    upper, lower = _edges(d, shift, x0, half * precision)
    edge = x0.abs() > EDGE
    probability = _cdf(upper) - torch.where(edge, 0.0, _cdf(lower))
    rate = _density(upper) * upper - torch.where(edge, 0.0, _density(lower) * lower)
    nll = torch.where(probability <= LEAST, 0.0, rate / probability)
    return 0.5 * slope * torch.where(half == 0, divergence, nll)


def _density(y: Tensor) -> Tensor:
    """Return the derivative of `_cdf`."""
    cdf = _cdf(y)
    return cdf * (1 - cdf) * CDF_SLOPE * (1 + 3 * CDF_CUBE * (y * y))
