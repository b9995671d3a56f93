"""The static buffers of a batch, and the one step that every way of running applies to them.

A batch has S slots (images) and L lanes (network evaluations): a slot owns one lane, or two when
it is guided. All state of a trajectory is in these tensors, at addresses that never change, so
that a captured graph stays valid whatever is put into them. A slot on row 0 rests: nothing of it
is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from flashddpm.kernels.contract import REST, Column
from flashddpm.solvers import Plan

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [L, C, H, W], t int64 [L], labels int64 [L] or None) -> out [L, C, H, W]."""


class Slots:
    """Buffers for S slots and L lanes of (C, H, W) images and plans of up to R - 1 rows.

    Attributes:
        x, hist: float32 [S, C, H, W], channels-last, rows padded to 16 elements.
        net_in: [L, C, H, W] in the network's dtype, channels-last.
        idx, seeds: int64 [S]. guidance: float32 [S]. nonfinite: int32 [S].
        bounds, factors: float32 [S], what ``measure`` found. lane_cond, lane_uncond: int32 [S].
        lane_slot: int64 [L]. lane_label: int64 [L] or None.
        rows: float32 [R, len(Column)]. timesteps, keys, next: int64 [R].
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
        self.guidance = zeros(S, dtype=torch.float32)
        self.bounds, self.factors = (torch.ones(S, device=device) for _ in range(2))
        self.nonfinite = zeros(S, dtype=torch.int32)
        self.lane_cond = zeros(S, dtype=torch.int32)
        self.lane_uncond = zeros(S, dtype=torch.int32) - 1
        self.lane_slot = zeros(L)
        self.lane_label = zeros(L) if labelled else None
        self.rows = zeros(R, len(Column), dtype=torch.float32)
        self.timesteps, self.keys, self.next = zeros(R), zeros(R), zeros(R)

    def load_plan(self, plan: Plan) -> None:
        """Put a plan into rows 1..len(plan); the last leads to rest."""
        n = len(plan)
        self.rows[1 : n + 1].copy_(torch.tensor(plan.rows))
        self.timesteps[1 : n + 1].copy_(torch.tensor(plan.timesteps))
        self.keys[1 : n + 1].copy_(torch.tensor(plan.noise_keys))
        self.next[1:n].copy_(torch.arange(2, n + 1))
        self.next[n] = REST

    def admit(
        self,
        noise: Tensor,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        null_label: int | None,
        guidance: Sequence[float],
    ) -> None:
        """Start the first len(seeds) slots from ``noise`` at row 1; the other slots rest.

        Guided slots (guidance other than 1) take a second lane each, after the first S.
        """
        S, n = len(self.idx), len(seeds)
        guided = [s for s in range(n) if guidance[s] != 1]
        lane_slot = [*range(S), *guided]
        lane_uncond = [-1] * S
        for lane, s in enumerate(guided, start=S):
            lane_uncond[s] = lane
        lane_slot += [0] * (len(self.lane_slot) - len(lane_slot))
        self.idx.copy_(torch.tensor([1] * n + [REST] * (S - n)))
        self.seeds[:n].copy_(torch.tensor(seeds))
        self.guidance[:n].copy_(torch.tensor(guidance))
        self.nonfinite.zero_()
        self.lane_cond.copy_(torch.arange(S))
        self.lane_uncond.copy_(torch.tensor(lane_uncond))
        self.lane_slot.copy_(torch.tensor(lane_slot))
        if self.lane_label is not None and labels is not None:
            lane_label = [*labels, *[labels[0]] * (S - n)]
            lane_label += [null_label or 0] * (len(lane_slot) - S)
            self.lane_label.copy_(torch.tensor(lane_label))
        self.x[:n].copy_(noise)
        self.net_in.copy_(self.x[self.lane_slot])


def evaluate(slots: Slots, network: Network) -> Tensor:
    """Run the network on every lane, at the timestep of the lane's slot.

    Raises:
        ValueError: the network returns anything but a tensor of its input's shape.
    """
    t = slots.timesteps.index_select(0, slots.idx.index_select(0, slots.lane_slot))
    out = network(slots.net_in, t, slots.lane_label)
    if not isinstance(out, Tensor) or out.shape != slots.net_in.shape:
        kind = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"network: returned {kind} for x_t of shape {tuple(slots.net_in.shape)}; "
            "must return a tensor of that shape (call= can unwrap or slice it)"
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
        slots.net_in,
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


def step(slots: Slots, network: Network, ops: ModuleType) -> None:
    """The whole reverse step of every slot, for any plan: what a graph captures."""
    out = evaluate(slots, network)
    measure(slots, out, ops)
    update(slots, out, ops)
