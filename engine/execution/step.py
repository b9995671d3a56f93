"""One reverse step of every slot: the network, the statistics that rows ask for, the update."""

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
"""(x_t [L, C, H, W], t int64 [L], labels int64 [L] or None) -> out [L, C, H, W].

t is float32 where a plan in the batch has timesteps between the integers.
"""

Network = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""(x_t [L, C, H, W], told, labels int64 [L] or None, index int64 [L]) -> out [L, C, H, W].

What it is told of time is t, int64 or float32 [L], or its embedding [L, E] where the slots hold
those of their rows; index is each lane's image among those that were asked for.
"""


def evaluate(slots: Slots, network: Network, fractional: bool = False) -> Tensor:
    """Run the network on every lane, at the timestep of the lane's slot.

    Allocates nothing besides what the network does.

    Args:
        slots: the buffers.
        network: what to run.
        fractional: whether it is told timesteps between the integers.

    Raises:
        ValueError: the network returns anything but a tensor of its input's shape, or of twice its
            channels.
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
    """Refuse what is not a tensor of the shape of the network's input, or of twice its channels."""
    L, C, H, W = shape
    if not isinstance(out, Tensor) or out.shape not in ((L, C, H, W), (L, 2 * C, H, W)):
        kind = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"network: returned {kind} for x_t of shape {(L, C, H, W)}; must return a tensor "
            "of that shape, or of twice its channels (call= can unwrap or slice it)"
        )


def compute_stats(slots: Slots, out: Tensor, ops: ModuleType) -> None:
    """Find the threshold and the guidance factor of each slot whose row asks for them."""
    ops.sample_stats(slots.state, out, slots.per_slot, slots.statistics, slots.table)


def update(slots: Slots, out: Tensor, ops: ModuleType, noise: Tensor | None = None) -> None:
    """Apply each slot's row, then move each slot to its next row."""
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
    """Take the whole reverse step of every slot, whatever its row; return the network's output.

    With its last two arguments by default it is what a graph captures: right for any plan.

    Args:
        slots: the buffers.
        network: what to run.
        ops: the module of the operations.
        fractional: whether the network is told timesteps between the integers.
        noise: returns the step's noise, float32 [S, C, H, W], or None where the step draws it;
            called once the network has run.
        stats: whether some row may ask for ``sample_stats``.
    """
    out = evaluate(slots, network, fractional)
    if stats:
        compute_stats(slots, out, ops)
    update(slots, out, ops, None if noise is None else noise())
    return out


def predicted_x0(
    slots: Slots, out: Tensor, x_t: Tensor, row: list[float], which: slice = slice(None)
) -> Tensor:
    """Return the x0 that slots on one row predicted in a step, float32 [s, C, H, W].

    Args:
        slots: the buffers, after the step.
        out: the network's output in it.
        x_t: float32 [s, C, H, W], the state of these slots before it.
        row: the numbers that the step applied.
        which: the slots.
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
