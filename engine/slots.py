"""The static buffers of a batch, and the one step that every way of running applies to them.

A batch has S slots (images) and L lanes (network evaluations): a slot owns one lane, or two when
it is guided. All state of a trajectory is in these tensors, at addresses that never change, so
that a captured graph stays valid whatever is put into them. A slot on row 0 rests: nothing of it
is read or written. The network runs on the first lanes only, as many as a bucket has.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from flashddpm.kernels.contract import REST, Column
from flashddpm.solvers import Plan

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [L, C, H, W], t int64 [L], labels int64 [L] or None) -> out [L, C, H, W].

t is float32 where a plan in the batch has timesteps between the integers.
"""


class Slots:
    """Buffers for S slots and L lanes of (C, H, W) images and R rows of plans, the rest row one.

    Attributes:
        x, hist: float32 [S, C, H, W], channels-last, rows padded to 16 elements.
        net_in: [L, C, H, W] in the network's dtype, channels-last.
        idx, seeds: int64 [S]. guidance, bounds, factors: float32 [S]. nonfinite: int32 [S].
        lane_cond, lane_uncond: int32 [S]. lane_slot: int64 [L]. lane_label: int64 [L] or None.
        lane_row, t: int64 [L], t_float: float32 [L]: of each lane in the step under way.
        rows: float32 [R, len(Column)]. timesteps: float32 [R]. keys, next: int64 [R].
        fractional: whether the network is told float timesteps; set by who runs the plans.
    """

    def __init__(
        self,
        S: int,
        L: int,
        shape: tuple[int, int, int],
        R: int,
        dtype: torch.dtype,
        device: torch.device,
        labelled: bool,
    ) -> None:
        C, H, W = shape
        stride = -(-C * H * W // 16) * 16

        def state() -> Tensor:
            return torch.zeros(S * stride, device=device).as_strided(
                (S, C, H, W), (stride, 1, W * C, C)
            )

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.x, self.hist = state(), state()
        self.net_in = zeros(L, H, W, C, dtype=dtype).permute(0, 3, 1, 2)
        self.idx, self.seeds = zeros(S), zeros(S)
        self.guidance, self.bounds, self.factors = zeros(3, S, dtype=torch.float32)
        self.nonfinite = zeros(S, dtype=torch.int32)
        self.lane_cond = zeros(S, dtype=torch.int32)
        self.lane_uncond = zeros(S, dtype=torch.int32) - 1
        self.lane_slot = zeros(L)
        self.lane_label = zeros(L) if labelled else None
        self.lane_row, self.t = zeros(L), zeros(L)
        self.t_float = zeros(L, dtype=torch.float32)
        self.rows = zeros(R, len(Column), dtype=torch.float32)
        self.timesteps = zeros(R, dtype=torch.float32)
        self.keys, self.next = zeros(R), zeros(R)
        self.fractional = False

    def load_plan(self, plan: Plan, start: int = 1) -> None:
        """Put a plan into rows start..start + len(plan) - 1; the last leads to rest."""
        n = len(plan)
        part = slice(start, start + n)
        self.rows[part].copy_(torch.tensor(plan.rows))
        self.timesteps[part].copy_(torch.tensor(plan.timesteps))
        self.keys[part].copy_(torch.tensor(plan.noise_keys))
        self.next[part].copy_(torch.tensor([*range(start + 1, start + n), REST]))


def _first(lanes: Tensor, L: int) -> Tensor:
    """Return the first L lanes; all of them without the cost of a view."""
    return lanes if len(lanes) == L else lanes[:L]


def evaluate(slots: Slots, network: Network, L: int | None = None) -> Tensor:
    """Run the network on the first L lanes (all by default), at the timestep of the lane's slot.

    Allocates nothing besides what the network does.

    Raises:
        ValueError: the network returns anything but a tensor of its input's shape, or of twice its
            channels.
    """
    L = len(slots.net_in) if L is None else L
    lane_row, t_float, t = _first(slots.lane_row, L), _first(slots.t_float, L), _first(slots.t, L)
    torch.index_select(slots.idx, 0, _first(slots.lane_slot, L), out=lane_row)
    torch.index_select(slots.timesteps, 0, lane_row, out=t_float)
    if not slots.fractional:
        t.copy_(t_float)
    x_t = _first(slots.net_in, L)
    labels = None if slots.lane_label is None else _first(slots.lane_label, L)
    out = network(x_t, t_float if slots.fractional else t, labels)
    _, C, H, W = x_t.shape
    if not isinstance(out, Tensor) or out.shape not in ((L, C, H, W), (L, 2 * C, H, W)):
        kind = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"network: returned {kind} for x_t of shape {tuple(x_t.shape)}; must return a tensor "
            "of that shape, or of twice its channels (call= can unwrap or slice it)"
        )
    return out


def measure(slots: Slots, out: Tensor, ops: ModuleType) -> None:
    """Find the threshold and the guidance factor of each slot whose row asks for them."""
    ops.sample_stats(
        slots.bounds,
        slots.factors,
        slots.x,
        out,
        slots.idx,
        slots.guidance,
        slots.lane_cond,
        slots.lane_uncond,
        slots.rows,
        slots.next,
    )


def update(slots: Slots, out: Tensor, ops: ModuleType, noise: Tensor | None = None) -> None:
    """Apply each slot's row, then move each slot to its next row."""
    ops.denoise_step(
        slots.x,
        slots.hist,
        _first(slots.net_in, len(out)),
        slots.nonfinite,
        out,
        slots.idx,
        slots.seeds,
        slots.guidance,
        slots.lane_cond,
        slots.lane_uncond,
        slots.bounds,
        slots.factors,
        slots.rows,
        slots.keys,
        slots.next,
        noise,
    )
    ops.advance(slots.idx, slots.next)


def step(slots: Slots, network: Network, ops: ModuleType, L: int | None = None) -> None:
    """The whole reverse step of every slot, for any plan: what a graph captures."""
    out = evaluate(slots, network, L)
    measure(slots, out, ops)
    update(slots, out, ops)
