"""Helpers that every launcher of a Triton kernel shares: device choice, layouts and grids."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set at import; Triton's interpreter then runs kernels on the CPU.
"""

OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
"""The options of every launch. Without fused multiply-add, each product and sum is rounded, as on
the CPU.
"""

WARPS_2C = 4
"""The warps of a program of kernels that read 2C channels.

With twice as many threads each handles half as many elements, for it holds more of each.
"""

BLOCK = 1024
"""The elements that a program handles, 16 a thread; under the interpreter, which is slow for each
program, ``block_size`` gives more.
"""


MAX_GRID_Y = tl.constexpr(65535)
"""The most programs along the second and the third axis of a CUDA grid."""


def runs_triton(tensor: Tensor) -> bool:
    """Return whether operations on this tensor launch Triton kernels rather than run the reference.

    They do for CUDA tensors, and for all tensors under Triton's interpreter (TRITON_INTERPRET=1).
    """
    return tensor.is_cuda or INTERPRETED


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **options: int
) -> None:
    """Launch a grid of programs of a Triton kernel on the GPU that holds a tensor.

    Args:
        kernel: the Triton kernel.
        grid: the number of programs along up to three axes.
        like: a tensor on the device that runs the kernel.
        arguments: the kernel's arguments.
        options: options of the launch, such as num_warps=4, which replace those of ``OPTIONS`` (2
            warps, no fused multiply-add).
    """
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **OPTIONS | options)


def launch_blocks(kernel: Any, images: Tensor, *arguments: Any, **options: int) -> None:
    """Launch one program of a kernel for each block of elements of each image.

    Args:
        kernel: a Triton kernel that begins with ``place`` (which gives a program its image and
            block) and whose last argument is BLOCK, the elements of a block.
        images: [B, C, H, W], any dtype, at least one element, on the device that runs the kernel.
        arguments: the kernel's arguments except the last; BLOCK is added.
        options: options of the launch, such as num_warps=4, which replace those of ``OPTIONS``.
    """
    programs, block = blocks_of(images)
    launch(kernel, programs, images, *arguments, block, **options)


def blocks_of(images: Tensor) -> tuple[tuple[int, int, int], int]:
    """Return the grid of programs for a batch of images, as ``place`` expects it, and the block.

    Args:
        images: [B, C, H, W], B >= 1; only the shape matters.

    Returns:
        (programs along three axes: images, and two for an image's blocks; elements of a block, that
        is of a program).
    """
    n = images[0].numel()
    block = block_size(n)
    return grid(len(images), n, block), block


def grid(images: int, n: int, block: int) -> tuple[int, int, int]:
    """Return the numbers of programs along three axes: images, and two for an image's blocks.

    Past 65,535 blocks the last of the programs may lie outside the image, where masks are empty.

    Args:
        images: the number of images.
        n: the elements of an image.
        block: the elements of a block.
    """
    blocks = triton.cdiv(n, block)
    return images, min(blocks, MAX_GRID_Y.value), triton.cdiv(blocks, MAX_GRID_Y.value)


@triton.jit
def place(n, BLOCK: tl.constexpr):
    """Return this program's image and block, the block's element offsets and their mask.

    Images lie along the grid's first axis and blocks along the other two, so no division is needed.

    Args:
        n: the elements of an image.
        BLOCK: the elements of a block.

    Returns:
        The image's index, int64 scalar; the block's index, int64 scalar; the offsets 0..BLOCK-1
        within the block, int32 [BLOCK]; which of them lie in the image, bool [BLOCK]; and n as
        int64.
    """
    n = tl.cast(n, tl.int64)  # 64 bits, and n = 1 arrives as a constant
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * MAX_GRID_Y
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n - block * BLOCK
    return image, block, offsets, mask, n


@triton.jit
def minus_zeros(BLOCK: tl.constexpr):
    """Return -0.0, float32 [BLOCK], the start of a sum: adding p gives p, its sign included.

    (tl.full would make it +0.0.)
    """
    return tl.full([BLOCK], -2147483648, tl.int32).to(tl.float32, bitcast=True)


def block_size(n: int) -> int:
    """Return how many elements a program handles, for images of n elements each.

    That is ``BLOCK`` = 1024 on a GPU; under the interpreter, the power of two that holds n, from 16
    to 16,384.
    """
    return min(triton.next_power_of_2(max(n, 16)), 16384) if INTERPRETED else BLOCK


def doubled_channels(out: Tensor, images: Tensor) -> int:
    """Return C if a network's output does not have as many channels as the images, else 0.

    Args:
        out: [L, C or 2C, H, W], the network's output; not checked.
        images: [B, C, H, W], whose C is meant.
    """
    C = images.shape[1]
    return C if out.shape[1] != C else 0


def channels_last(tensor: Tensor) -> Tensor:
    """Return a tensor with its elements in (b, h, w, c) order, copied only if they are not in it.

    Args:
        tensor: [B, C, H, W], any dtype.
    """
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised channels-last tensor with the shape and device of another.

    Args:
        like: [B, C, H, W], the tensor whose shape, device and, by default, dtype are taken.
        dtype: the dtype of the result; None for that of ``like``.
    """
    return torch.empty(
        like.shape,
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )
