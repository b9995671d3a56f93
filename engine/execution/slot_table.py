"""Which slot holds what, on the host: images come and go, and one upload tells the device.

The host knows where every trajectory is without asking: rows follow one another by tables that it
wrote itself. So nothing is read back while a batch runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashddpm.execution.slots import Slots
from flashddpm.execution.upload import fill
from flashddpm.kernels.tables import IDLE


@dataclass(eq=False)
class Occupant:
    """An image in a slot, which no other image equals.

    Attributes:
        seed: the seed of the image's noise.
        label: the label of its conditional lane; None without labels.
        null_label: the label of its unconditional lane; None without labels.
        guidance: the guidance scale w; at 1 the image has one lane, else two.
        row: the row that its next step applies.
        last: the last row of its plan.
        index: its place among the images that were asked for, which a network may be told.
    """

    seed: int
    label: int | None
    null_label: int | None
    guidance: float
    row: int
    last: int
    index: int = 0

    @property
    def lanes(self) -> int:
        """How many network evaluations it takes a step."""
        return 1 if self.guidance == 1 else 2


class SlotTable:
    """The occupants of slots, and their lanes.

    Lanes are packed without gaps, the conditional ones first, each in the order of slots, so that
    the network runs on as few as a bucket allows. ``upload`` and ``fill_lanes`` must follow any
    change before the next step.

    Attributes:
        occupants: of each slot, None where it is idle.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.occupants: list[Occupant | None] = [None] * len(slots.per_slot.idx)

    def __len__(self) -> int:
        return sum(occupant is not None for occupant in self.occupants)

    @property
    def lanes(self) -> int:
        """Lanes in use."""
        return sum(occupant.lanes for occupant in self.occupants if occupant)

    def admit(self, occupant: Occupant) -> int:
        """Put an image into the first idle slot, and return the slot; its x_t is yet to be set."""
        slot = self.occupants.index(None)
        self.occupants[slot] = occupant
        return slot

    def retire(self, slot: int) -> None:
        """Empty a slot, finished or not."""
        self.occupants[slot] = None

    def upload(self) -> None:
        """Tell the device who is where, in one copy."""
        slots, S = self.slots, len(self.occupants)
        present = [(s, o) for s, o in enumerate(self.occupants) if o is not None]
        guided = [(s, o) for s, o in present if o.lanes == 2]
        host = torch.zeros_like(slots.control, device="cpu")
        parts = {name: part.numpy() for name, part in slots.parts(host).items()}
        parts["lane_uncond"][:] = -1
        parts["guidance"][:S] = 1.0
        for lane, (s, o) in enumerate(present):
            parts["idx"][s], parts["seeds"][s] = o.row, o.seed
            parts["guidance"][s], parts["lane_cond"][s] = o.guidance, lane
        for lane, (s, _) in enumerate(guided, start=len(present)):
            parts["lane_uncond"][s] = lane
        n = len(present) + len(guided)
        parts["lane_slot"][:n] = [s for s, _ in (*present, *guided)]
        parts["lane_index"][:n] = [o.index for _, o in (*present, *guided)]
        if slots.lane_label is not None:
            labels = [o.label or 0 for _, o in present] + [o.null_label or 0 for _, o in guided]
            parts["lane_label"][:n] = labels
        fill(slots.control, host)

    def fill_lanes(self) -> None:
        """Give every lane the image of its slot, as the uploaded lanes have it."""
        slots, n = self.slots, self.lanes
        slots.state.net_in[:n].copy_(slots.state.x.index_select(0, slots.lane_slot[:n]))

    def advance(self) -> list[int]:
        """Move every occupant by one row, as the step just did; return slots that are finished."""
        done = []
        for s, o in enumerate(self.occupants):
            if o is not None and o.row != IDLE:
                o.row = IDLE if o.row == o.last else o.row + 1
                if o.row == IDLE:
                    done.append(s)
        return done
