r"""Operation ``add_noise``, forward noising x_t = a x_0 + b eps with (a, b) = rows[t].

(Equations S2 and S4 of docs/math.md.) eps is drawn in registers. Reads one image and writes one: 2
x itemsize bytes for each element.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.examples import image_bytes, of_images, on_row
from flashddpm.kernels.launch import (
    channels_last,
    empty_channels_last,
    launch_blocks,
    minus_zeros,
    place,
    runs_triton,
)
from flashddpm.kernels.operation import Arguments, Budget, ByteCase, Op, variant
from flashddpm.kernels.philox import DRAWN, draw
from flashddpm.kernels.tables import FLOATS, Purpose
from flashddpm.kernels.validation import check_image, check_images_rows, check_purpose


@triton.jit
def _add_noise_kernel(
    x_t,  # [B, n], written
    x0,  # [B, n]
    t,  # int64 [B], row of each image
    seeds,  # int64 [B]
    keys,  # int64 [B]
    rows,  # float32 [T, 2]
    n,  # elements of an image
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, block, offsets, mask, n = place(n, BLOCK)
    start = image * n + block * BLOCK
    row = tl.load(t + image) * 2
    a = tl.load(rows + row)
    b = tl.load(rows + row + 1)
    signal = a * tl.load(x0 + start + offsets, mask=tl.where(a != 0, mask, False), other=0).to(
        tl.float32
    )
    noise = minus_zeros(BLOCK)
    if b != 0:
        seed, key = tl.load(seeds + image), tl.load(keys + image)
        noise = b * draw(seed, key, block, x_t, PURPOSE, BLOCK)
    tl.store(x_t + start + offsets, (signal + noise).to(x_t.dtype.element_ty), mask=mask)


@torch.library.custom_op("flashddpm::add_noise", mutates_args=())
def _add_noise(
    x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor, purpose: int
) -> Tensor:
    x_t = empty_channels_last(x0)
    if not runs_triton(x0):
        return x_t.copy_(reference.add_noise(x0, t, seeds, keys, rows, purpose))
    if x0.numel():
        x0 = channels_last(x0)
        arguments = (x_t, x0, t, seeds, keys, rows, x0[0].numel(), purpose)
        launch_blocks(_add_noise_kernel, x0, *arguments)
    return x_t


@_add_noise.register_fake
def _add_noise_fake(
    x0: Tensor, t: Tensor, seeds: Tensor, keys: Tensor, rows: Tensor, purpose: int
) -> Tensor:
    return empty_channels_last(x0)


def _setup_context(ctx, inputs, output) -> None:
    _, *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    """Gradient of x_0: a times that of x_t, as noising without noise has it."""
    t, seeds, keys, rows = ctx.saved_tensors
    rows = torch.stack([rows[:, 0], torch.zeros_like(rows[:, 1])], 1)
    return _add_noise(grad, t, seeds, keys, rows, 0), None, None, None, None, None


_add_noise.register_autograd(_backward, setup_context=_setup_context)


def add_noise(
    x0: Tensor,
    t: Tensor,
    seeds: Tensor,
    keys: Tensor,
    rows: Tensor,
    purpose: int = Purpose.TRAINING,
) -> Tensor:
    """Return the images with noise added, x_t = rows[t, 0] x0 + rows[t, 1] eps.

    (Equations S2 and S4 of docs/math.md.) eps is the standard normal noise that ``philox`` gives
    for the same seeds, keys and purpose. Computed in float32 whatever the dtype. Differentiable
    with respect to x0.

    Args:
        x0: [B, C, H, W], the images, float32, float16 or bfloat16, any layout and range.
        t: int64 [B], the row of ``rows`` of each image, in [0, T): not checked, for that would wait
            for the device.
        seeds, keys: int64 [B], the seed of each image's noise eps and its key (the upper 64 bits of
            the noise counter); any values.
        rows: float32 [T, 2], the factors of x0 and of eps.
        purpose: what the noise is for, in 0..2^32-1 (``Purpose``): the second word of the noise
            counter.

    Returns:
        [B, C, H, W], channels-last, in x0's dtype.

    Raises:
        ValueError: if x0 is not a [B, C, H, W] of these dtypes with fewer than 2^34 elements an
            image; if t, seeds, keys or rows is not contiguous, of this shape and dtype, and on x0's
            device; or if purpose is not an integer in range.
    """
    check_image("x0", x0)
    check_images_rows(t, seeds, keys, rows, 2, x0)
    return _add_noise(x0, t, seeds, keys, rows, check_purpose(purpose))


# The record of the operation, for tests, gates, counts of bytes and benchmarks.

ROWS = [[1.0, 0.0], [0.8, 0.6], [0.28, 0.96], [0.0, 1.0]]


def _example(*case: Any) -> Arguments:
    return of_images(*case, rows=ROWS, first=1)


def _bytes_moved(args: Arguments) -> int:
    x0 = args["x0"]
    read = (args["rows"][args["t"], 0] != 0).sum().item()
    return (len(x0) + read) * image_bytes(x0)


def _plain(x0: Tensor, t: Tensor, rows: Tensor, **_: Any) -> Tensor:
    """Draw noise, scale the images and the noise, add: in the images' dtype."""
    eps = torch.randn_like(x0)
    a, b = rows[t].to(x0.dtype).reshape(-1, 2, 1, 1, 1).unbind(1)
    return a * x0 + b * eps


_REASON = f"{DRAWN}; two products, a sum from -0, conversions: below the 72 that noise may cost"
OP = Op(
    name="add_noise",
    fast=add_noise,
    reference=reference.add_noise,
    example=_example,
    bytes_moved=_bytes_moved,
    kernels=(
        variant(
            "add_noise",
            _add_noise_kernel,
            {4: Budget(64, 0, 58.0, _REASON), 2: Budget(60, 0, 60.5, _REASON)},
            ("x_t", "x0"),
            PURPOSE=Purpose.TRAINING,
        ),
    ),
    cases=(ByteCase("add_noise", on_row([0.8, 0.6]), ("add_noise",), _plain),),
    differentiable=("x0",),
    gradient_bytes=_bytes_moved,  # that of the result is read, that of x0 written
    dtypes=FLOATS,
    index="t",
    all_work=(0, 1),  # a and b
)
