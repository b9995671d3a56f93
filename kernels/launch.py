"""What every launcher shares: where Triton runs, layouts of images and grids of programs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set at import: then the kernels run on CPU tensors."""

OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
"""Of every launch. No fused multiply-add: each product and sum is rounded, as on the CPU."""

WARPS_2C = 4
"""Of kernels that read 2C channels: half as many elements a thread, for they hold more of each."""

BLOCK = 1024
"""Elements a program handles, 16 a thread; the interpreter, slow per program, is given more."""


MAX_GRID_Y = tl.constexpr(65535)
"""The most programs along the second and third axes of CUDA's grids."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor launch Triton kernels; elsewhere they run the reference."""
    return tensor.is_cuda or INTERPRETED


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **options: int
) -> None:
    """Launch a grid of programs on the GPU of ``like``, whichever is the current one."""
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **OPTIONS | options)


def launch_blocks(kernel: Any, images: Tensor, *arguments: Any, **options: int) -> None:
    """Launch a program for each block of each image; the block's size is the last argument.

    Args:
        kernel: begins with ``place``.
        images: [B, C, H, W], at least one element, on the GPU that runs the kernel.
        arguments: of the kernel, but for the block's size.
        options: of the launch, which replace those of ``OPTIONS``.
    """
    programs, block = blocks_of(images)
    launch(kernel, programs, images, *arguments, block, **options)


def blocks_of(images: Tensor) -> tuple[tuple[int, int, int], int]:
    """Return the grid of ``place`` for images [B, C, H, W], and the elements of a block."""
    n = images[0].numel()
    block = block_size(n)
    return grid(len(images), n, block), block


def grid(images: int, n: int, block: int) -> tuple[int, int, int]:
    """Return the grid of ``place``: images, then blocks along two axes.

    Past 65,535 blocks the last of them may lie outside the image, where masks are empty.
    """
    blocks = triton.cdiv(n, block)
    return images, min(blocks, MAX_GRID_Y.value), triton.cdiv(blocks, MAX_GRID_Y.value)


@triton.jit
def place(n, BLOCK: tl.constexpr):
    """Return this program's image, its block, the block's elements and which of them exist, and n.

    Images lie along the grid's first axis, blocks along the other two: no division tells which.
    """
    n = tl.cast(n, tl.int64)  # 64 bits, and n = 1 arrives as a constant
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * MAX_GRID_Y
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n - block * BLOCK
    return image, block, offsets, mask, n


@triton.jit
def minus_zeros(BLOCK: tl.constexpr):
    """Return -0.0, float32 [BLOCK], where a sum starts; tl.full would make it +0.0."""
    return tl.full([BLOCK], -2147483648, tl.int32).to(tl.float32, bitcast=True)


def block_size(n: int) -> int:
    """Return the elements a program handles for images of n elements."""
    return min(triton.next_power_of_2(max(n, 16)), 16384) if INTERPRETED else BLOCK


def doubled_channels(out: Tensor, images: Tensor) -> int:
    """Return C where a network's output has 2C channels for images of C, else 0."""
    C = images.shape[1]
    return C if out.shape[1] != C else 0


def channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor with elements in (b, h, w, c) order, copied only if they are not."""
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised channels-last tensor of the same shape."""
    return torch.empty(
        like.shape,
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )
