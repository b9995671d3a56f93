"""The images in flight: jobs in the slots of one batch, which step together and leave one by one.

Used by one thread at a time. What fails, fails by raising; who is told is up to the caller.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashddpm import arguments, host
from flashddpm.errors import NonFiniteError
from flashddpm.execution.checks import check_variance
from flashddpm.execution.derived import Glimpse
from flashddpm.execution.executor import Executor
from flashddpm.execution.follower import CHANGED
from flashddpm.execution.plan_table import PlanTable
from flashddpm.execution.slot_table import Occupant, SlotTable
from flashddpm.execution.step import predicted_x0
from flashddpm.execution.upload import send
from flashddpm.kernels.tables import IDLE
from flashddpm.serving.request import Job

PLAN_ROWS = 8192
"""Rows that the table of plans has at least; more if a model has more timesteps."""
STEPS_AHEAD = 2
"""How many steps the host may be ahead of a GPU: enough to keep it busy, few enough that a new
request does not wait behind a long queue of launches."""


class Flight:
    """A batch of jobs.

    Args:
        executor: what runs the network.
        max_batch: slots, which is to say images at a time.
        guided: whether an image may need two lanes.
        num_timesteps: rows of the longest plan.
        compiled: whether the compiled network runs.
        exact: whether the network always runs on all lanes.
        buckets: numbers of lanes that it runs on besides all; None for the executor's.

    Attributes:
        buckets: numbers of lanes that the network may run on; None for any.
        jobs: by slot.
    """

    def __init__(
        self,
        executor: Executor,
        max_batch: int,
        guided: bool,
        num_timesteps: int,
        compiled: bool,
        exact: bool,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.executor, self.compiled = executor, compiled
        self.max_batch = max_batch
        self.max_lanes = max_batch * (2 if guided else 1)
        rows = 1 + max(PLAN_ROWS, num_timesteps)
        self.slots = executor.service_slots(max_batch, self.max_lanes, rows)
        self.batch = SlotTable(self.slots)
        self.table = PlanTable(self.slots)
        self.jobs: dict[int, Job] = {}
        self._slot_of: dict[Job, int] = {}
        self._exact = exact
        self.buckets = self._choose(buckets)
        self._changed = False
        self._version = 0  # of what the rows of plans were embedded by
        self._glimpse = Glimpse(executor.follower.modules)
        self._weights: Tensor | None = None  # as seen when images last entered
        self._weights_now: Tensor | None = None  # as seen since the last step
        self._channels: int | None = None  # that the network returns
        self._pace = Pace(executor.device)
        # Only noted, for this may be while something is captured; nobody waits for it at exit.
        weakref.finalize(self, executor.graphs.forget, self.slots.token).atexit = False

    def __len__(self) -> int:
        return len(self.jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._slot_of

    @property
    def finished(self) -> list[Job]:
        """The jobs whose plan is at its end; they keep their slots until removed."""
        return [job for slot, job in self.jobs.items() if self._row(slot) == IDLE]

    @property
    def lanes(self) -> int:
        """How many the network runs on in the next step, spare ones included."""
        used = self.batch.lanes
        if self.buckets is None:
            return used
        return next(lanes for lanes in self.buckets if lanes >= used)

    def _choose(self, buckets: Sequence[int] | None) -> list[int] | None:
        most = self.max_lanes
        if self._exact:
            return [most]
        if buckets is not None:
            return sorted({*(arguments.integer("buckets", n, 1, most) for n in buckets), most})
        fixed = self.compiled or self.executor.capture
        return self.executor.buckets(most) if fixed else None

    def warm(self) -> None:
        """Make ready for every number of lanes that the network may run on."""
        prefixes = [self.slots.prefix(self.max_batch, L) for L in self.buckets or []]
        self.executor.warm(prefixes, self.compiled)

    def reserve(self, job: Job) -> bool:
        """Give the job's plan a place in the table; False if there is none before others leave."""
        start = self.table.acquire(job.plan)
        job.start = start or 0
        return start is not None

    def release(self, job: Job) -> None:
        """Give up what `reserve` gave."""
        self.table.release(job.plan)

    def follow_weights(self) -> None:
        """Have jobs that enter now drawn by the network as it is now; call it before they do.

        Raises:
            RuntimeError: it was changed in a way that cannot be followed (`Follower.renew`).
        """
        self._weights = self._glimpse.take()  # first: what changes meanwhile shows at the end
        version = self.executor.renew()
        if version != self._version:
            self.table.reload()
            self._version = version

    def admit(self, job: Job) -> None:
        """Put a job that holds a reservation into a free slot; ``start`` is to follow."""
        job.weights, job.version = self._weights, self._version
        slot = self.batch.admit(
            Occupant(
                seed=job.seed,
                label=job.label,
                null_label=job.null_label,
                guidance=job.guidance,
                row=job.start,
                last=job.start + len(job.plan) - 1,
                index=job.index,
            )
        )
        self.jobs[slot], self._slot_of[job] = job, slot
        self._changed = True

    def start(self, jobs: Sequence[Job]) -> None:
        """Set x_T of these jobs, which have just been admitted: noise, or their image, noised."""
        self.batch.upload()
        plain = [job for job in jobs if job.plan.initial == (0.0, 1.0)]
        for group in (plain, *([job] for job in jobs if job not in plain)):
            if group:
                slots = send(host.ints([self._slot_of[job] for job in group]), self.executor.device)
                self.executor.start(self.slots, slots, group[0].plan, group[0].image)
        self.batch.fill_lanes()
        self._changed = False

    def remove(self, job: Job) -> None:
        """Free the job's slot and what it reserved."""
        slot = self._slot_of.pop(job)
        del self.jobs[slot]
        self.batch.retire(slot)
        self.release(job)
        self._changed = True

    def step(self) -> list[tuple[Job, Tensor]]:
        """Take one step of every job.

        Returns:
            Each job that has an ``on_step``, with the x0 that the step predicted, float32
            [C, H, W].
        """
        if self._changed:
            self.batch.upload()
            self.batch.fill_lanes()
            self._changed = False
        jobs = self.jobs.values()
        watched = [
            (slot, self._numbers(slot), self.slots.state.x[slot : slot + 1].clone())
            for slot, job in self.jobs.items()
            if job.on_step is not None and self._row(slot) != IDLE
        ]
        if self._exact:
            self.executor.prove_exact(self.max_lanes)
        self._pace.wait()
        self._weights_now = None
        out = self.executor.take_step(
            self.slots.prefix(self.max_batch, self.lanes),
            self.compiled,
            any(job.needs_stats for job in jobs),
            any(job.fractional for job in jobs),
        )
        self._pace.mark()
        self._channels = out.shape[1]
        self.batch.advance()
        return [
            (self.jobs[s], predicted_x0(self.slots, out, x_t, row, slice(s, s + 1))[0])
            for s, row, x_t in watched
        ]

    def take(self, job: Job) -> Landing:
        """Return a copy of the job's image, on its way from the device; the slot may be freed.

        Raises:
            ValueError: the plan learns its variance, and the network returns none.
        """
        if self._channels is not None:
            check_variance(job.plan, self._channels, self.executor.shape[0])
        slot = self._slot_of[job]
        image = self.slots.state.x[slot].clone(memory_format=torch.contiguous_format)
        flags = [self.slots.state.nonfinite[slot]]
        if self._weights_now is None:
            self._weights_now = self._glimpse.take()
        if job.weights is not None and self._weights_now is not None:
            flags.append((job.weights != self._weights_now).any())
        there = torch.stack([flag.to(torch.int32) for flag in flags]).to("cpu", non_blocking=True)
        same = job.version == self.executor.follower.version
        return Landing(job, image, there, same, self._pace.event())

    def after_fork(self) -> None:
        """Forget every job: nobody takes their steps in a forked child."""
        self.jobs.clear()
        self._slot_of.clear()

    def close(self) -> None:
        """Let go of the graphs; they are dropped when next somebody may."""
        self.executor.graphs.forget(self.slots.token)

    def _row(self, slot: int) -> int:
        occupant = self.batch.occupants[slot]
        assert occupant is not None
        return occupant.row

    def _numbers(self, slot: int) -> list[float]:
        """Return what the slot's next step applies, from the host's copy."""
        job = self.jobs[slot]
        return job.plan.rows[self._row(slot) - job.start].astype(np.float32).tolist()


