"""What every launcher shares: where Triton runs, checks of arguments, layouts and grids."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set at import: then the kernels run on CPU tensors."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of every launch. No fused multiply-add: each product and sum is rounded, as on the CPU."""

BLOCK = 1024
"""Elements a program handles; the interpreter, slow per program, is given larger ones."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor launch Triton kernels; elsewhere they run the reference."""
    return tensor.is_cuda or INTERPRETED


def launch(kernel: Any, grid: int, like: Tensor, *arguments: Any) -> None:
    """Launch ``grid`` programs on the GPU of ``like``, whichever is the current one."""
    with torch.cuda.device_of(like):
        kernel[(grid,)](*arguments, **OPTIONS)


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


def check_purpose(purpose: int) -> int:
    """Return the purpose as an int, refusing what does not fit the counter's 32-bit word."""
    if not 0 <= purpose < 2**32:
        raise ValueError(f"purpose={purpose}: must be in 0..2^32-1")
    return int(purpose)


def check_in_place(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse buffers that are not float32 images with channels-last elements, row by row.

    The stride from image to image is free, so that rows may be padded.
    """
    check_image(name, tensor, like)
    _, C, H, W = tensor.shape
    wanted = {1: (1, C), 2: (W * C, H), 3: (C, W)}
    dense = all(tensor.stride(i) == s or size == 1 for i, (s, size) in wanted.items())
    if not dense or (len(tensor) > 1 and tensor.stride(0) < C * H * W):
        raise ValueError(
            f"{name} of strides {tensor.stride()}: is changed in place and must be channels-last"
        )
