"""What every launcher shares: where Triton runs, checks of arguments, layouts and grids."""

from __future__ import annotations

import operator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels.tables import LOSSES

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set at import: then the kernels run on CPU tensors."""

OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
"""Of every launch. No fused multiply-add: each product and sum is rounded, as on the CPU."""

SMALLEST = 1e-37
"""Of a positive number that has a place in float32, as its inverse has."""

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


def check_image(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse anything but a floating-point [B, C, H, W] (of the shape and device of ``like``)."""
    if tensor.ndim != 4 or tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype}: "
            "must be [B, C, H, W] in float32, float16 or bfloat16"
        )
    if like is not None and (tensor.shape != like.shape or tensor.device != like.device):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} on {tensor.device}: "
            f"must be {tuple(like.shape)} on {like.device}"
        )
    if tensor.numel() // max(len(tensor), 1) >= 2**34:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)}: an image must be below 2^34")


def check_output(out: Tensor, image: Tensor, lanes: int | None = None) -> None:
    """Refuse an output that is not [L, C or 2C, H, W] for images [any, C, H, W]."""
    check_image("out", out)
    _, C, H, W = image.shape
    L = len(out) if lanes is None else lanes
    if out.shape not in ((L, C, H, W), (L, 2 * C, H, W)) or out.device != image.device:
        raise ValueError(
            f"out of shape {tuple(out.shape)} on {out.device}: "
            f"must be [{L}, {C} or {2 * C}, {H}, {W}] on {image.device}"
        )


def check_vector(name: str, tensor: Tensor, size: int, dtype: torch.dtype, like: Tensor) -> None:
    """Refuse anything but a contiguous [size] of this dtype on the device of ``like``."""
    if tensor.shape != (size,) or tensor.dtype is not dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: "
            f"must be [{size}], {dtype} on {like.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of strides {tensor.stride()}: must be contiguous")


def check_table(name: str, tensor: Tensor, columns: int, like: Tensor) -> None:
    """Refuse anything but a contiguous float32 [R, columns] on the device of ``like``."""
    if (
        tensor.ndim != 2
        or tensor.shape[1] != columns
        or tensor.dtype is not torch.float32
        or tensor.device != like.device
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: "
            f"must be a contiguous [R, {columns}], float32 on {like.device}"
        )


def check_images_rows(
    t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor, columns: int, like: Tensor
) -> None:
    """Refuse anything but int64 [B] for t, seeds and keys, and a table of so many columns."""
    for name, vector in (("t", t), ("seeds", seeds), ("keys", keys)):
        check_vector(name, vector, len(like), torch.int64, like)
    check_table("rows", rows, columns, like)


def check_loss(loss: str, delta: float) -> None:
    """Refuse a loss that is not one of ``LOSSES``, and a delta that float32 has no place for."""
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: must be one of {', '.join(LOSSES)}")
    if not SMALLEST <= delta <= 1 / SMALLEST:
        raise ValueError(
            f"delta={delta!r}: must be in [{SMALLEST:g}, {1 / SMALLEST:g}], for float32"
        )


def check_purpose(purpose: int) -> int:
    """Return the purpose as an int, refusing what does not fit the counter's 32-bit word."""
    try:
        number = operator.index(purpose)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise ValueError(f"purpose={purpose!r}: must be an integer in 0..2^32-1")
    return number


def check_in_place(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse images whose elements are not channels-last, row by row.

    The stride from image to image is free, so that rows may be padded.
    """
    check_image(name, tensor, like)
    _, C, H, W = tensor.shape
    wanted = {1: (1, C), 2: (W * C, H), 3: (C, W)}
    dense = all(tensor.stride(i) == s or size == 1 for i, (s, size) in wanted.items())
    if not dense or (len(tensor) > 1 and tensor.stride(0) < C * H * W):
        raise ValueError(
            f"{name} of strides {tensor.stride()}: must be channels-last, one image after another"
        )
