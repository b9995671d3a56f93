"""Which slot holds what, on the host: images come and go, and one upload tells the device.

The host knows where every trajectory is without asking: rows follow one another by tables that it
wrote itself. So nothing is read back while a batch runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashddpm.diffusion.solvers import Plan
from flashddpm.execution.slots import Slots
from flashddpm.execution.upload import fill
from flashddpm.kernels.tables import REST


@dataclass
class Occupant:
    """An image in a slot.

    Attributes:
        seed: of its noise.
        label: of its conditional lane; null_label: of the other. Both None without labels.
        guidance: w; with 1 it has one lane.
        row: that it is at; last: of its plan.
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


class Batch:
    """The occupants of slots, and their lanes.

    Lanes are packed without gaps, the conditional ones first, each in the order of slots, so that
    the network runs on as few as a bucket allows. ``upload`` must follow any change before the
    next step.

    Attributes:
        occupants: of each slot, None where it is idle.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.occupants: list[Occupant | None] = [None] * len(slots.idx)

    def __len__(self) -> int:
        return sum(occupant is not None for occupant in self.occupants)

    @property
    def lanes(self) -> int:
        """Lanes in use."""
        return sum(occupant.lanes for occupant in self.occupants if occupant)

    def admit(self, occupant: Occupant, x: Tensor) -> int:
        """Put an image into the first idle slot, started from x [C, H, W]; return the slot."""
        slot = self.occupants.index(None)
        self.slots.x[slot].copy_(x)
        self.slots.nonfinite[slot] = 0
        self.occupants[slot] = occupant  # last, so that the slot is idle if anything raised
        return slot

    def retire(self, slot: int) -> None:
        """Empty a slot, finished or not."""
        self.occupants[slot] = None

    def upload(self) -> None:
        """Tell the device who is where, in one copy, and give every lane its image."""
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
        slots.net_in[:n].copy_(slots.x.index_select(0, slots.lane_slot[:n]))

    def advance(self) -> list[int]:
        """Move every occupant by one row, as the step just did; return slots that are finished."""
        done = []
        for s, o in enumerate(self.occupants):
            if o is not None and o.row != REST:
                o.row = REST if o.row == o.last else o.row + 1
                if o.row == REST:
                    done.append(s)
        return done


class PlanTable:
    """Where plans stand in the rows of ``slots``; each once, while some image follows it.

    Plans that nobody follows stay until their room is needed.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self._plans: dict[bytes, tuple[int, Plan]] = {}  # content -> start, plan; oldest first
        self._users: dict[bytes, int] = {}

    def acquire(self, plan: Plan) -> int | None:
        """Return the plan's first row, put there if it is new; None if there is no room now.

        Raises:
            ValueError: the plan is longer than the whole table.
        """
        room = len(self.slots.rows) - 1
        if len(plan) > room:
            raise ValueError(f"plan of {len(plan)} rows: must be at most {room}")
        key = plan.content
        if key not in self._plans:
            start = self._place(len(plan))
            if start is None:
                return None
            self.slots.load_plan(plan, start)
            self._plans[key] = (start, plan)
        self._plans[key] = self._plans.pop(key)  # the newest now
        self._users[key] = self._users.get(key, 0) + 1
        return self._plans[key][0]

    def release(self, plan: Plan) -> None:
        """Say that one image less follows the plan."""
        key = plan.content
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]

    def reload(self) -> None:
        """Put every plan into its rows again: what the network is told there has changed."""
        for start, plan in self._plans.values():
            self.slots.load_plan(plan, start)

    def _place(self, length: int) -> int | None:
        """Return the first row of a gap, letting go of unused plans, the oldest first."""
        unused = [key for key in self._plans if key not in self._users]
        while True:
            row = 1
            for start, plan in sorted(self._plans.values(), key=lambda placed: placed[0]):
                if start - row >= length:
                    return row
                row = start + len(plan)
            if len(self.slots.rows) - row >= length:
                return row
            if not unused:
                return None
            del self._plans[unused.pop(0)]
