r"""Fused training loss, L_b = w mean((out - (k0 x_0 + k1 eps))^2), (k0, k1, w) = rows[t]   (S7).

(Ho et al. 2020, eq. 14; the targets of Salimans & Ho 2022.) eps is the noise of ``add_noise``,
drawn again; neither it nor the target is ever written. Bytes an element: forward one read (two
where k0 is not 0), backward the same reads and one write. The sum runs in two stages of fixed
order, without atomics: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.contract import Purpose
from flashddpm.kernels.launch import (
    block_size,
    channels_last,
    check_image,
    check_table,
    check_vector,
    empty_channels_last,
    launch,
    runs_triton,
)
from flashddpm.kernels.philox import draw

TRAINING = tl.constexpr(int(Purpose.TRAINING))


@triton.jit
def _error(out, x0, row, seed, key, block, start, offsets, mask, BLOCK: tl.constexpr):
    """Return out - (k0 x_0 + k1 eps) of one block, float32 [BLOCK]."""
    k0 = tl.load(row)
    k1 = tl.load(row + 1)
    signal = tl.zeros([BLOCK], tl.float32)
    if k0 != 0:
        signal = k0 * tl.load(x0 + start + offsets, mask=mask, other=0).to(tl.float32)
    noise = tl.zeros([BLOCK], tl.float32)
    if k1 != 0:
        noise = k1 * draw(seed, key, block, TRAINING, BLOCK)
    return tl.load(out + start + offsets, mask=mask, other=0).to(tl.float32) - (signal + noise)


@triton.jit
def _diffusion_loss_fwd_kernel(
    partial,  # float32 [B, blocks], sums of squares, written
    out,  # [B, n], the network's output
    x0,  # [B, n], read where k0 is not 0
    t,  # int64 [B], row of each image
    seeds,  # int64 [B]
    keys,  # int64 [B]
    rows,  # float32 [T, 3]
    n,  # elements of an image
    BLOCK: tl.constexpr,
):
    n = tl.cast(n, tl.int64)  # 64 bits, and n = 1 arrives as a constant
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // blocks
    block = pid % blocks
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n - block * BLOCK
    row = rows + tl.load(t + sample) * 3
    seed = tl.load(seeds + sample)
    key = tl.load(keys + sample)
    start = sample * n + block * BLOCK
    error = _error(out, x0, row, seed, key, block, start, offsets, mask, BLOCK)
    tl.store(partial + pid, tl.sum(tl.where(mask, error * error, 0.0), axis=0))


@triton.jit
def _diffusion_loss_sum_kernel(
    loss,  # float32 [B], written
    partial,  # float32 [B, blocks]
    t,  # int64 [B]
    rows,  # float32 [T, 3]
    n,  # elements of an image
    blocks,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, blocks, BLOCK):
        mask = offsets < blocks - start
        total += tl.load(partial + sample * blocks + start + offsets, mask=mask, other=0)
    weight = tl.load(rows + tl.load(t + sample) * 3 + 2)
    mean = tl.div_rn(tl.sum(total, axis=0), tl.cast(n, tl.float32))
    tl.store(loss + sample, weight * mean)


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
    n,  # elements of an image
    BLOCK: tl.constexpr,
):
    n = tl.cast(n, tl.int64)  # 64 bits, and n = 1 arrives as a constant
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // blocks
    block = pid % blocks
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n - block * BLOCK
    row = rows + tl.load(t + sample) * 3
    seed = tl.load(seeds + sample)
    key = tl.load(keys + sample)
    start = sample * n + block * BLOCK
    error = _error(out, x0, row, seed, key, block, start, offsets, mask, BLOCK)
    scale = tl.div_rn(2.0 * tl.load(row + 2) * tl.load(d_loss + sample), tl.cast(n, tl.float32))
    tl.store(d_out + start + offsets, (scale * error).to(d_out.dtype.element_ty), mask=mask)


@torch.library.custom_op("flashddpm::diffusion_loss", mutates_args=())
def _diffusion_loss(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    if not runs_triton(out):
        return reference.diffusion_loss(out, x0, t, seeds, keys, rows)
    loss = torch.full((len(out),), torch.nan, device=out.device)  # a mean over nothing is 0 / 0
    if out.numel():
        n = out[0].numel()
        block = block_size(n)
        blocks = triton.cdiv(n, block)
        partial = torch.empty(len(out), blocks, device=out.device)
        out, x0 = channels_last(out), channels_last(x0)
        launch(
            _diffusion_loss_fwd_kernel, len(out) * blocks, out,
            partial, out, x0, t, seeds, keys, rows, n, block,
        )  # fmt: skip
        width = min(triton.next_power_of_2(blocks), 1024)
        launch(_diffusion_loss_sum_kernel, len(out), out, loss, partial, t, rows, n, blocks, width)
    return loss


@_diffusion_loss.register_fake
def _diffusion_loss_fake(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    return torch.empty(len(out), device=out.device)


@torch.library.custom_op("flashddpm::diffusion_loss_backward", mutates_args=())
def _diffusion_loss_backward(
    d_loss: Tensor, out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    d_out = empty_channels_last(out)
    if not runs_triton(out):
        return d_out.copy_(reference.diffusion_loss_backward(d_loss, out, x0, t, seeds, keys, rows))
    if out.numel():
        n = out[0].numel()
        block = block_size(n)
        out, x0 = channels_last(out), channels_last(x0)
        launch(
            _diffusion_loss_bwd_kernel, len(out) * triton.cdiv(n, block), out,
            d_out, d_loss, out, x0, t, seeds, keys, rows, n, block,
        )  # fmt: skip
    return d_out


@_diffusion_loss_backward.register_fake
def _diffusion_loss_backward_fake(
    d_loss: Tensor, out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    return empty_channels_last(out)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_loss: Tensor):
    d_out = _diffusion_loss_backward(d_loss.contiguous(), *ctx.saved_tensors)
    return d_out, None, None, None, None, None


_diffusion_loss.register_autograd(_backward, setup_context=_setup_context)


def diffusion_loss(
    out: Tensor, x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor
) -> Tensor:
    """Return the weighted mean squared error of each image, float32 [B]   (S7).

    Differentiable with respect to ``out``; the data have no gradient.

    Args:
        out: the network's output, [B, C, H, W], float32, float16 or bfloat16, any layout.
        x0: the images, same shape, float32, float16 or bfloat16, any layout.
        t: int64 [B], the row of each image, in [0, T): not checked, for that would wait.
        seeds, keys: int64 [B], those given to ``add_noise``.
        rows: float32 [T, 3], (k0, k1, weight).

    Raises:
        ValueError: a shape, dtype, layout or device that does not fit.
    """
    check_image("out", out)
    check_image("x0", x0, like=out)
    for name, vector in (("t", t), ("seeds", seeds), ("keys", keys)):
        check_vector(name, vector, len(out), torch.int64, out)
    check_table("rows", rows, 3, out)
    return _diffusion_loss(out, x0, t, seeds, keys, rows)
