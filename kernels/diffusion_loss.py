r"""Fused training loss, L_b = w mean(l(out - (k0 x_0 + k1 eps))), (k0, k1, w) = rows[t]   (S7).

(Ho et al. 2020, eq. 14; the targets of Salimans & Ho 2022; l is e^2, |e| or Huber's.) eps is the
noise of ``add_noise``, drawn again; neither it nor the target is ever written. Bytes an element:
forward one read (two where k0 is not 0), backward the same reads and one write. The sum runs in two
stages of fixed order, without atomics: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.launch import (
    block_size,
    channels_last,
    empty_channels_last,
    grid,
    launch,
    minus_zeros,
    place,
    runs_triton,
)
from flashddpm.kernels.philox import draw
from flashddpm.kernels.tables import LOSSES, Purpose
from flashddpm.kernels.validation import check_image, check_images_rows, check_loss

TRAINING = tl.constexpr(int(Purpose.TRAINING))
MSE = tl.constexpr(LOSSES.index("mse"))
L1 = tl.constexpr(LOSSES.index("l1"))


@triton.jit
def error_of(o, x0, row, seed, key, block, start, offsets, mask, like, BLOCK: tl.constexpr):
    """Return o - (k0 x_0 + k1 eps) of one block, float32 [BLOCK]."""
    k0 = tl.load(row)
    k1 = tl.load(row + 1)
    signal = k0 * tl.load(x0 + start + offsets, mask=tl.where(k0 != 0, mask, False), other=0).to(
        tl.float32
    )
    noise = minus_zeros(BLOCK)
    if k1 != 0:
        noise = k1 * draw(seed, key, block, like, TRAINING, BLOCK)
    return o - (signal + noise)


@triton.jit
def penalty(error, delta, LOSS: tl.constexpr):
    """Return l(error)."""
    if LOSS == MSE:
        return error * error
    size = tl.abs(error)
    if LOSS == L1:
        return size
    return tl.where(size > delta, delta * (size - 0.5 * delta), 0.5 * error * error)


@triton.jit
def slope(error, delta, LOSS: tl.constexpr):
    """Return l'(error); NaN where the error is."""
    if LOSS == MSE:
        return 2.0 * error
    if LOSS == L1:
        return tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
    return tl.clamp(error, -delta, delta, propagate_nan=tl.PropagateNan.ALL)


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
def store_partial(partial, total, image, block):
    """Store a block's sum at [image, block]."""
    blocks = tl.num_programs(1).to(tl.int64) * tl.num_programs(2)
    tl.store(partial + image * blocks + block, total)


@triton.jit
def _mean_kernel(
    loss,  # float32 [B], written
    partial,  # float32 [B, blocks]
    n,  # elements of an image
    blocks,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, blocks, BLOCK):
        mask = offsets < blocks - start
        total += tl.load(partial + image * blocks + start + offsets, mask=mask, other=0)
    tl.store(loss + image, tl.div_rn(tl.sum(total, axis=0), tl.cast(n, tl.float32)))


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


def mean_loss(kernel, out: Tensor, x0: Tensor, *arguments, **options: int) -> Tensor:
    """Return the mean over each image of what ``kernel`` sums by blocks, float32 [B].

    Args:
        kernel: takes partial, out, x0, the arguments and a block's size.
        out, x0: channels-last.
        arguments: t, seeds, keys, rows, delta, n and constants of the kernel.
        options: of its launch.
    """
    if not x0.numel():
        # A mean over nothing is 0 / 0.
        return x0.new_full((len(x0),), torch.nan, dtype=torch.float32)
    n = x0[0].numel()
    block = block_size(n)
    programs = grid(len(x0), n, block)
    blocks = programs[1] * programs[2]
    partial = torch.empty(len(x0), blocks, dtype=torch.float32, device=x0.device)
    launch(kernel, programs, out, partial, out, x0, *arguments, block, **options)
    loss = torch.empty(len(x0), dtype=torch.float32, device=x0.device)
    width = min(triton.next_power_of_2(blocks), 1024)
    launch(_mean_kernel, (len(x0),), out, loss, partial, n, blocks, width)
    return loss


@torch.library.custom_op("flashddpm::diffusion_loss", mutates_args=())
def _diffusion_loss(
    out: Tensor,
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    loss: str,
    delta: float,
) -> Tensor:
    if not runs_triton(out):
        return reference.diffusion_loss(out, x0, t, seeds, keys, rows, loss, delta)
    n, kind = out[:1].numel(), LOSSES.index(loss)
    out, x0 = channels_last(out), channels_last(x0)
    return mean_loss(
        _diffusion_loss_fwd_kernel, out, x0, t, seeds, keys, rows, delta, n, kind
    )  # fmt: skip


@_diffusion_loss.register_fake
def _diffusion_loss_fake(out, x0, t, seeds, keys, rows, loss, delta) -> Tensor:
    return torch.empty(len(out), dtype=torch.float32, device=out.device)


@torch.library.custom_op("flashddpm::diffusion_loss_backward", mutates_args=())
def _diffusion_loss_backward(
    d_loss: Tensor,
    out: Tensor,
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    loss: str,
    delta: float,
) -> Tensor:
    d_out = empty_channels_last(out)
    if not runs_triton(out):
        arguments = (d_loss, out, x0, t, seeds, keys, rows, loss, delta)
        return d_out.copy_(reference.diffusion_loss_backward(*arguments))
    if out.numel():
        n, kind = out[0].numel(), LOSSES.index(loss)
        block = block_size(n)
        out, x0 = channels_last(out), channels_last(x0)
        launch(
            _diffusion_loss_bwd_kernel, grid(len(out), n, block), out,
            d_out, d_loss, out, x0, t, seeds, keys, rows, delta, n, kind, block,
        )  # fmt: skip
    return d_out


@_diffusion_loss_backward.register_fake
def _diffusion_loss_backward_fake(
    d_loss, out, x0, t, seeds, keys, rows, loss, delta
) -> Tensor:  # fmt: skip
    return empty_channels_last(out)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.loss, ctx.delta = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_loss: Tensor):
    d_out = _diffusion_loss_backward(d_loss.contiguous(), *ctx.saved_tensors, ctx.loss, ctx.delta)
    return d_out, *[None] * 7


_diffusion_loss.register_autograd(_backward, setup_context=_setup_context)


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
