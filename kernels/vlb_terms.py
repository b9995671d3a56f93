r"""Operation ``vlb_terms``, a term of the variational bound, and errors, of images.

(Equations S9 and S10 of docs/math.md.) The errors are those of the predicted x_0 and eps. With
error e = out - (k0 x_0 + k1 eps) of the network's own target, the predicted x_0 is off by x0_out e,
clipped where the row clips, and the predicted eps by eps_out e: what cancels in x_0 = x0_xt x_t +
x0_out out is never computed. In standard deviations of the posterior (S5) the model's mean is off
by s = gain (x_0's error); d = offset + slope v is its log variance over the posterior's. In nats, a
term of the bound is

    (d - 1 + e^-d (1 + s^2)) / 2      the divergence of two normals: L_{t-1}, and L_T
    -ln P(bin of x_0)                 where half_bin is not 0: L_0, with P as `_decoder` says

(Ho et al. 2020, eq. 5 and 13.) The formulas in PyTorch: ``reference/evaluation.py``; columns:
tables.py. Means over an image run in two stages of fixed order, without atomics. Bytes for each
element: one read of out, one of v where the variance is learned, one of x_0 where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.exact_math import exp, ln
from flashddpm.kernels.examples import learned_range, of_images, on_row
from flashddpm.kernels.image_means import image_means, store_partial
from flashddpm.kernels.launch import (
    WARPS_2C,
    channels_last,
    doubled_channels,
    minus_zeros,
    place,
    runs_triton,
)
from flashddpm.kernels.operation import LEARNED, Arguments, Budget, ByteCase, Op, variant
from flashddpm.kernels.philox import draw
from flashddpm.kernels.step_rows import lane_elements
from flashddpm.kernels.tables import FLOATS, Purpose, VlbColumn
from flashddpm.kernels.validation import check_image, check_images_rows, check_output

TRAINING = tl.constexpr(int(Purpose.TRAINING))
VLB_COLUMNS = tl.constexpr(len(VlbColumn))
X0 = tl.constexpr(int(VlbColumn.X0))
EPS = tl.constexpr(int(VlbColumn.EPS))
OUT = tl.constexpr(int(VlbColumn.OUT))
X0_OUT = tl.constexpr(int(VlbColumn.X0_OUT))
EPS_OUT = tl.constexpr(int(VlbColumn.EPS_OUT))
CLIP = tl.constexpr(int(VlbColumn.CLIP))
OFFSET = tl.constexpr(int(VlbColumn.OFFSET))
SLOPE = tl.constexpr(int(VlbColumn.SLOPE))
GAIN = tl.constexpr(int(VlbColumn.GAIN))
HALF_BIN = tl.constexpr(int(VlbColumn.HALF_BIN))
EDGE = tl.constexpr(reference.training.EDGE)

LN_ROOT_2PI = tl.constexpr(0.9189385332)
ROOT_2PI = tl.constexpr(2.5066282746)
NODE = tl.constexpr(0.7745966692)  # sqrt(3/5), of Gauss' rule with three points
NARROW, STEEP = tl.constexpr(0.3), tl.constexpr(0.4)  # where that rule is good to 4e-8


@triton.jit
def _mills(y):
    """Return Q(y) / phi(y), the normal's tail over its density, to 3e-7; y >= 0.

    4 / (y + 4) times a polynomial in it, fitted to the least largest relative error.
    """
    t = tl.div_rn(4.0, y + 4.0)
    p = t * 0.04958606511 + -0.2027290016
    p = p * t + 0.2396256924
    p = p * t + -0.07950337976
    p = p * t + 0.1596696079
    p = p * t + 0.1478289068
    p = p * t + 0.204548642
    p = p * t + 0.2342854142
    p = p * t + 0.2500021458
    p = p * t + 0.2499999851
    return p * t


@triton.jit
def _decoder(d, shift, pixel, half):
    """Return -ln of the probability of each pixel's bin.

    To 1e-6 of itself; where P is nearly 1, to 2 u near^2 more, which near's own rounding costs.

    By symmetry the bin lies above the mean, from near to far deviations, or to infinity where the
    pixel is the first or the last. Its probability P is, without a difference that cancels,

        phi(near) (mills(near) - e^-(far^2 - near^2)/2 mills(far))    if near is not negative
        1 - q,  q = Q(-near) + Q(far)                                 else; -ln P by Kahan's log1p
        phi(center) times Gauss' rule for the integral of e^-(center s + s^2 / 2)

    the last where the bin is narrow and its ends alike. Of the first and the last only logarithms
    are taken, so that P itself may be far below what float32 holds.
    """
    inverse = exp(d * -0.5)
    edge = tl.abs(pixel) > EDGE
    center = tl.where(edge, tl.where(pixel > 0, -shift, shift), tl.abs(shift))
    near, far = (center - half) * inverse, (center + half) * inverse
    c, h = center * inverse, half * inverse
    narrow = (h <= NARROW) & (c * h <= STEEP) & (edge == 0)
    within = near < 0

    beyond_far = exp(tl.where(within, far * far * -0.5, c * h * -2.0)) * _mills(tl.abs(far))
    beyond_far = tl.where(edge, 0.0, beyond_far)
    beyond_near = _mills(tl.abs(near))
    q = tl.div_rn(exp(near * near * -0.5) * beyond_near + beyond_far, ROOT_2PI)
    rest = 1.0 - q
    lost = 1.0 - rest
    ratio = tl.div_rn(q, tl.where(lost == 0, 1.0, lost))

    k = h * NODE
    even, odd = k * k * -0.5, c * k
    rule = (exp(even + odd) + exp(even - odd)) * 0.2777777778 + 0.4444444444

    mass = tl.where(narrow, 2.0 * half * rule, tl.where(within, rest, beyond_near - beyond_far))
    start = tl.where(narrow, c * c + d, near * near) * 0.5 + LN_ROOT_2PI
    nll = start - ln(mass, 0)
    by_rest = tl.where(lost == 0, q, ln(mass, 0) * -ratio)
    return tl.where(within & (narrow == 0), by_rest, nll)


@triton.jit
def _divergence(d, shift):
    """Return (d - 1 + e^-d (1 + shift^2)) / 2; where |d| is small, d - 1 + e^-d by its series."""
    e = exp(-d)
    p = d * -2.5052108e-8 + 2.7557319e-7
    p = p * d + -2.7557319e-6
    p = p * d + 2.4801587e-5
    p = p * d + -1.9841270e-4
    p = p * d + 1.3888889e-3
    p = p * d + -8.3333333e-3
    p = p * d + 4.1666667e-2
    p = p * d + -1.6666667e-1
    p = p * d + 0.5
    own = tl.where(tl.abs(d) < 1.0, p * d * d, e - 1.0 + d)
    return (own + e * (shift * shift)) * 0.5


@triton.jit
def _vlb_terms_kernel(
    partial,  # float32 [B, 3, blocks], sums of term and squared errors, written
    out,  # [B, n], or [B, 2n] of 2C channels: the network's output, read where the row says so
    x0,  # [B, n], read where k0, clip or half_bin is not 0
    t,  # int64 [B], row of each image
    seeds,  # int64 [B]
    keys,  # int64 [B]
    rows,  # float32 [T + 1, VLB_COLUMNS]
    n,  # elements of an image
    C: tl.constexpr,  # channels of an image if out has 2C, else 0
    BLOCK: tl.constexpr,
):
    image, block, offsets, mask, n = place(n, BLOCK)
    row = rows + tl.load(t + image) * VLB_COLUMNS
    start = block * BLOCK
    at, lane = lane_elements(start, offsets, n, C)
    k0, k1, clip = tl.load(row + X0), tl.load(row + EPS), tl.load(row + CLIP)
    half = tl.load(row + HALF_BIN)
    reads = (k0 != 0) | (clip != 0) | (half != 0)
    pixel = tl.load(
        x0 + image * n + start + offsets, mask=tl.where(reads, mask, False), other=0
    ).to(tl.float32)
    noise = minus_zeros(BLOCK)
    if k1 != 0:
        seed, key = tl.load(seeds + image), tl.load(keys + image)
        noise = k1 * draw(seed, key, block, x0, TRAINING, BLOCK)
    c = tl.load(row + OUT)
    prediction = c * tl.load(
        out + image * lane + at, mask=tl.where(c != 0, mask, False), other=0
    ).to(tl.float32)
    error = prediction - (k0 * tl.where(k0 != 0, pixel, 0.0) + noise)

    wrong = error * tl.load(row + X0_OUT)
    if clip != 0:
        wrong = tl.clamp(wrong, -clip - pixel, clip - pixel, propagate_nan=tl.PropagateNan.ALL)
    error *= tl.load(row + EPS_OUT)
    store_partial(partial, tl.sum(tl.where(mask, wrong * wrong, 0.0), axis=0), image * 3 + 1, block)
    store_partial(partial, tl.sum(tl.where(mask, error * error, 0.0), axis=0), image * 3 + 2, block)

    d = tl.zeros([BLOCK], tl.float32) + tl.load(row + OFFSET)
    if C != 0:
        c = tl.load(row + SLOPE)
        v = tl.load(out + image * lane + C + at, mask=tl.where(c != 0, mask, False), other=0)
        d += c * v.to(tl.float32)
    shift = wrong * tl.load(row + GAIN)
    if half != 0:
        term = _decoder(d, shift, pixel, half)
    else:
        term = _divergence(d, shift)
    store_partial(partial, tl.sum(tl.where(mask, term, 0.0), axis=0), image * 3, block)


@torch.library.custom_op("flashddpm::vlb_terms", mutates_args=())
def _vlb_terms(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    if not runs_triton(out):
        return reference.vlb_terms(out, x0, t, seeds, keys, rows)
    out, x0 = channels_last(out), channels_last(x0)
    arguments = (out, x0, t, seeds, keys, rows, x0[:1].numel(), doubled_channels(out, x0))
    return image_means(_vlb_terms_kernel, x0, *arguments, sums=(3,), num_warps=WARPS_2C)


@_vlb_terms.register_fake
def _vlb_terms_fake(out, x0, t, seeds, keys, rows) -> Tensor:
    return torch.empty(len(x0), 3, dtype=torch.float32, device=x0.device)


def vlb_terms(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    """Return a term of the variational bound and the errors of x_0 and eps of each image.

    (Equations S9 and S10 of docs/math.md.) The error of the network's output is e = out - (k0 x0 +
    k1 eps); the predicted x_0 is then off by f = x0_out e (where clip is not 0, clipped so that
    x_0 + f is in [-clip, clip]), and the predicted eps by eps_out e. Each image's coefficients are
    its row of ``rows``, of which k0 is the column x0 and k1 the column eps. With d = offset + slope
    v, the log variance of the model over the posterior's, and s = gain f, the term is (d - 1 + e^-d
    (1 + s^2)) / 2 or, where half_bin is not 0, -ln of the probability of x0's bin, s +- half_bin
    under a normal of mean 0 and deviation e^(d/2); bins of the first and the last pixel value (|x0|
    > 0.999) are open. Not differentiable.

    Args:
        out: the network's output, [B, C or 2C, H, W], float32, float16 or bfloat16, any layout; v
            is its second C channels. A learned variance (a row whose slope is not 0) takes 2C
            channels: not checked, for that would wait for the device. The row of the prior takes
            it for 0 and does not read it, so any such tensor will do.
        x0: the clean images, [B, C, H, W] in [-1, 1], float32, float16 or bfloat16, any layout.
        t: int64 [B], the row of ``rows`` of each image, in [0, T]; T is that of the prior's term
            L_T. The range is not checked, for that would wait for the device.
        seeds, keys: int64 [B], the noise seeds and keys (the upper 64 bits of the noise counter)
            that ``add_noise`` got, with Purpose.TRAINING.
        rows: float32 [T + 1, len(VlbColumn)], the coefficients of each timestep and of the prior
            (``flashddpm.diffusion.loss_tables.vlb_rows`` makes them).

    Returns:
        float32 [B, 3], means over the elements of each image: of the bound's term in nats, of the
        squared error of the predicted x_0 after clipping, and of the squared error of the predicted
        eps. NaN for images of no elements.

    Raises:
        ValueError: if x0 is not a [B, C, H, W] of these dtypes with fewer than 2^34 elements an
            image; if out is not a [B, C or 2C, H, W] of these dtypes on x0's device; or if t,
            seeds, keys or rows is not contiguous, of this shape and dtype, and on that device.
    """
    check_image("x0", x0)
    check_output(out, x0, lanes=len(x0))
    check_images_rows(t, seeds, keys, rows, len(VlbColumn), out)
    return _vlb_terms(out, x0, t, seeds, keys, rows)


# The record of the operation, for tests, gates, counts of bytes and benchmarks.

ROWS = [
    [-0.6, 0.8, 1.0, -0.6, 0.8, 0.0, 0.7, 0.6, 0.9, 0.0],  # v, a learned variance
    [0.0, 1.0, 1.0, -0.75, 1.0, 1.0, 0.3, 0.0, 2.0, 0.0],  # eps, clipped
    [0.0, 1.0, 1.0, -0.03, 1.0, 1.0, 0.2, 0.5, 30.0, 0.12],  # the decoder's
    [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.02, 0.0, 0.1, 0.0],  # the prior's
]


def _example(*case: Any) -> Arguments:
    args = of_images(*case, rows=ROWS, outputs=2)
    return args | {"x0": args["x0"].clamp(-1, 1)}


def _bytes_moved(args: Arguments) -> int:
    out, rows = args["out"], args["rows"][args["t"]]
    used = [VlbColumn.X0, VlbColumn.CLIP, VlbColumn.HALF_BIN]
    read = (rows[:, used] != 0).any(1).sum()
    predictions = (rows[:, VlbColumn.OUT] != 0).sum()
    if out.shape[1] != args["x0"].shape[1]:
        predictions += (rows[:, VlbColumn.SLOPE] != 0).sum()
    n = args["x0"][0].numel()
    return n * (int(read) * args["x0"].itemsize + int(predictions) * out.itemsize)


def _fixed(args: Arguments) -> Arguments:
    """An output of C channels, for a variance that is fixed."""
    row = on_row([0.0, 1.0, 1.0, -0.75, 1.0, 1.0, 0.3, 0.0, 2.0, 0.0])
    return row(args) | {"out": channels_last(args["out"][:, : args["x0"].shape[1]])}


def _plain(out: Tensor, x0: Tensor, log_variance: Tensor | float = -2.0, **_: Any) -> list[Tensor]:
    """A term of the bound: x0 from the output, clipped; the means; their divergence; errors.

    The noise and x_t: here x0.
    """
    predicted = ((x0.float() - 0.6 * out.float()) / 0.8).clamp(-1, 1)
    variance = torch.as_tensor(log_variance)
    mean, wanted = (0.3 * x + 0.68 * x0.float() for x in (predicted, x0.float()))
    term = 0.5 * (2.0 + variance + torch.exp(-3.0 - variance))
    term = term + 0.5 * (mean - wanted) ** 2 * torch.exp(-variance)
    errors = (predicted - x0.float()) ** 2, (out.float() - x0.float()) ** 2
    return [value.mean(dim=(1, 2, 3)) for value in (term, *errors)]


def _plain_learned(out: Tensor, x0: Tensor, **_: Any) -> list[Tensor]:
    """The same with a learned range."""
    prediction, log_variance = learned_range(out)
    return _plain(prediction, x0, log_variance)


_REASON = (
    "noise, and a term of the bound: an exponential, or the decoder's bin with five, a logarithm "
    "and four divisions; three sums; 2C channels of 3 are read one by one"
)
_LEARNED_ROW = on_row([-0.6, 0.8, 1.0, -0.6, 0.8, 1.0, 0.7, 0.6, 0.9, 0.0])
OP = Op(
    name="vlb_terms",
    fast=vlb_terms,
    reference=reference.vlb_terms,
    example=_example,
    bytes_moved=_bytes_moved,
    kernels=(
        variant(
            "vlb_terms",
            _vlb_terms_kernel,
            dict.fromkeys((4, 2), Budget(104, 16, 381.0, _REASON)),
            ("out", "x0"),
            num_warps=WARPS_2C,
            C=0,
        ),
        variant(
            "vlb_terms_learned",
            _vlb_terms_kernel,
            {
                4: Budget(119, 16, 473.0, _REASON, width=4),
                2: Budget(122, 16, 475.0, _REASON, width=2),
            },
            ("x0",),
            **LEARNED,
        ),
    ),
    cases=(
        ByteCase("vlb_terms", _fixed, ("vlb_terms",), _plain),
        ByteCase("vlb_terms learned", _LEARNED_ROW, ("vlb_terms_learned",), _plain_learned),
    ),
    dtypes=FLOATS,
    index="t",
    all_work=(VlbColumn.EPS,),
)
