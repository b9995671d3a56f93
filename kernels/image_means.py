"""Means over each image of values that a kernel sums by blocks, in two stages of fixed order.

There are no atomics, so two runs give the same bits. The first stage is a kernel that ends in
``store_partial``; the second stage is the same kernel for all operations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels.launch import blocks_of, launch
from flashddpm.kernels.operation import Budget, variant


@triton.jit
def store_partial(partial, total, image, block):
    """Store a block's sum at [image, block] of the partial sums.

    Args:
        partial: pointer to float32 [images, blocks], the blocks of the launch's grid.
        total: float32 scalar, the block's sum.
        image: the first index, int64 scalar.
        block: the second index, int64 scalar.
    """
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


def image_means(
    kernel: Any, x0: Tensor, *arguments: Any, sums: tuple[int, ...] = (), **options: int
) -> Tensor:
    """Return the means over each image of what a kernel sums by blocks, float32 [B, *sums].

    The mean over an image of no elements is NaN.

    Args:
        kernel: a Triton kernel that begins with ``launch.place`` (which gives a program its image
            and block of elements), takes the partial sums, float32 [B, *sums, blocks of an image],
            as its first argument, and ends in ``store_partial`` (which stores one block's sum).
        x0: the images that the means are of, [B, C, H, W], any dtype.
        arguments: the kernel's arguments between the partial sums, its first, and BLOCK, its last.
        sums: the shape of the sums of one image; () for a single one. The kernel stores them as if
            each were an image of its own, one after the other.
        options: options of the kernel's launch, such as num_warps=4.
    """
    shape = (len(x0), *sums)
    if not x0.numel():
        return x0.new_full(shape, torch.nan, dtype=torch.float32)
    programs, block = blocks_of(x0)
    blocks = programs[1] * programs[2]
    partial = torch.empty(*shape, blocks, dtype=torch.float32, device=x0.device)
    launch(kernel, programs, x0, partial, *arguments, block, **options)
    means = torch.empty(shape, dtype=torch.float32, device=x0.device)
    width = min(triton.next_power_of_2(blocks), 1024)
    launch(_mean_kernel, (means.numel(),), x0, means, partial, x0[0].numel(), blocks, width)
    return means


MEAN = variant("loss_mean", _mean_kernel, {4: Budget(60, 8, None, "a loop over partial sums")})
"""The record of the second stage's kernel, as it is compiled."""
