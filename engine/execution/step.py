"""One reverse step of all slots: the network, the statistics that rows ask for, and the update.

A slot is the place of one image in a batch, a lane one network evaluation, a row one step of a
plan.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashddpm.execution.slots import Slots
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Column

Call = Callable[..., Tensor]
"""Called with (x_t [L, C, H, W], t int64 [L], labels int64 [L] or None), returns the output.

That is [L, C or 2C, H, W]. L is the number of lanes (network evaluations); x_t is in the dtype of
the network's input. t is float32 where a plan in the batch has timesteps between the integers.
"""

Network = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""Called with (x_t, told, labels, index), returns the network's output, [L, C or 2C, H, W].

x_t is [L, C, H, W] in the dtype of the network's input, for L lanes (network evaluations). What the
network is told of time is the timestep, int64 or float32 [L], or its embedding [L, E] where the
slots hold those of their rows. labels is int64 [L] or None; index, int64 [L], is the place of each
lane's image among those that were asked for.
"""


def evaluate(slots: Slots, network: Network, fractional: bool = False) -> Tensor:
    """Run the network on every lane, at the timestep of the lane's slot.

    It allocates nothing besides what the network does.

    Args:
        slots: the buffers of S slots (images) and L lanes (network evaluations); lane_row and the
            lanes' timesteps or embeddings are overwritten.
        network: what to run, a `Network` function of (x_t, told, labels, index).
        fractional: whether timesteps are given as float32 instead of int64; of no effect where the
            slots hold embeddings.

    Returns:
        The network's output, [L, C or 2C, H, W].

    Raises:
        ValueError: if the network returns anything but a tensor of its input's shape, or of twice
            its channels.
    """
    rows, told = (slots.timesteps, slots.t_float) if fractional else (slots.whole, slots.t)
    if slots.embeddings is not None:
        assert slots.lane_embedding is not None
        rows, told = slots.embeddings, slots.lane_embedding
    torch.index_select(slots.per_slot.idx, 0, slots.lane_slot, out=slots.lane_row)
    torch.index_select(rows, 0, slots.lane_row, out=told)
    out = network(slots.state.net_in, told, slots.lane_label, slots.lane_index)
    check_output(out, slots.state.net_in.shape)
    return out


def check_output(out: Any, shape: torch.Size) -> None:
    """Raise unless a network's output is a tensor of its input's shape, or of twice its channels.

    Args:
        out: what the network returned.
        shape: the shape of its input, (L, C, H, W).

    Raises:
        ValueError: if it is of another type or shape.
    """
    L, C, H, W = shape
    if not isinstance(out, Tensor) or out.shape not in ((L, C, H, W), (L, 2 * C, H, W)):
        kind = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"network: returned {kind} for x_t of shape {(L, C, H, W)}; must return a tensor "
            "of that shape, or of twice its channels (call= can unwrap or slice it)"
        )


def compute_stats(slots: Slots, out: Tensor, ops: ModuleType) -> None:
    """Compute the dynamic threshold and guidance rescale factor of each slot whose row needs them.

    Args:
        slots: the buffers, whose ``statistics`` are written.
        out: the network's output, [L, C or 2C, H, W], float32, float16 or bfloat16.
        ops: the module of the operations: flashddpm.kernels or flashddpm.kernels.reference.
    """
    ops.sample_stats(slots.state, out, slots.per_slot, slots.statistics, slots.table)


def update(slots: Slots, out: Tensor, ops: ModuleType, noise: Tensor | None = None) -> None:
    """Apply each slot's row (its step's coefficients) to its image, then move it to its next row.

    Args:
        slots: the buffers, whose ``state`` and rows are changed in place.
        out: the network's output, [L, C or 2C, H, W], float32, float16 or bfloat16.
        ops: the module of the operations: flashddpm.kernels or flashddpm.kernels.reference.
        noise: float32 [S, C, H, W], the standard normal noise z of each slot; None to draw it.
    """
    ops.denoise_step(slots.state, out, slots.per_slot, slots.statistics, slots.table, noise)
    ops.advance(slots.per_slot, slots.table)


def step(
    slots: Slots,
    network: Network,
    ops: ModuleType,
    fractional: bool = False,
    noise: Callable[[], Tensor | None] | None = None,
    stats: bool = True,
) -> Tensor:
    """Take one whole reverse step of every slot, whatever its row: network, statistics, update.

    With the defaults of noise and stats it is what a CUDA graph captures, and right for any plan.

    Args:
        slots: the buffers of S slots (images) and L lanes (network evaluations), changed in place.
        network: what to run, a `Network` function of (x_t, told, labels, index).
        ops: the module of the operations: flashddpm.kernels or flashddpm.kernels.reference.
        fractional: whether timesteps are given as float32 instead of int64.
        noise: called without arguments once the network has run, returns the noise of the step,
            float32 [S, C, H, W], or None to draw it in the step; None is the same.
        stats: whether some row may need ``sample_stats``, for a dynamic threshold or a rescale of
            guidance.

    Returns:
        The network's output, [L, C or 2C, H, W].

    Raises:
        ValueError: if the network's output is of another shape.
    """
    out = evaluate(slots, network, fractional)
    if stats:
        compute_stats(slots, out, ops)
    update(slots, out, ops, None if noise is None else noise())
    return out


def predicted_x0(
    slots: Slots, out: Tensor, x_t: Tensor, row: list[float], which: slice = slice(None)
) -> Tensor:
    """Return the x0 that slots on one row (step of a plan) have predicted, float32 [s, C, H, W].

    It is a new tensor, computed again from what the step left: guided, rescaled and clipped as the
    row says.

    Args:
        slots: the buffers, after the step.
        out: the network's output in the step, [L, C or 2C, H, W].
        x_t: float32 [s, C, H, W], the state of these slots before the step.
        row: the coefficients that the step applied, one number for each `Column` (a name of a
            coefficient).
        which: the s slots concerned, all by default.
    """
    out = out[:, : x_t.shape[1]]
    uncond = slots.per_slot.lane_uncond[which]
    o = cond = out[slots.per_slot.lane_cond[which].long()].float()
    if not row[Column.UNGUIDED]:
        o = reference.combine(cond, out[uncond.clamp(min=0).long()], slots.per_slot.guidance[which])
        if row[Column.RESCALE]:
            o *= slots.statistics.rescale_factor[which].reshape(-1, 1, 1, 1)
        o = torch.where((uncond >= 0).reshape(-1, 1, 1, 1), o, cond)
    return reference.predict_x0(x_t, o, row, slots.statistics.dynamic_threshold[which])
