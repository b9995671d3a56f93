"""Checks of the operations' arguments, each of which raises ValueError for what does not fit.

The message begins with the argument's name. No check reads a number from a device, so none waits.
"Slot" is the place of one image in a batch, "lane" one evaluation of the network, "row" the
coefficients of one step.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from flashddpm.kernels.step_arguments import StepSlots, StepStatistics, StepTable
from flashddpm.kernels.tables import FLOATS, LOSSES, Column

SMALLEST = 1e-37
"""The smallest delta allowed: a positive number whose inverse float32 holds too."""


def check_image(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Check that a tensor is a batch of images, optionally of a given shape and device.

    Args:
        name: the argument's name, for the message.
        tensor: the tensor to check, any layout.
        like: a tensor whose shape and device, not dtype, it must have; None for any.

    Raises:
        ValueError: if the tensor is not [B, C, H, W] in float32, float16 or bfloat16, differs from
            ``like`` in shape or device, or has 2^34 or more elements an image.
    """
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
    """Check that a network's output fits images: [L, C or 2C, H, W] on their device.

    Args:
        out: the network's output, any layout.
        image: [any, C, H, W], the images whose C, H, W and device it must have.
        lanes: the number L of images that ``out`` must hold; None for any.

    Raises:
        ValueError: if ``out`` has another shape or device, is not float32, float16 or bfloat16, or
            has 2^34 or more elements an image.
    """
    check_image("out", out)
    _, C, H, W = image.shape
    L = len(out) if lanes is None else lanes
    if out.shape not in ((L, C, H, W), (L, 2 * C, H, W)) or out.device != image.device:
        raise ValueError(
            f"out of shape {tuple(out.shape)} on {out.device}: "
            f"must be [{L}, {C} or {2 * C}, {H}, {W}] on {image.device}"
        )


def check_vectors(like: Tensor, dtype: torch.dtype, size: int, **vectors: Tensor) -> None:
    """Check that tensors are contiguous vectors of a given size, dtype and device.

    Args:
        like: a tensor on the device that they must be on.
        dtype: the dtype that they must have.
        size: the number of elements that they must have.
        vectors: the tensors to check by the names of the arguments.

    Raises:
        ValueError: if a tensor's shape is not (size,), its dtype or device is another, or it is not
            contiguous.
    """
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
    """Check that a tensor is a contiguous float32 [R, columns] on the device of another tensor.

    Args:
        name: the argument's name, for the message.
        tensor: the tensor to check.
        columns: the number of columns that it must have.
        like: a tensor on the device that it must be on.

    Raises:
        ValueError: if its shape, dtype, device or layout is another.
    """
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
    """Check the arguments that give each of B images its row and its noise, and the table of rows.

    Args:
        t, seeds, keys: the row, the noise seed and the noise key of each image; must be contiguous
            int64 [B].
        rows: the table of coefficients; must be a contiguous float32 [R, columns].
        columns: the number of columns that the table must have.
        like: [B, ...], a tensor that gives B and the device that all of them must be on.

    Raises:
        ValueError: if one of them has another shape, dtype, device or layout.
    """
    check_vectors(like, torch.int64, len(like), t=t, seeds=seeds, keys=keys)
    check_table("rows", rows, columns, like)


def check_loss(loss: str, delta: float) -> None:
    """Check the name of a training loss and the delta of the Huber loss.

    Args:
        loss: must be "mse", "l1" or "huber" (``tables.LOSSES``).
        delta: must be in [1e-37, 1e37], so that float32 holds it and its inverse, whatever the
            loss.

    Raises:
        ValueError: if the loss is none of them (in lower case) or delta is out of range or NaN.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: must be one of {', '.join(LOSSES)}")
    if not SMALLEST <= delta <= 1 / SMALLEST:
        raise ValueError(
            f"delta={delta!r}: must be in [{SMALLEST:g}, {1 / SMALLEST:g}], for float32"
        )


def check_purpose(purpose: int) -> int:
    """Return the purpose of a noise draw as an int, after checking that it fits a 32-bit word.

    Args:
        purpose: what the noise is for (``Purpose``), an int or what ``__index__`` makes one.

    Raises:
        ValueError: if it is no integer, or not in 0..2^32-1.
    """
    try:
        number = operator.index(purpose)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise ValueError(f"purpose={purpose!r}: must be an integer in 0..2^32-1")
    return number


def check_float32(name: str, tensor: Tensor) -> None:
    """Check that a tensor is float32.

    Args:
        name: the argument's name, for the message.
        tensor: the tensor to check.

    Raises:
        ValueError: if its dtype is another.
    """
    if tensor.dtype is not torch.float32:
        raise ValueError(f"{name} of {tensor.dtype}: must be float32")


def check_in_place(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Check that a tensor holds channels-last images, so that a kernel can update them in place.

    Within an image the elements must be dense in (h, w, c) order. The stride from image to image
    may be larger than an image, so that images may be padded.

    Args:
        name: the argument's name, for the message.
        tensor: the tensor to check.
        like: a tensor whose shape and device, not dtype, it must have; None for any.

    Raises:
        ValueError: if it is not [B, C, H, W] in float32, float16 or bfloat16 with fewer than 2^34
            elements an image, differs from ``like`` in shape or device, an image is not dense in
            channels-last order, or images overlap.
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
    """Check a step's vectors with one number a slot, and that they are on the device of the states.

    The noise seeds are not checked, nor any values.

    Args:
        x: [S, C, H, W], the states, which give S and the device.
        slots: idx must be int64 [S], guidance float32 [S], lane_cond and lane_uncond int32 [S].
        statistics: dynamic_threshold and rescale_factor must be float32 [S].

    Raises:
        ValueError: if a vector has another shape, dtype or device or is not contiguous.
    """
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
    """Check a table of steps: its rows of coefficients and the row after each; not its keys.

    Args:
        x: a tensor on the device that they must be on.
        table: rows must be a contiguous float32 [R, len(Column)], next a contiguous int64 [R].

    Raises:
        ValueError: if one of them has another shape, dtype, device or layout.
    """
    check_table("rows", table.rows, len(Column), x)
    check_vectors(x, torch.int64, len(table.rows), next=table.next)


def check_state(x: Tensor, **others: Tensor) -> None:
    """Check that the states of slots are float32, channels-last and of x's shape and device.

    There may be room between one image and the next, but not within an image.

    Args:
        x: [S, C, H, W], the states; checked itself.
        others: more tensors to check, by the names of the arguments; they must have the shape and
            device of ``x``.

    Raises:
        ValueError: if one of them is not a float32 [S, C, H, W] of that shape and device with fewer
            than 2^34 elements an image, or is not channels-last, or its images overlap.
    """
    for name, tensor in {"x": x, **others}.items():
        check_in_place(name, tensor, like=x)
        check_float32(name, tensor)
