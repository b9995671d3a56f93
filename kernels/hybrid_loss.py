r"""Operation ``hybrid_loss``, the training loss of a network that predicts its variance too.

    L_b = w mean(l(error)) + b mean(bound),    error = out - (k0 x_0 + k1 eps)

(Equations S7 and S10 of docs/math.md; Nichol & Dhariwal 2021, eq. 16.) The second C of the
network's 2C channels, v, set the variance: the log variance of the model over that of the posterior
(S5) is d = offset + slope v, and a term of the variational bound is, in nats,

    (d - 1 + e^-d (1 + (gain precision error)^2)) / 2      the divergence of two normals
    -ln P(bin of x_0)                                      where half_bin is not 0 (t = 0)

with P under a normal of deviation e^(d/2) / precision about x_0 + gain error. The bound has a
gradient for v only. The formulas in PyTorch: ``reference/training.py``; columns: tables.py.
Bytes for each element: forward both halves of out and x_0 where used; backward the same and two
written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.exact_math import exp, ln
from flashddpm.kernels.examples import image_bytes, learned_range, of_images, on_row
from flashddpm.kernels.image_means import store_partial
from flashddpm.kernels.launch import (
    place,
)
from flashddpm.kernels.losses import error_of, loss_operator, penalty, plain_loss, slope
from flashddpm.kernels.operation import LEARNED, Arguments, Budget, ByteCase, Op, variant
from flashddpm.kernels.step_rows import lane_elements
from flashddpm.kernels.tables import FLOATS, LossColumn
from flashddpm.kernels.validation import check_image, check_images_rows, check_loss, check_output

LOSS_COLUMNS = tl.constexpr(len(LossColumn))
WEIGHT = tl.constexpr(int(LossColumn.WEIGHT))
BOUND_WEIGHT = tl.constexpr(int(LossColumn.BOUND_WEIGHT))
OFFSET = tl.constexpr(int(LossColumn.OFFSET))
SLOPE = tl.constexpr(int(LossColumn.SLOPE))
GAIN = tl.constexpr(int(LossColumn.GAIN))
PRECISION = tl.constexpr(int(LossColumn.PRECISION))
HALF_BIN = tl.constexpr(int(LossColumn.HALF_BIN))
EDGE = tl.constexpr(reference.training.EDGE)
LEAST = tl.constexpr(reference.training.LEAST)
FARTHEST = tl.constexpr(reference.training.FARTHEST)
CDF_SLOPE = tl.constexpr(reference.training.CDF_SLOPE)
CDF_CUBE = tl.constexpr(reference.training.CDF_CUBE)


@triton.jit
def _cdf(y):
    """Return the normal distribution function at y as the reference approximates it."""
    return tl.div_rn(1.0, 1.0 + exp((y + y * y * y * CDF_CUBE) * -CDF_SLOPE))


@triton.jit
def _density(y, cdf):
    """Return the derivative of `_cdf` at y, where its value is cdf."""
    return cdf * (1.0 - cdf) * CDF_SLOPE * (1.0 + y * y * (3 * CDF_CUBE))


@triton.jit
def _bin(d, shift, pixel, half):
    """Return the ends of a pixel's bin, in deviations from the mean, and the mass below each.

    The mass below the lower end is 0 for pixels at the edge of the range.
    """
    inverse = exp(d * -0.5)
    upper = tl.clamp((half - shift) * inverse, -FARTHEST, FARTHEST, tl.PropagateNan.ALL)
    lower = tl.clamp((-half - shift) * inverse, -FARTHEST, FARTHEST, tl.PropagateNan.ALL)
    edge = tl.abs(pixel) > EDGE
    mirrored = tl.where(edge, pixel > 0, shift < 0)
    a = tl.where(mirrored, -lower, upper)
    b = tl.where(mirrored, -upper, lower)
    return a, b, _cdf(a), tl.where(edge, 0.0, _cdf(b))


@triton.jit
def _terms(
    out, x0, row, seed, key, image, block, offsets, mask, n, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Return a block's error, shift = gain precision error, d, and pixels, float32 [BLOCK]."""
    start = block * BLOCK
    at, lane = lane_elements(start, offsets, n, C)
    prediction = tl.load(out + image * lane + at, mask=mask, other=0).to(tl.float32)
    v = tl.load(out + image * lane + C + at, mask=mask, other=0).to(tl.float32)
    error = error_of(
        prediction, x0, row, seed, key, block, image * n + start, offsets, mask, x0, BLOCK
    )
    shift = error * (tl.load(row + GAIN) * tl.load(row + PRECISION))
    d = tl.load(row + OFFSET) + v * tl.load(row + SLOPE)
    decoder = tl.load(row + HALF_BIN) != 0
    pixel = tl.load(
        x0 + image * n + start + offsets, mask=tl.where(decoder, mask, False), other=0
    ).to(tl.float32)
    return error, shift, d, pixel


