"""`Slots`: the buffers on a device of a batch of images, which every step reads and writes.

A batch has S slots (places of images) and L lanes (network evaluations): a slot has one lane, or
two when it is guided. The whole state is in these tensors, at addresses that never change, so that
a captured graph stays valid whatever is put into them. A slot on row 0 of the table is idle:
nothing of it is read or written. A bucket (a number of lanes for which the network is compiled or
captured) is a prefix of the lanes.
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
    """The buffers of S slots (images), L lanes (network evaluations) and a table of R rows (steps).

    Args:
        S: the number of slots.
        L: the number of lanes.
        shape: (C, H, W) of an image.
        R: the number of rows of the table, row 0, that of idle slots, included.
        dtype: the dtype of the network's input.
        device: the device of all tensors.
        labelled: whether the network takes labels.
        embed: called with timesteps, float32 [n], returns their embeddings, [n, E]; None for a
            network that is given timesteps themselves.

    Attributes:
        state: what a step changes: x and hist, float32 [S, C, H, W], net_in, [L, C, H, W] in
            ``dtype``, all channels-last, and nonfinite, int32 [S]; images of x and hist are padded
            to a multiple of 16 elements.
        per_slot: what each slot follows: idx (its row) and seeds, int64 [S]; guidance, float32 [S];
            lane_cond and lane_uncond (its lanes, -1 for none), int32 [S].
        statistics: what rows ask of whole images: dynamic_threshold and rescale_factor, float32
            [S].
        table: the rows of plans: rows, float32 [R, len(Column)], a coefficient a column; keys (the
            words of the noise's counter that tell steps apart) and next (the row that follows),
            int64 [R].
        control: uint8, the bytes that the host writes before a step in one copy: those of
            ``per_slot``, lane_slot, lane_index and lane_label are views of it.
        lane_slot: int64 [L], the slot of each lane.
        lane_index: int64 [L], the place of each lane's image among those asked for.
        lane_label: int64 [L], the class label of each lane; None without labels.
        lane_row: int64 [L], the row of each lane in the current step.
        t, t_float: int64 and float32 [L], the timestep of each lane in the current step, one of
            which the network is given, by whether timesteps are whole.
        lane_embedding: [L, E] in ``dtype``, the time embedding of each lane; None without
            ``embed``.
        timesteps, whole: float32 and int64 [R], the timestep of each row, as it is and cut to an
            integer.
        embeddings: [R, E] in ``dtype``, the time embedding of each row; None without ``embed``.
        token: an object that stands for these buffers, and their prefixes, as a key in
            dictionaries.
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
        """Return views of the named parts of ``control``, or of another tensor of its size.

        Args:
            control: uint8, as long as ``self.control``, on any device.

        Returns:
            idx, seeds, guidance, lane_cond and lane_uncond, each [S], and lane_slot, lane_index
            and, for a network with labels, lane_label, each [L], by name, in the dtypes of the
            attributes.
        """
        pieces = control.split([size for *_, size in self._layout])
        return {
            name: piece.view(dtype)[:count]
            for piece, (name, dtype, count, _) in zip(pieces, self._layout, strict=True)
        }

    def prefix(self, S: int, L: int) -> Slots:
        """Return the buffers of the first S slots and L lanes: views of the same memory and table.

        The same numbers give the same object each time.

        Args:
            S: the number of slots, at most that of these buffers.
            L: the number of lanes, at most that of these buffers.
        """
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
        """Copy a plan into the table's rows from ``start`` on; its last leads to the idle row 0.

        Timesteps and, if there is ``embed``, time embeddings of the rows are written too.

        Args:
            plan: the plan (a table of coefficients, one row a step).
            start: its first row, at least 1; start + len(plan) must not exceed R
                (not checked).
        """
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
