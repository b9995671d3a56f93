"""The static buffers of a batch, which every step reads and writes.

A batch has S slots (images) and L lanes (network evaluations): a slot owns one lane, or two when
it is guided. All state of a trajectory is in these tensors, at addresses that never change, so
that a captured graph stays valid whatever is put into them. A slot on row 0 is idle: nothing of
it is read or written. A bucket is a prefix of the slots and lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from flashddpm import host
from flashddpm.diffusion.plan import Plan
from flashddpm.execution.upload import fill
from flashddpm.kernels.step_arguments import StepSlots, StepState, StepStatistics, StepTable
from flashddpm.kernels.tables import IDLE, Column

ALIGNMENT = 64  # bytes: kernels are compiled for pointers that are multiples of 16
OF_LANES = (
    *("lane_slot", "lane_label", "lane_index"),
    *("lane_row", "t", "t_float", "lane_embedding"),
)


class Slots:
    """Buffers for S slots and L lanes of (C, H, W) images and R rows of plans, the idle row one.

    Attributes:
        state: what a step changes; rows of x and hist are padded to 16 elements, net_in is in the
            network's dtype.
        per_slot: the row, seed, guidance and lanes of each slot.
        statistics: what rows ask of whole images.
        table: the rows of plans.
        control: uint8, what the host writes before a step, in one piece; its parts are those of
            ``per_slot`` and
            lane_slot, lane_index: int64 [L]; lane_label: int64 [L] or None.
        lane_row, t: int64 [L], t_float: float32 [L], lane_embedding: [L, E] or None: of each lane
            in the step under way.
        timesteps: float32 [R], whole: int64 [R]: what the network is told, unless it is told
        embeddings: [R, E] in the network's dtype, those of the rows' timesteps; or None.
        token: what stands for these buffers, and for every prefix of them, in a dictionary.
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
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        C, H, W = shape
        stride = -(-C * H * W // 16) * 16

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        def images() -> Tensor:
            return zeros(S * stride, dtype=torch.float32).as_strided(
                (S, C, H, W), (stride, 1, W * C, C)
            )

        self.state = StepState(
            x=images(),
            hist=images(),
            net_in=zeros(L, H, W, C, dtype=dtype).permute(0, 3, 1, 2),
            nonfinite=zeros(S, dtype=torch.int32),
        )
        self._layout = _layout(S, L, labelled)
        self.control = zeros(sum(size for *_, size in self._layout), dtype=torch.uint8)
        parts = self.parts(self.control)
        self.per_slot = StepSlots(*(parts[name] for name in StepSlots._fields))
        self.per_slot.lane_uncond.fill_(-1)
        self.lane_slot, self.lane_index = parts["lane_slot"], parts["lane_index"]
        self.lane_label = parts.get("lane_label")
        self.statistics = StepStatistics(*zeros(2, S, dtype=torch.float32))
        self.lane_row, self.t = zeros(L), zeros(L)
        self.t_float = zeros(L, dtype=torch.float32)
        self.table = StepTable(zeros(R, len(Column), dtype=torch.float32), zeros(R), zeros(R))
        self.timesteps, self.whole = zeros(R, dtype=torch.float32), zeros(R)
        self._embed = embed
        self.embeddings = self.lane_embedding = None
        if embed is not None:
            width = embed(self.timesteps[:1]).shape[1]
            self.embeddings = zeros(R, width, dtype=dtype)
            self.lane_embedding = zeros(L, width, dtype=dtype)
        self.token = object()
        self._prefixes: dict[tuple[int, int], Slots] = {}

    def parts(self, control: Tensor) -> dict[str, Tensor]:
        """Return the named parts of ``control``, or of a tensor of its size."""
        pieces = control.split([size for *_, size in self._layout])
        return {
            name: piece.view(dtype)[:count]
            for piece, (name, dtype, count, _) in zip(pieces, self._layout, strict=True)
        }

    def prefix(self, S: int, L: int) -> Slots:
        """Return the first S slots and L lanes, in the same memory; the same object each time."""
        if (S, L) == (len(self.per_slot.idx), len(self.lane_slot)):
            return self
        if (S, L) not in self._prefixes:
            view = copy.copy(self)
            view._prefixes = {}
            state = StepState(*(tensor[:S] for tensor in self.state))
            view.state = state._replace(net_in=self.state.net_in[:L])
            view.per_slot = StepSlots(*(tensor[:S] for tensor in self.per_slot))
            view.statistics = StepStatistics(*(tensor[:S] for tensor in self.statistics))
            for name in OF_LANES:
                whole = getattr(self, name)
                setattr(view, name, None if whole is None else whole[:L])
            self._prefixes[S, L] = view
        return self._prefixes[S, L]

    def load_plan(self, plan: Plan, start: int = 1) -> None:
        """Put a plan into rows start..start + len(plan) - 1; the last leads to the idle row."""
        n = len(plan)
        part = slice(start, start + n)
        fill(self.table.rows[part], host.floats(plan.rows))
        fill(self.timesteps[part], host.floats(plan.timesteps))
        fill(self.whole[part], host.ints(plan.timesteps))
        fill(self.table.keys[part], host.ints(plan.noise_keys))
        fill(self.table.next[part], host.ints([*range(start + 1, start + n), IDLE]))
        if self.embeddings is not None:
            assert self._embed is not None
            self.embeddings[part].copy_(self._embed(self.timesteps[part]))


def _layout(S: int, L: int, labelled: bool) -> list[tuple[str, torch.dtype, int, int]]:
    """Return name, dtype, length and padded bytes of each part of ``control``."""
    parts = [("idx", torch.int64, S), ("seeds", torch.int64, S)]
    parts += [("lane_slot", torch.int64, L), ("lane_index", torch.int64, L)]
    parts += [("lane_label", torch.int64, L)] if labelled else []
    parts += [("guidance", torch.float32, S)]
    parts += [("lane_cond", torch.int32, S), ("lane_uncond", torch.int32, S)]
    return [
        (name, dtype, n, -(-n * dtype.itemsize // ALIGNMENT) * ALIGNMENT)
        for name, dtype, n in parts
    ]
