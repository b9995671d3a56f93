"""A term of the variational bound of an image, in plain PyTorch.

(Equations S9 and S10 of docs/math.md.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashddpm.kernels.reference.noise import philox
from flashddpm.kernels.reference.training import EDGE, _sum
from flashddpm.kernels.tables import Purpose, VlbColumn


def vlb_terms(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    """Return a term of the variational bound and the errors of x_0 and eps of each image.

    (Equations S9 and S10 of docs/math.md; Ho et al. 2020, eq. 5 and 13.) The error of the network's
    output is e = out - (k0 x0 + k1 eps). The predicted x_0 is then off by f = x0_out e (where clip
    is not 0, clipped so that x_0 + f is in [-clip, clip]), and the predicted eps by eps_out e. Each
    image's coefficients are its row of ``rows``, of which k0 is the column x0 and k1 eps. With d =
    offset + slope v, the log variance of the model over the posterior's, and s = gain f, the term
    is

        (d - 1 + exp(-d) (1 + s^2)) / 2     (the divergence of two normals)

    or, where half_bin is not 0, -ln of the probability of x0's bin, s +- half_bin, under a normal
    of mean 0 and deviation exp(d / 2); bins of the first and the last pixel value (|x0| > 0.999)
    are open.

    A float64 ``out`` is computed in float64; the probabilities of bins always are. The result has
    no gradient. Arguments are not checked.

    Args:
        out: the network's output, [B, C or 2C, H, W], float32, float16, bfloat16 or float64. The
            second C channels are v; without them v is 0.
        x0: the clean images, [B, C, H, W], float32, float16 or bfloat16, in [-1, 1].
        t: int64 [B], the row of ``rows`` of each image, in [0, T]; T is that of the prior's term
            L_T, which takes ``out`` for 0.
        seeds, keys: int64 [B], the noise seeds and keys (the upper 64 bits of the noise counter)
            that ``add_noise`` got, with Purpose.TRAINING.
        rows: float32 [T + 1, len(VlbColumn)], the coefficients of each timestep and of the prior.

    Returns:
        float32 [B, 3] (float64 for a float64 ``out``), means over the elements of each image: of
        the bound's term in nats, of the squared error of the predicted x_0 after clipping, and of
        the squared error of the predicted eps.
    """
    dtype = torch.float64 if out.dtype is torch.float64 else torch.float32
    B, C, H, W = x0.shape
    columns = rows[t].to(dtype).reshape(B, len(VlbColumn), 1, 1, 1).unbind(1)
    k0, k1, of_out, x0_out, eps_out, clip, offset, slope, gain, half = columns
    out, x = out.detach().to(dtype), x0.detach().to(dtype)
    eps = philox(seeds, keys, (C, H, W), Purpose.TRAINING).to(dtype)
    error = torch.where(of_out == 0, 0.0, of_out * out[:, :C]) - _sum(k0, x, k1, eps)

    wrong = x0_out * error
    wrong = torch.where(clip == 0, wrong, wrong.clamp(-clip - x, clip - x))
    v = out[:, C:] if out.shape[1] == 2 * C else torch.zeros_like(x)
    d = offset + torch.where(slope == 0, 0.0, slope * v)
    shift = gain * wrong
    term = 0.5 * (torch.expm1(-d) + d + torch.exp(-d) * (shift * shift))
    decodes = half.flatten() != 0
    if decodes.any():
        some = (values[decodes] for values in (d, shift, x, half))
        term[decodes] = _decoder(*some).to(dtype)
    values = (term, wrong.square(), (eps_out * error).square())
    return torch.stack([value.flatten(1).mean(1) for value in values], 1)


def _decoder(d: Tensor, shift: Tensor, x0: Tensor, half: Tensor) -> Tensor:
    """Return -ln of the probability of each pixel's bin, float64.

    By symmetry the bin is taken to lie above the mean: from near to far deviations, or to infinity
    where the pixel is the first or the last. Its probability is that beyond near, less that beyond
    far, each by its logarithm, which is representable where the probability is not.
    """
    d, shift, x0, half = (values.double() for values in (d, shift, x0, half))
    inverse = torch.exp(-0.5 * d)
    edge = x0.abs() > EDGE
    center = torch.where(edge, -x0.sign() * shift, shift.abs())
    near, far = (center - half) * inverse, (center + half) * inverse
    beyond_near = torch.special.log_ndtr(-near)
    beyond_far = torch.special.log_ndtr(-far)
    nothing = edge | (beyond_near == -torch.inf)
    share = torch.exp(torch.where(nothing, -torch.inf, beyond_far - beyond_near))
    return -(beyond_near + torch.log1p(-share))
