"""`SlotTable`: which slot (the place of one image in a batch) holds which image, kept on the host.

Images come and go, and one upload tells the device. The host knows where every image is without
asking, since rows follow one another by tables that it wrote: nothing is read back while a batch
runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashddpm.execution.slots import Slots
from flashddpm.execution.upload import fill
from flashddpm.kernels.tables import IDLE


@dataclass(eq=False)
class Occupant:
    """An image in a slot of a batch; two of them are never equal.

    Attributes:
        seed: the seed of the image's noise, a signed 64-bit integer.
        label: the class label of its conditional lane (network evaluation); None without labels.
        null_label: the label of its unconditional lane; None without one.
        guidance: the guidance scale w; at 1 the image has one lane, else two.
        row: the row of the table of coefficients that its next step applies; 0 once it is finished.
        last: the last row of its plan (its steps, a row each).
        index: its place among the images that were asked for, an integer that a network may be
            given.
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
        """The number of its lanes (network evaluations a step): 1, or 2 if it is guided."""
        return 1 if self.guidance == 1 else 2


class SlotTable:
    """The images in the slots of a batch, and the lanes (network evaluations) that they take.

    ``len`` of it is the number of slots in use. Lanes are packed without gaps, the conditional ones
    first, each in the order of slots, so that the network runs on as few as possible. After any
    change call `upload` and then `fill_lanes` before the next step.

    Args:
        slots: the buffers of S slots and L lanes on the device.

    Attributes:
        slots: as above.
        occupants: the `Occupant` of each slot, a list of S; None where the slot is idle.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.occupants: list[Occupant | None] = [None] * len(slots.per_slot.idx)

    def __len__(self) -> int:
        return sum(occupant is not None for occupant in self.occupants)

    @property
    def lanes(self) -> int:
        """The number of lanes in use, an int: the network evaluations of all images in a step."""
        return sum(occupant.lanes for occupant in self.occupants if occupant)

    def admit(self, occupant: Occupant) -> int:
        """Put an image into the first idle slot, and return the slot's number, from 0.

        Its state x_t in the buffers is still to be set.

        Raises:
            ValueError: if no slot is idle.
        """
        slot = self.occupants.index(None)
        self.occupants[slot] = occupant
        return slot

    def retire(self, slot: int) -> None:
        """Empty a slot, whether its image is finished or not.

        Args:
            slot: the slot's number, in 0..S-1.
        """
        self.occupants[slot] = None

    def upload(self) -> None:
        """Copy each slot's row, seed, guidance, lanes, label and index to the device, in one copy.

        Raises:
            ValueError: if the images need more than the L lanes of the buffers.
        """
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
        """Copy each slot's x_t into the network's input at the slot's lanes, once uploaded."""
        slots, n = self.slots, self.lanes
        slots.state.net_in[:n].copy_(slots.state.x.index_select(0, slots.lane_slot[:n]))

    def advance(self) -> list[int]:
        """Move every image to its next row, as the step on the device has just done.

        Returns:
            The numbers of the slots whose images are finished by it; their row is now 0.
        """
        done = []
        for s, o in enumerate(self.occupants):
            if o is not None and o.row != IDLE:
                o.row = IDLE if o.row == o.last else o.row + 1
                if o.row == IDLE:
                    done.append(s)
        return done
