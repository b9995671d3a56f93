"""Checks of the operations' arguments: each refuses what does not fit by a ValueError.

The message begins with the argument's name. No check reads a number from a device.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from flashddpm.kernels.step_arguments import StepSlots, StepStatistics, StepTable
from flashddpm.kernels.tables import FLOATS, LOSSES, Column

SMALLEST = 1e-37
"""The smallest positive number whose inverse float32 holds too."""


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


def check_vectors(like: Tensor, dtype: torch.dtype, size: int, **vectors: Tensor) -> None:
    """Refuse anything but contiguous [size] of this dtype on the device of ``like``."""
    shape, device = (size,), like.device
    for name, vector in vectors.items():
        if vector.shape != shape or vector.dtype is not dtype or vector.device != device:
            raise ValueError(
                f"{name} of shape {tuple(vector.shape)}, {vector.dtype} on {vector.device}: "
                f"must be [{size}], {dtype} on {device}"
            )
        if not vector.is_contiguous():
            raise ValueError(f"{name} of strides {vector.stride()}: must be contiguous")


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
    check_vectors(like, torch.int64, len(like), t=t, seeds=seeds, keys=keys)
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


def check_float32(name: str, tensor: Tensor) -> None:
    """Refuse another dtype than float32."""
    if tensor.dtype is not torch.float32:
        raise ValueError(f"{name} of {tensor.dtype}: must be float32")


def check_in_place(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse images whose elements are not channels-last, row by row.

    The stride from image to image is free, so that rows may be padded.
    """
    check_image(name, tensor, like)
    B, C, H, W = tensor.shape
    image, channel, row, pixel = tensor.stride()
    dense = (channel == 1 or C == 1) and (row == W * C or H == 1) and (pixel == C or W == 1)
    if not dense or (B > 1 and image < C * H * W):
        raise ValueError(
            f"{name} of strides {tensor.stride()}: must be channels-last, one image after another"
        )


def check_slots(x: Tensor, slots: StepSlots, statistics: StepStatistics) -> None:
    """Refuse rows, guidance, lanes and statistics that are not one a slot of ``x``; not seeds."""
    S = len(x)
    check_vectors(x, torch.int64, S, idx=slots.idx)
    check_vectors(
        *(x, torch.float32, S),
        guidance=slots.guidance,
        dynamic_threshold=statistics.dynamic_threshold,
        rescale_factor=statistics.rescale_factor,
    )
    lanes = {"lane_cond": slots.lane_cond, "lane_uncond": slots.lane_uncond}
    check_vectors(x, torch.int32, S, **lanes)


def check_rows(x: Tensor, table: StepTable) -> None:
    """Refuse rows of steps that are no table on the device of ``x``, and others of next."""
    check_table("rows", table.rows, len(Column), x)
    check_vectors(x, torch.int64, len(table.rows), next=table.next)


def check_state(x: Tensor, **others: Tensor) -> None:
    """Refuse states of slots that are not float32, in place, and of the shape of ``x``."""
    for name, tensor in {"x": x, **others}.items():
        check_in_place(name, tensor, like=x)
        check_float32(name, tensor)