@dataclass(frozen=True, eq=False)
class Landing:
    """A finished image whose last step the device may still be at.

    Attributes:
        job: whose.
        image: float32 [C, H, W].
        flags: int32 [1 or 2], on the host: the row that was first not finite, or 0; and, where
            weights can be seen, whether they are others than when the image entered.
        same: whether what is derived from the weights is what it was when the image entered.
        event: after which both are there; None where they are already.
    """

    job: Job
    image: Tensor
    flags: Tensor
    same: bool
    event: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """Return the image; wait for it.

        Raises:
            RuntimeError: steps of two networks drew it.
            NonFiniteError: the network's output turned NaN or infinite.
        """
        if self.event is not None:
            self.event.synchronize()
        row, *others = self.flags.tolist()
        if any(others) or not self.same:
            raise RuntimeError(CHANGED)
        if row:
            raise NonFiniteError(self.job.seed, row - self.job.start, len(self.job.plan))
        return self.image


class Pace:
    """Keeps the host at most `STEPS_AHEAD` steps ahead of a GPU; on the CPU there is no ahead."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: deque[torch.cuda.Event] = deque()

    def event(self) -> torch.cuda.Event | None:
        """Return an event after all that was launched so far."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def mark(self) -> None:
        """Note that a step was launched."""
        event = self.event()
        if event is not None:
            self._marks.append(event)

    def wait(self) -> None:
        """Wait until fewer than `STEPS_AHEAD` steps are under way."""
        while len(self._marks) >= STEPS_AHEAD:
            self._marks.popleft().synchronize()
