"""The noise of sampling steps on the CPU's fast path, drawn for many steps or images at a time."""

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
"""The most bytes of memory that noise drawn ahead may take, unless one step needs more."""

Draw = Callable[[Tensor, Tensor, tuple[int, int, int], int], Tensor]
"""Called with (seeds int64 [B], keys int64 [B], (C, H, W), purpose), returns float32 [B, C, H, W].

A key is the upper 64 bits of the noise's counter, and tells steps apart, as purpose tells uses.
"""


class CompiledNoise:
    """A compiled form of ``reference.philox`` that draws the same bits, compiled at its first call.

    It is compiled in three pieces, since Inductor cannot compile the casts of bits between them for
    the CPU. If the compiler fails, it warns once and draws uncompiled.
    """

    def __init__(self) -> None:
        self._broken = False

    @cached_property
    def _pieces(self) -> tuple:
        return tuple(torch.compile(piece, dynamic=True) for piece in reference.PIECES)

    def __call__(
        self, seeds: Tensor, keys: Tensor, shape: tuple[int, int, int], purpose: int
    ) -> Tensor:
        """Draw standard normal noise, a pure function of the arguments.

        Args:
            seeds: int64 [B], the seed of each image's noise.
            keys: int64 [B], the key (upper 64 bits of the counter) of each image's step.
            shape: (C, H, W) of one image.
            purpose: what the noise is for, a number of `flashddpm.kernels.tables.Purpose`.

        Returns:
            float32 [B, C, H, W], channels-last.
        """
        if not self._broken:
            try:
                with compiling():
                    return reference.philox_in_pieces(self._pieces, seeds, keys, shape, purpose)
            except CompilationError as error:  # that of the network lies in a cache, say
                log.warning("noise is drawn without compiling: %s", error)
                self._broken = True
        return reference.philox(seeds, keys, shape, purpose)  # the same bits


def ahead(slots: Slots, plan: Plan, draw: Draw) -> Iterator[Tensor | None]:
    """Yield the noise of each step of a plan, drawn for as many steps at once as fit in 16 MiB.

    Args:
        slots: the buffers of S slots (images), which all follow the plan together; their seeds are
            read.
        plan: the plan (a table of coefficients, one row a step).
        draw: called with seeds, int64 [B], keys, int64 [B], (C, H, W) and purpose, returns the
            noise, float32 [B, C, H, W].

    Yields:
        For each step float32 [S, C, H, W]; or None where none of the steps that are drawn together
        with it adds noise.
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
    """Draw the noise of each slot's current row (step), for slots that may be at different steps.

    Args:
        slots: the buffers of S slots (images), whose rows, seeds and keys are read.

    Returns:
        float32 [S, C, H, W], uninitialised for slots whose row adds no noise; None if no row does.
    """
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
