"""Which requests are open, waiting or in flight, and how each of them ends: once."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

from flashddpm.serving.metrics import Metrics
from flashddpm.serving.request import (
    DeadlineExceeded,
    EngineClosed,
    Job,
    QueueFull,
    RequestFailed,
    Result,
)

Outcome = Result | Exception | None
"""How a job ends; None where it was cancelled."""


FORKED = "the engine is in the process that this one was forked from; make one here"


class Desk:
    """The open requests of an engine, in a queue of bounded length until they are in flight.

    Any thread may call any method.

    Args:
        size: requests that may wait.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()  # guards all below
        self._held = 0  # by how many; then nobody leaves the queue for a slot
        self._queue: OrderedDict[Job, None] = OrderedDict()
        self._open: set[Job] = set()  # in the queue or in flight
        self._futures: WeakSet[Future[Result]] = WeakSet()  # that somebody may still ask
        self._next_deadline = math.inf  # no waiting request has an earlier one
        self._metrics = Metrics()
        self._closing, self._why = False, "the engine was shut down"
        self._cause: BaseException | None = None

    def accept(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: the queue is full.
            EngineClosed: no more is accepted.
        """
        with self._changed:
            if self._closing:
                raise EngineClosed(self._why) from self._cause
            if len(self._queue) >= self.size:
                self._metrics.totals["rejected"] += 1
                raise QueueFull(f"queue_size={self.size}: as many requests are waiting")
            self._metrics.totals["submitted"] += 1
            self._futures.add(job.future)
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
        """Return the job that has waited longest; None too while the queue is held."""
        with self._changed:
            return None if self._held else next(iter(self._queue), None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no job enter the batch within the context."""
        with self._changed:
            self._held += 1
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1
                self._changed.notify_all()

    @property
    def in_flight(self) -> int:
        """How many jobs have left the queue and have not ended."""
        return len(self._open) - len(self._queue)

    def wait_until_empty(self) -> None:
        """Wait until no job is in flight."""
        with self._changed:
            self._changed.wait_for(lambda: not self.in_flight)

    def take(self, job: Job) -> bool:
        """Take a job out of the queue, for a slot; False if it has left, or the queue is held."""
        with self._changed:
            return not self._held and self.withdraw(job)

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
            self._changed.wait_for(
                lambda: (
                    self.in_flight
                    or (self._queue and not self._held)
                    or (self._closing and not self._open)
                )
            )
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

    def after_fork(self) -> None:
        """In a forked child, where nobody turns: fail what is open, and accept nothing.

        The parent's threads may have been at any line of this file.
        """
        self._changed = threading.Condition()
        self._held = 0
        self._closing, self._why = True, FORKED
        now = time.monotonic()
        for job in self._open:
            self._metrics.end("failed", now - job.submitted)
        self._queue.clear()
        self._open.clear()
        for future in list(self._futures):
            _end_in_child(future)

    def metrics(self) -> dict[str, Any]:
        """Return what was counted, as `Engine.metrics` says."""
        with self._changed:
            waiting = len(self._queue)
            active = len(self._open) - waiting
            return {"queue_depth": waiting, "active": active, **self._metrics.summary()}


def _end_in_child(future: Future[Result]) -> None:
    """Fail a future unless it has ended; either way whoever asks it does not wait.

    Its lock may be held by a thread that is not here, as those who wait and those who are called
    back are not.
    """
    vars(future).update(_condition=threading.Condition(), _waiters=[], _done_callbacks=[])
    if future.cancelled():
        with suppress(RuntimeError):  # that was noted already
            future.set_running_or_notify_cancel()
    elif not future.done():
        future.set_exception(EngineClosed(FORKED))


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
