"""Parts that the two training losses share: the error, its penalty, the operator and its gradient.

A loss is L_b = w mean(l(error)) and what the operation adds to it, with error = out - (k0 x_0 +
k1 eps), (k0, k1, w) the first columns of rows[t], and l one of ``tables.LOSSES``. eps is the noise
of ``add_noise``, drawn again; neither it nor the target is ever written to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from flashddpm.kernels import reference
from flashddpm.kernels.image_means import image_means
from flashddpm.kernels.launch import (
    WARPS_2C,
    channels_last,
    empty_channels_last,
    launch_blocks,
    minus_zeros,
    runs_triton,
)
from flashddpm.kernels.philox import draw
from flashddpm.kernels.tables import LOSSES, LossColumn, Purpose

TRAINING = tl.constexpr(int(Purpose.TRAINING))
MSE = tl.constexpr(LOSSES.index("mse"))
L1 = tl.constexpr(LOSSES.index("l1"))


@triton.jit
def error_of(o, x0, row, seed, key, block, start, offsets, mask, like, BLOCK: tl.constexpr):
    """Return the error o - (k0 x_0 + k1 eps) of one block of an image, float32 [BLOCK].

    Args:
        o: float32 [BLOCK], the network's prediction.
        x0: pointer to the clean images, [B, n]; read only where k0 is not 0.
        row: pointer to the image's row of float32 coefficients, which begins with k0 and k1.
        seed, key: int64 scalars, the seed and key of the noise eps.
        block: the block's index in its image, int64 scalar.
        start: the block's first element in x0, int64 scalar, the images before it included.
        offsets: int32 [BLOCK], the elements of the block, from 0.
        mask: bool [BLOCK], which elements exist.
        like: a pointer whose element size decides how threads divide the noise (``philox.draw``).
    """
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
    """Return the penalty of an error, float32 [BLOCK].

    Args:
        error: float32 [BLOCK].
        delta: float32 scalar, where Huber's penalty turns to a line.
        LOSS: the index of the loss in ``tables.LOSSES``: 0 for e^2, 1 for |e|, 2 for Huber's.
    """
    if LOSS == MSE:
        return error * error
    size = tl.abs(error)
    if LOSS == L1:
        return size
    return tl.where(size > delta, delta * (size - 0.5 * delta), 0.5 * error * error)


@triton.jit
def slope(error, delta, LOSS: tl.constexpr):
    """Return the derivative of ``penalty``, float32 [BLOCK]; NaN where the error is NaN.

    Args:
        error: float32 [BLOCK].
        delta: float32 scalar, where Huber's penalty turns to a line.
        LOSS: the index of the loss in ``tables.LOSSES``: 0 for e^2, 1 for |e|, 2 for Huber's.
    """
    if LOSS == MSE:
        return 2.0 * error
    if LOSS == L1:
        return tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
    return tl.clamp(error, -delta, delta, propagate_nan=tl.PropagateNan.ALL)


def loss_operator(
    name: str, forward: Any, backward: Any, learned: bool = False
) -> Callable[..., Tensor]:
    """Register a loss as a torch operator with a gradient for ``out``, and return it.

    A second operator, ``{name}_backward``, computes the gradient. On tensors that do not run
    Triton, both are the functions of the same names in ``reference``.

    Args:
        name: the name of the operation, "diffusion_loss" or "hybrid_loss"; AttributeError for a
            name that ``reference`` lacks.
        forward: the Triton kernel of the loss, with arguments (partial, out, x0, t, seeds, keys,
            rows, delta, n, LOSS, [C], BLOCK): it writes the sums of blocks to partial, float32 [B,
            blocks]; n is the elements of an image, LOSS the index of the loss in ``LOSSES``.
        backward: the Triton kernel of the gradient, with arguments (d_out, d_loss, out, x0, t,
            seeds, keys, rows, delta, n, LOSS, [C], BLOCK): it writes d_out, like out, from d_loss,
            float32 [B].
        learned: whether ``out`` has 2C channels; the kernels then take C too.

    Returns:
        The operator, called as (out, x0, t, seeds, keys, rows, loss, delta): six tensors, the name
        of the loss ("mse", "l1" or "huber") and a float; it returns the loss of each image, float32
        [B], and checks no argument.
    """
    gradient = _gradient_operator(f"{name}_backward", backward, learned)
    plain, options = getattr(reference, name), _options(learned)

    @torch.library.custom_op(f"flashddpm::{name}", mutates_args=())
    def operator(
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
            return plain(out, x0, t, seeds, keys, rows, loss, delta)
        out, x0 = channels_last(out), channels_last(x0)
        arguments = (out, x0, t, seeds, keys, rows, delta, *_constants(x0, loss, learned))
        return image_means(forward, x0, *arguments, **options)

    @operator.register_fake
    def fake(out, x0, t, seeds, keys, rows, loss, delta) -> Tensor:
        return torch.empty(len(out), dtype=torch.float32, device=out.device)

    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.loss, ctx.delta = inputs
        ctx.save_for_backward(*tensors)

    def backpropagate(ctx, d_loss: Tensor):
        d_out = gradient(d_loss.contiguous(), *ctx.saved_tensors, ctx.loss, ctx.delta)
        return d_out, *[None] * 7

    operator.register_autograd(backpropagate, setup_context=setup_context)
    return operator


def _gradient_operator(name: str, backward: Any, learned: bool) -> Callable[..., Tensor]:
    """Register and return the operator of a loss's gradient (``loss_operator``)."""
    plain, options = getattr(reference, name), _options(learned)

    @torch.library.custom_op(f"flashddpm::{name}", mutates_args=())
    def gradient(
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
            return d_out.copy_(plain(d_loss, out, x0, t, seeds, keys, rows, loss, delta))
        if out.numel():
            out, x0 = channels_last(out), channels_last(x0)
            arguments = (out, x0, t, seeds, keys, rows, delta, *_constants(x0, loss, learned))
            launch_blocks(backward, x0, d_out, d_loss, *arguments, **options)
        return d_out

    @gradient.register_fake
    def fake(d_loss, out, x0, t, seeds, keys, rows, loss, delta) -> Tensor:
        return empty_channels_last(out)

    return gradient


def _options(learned: bool) -> dict[str, Any]:
    """Return the options of a launch."""
    return {"num_warps": WARPS_2C} if learned else {}


def _constants(x0: Tensor, loss: str, learned: bool) -> tuple[int, ...]:
    """Return the last arguments of a kernel: n, LOSS and, where there are 2C channels, C."""
    return x0[:1].numel(), LOSSES.index(loss), *((x0.shape[1],) if learned else ())


def plain_loss(out: Tensor, x0: Tensor, t: Tensor, rows: Tensor, **_: Any) -> Tensor:
    """Return the loss of a noise-predicting network in eager PyTorch, float32 [B].

    It is w times the mean squared error, in float32, against the noise, which plain code has to
    keep in memory after noising; x0 stands for the noise here. For ``ByteCase.plain``, which counts
    the bytes that such code moves.

    Args:
        out: [B, C, H, W], the network's output, any floating-point dtype.
        x0: [B, C, H, W], the noise, any floating-point dtype.
        t: int64 [B], the row of ``rows`` of each image, in [0, T).
        rows: float32 [T, columns], whose column ``LossColumn.WEIGHT`` is the weight of the loss.
        _: the operation's other arguments, ignored.
    """
    error = F.mse_loss(out.float(), x0.float(), reduction="none")
    return rows[t, LossColumn.WEIGHT] * error.mean(dim=(1, 2, 3))
