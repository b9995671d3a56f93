r"""Operation ``diffusion_loss``, the training loss of each image by one fused kernel.

    L_b = w mean(l(out - (k0 x_0 + k1 eps))),    (k0, k1, w) = rows[t]

(Equation S7 of docs/math.md; Ho et al. 2020, eq. 14; the targets of Salimans & Ho 2022; l is e^2,
|e| or Huber's.) The error, its penalty and the launcher: losses.py. Bytes for each element: forward
one read (two where k0 is not 0), backward the same reads and one write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.examples import image_bytes, of_images, on_row
from flashddpm.kernels.image_means import MEAN, store_partial
from flashddpm.kernels.launch import place
from flashddpm.kernels.losses import error_of, loss_operator, penalty, plain_loss, slope
from flashddpm.kernels.operation import Arguments, Budget, ByteCase, Kernel, Op, variant
from flashddpm.kernels.philox import DRAWN
from flashddpm.kernels.tables import FLOATS, LOSSES, LossColumn
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
    """Return the training loss w mean(l(out - (k0 x0 + k1 eps))) of each image, float32 [B].

    (Equation S7 of docs/math.md.) (k0, k1, w) = rows[t], and l is the penalty ``loss``; eps is the
    noise that ``add_noise`` drew for the same seeds and keys. Differentiable with respect to
    ``out``, once (no second derivative); the images have no gradient.

    Args:
        out: the network's output, [B, C, H, W], float32, float16 or bfloat16, any layout.
        x0: the clean images, [B, C, H, W], float32, float16 or bfloat16, any layout.
        t: int64 [B], the row of ``rows`` of each image, in [0, T): not checked, for that would wait
            for the device.
        seeds, keys: int64 [B], the noise seeds and keys (the upper 64 bits of the noise counter)
            that ``add_noise`` got, with Purpose.TRAINING.
        rows: float32 [T, 3], the factors k0 and k1 of the target and the weight w of the loss.
        loss: the penalty of an error e: "mse" (e^2), "l1" (|e|) or "huber" (e^2 / 2 where |e| <=
            delta, delta (|e| - delta / 2) beyond).
        delta: the |e| where "huber" turns from a parabola to a line, in [1e-37, 1e37].

    Raises:
        ValueError: if out or x0 is not a floating-point [B, C, H, W] of these dtypes with fewer
            than 2^34 elements an image; if x0 is not of the shape and device of out; if t, seeds,
            keys or rows is not contiguous, of this shape and dtype, and on their device; if loss is
            none of these; or if delta is out of range, whatever the loss.
    """
    check_image("out", out)
    check_image("x0", x0, like=out)
    check_images_rows(t, seeds, keys, rows, 3, out)
    check_loss(loss, delta)
    return _diffusion_loss(out, x0, t, seeds, keys, rows, loss, delta)


# The record of the operation, for tests, gates, counts of bytes and benchmarks.

ROWS = [[0.0, 1.0, 1.0], [-0.6, 0.8, 0.5], [1.0, 0.0, 2.0]]


def _example(*case: Any) -> Arguments:
    return of_images(*case, rows=ROWS, outputs=1)


def _bytes_moved(args: Arguments) -> int:
    read = (args["rows"][args["t"], LossColumn.X0] != 0).sum().item()
    return len(args["out"]) * image_bytes(args["out"]) + read * image_bytes(args["x0"])


def _plain_velocity(out: Tensor, x0: Tensor, t: Tensor, rows: Tensor, **_: Any) -> Tensor:
    """The same against v = a eps - b x0; eps, which add_noise had to keep, has x0's shape."""
    eps = x0.detach()
    k0, k1 = (rows[t, i].to(x0.dtype).reshape(-1, 1, 1, 1) for i in (0, 1))
    return plain_loss(out, k1 * eps + k0 * x0, t, rows)


_SUMMED = f"{DRAWN}; the error and its penalty, summed over the program by shuffles: below 72"
_GRADIENT = f"{DRAWN}; the error and its slope, scaled: below 72"
_BUDGETS = {
    "diffusion_loss": {4: Budget(71, 8, 65.5, _SUMMED), 2: Budget(56, 8, 67.5, _SUMMED)},
    "diffusion_loss_l1": {4: Budget(71, 8, 64.5, _SUMMED), 2: Budget(56, 8, 66.5, _SUMMED)},
    "diffusion_loss_huber": {4: Budget(71, 8, 70.0, _SUMMED), 2: Budget(56, 8, 71.5, _SUMMED)},
    "diffusion_loss_backward": {
        4: Budget(71, 0, 64.0, _GRADIENT),
        2: Budget(56, 0, 67.0, _GRADIENT),
    },
    "diffusion_loss_backward_l1": {
        4: Budget(72, 0, 67.0, _GRADIENT),
        2: Budget(58, 0, 70.0, _GRADIENT),
    },
    "diffusion_loss_backward_huber": {
        4: Budget(71, 0, 64.5, _GRADIENT),
        2: Budget(56, 0, 68.0, _GRADIENT),
    },
}
_ENDS = ("", *(f"_{loss}" for loss in LOSSES[1:]))  # mse goes without
_FORWARD = tuple(f"diffusion_loss{end}" for end in _ENDS)
_BACKWARD = tuple(f"diffusion_loss_backward{end}" for end in _ENDS)


def _variants() -> Iterator[Kernel]:
    """Yield forward and backward of each loss."""
    for kind, (forward, backward) in enumerate(zip(_FORWARD, _BACKWARD, strict=True)):
        summed, written = ("out", "x0"), ("d_out", "out", "x0")
        yield variant(forward, _diffusion_loss_fwd_kernel, _BUDGETS[forward], summed, LOSS=kind)
        yield variant(backward, _diffusion_loss_bwd_kernel, _BUDGETS[backward], written, LOSS=kind)


_EPSILON, _VELOCITY = on_row([0.0, 1.0, 1.0]), on_row([-0.6, 0.8, 1.0])
OP = Op(
    name="diffusion_loss",
    fast=diffusion_loss,
    reference=reference.diffusion_loss,
    example=_example,
    bytes_moved=_bytes_moved,
    kernels=(*_variants(), MEAN),
    cases=(
        ByteCase("diffusion_loss", _EPSILON, _FORWARD, plain_loss),
        ByteCase("diffusion_loss v", _VELOCITY, _FORWARD, _plain_velocity),
        ByteCase("diffusion_loss backward", _EPSILON, _BACKWARD, plain_loss, backward=True),
        ByteCase("diffusion_loss v backward", _VELOCITY, _BACKWARD, _plain_velocity, backward=True),
    ),
    differentiable=("out",),
    gradient_bytes=lambda args: _bytes_moved(args) + args["out"].nbytes,  # the gradient is written
    dtypes=FLOATS,
    index="t",
    all_work=(LossColumn.EPS,),
)
