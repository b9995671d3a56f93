r"""Fused training loss, L_b = w mean(l(out - (k0 x_0 + k1 eps))), (k0, k1, w) = rows[t]   (S7).

(Ho et al. 2020, eq. 14; the targets of Salimans & Ho 2022; l is e^2, |e| or Huber's.) The error,
its penalty and the launcher: losses.py. Bytes an element: forward one read (two where k0 is not 0),
backward the same reads and one write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels.image_means import store_partial
from flashddpm.kernels.launch import place
from flashddpm.kernels.losses import error_of, loss_operator, penalty, slope
from flashddpm.kernels.validation import check_image, check_images_rows, check_loss


@triton.jit
def _diffusion_loss_fwd_kernel(
    partial,  # float32 [B, blocks], weighted sums of l, written
    out,  # [B, n], the network's output
    x0,  # [B, n], read where k0 is not 0
    t,  # int64 [B], row of each image
    seeds,  # int64 [B]
    keys,  # int64 [B]
    rows,  # float32 [T, 3]
    delta,
    n,  # elements of an image
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, block, offsets, mask, n = place(n, BLOCK)
    row = rows + tl.load(t + image) * 3
    seed, key = tl.load(seeds + image), tl.load(keys + image)
    start = image * n + block * BLOCK
    o = tl.load(out + start + offsets, mask=mask, other=0).to(tl.float32)
    error = error_of(o, x0, row, seed, key, block, start, offsets, mask, out, BLOCK)
    total = tl.sum(tl.where(mask, penalty(error, delta, LOSS), 0.0), axis=0)
    store_partial(partial, total * tl.load(row + 2), image, block)


@triton.jit
def _diffusion_loss_bwd_kernel(
    d_out,  # [B, n], gradient of the network's output, written
    d_loss,  # float32 [B]
    out,  # [B, n]
    x0,  # [B, n], read where k0 is not 0
    t,  # int64 [B]
    seeds,  # int64 [B]
    keys,  # int64 [B]
    rows,  # float32 [T, 3]
    delta,
    n,  # elements of an image
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, block, offsets, mask, n = place(n, BLOCK)
    row = rows + tl.load(t + image) * 3
    seed, key = tl.load(seeds + image), tl.load(keys + image)
    start = image * n + block * BLOCK
    o = tl.load(out + start + offsets, mask=mask, other=0).to(tl.float32)
    error = error_of(o, x0, row, seed, key, block, start, offsets, mask, out, BLOCK)
    scale = tl.div_rn(tl.load(row + 2) * tl.load(d_loss + image), tl.cast(n, tl.float32))
    gradient = scale * slope(error, delta, LOSS)
    tl.store(d_out + start + offsets, gradient.to(d_out.dtype.element_ty), mask=mask)


_diffusion_loss = loss_operator(
    "diffusion_loss", _diffusion_loss_fwd_kernel, _diffusion_loss_bwd_kernel
)


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
    """Return w mean(l(error)) of each image, float32 [B]   (S7).

    Differentiable with respect to ``out``, once; the data have no gradient.

    Args:
        out: the network's output, [B, C, H, W], float32, float16 or bfloat16, any layout.
        x0: the images, same shape, float32, float16 or bfloat16, any layout.
        t: int64 [B], the row of each image, in [0, T): not checked, for that would wait.
        seeds, keys: int64 [B], those given to ``add_noise``.
        rows: float32 [T, 3], (k0, k1, weight).
        loss: "mse", "l1" or "huber" (tables.LOSSES).
        delta: where huber turns from a parabola to a line; above 0.

    Raises:
        ValueError: a shape, dtype, layout or device that does not fit, or another loss.
    """
    check_image("out", out)
    check_image("x0", x0, like=out)
    check_images_rows(t, seeds, keys, rows, 3, out)
    check_loss(loss, delta)
    return _diffusion_loss(out, x0, t, seeds, keys, rows, loss, delta)