@triton.jit
def _hybrid_loss_fwd_kernel(
    partial,  # float32 [B, blocks], weighted sums of both terms, written
    out,  # [B, 2n], the network's output
    x0,  # [B, n], read where k0 or half_bin is not 0
    t,  # int64 [B], row of each image
    seeds,  # int64 [B]
    keys,  # int64 [B]
    rows,  # float32 [T, LOSS_COLUMNS]
    delta,
    n,  # elements of an image
    LOSS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, block, offsets, mask, n = place(n, BLOCK)
    row = rows + tl.load(t + image) * LOSS_COLUMNS
    seed, key = tl.load(seeds + image), tl.load(keys + image)
    error, shift, d, pixel = _terms(
        out, x0, row, seed, key, image, block, offsets, mask, n, C, BLOCK
    )
    half = tl.load(row + HALF_BIN)
    if half != 0:
        _, _, mass_a, mass_b = _bin(d, shift, pixel, half * tl.load(row + PRECISION))
        mass = mass_a - mass_b
        mass = tl.where(mass < LEAST, LEAST, mass)
        bound = tl.where(mass == mass, -ln(mass, 0), mass)  # ln takes NaN for a number
    else:
        bound = 0.5 * (d - 1.0 + exp(-d) * (1.0 + shift * shift))
    simple = tl.sum(tl.where(mask, penalty(error, delta, LOSS), 0.0), axis=0)
    bound_sum = tl.sum(tl.where(mask, bound, 0.0), axis=0)
    total = simple * tl.load(row + WEIGHT) + bound_sum * tl.load(row + BOUND_WEIGHT)
    store_partial(partial, total, image, block)


@triton.jit
def _hybrid_loss_bwd_kernel(
    d_out,  # [B, 2n], gradient of the network's output, written
    d_loss,  # float32 [B]
    out,  # [B, 2n]
    x0,  # [B, n], read where k0 or half_bin is not 0
    t,  # int64 [B]
    seeds,  # int64 [B]
    keys,  # int64 [B]
    rows,  # float32 [T, LOSS_COLUMNS]
    delta,
    n,  # elements of an image
    LOSS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, block, offsets, mask, n = place(n, BLOCK)
    row = rows + tl.load(t + image) * LOSS_COLUMNS
    seed, key = tl.load(seeds + image), tl.load(keys + image)
    error, shift, d, pixel = _terms(
        out, x0, row, seed, key, image, block, offsets, mask, n, C, BLOCK
    )
    half = tl.load(row + HALF_BIN)
    if half != 0:
        a, b, mass_a, mass_b = _bin(d, shift, pixel, half * tl.load(row + PRECISION))
        mass = mass_a - mass_b
        inner = tl.where(mass_b == 0, 0.0, _density(b, mass_b) * b)
        rate = tl.div_rn(_density(a, mass_a) * a - inner, mass)
        bound = tl.where(mass <= LEAST, 0.0, rate)
    else:
        bound = 1.0 - exp(-d) * (1.0 + shift * shift)
    scale = tl.div_rn(tl.load(d_loss + image), tl.cast(n, tl.float32))
    d_error = scale * tl.load(row + WEIGHT) * slope(error, delta, LOSS)
    d_v = scale * tl.load(row + BOUND_WEIGHT) * (0.5 * tl.load(row + SLOPE)) * bound
    at, lane = lane_elements(block * BLOCK, offsets, n, C)
    pixel_out = d_out + image * lane + at
    tl.store(pixel_out, d_error.to(d_out.dtype.element_ty), mask=mask)
    tl.store(pixel_out + C, d_v.to(d_out.dtype.element_ty), mask=mask)


_hybrid_loss = loss_operator(
    "hybrid_loss", _hybrid_loss_fwd_kernel, _hybrid_loss_bwd_kernel, learned=True
)


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
    """Return the hybrid loss w mean(l(error)) + b mean(bound) of each image, float32 [B].

    (Equations S7 and S10 of docs/math.md; Nichol & Dhariwal 2021, eq. 16.) The first C channels of
    ``out`` are the prediction, whose error is out - (k0 x0 + k1 eps) with the noise eps of
    ``add_noise``. The second C, v, set the log variance of the model over that of the posterior, d
    = offset + slope v, in the term of the variational bound, in nats,

        (d - 1 + e^-d (1 + (gain precision error)^2)) / 2     (the divergence of two normals)

    or, where half_bin is not 0, -ln of the probability of x0's bin, x0 +- half_bin, under a normal
    of deviation e^(d/2) / precision about x0 + gain error; bins of the first and the last pixel
    value (|x0| > 0.999) are open. Each image's coefficients are its row of ``rows``: k0 is the
    column x0, k1 eps, w weight, b bound_weight. Differentiable with respect to ``out``, once (no
    second derivative); the bound has a gradient for v only, and the images have none.

    Args:
        out: the network's output, [B, 2C, H, W], float32, float16 or bfloat16, any layout.
        x0: the clean images, [B, C, H, W] in [-1, 1], float32, float16 or bfloat16, any layout.
        t: int64 [B], the row of ``rows`` of each image, in [0, T): not checked, for that would wait
            for the device.
        seeds, keys: int64 [B], the noise seeds and keys (the upper 64 bits of the noise counter)
            that ``add_noise`` got, with Purpose.TRAINING.
        rows: float32 [T, len(LossColumn)], the coefficients of each timestep, a column for each
            ``LossColumn`` (``flashddpm.diffusion.loss_tables.hybrid_rows`` makes them).
        loss: the penalty l of an error e: "mse" (e^2), "l1" (|e|) or "huber" (e^2 / 2 where |e| <=
            delta, delta (|e| - delta / 2) beyond).
        delta: the |e| where "huber" turns from a parabola to a line, in [1e-37, 1e37].

    Raises:
        ValueError: if x0 is not a [B, C, H, W] of these dtypes with fewer than 2^34 elements an
            image; if out is not a [B, 2C, H, W] of these dtypes on x0's device; if t, seeds, keys
            or rows is not contiguous, of this shape and dtype, and on that device; if loss is none
            of these; or if delta is out of range, whatever the loss.
    """
    check_image("x0", x0)
    check_output(out, x0, lanes=len(x0))
    if out.shape[1] != 2 * x0.shape[1]:
        raise ValueError(f"out of shape {tuple(out.shape)}: must have {2 * x0.shape[1]} channels")
    check_images_rows(t, seeds, keys, rows, len(LossColumn), out)
    check_loss(loss, delta)
    return _hybrid_loss(out, x0, t, seeds, keys, rows, loss, delta)


# The record of the operation, for tests, gates, counts of bytes and benchmarks.

ROWS = [
    [0.0, 1.0, 1.0, 1.5, 0.7, 0.6, -0.4, 3.0, 0.0],
    [-0.6, 0.8, 0.5, 1.5, 0.1, 0.2, -0.3, 2.0, 0.0],
    [0.0, 1.0, 1.0, 1.5, 0.9, 0.8, -0.02, 60.0, 1 / 255],  # the decoder's
]


def _example(*case: Any) -> Arguments:
    args = of_images(*case, rows=ROWS, outputs=2)
    return args | {"x0": args["x0"].clamp(-1, 1)}


def _bytes_moved(args: Arguments) -> int:
    rows = args["rows"][args["t"]]
    read = (rows[:, LossColumn.X0] != 0).sum() + (rows[:, LossColumn.HALF_BIN] != 0).sum()
    return args["out"].numel() * args["out"].itemsize + int(read) * image_bytes(args["x0"])


def _plain(out: Tensor, x0: Tensor, t: Tensor, rows: Tensor, **_: Any) -> Tensor:
    """The error's square, and the divergence of the learned from the true posterior."""
    prediction, log_variance = learned_range(out)
    shift = 0.1 * (prediction.detach().float() - x0.float())  # of the means; the noise: here x0
    bound = 0.5 * (2.0 + log_variance + torch.exp(-3.0 - log_variance))
    bound = bound + 0.5 * shift**2 * torch.exp(-log_variance)
    return plain_loss(prediction, x0, t, rows) + bound.mean(dim=(1, 2, 3))


_REASON = (
    "noise, and the bound of a learned variance: exponentials and a logarithm by polynomials, the "
    "decoder's bins with four divisions; 2C channels of 3 are read one by one"
)
_BUDGETS = {
    "hybrid_loss": {
        4: Budget(58, 16, 303.0, _REASON, width=4),
        2: Budget(72, 16, 308.0, _REASON, width=2),
    },
    "hybrid_loss_backward": {
        4: Budget(84, 2048, 323.5, _REASON, width=4),
        2: Budget(84, 2048, 336.5, _REASON, width=2),
    },
}
_ROW = on_row([0.0, 1.0, 1.0, 1.5, 0.7, 0.6, -0.4, 3.0, 0.0])
OP = Op(
    name="hybrid_loss",
    fast=hybrid_loss,
    reference=reference.hybrid_loss,
    example=_example,
    bytes_moved=_bytes_moved,
    kernels=tuple(
        variant(name, fn, _BUDGETS[name], ("x0",), **LEARNED, LOSS=0)
        for name, fn in (
            ("hybrid_loss", _hybrid_loss_fwd_kernel),
            ("hybrid_loss_backward", _hybrid_loss_bwd_kernel),
        )
    ),
    cases=(
        ByteCase("hybrid_loss", _ROW, ("hybrid_loss",), _plain),
        ByteCase("hybrid_loss backward", _ROW, ("hybrid_loss_backward",), _plain, backward=True),
    ),
    differentiable=("out",),
    gradient_bytes=lambda args: _bytes_moved(args) + args["out"].nbytes,  # the gradient is written
    dtypes=FLOATS,
    index="t",
    all_work=(LossColumn.EPS,),
)
