"""`PlanTable`: which rows of a batch's table of coefficients hold which plan."""

from __future__ import annotations

from flashddpm.diffusion.plan import Plan
from flashddpm.execution.slots import Slots


class PlanTable:
    """The plans in the rows of a batch's table, each held once however many images follow it.

    A plan is the steps of an image, one row of coefficients a step. A plan that no image follows
    stays until its rows are needed. The bookkeeping is on the host.

    Args:
        slots: the buffers with the table of R rows, of which row 0, that of idle slots (places
            without an image), is not used.

    Attributes:
        slots: as above.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self._plans: dict[bytes, tuple[int, Plan]] = {}  # content -> start, plan; oldest first
        self._users: dict[bytes, int] = {}

    def acquire(self, plan: Plan) -> int | None:
        """Count one more image that follows a plan, and return the plan's first row in the table.

        A plan that is not in the table is copied there, in place of unused ones if need be.

        Returns:
            The number of the row, at least 1; None, and nothing is counted, if there is no room
            now.

        Raises:
            ValueError: if the plan has more than the R - 1 rows of the whole table.
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
        """Count one image fewer that follows a plan; each call must match one `acquire`.

        Raises:
            KeyError: if no image follows the plan.
        """
        key = plan.content
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]

    def reload(self) -> None:
        """Copy every plan into its rows again, with time embeddings by the network's new weights.

        Call it when the weights have changed; plans keep their rows.
        """
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
