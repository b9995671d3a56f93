"""Which rows of the slots' table hold which plan, on the host."""

from __future__ import annotations

from flashddpm.diffusion.plan import Plan
from flashddpm.execution.slots import Slots


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
        room = len(self.slots.table.rows) - 1
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
            if len(self.slots.table.rows) - row >= length:
                return row
            if not unused:
                return None
            del self._plans[unused.pop(0)]
