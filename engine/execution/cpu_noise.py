"""The noise of steps on the CPU's fast path: drawn for many steps, or many rows, in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from flashddpm import host
from flashddpm.diffusion.plan import Plan
from flashddpm.errors import CompilationError
from flashddpm.execution.compiled_network import compiling
from flashddpm.execution.slots import Slots
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Column, Purpose

log = logging.getLogger("flashddpm")

NOISE_BYTES = 16 << 20
"""Most memory that noise drawn ahead may hold, unless one step needs more."""

Draw = Callable[[Tensor, Tensor, tuple[int, int, int], int], Tensor]
"""(seeds [B], keys [B], (C, H, W), purpose) -> float32 [B, C, H, W]."""


class CompiledNoise:
    """``reference.philox`` in three compiled pieces, with its two casts of bits between them.

    (Inductor cannot cast bits on the CPU; hence pieces.) Compiled at the first call.
    """

    def __init__(self) -> None:
        self._broken = False

    @cached_property
    def _pieces(self) -> tuple:
        return tuple(torch.compile(piece, dynamic=True) for piece in reference.PIECES)

    def __call__(
        self, seeds: Tensor, keys: Tensor, shape: tuple[int, int, int], purpose: int
    ) -> Tensor:
        """Return standard normal noise, float32 [B, C, H, W], as ``reference.philox`` does."""
        if not self._broken:
            try:
                with compiling():
                    return reference.philox_in_pieces(self._pieces, seeds, keys, shape, purpose)
            except CompilationError as error:  # that of the network lies in a cache, say
                log.warning("noise is drawn without compiling: %s", error)
                self._broken = True
        return reference.philox(seeds, keys, shape, purpose)  # the same bits


def ahead(slots: Slots, plan: Plan, draw: Draw) -> Iterator[Tensor | None]:
    """Yield each step's noise, float32 [S, C, H, W], where all slots follow the plan together.

    None where the step takes none.
    """
    S, C, H, W = slots.state.x.shape
    many = max(1, NOISE_BYTES // (4 * slots.state.x.numel()))
    for start in range(0, len(plan), many):
        keys = host.ints(plan.noise_keys[start : start + many])
        if not plan.rows[start : start + many, Column.SIGMA].any():
            yield from [None] * len(keys)
            continue
        seeds = slots.per_slot.seeds.repeat(len(keys))
        z = draw(seeds, keys.repeat_interleave(S), (C, H, W), Purpose.REVERSE_STEP)
        yield from z.unflatten(0, (len(keys), S))


def of_rows(slots: Slots) -> Tensor | None:
    """Return the noise of each slot's own row, float32 [S, C, H, W]; None if none takes any."""
    drawing = (slots.table.rows[slots.per_slot.idx, Column.SIGMA] != 0).nonzero().flatten()
    if not len(drawing):
        return None
    noise = torch.empty_like(slots.state.x)
    _, C, H, W = noise.shape
    noise[drawing] = reference.philox(
        slots.per_slot.seeds[drawing],
        slots.table.keys[slots.per_slot.idx[drawing]],
        (C, H, W),
        Purpose.REVERSE_STEP,
    )
    return noise
