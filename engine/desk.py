"""Which requests are open, waiting or in flight, and how each of them ends: once."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from flashddpm.metrics import Metrics
from flashddpm.request import DeadlineExceeded, EngineClosed, Job, QueueFull, RequestFailed, Result

Outcome = Result | Exception | None
"""How a job ends; None where it was cancelled."""


class Desk:
    """The open requests of an engine, in a queue of bounded length until they are in flight.

    Any thread may call any method.

    Args:
        size: requests that may wait.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()  # guards all below
        self._queue: OrderedDict[Job, None] = OrderedDict()
        self._open: set[Job] = set()  # in the queue or in flight
        self._next_deadline = math.inf  # no waiting request has an earlier one
        self._metrics = Metrics()
        self._closing = False
        self._cause: BaseException | None = None

    def accept(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: the queue is full.
            EngineClosed: no more is accepted.
        """
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine was shut down") from self._cause
            if len(self._queue) >= self.size:
                self._metrics.totals["rejected"] += 1
                raise QueueFull(f"queue_size={self.size}: as many requests are waiting")
            self._metrics.totals["submitted"] += 1
            self._queue[job] = None
            self._open.add(job)
            self._next_deadline = min(self._next_deadline, job.deadline)
            self._changed.notify_all()
        job.future.add_done_callback(lambda _: self._leave_queue(job))

    def _leave_queue(self, job: Job) -> None:
        """End a job that was cancelled while it waited, at once: its place is free for another."""
        if self.withdraw(job):
            self.end(job, None)

    def first(self) -> Job | None:
        """Return the job that has waited longest."""
        with self._changed:
            return next(iter(self._queue), None)

    def withdraw(self, job: Job) -> bool:
        """Take a job out of the queue; False if it has left already."""
        with self._changed:
            if job not in self._queue:
                return False
            del self._queue[job]
            return True

    def late(self, now: float) -> list[Job]:
        """Return the waiting jobs whose deadline has passed."""
        with self._changed:
            if now < self._next_deadline:
                return []
            late = [job for job in self._queue if now >= job.deadline]
            left = (job.deadline for job in self._queue if now < job.deadline)
            self._next_deadline = min(left, default=math.inf)
            return late

    def end(self, job: Job, outcome: Outcome) -> None:
        """Resolve the job's future, unless that was done or it was cancelled."""
        with self._changed:
            if job not in self._open:
                return
            self._open.remove(job)
            self._queue.pop(job, None)
            wanted = job.future.set_running_or_notify_cancel()  # from here no cancel() succeeds
            self._metrics.end(_name(outcome, wanted), time.monotonic() - job.submitted)
            self._changed.notify_all()
        # Outside the lock: callbacks of the future may submit, cancel or shut down.
        if not wanted:
            return
        if isinstance(outcome, Result):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)

    def count_step(self, seconds: float, occupancy: float) -> None:
        """Count a step that took so long, with this fraction of the slots in use."""
        with self._changed:
            self._metrics.step(seconds, occupancy)

    def wait_for_work(self) -> bool:
        """Wait until some job is open; False if none is and none will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._closing)
            return bool(self._open)

    @property
    def busy(self) -> bool:
        """Whether some job is open."""
        with self._changed:
            return bool(self._open)

    @property
    def futures(self) -> list[Future[Result]]:
        """The futures of all open jobs."""
        with self._changed:
            return [job.future for job in self._open]

    def stop_accepting(self, cause: BaseException | None = None) -> None:
        """Accept nothing more."""
        with self._changed:
            self._closing = True
            self._cause = self._cause or cause
            self._changed.notify_all()

    def close(self, cause: BaseException | None) -> None:
        """Accept nothing more and fail whatever is open."""
        self.stop_accepting(cause)
        with self._changed:
            left = list(self._open)
        for job in left:
            error = EngineClosed("the engine closed before the image was finished")
            error.__cause__ = cause
            with suppress(BaseException):  # a callback's SystemExit keeps nobody else waiting
                self.end(job, error)

    def metrics(self) -> dict[str, Any]:
        """Return what was counted, as `Engine.metrics` says."""
        with self._changed:
            waiting = len(self._queue)
            active = len(self._open) - waiting
            return {"queue_depth": waiting, "active": active, **self._metrics.summary()}


def failure(stage: str, cause: BaseException) -> RequestFailed:
    """Return an error of its own for one request, so that no two futures share a traceback."""
    error = RequestFailed(f"{stage}: {cause!r}")
    error.__cause__ = cause
    return error


def _name(outcome: Outcome, wanted: bool) -> str:
    if not wanted:
        return "cancelled"
    if isinstance(outcome, Result):
        return "completed"
    return "expired" if isinstance(outcome, DeadlineExceeded) else "failed"
