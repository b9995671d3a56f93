"""`RequestScheduler`: which requests wait, which run, and how each of them ends, exactly once.

    waiting --schedule--> running --leave--> leaving --end-->

An image that waits is in the queue. One that runs has a slot (a place in the batch) and rows of the
table of plans (a row for each step of a plan). One that leaves has given them back; its copy has
not arrived yet. ``end`` takes an image from wherever it is.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any
from weakref import WeakSet

from flashddpm.execution.plan_table import PlanTable
from flashddpm.serving.metrics import Metrics
from flashddpm.serving.pending_image import Outcome, PendingImage, failure
from flashddpm.serving.request import DeadlineExceeded, EngineClosed, QueueFull, Result

FORKED = "the engine is in the process that this one was forked from; make one here"


class RequestScheduler:
    """The requests of an engine that have not ended: a bounded queue, and those under way.

    Any thread may add, cancel and ask. An image that runs leaves and ends only on the thread that
    takes the engine's turns (steps) or, once nobody takes them any more, closes it, for the table
    of plans takes one thread at a time.

    Args:
        queue_size: the number of requests that may wait, at least 1.
        max_batch: the number of images that may run at a time, at least 1.
        plan_table: the table in which the plans of running images get their rows.

    Attributes:
        queue_size, max_batch: the arguments.
    """

    def __init__(self, queue_size: int, max_batch: int, plan_table: PlanTable) -> None:
        self.queue_size, self.max_batch = queue_size, max_batch
        self._plan_table = plan_table
        self._changed = threading.Condition()  # guards all below
        self._held = 0  # open contexts of held(): while there are any, no image leaves the queue
        self._waiting: OrderedDict[PendingImage, None] = OrderedDict()  # as they came
        self._running: dict[PendingImage, None] = {}
        self._leaving: dict[PendingImage, None] = {}
        self._futures: WeakSet[Future[Result]] = WeakSet()  # that somebody may still ask
        self._next_deadline = math.inf  # no image that waits or runs has an earlier one
        self._metrics = Metrics()
        self._closing, self._why = False, "the engine was shut down"
        self._cause: BaseException | None = None

    def add(self, image: PendingImage) -> None:
        """Put an image at the end of the queue.

        Args:
            image: the pending image of a checked request.

        Raises:
            QueueFull: if queue_size requests wait.
            EngineClosed: if no more requests are accepted.
        """
        with self._changed:
            if self._closing:
                raise EngineClosed(self._why) from self._cause
            if len(self._waiting) >= self.queue_size:
                self._metrics.totals["rejected"] += 1
                raise QueueFull(f"queue_size={self.queue_size}: as many requests are waiting")
            self._metrics.totals["submitted"] += 1
            self._futures.add(image.future)
            self._waiting[image] = None
            self._next_deadline = min(self._next_deadline, image.deadline)
            self._changed.notify_all()
        image.future.add_done_callback(lambda _: self._end_waiting(image))

    def _end_waiting(self, image: PendingImage) -> None:
        """End an image at once that was cancelled while it waited: its place is free."""
        with self._changed:
            if image in self._waiting:
                self.end(image, None)  # which calls nobody back, since the future has ended

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every waiting request in the queue within this context; contexts may be nested.

        They may leave it again when the outermost block ends, or raises.
        """
        with self._changed:
            self._held += 1
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1
                self._changed.notify_all()

    def late(self, now: float) -> list[PendingImage]:
        """Return the images that wait or run although their deadline has passed.

        Args:
            now: the time, in seconds by the engine's clock (time.monotonic).
        """
        with self._changed:
            if now < self._next_deadline:
                return []
            images = [*self._waiting, *self._running]
            self._next_deadline = min((image.deadline for image in images), default=math.inf)
            return [image for image in images if now >= image.deadline]

    def cancelled(self) -> list[PendingImage]:
        """Return the running images whose futures were cancelled."""
        with self._changed:
            images = list(self._running)
        # Outside the lock: a signal's handler may call here where concurrent.futures.wait holds the
        # locks of futures.
        return [image for image in images if image.future.cancelled()]

    def schedule(self) -> list[PendingImage]:
        """Move waiting images to the running ones, in their order, and give their plans rows.

        As many may run as there are slots, and as the table of plans has room for: if the first of
        the queue finds no room, it waits for rows, and those behind it for their turn. An image
        whose plan cannot be put into the table ends with a `RequestFailed`.

        Returns:
            The images that are to enter the batch.
        """
        entering: list[PendingImage] = []
        while len(self._running) < self.max_batch and (image := self._first()):
            try:
                row = self._plan_table.acquire(image.plan)
            except Exception as error:
                self.end(image, failure("admission", error))
                continue
            if row is None:
                break
            image.place(row)
            if self._run(image):
                entering.append(image)
            else:  # cancelled just now, or to wait for new weights
                self._plan_table.release(image.plan)
        # A callback of one that failed may have turned the engine, which ends what is cancelled.
        return [image for image in entering if image in self._running]

    def _first(self) -> PendingImage | None:
        """Return the image that has waited longest; None too while the queue is held."""
        with self._changed:
            return None if self._held else next(iter(self._waiting), None)

    def _run(self, image: PendingImage) -> bool:
        """Move a waiting image to those that run; False if it has ended, or the queue is held."""
        with self._changed:
            if self._held or image not in self._waiting:
                return False
            self._running[image] = None  # first: a forked child finds it somewhere
            del self._waiting[image]
            return True

    def leave(self, image: PendingImage) -> None:
        """Take back the rows of a running image, which is being copied out of its slot."""
        with self._changed:
            if image in self._running:
                self._leaving[image] = None
                self._forget(image)

    def end(self, image: PendingImage, outcome: Outcome) -> None:
        """End an image: take it from wherever it is, and resolve its future.

        An image that has ended is left alone. Callbacks of the future run in the calling thread. A
        future that was cancelled stays so.

        Args:
            image: the image.
            outcome: the `Result` or the error to resolve the future with; None for a cancelled one.
        """
        with self._changed:
            if not self._forget(image):
                return
            wanted = image.future.set_running_or_notify_cancel()  # from here no cancel() succeeds
            self._metrics.end(_name(outcome, wanted), time.monotonic() - image.submitted)
            self._changed.notify_all()
        # Outside the lock: callbacks of the future may submit, cancel or shut down.
        if not wanted:
            return
        if isinstance(outcome, Result):
            image.future.set_result(outcome)
        else:
            image.future.set_exception(outcome)

    def _forget(self, image: PendingImage) -> bool:
        """Remove an image from the first place where it is; return whether it was in any.

        If it ran, its rows are free then.
        """
        for images in (self._waiting, self._running, self._leaving):
            if image in images:
                del images[image]
                if images is self._running:
                    self._plan_table.release(image.plan)
                return True
        return False

    def count_step(self, seconds: float, occupancy: float) -> None:
        """Count a step in the metrics.

        Args:
            seconds: the time that it took, in seconds.
            occupancy: the fraction (0..1) of the slots in use.
        """
        with self._changed:
            self._metrics.step(seconds, occupancy)

    @property
    def active(self) -> int:
        """The number of images that have left the queue and have not ended."""
        with self._changed:
            return len(self._running) + len(self._leaving)

    @property
    def busy(self) -> bool:
        """Whether some request has not ended."""
        with self._changed:
            return bool(self._waiting or self._running or self._leaving)

    @property
    def futures(self) -> list[Future[Result]]:
        """The futures, a new list, of all requests that have not ended."""
        with self._changed:
            return [image.future for image in self._open()]

    def _open(self) -> Iterator[PendingImage]:
        return chain(self._waiting, self._running, self._leaving)

    def wait_until_empty(self) -> None:
        """Wait until no image is active: none is in a slot or being copied out of it."""
        with self._changed:
            self._changed.wait_for(lambda: not self.active)

    def wait_for_work(self) -> bool:
        """Wait until a request can be worked on, or until no more are accepted and all have ended.

        Returns:
            True if there is work; False if there is none and never will be.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.active
                    or (self._waiting and not self._held)
                    or (self._closing and not self.busy)
                )
            )
            return self.busy

    def stop_accepting(self, cause: BaseException | None = None) -> None:
        """Refuse every further request with EngineClosed.

        Args:
            cause: the error because of which the engine closes, the ``__cause__`` of those; None
                for none. The first one given is kept.
        """
        with self._changed:
            self._closing = True
            self._cause = self._cause or cause
            self._changed.notify_all()

    def close(self, cause: BaseException | None) -> None:
        """Refuse every further request, and fail all that have not ended with EngineClosed.

        Args:
            cause: the error because of which the engine closes, the ``__cause__`` of those; None
                for none.
        """
        self.stop_accepting(cause)
        with self._changed:
            left = list(self._open())
        for image in left:
            error = EngineClosed("the engine closed before the image was finished")
            error.__cause__ = cause
            with suppress(BaseException):  # a callback's SystemExit keeps nobody else waiting
                self.end(image, error)

    def after_fork(self) -> None:
        """Fail, in a forked child, all requests that have not ended, and accept no more.

        They fail with EngineClosed. No thread takes turns in the child, and the parent's threads
        may have been at any line of this file.
        """
        self._changed = threading.Condition()
        self._held = 0
        self._closing, self._why = True, FORKED
        now = time.monotonic()
        for image in {*self._open()}:
            self._metrics.end("failed", now - image.submitted)
        for images in (self._waiting, self._running, self._leaving):
            images.clear()
        for future in list(self._futures):
            _end_in_child(future)

    def metrics(self) -> dict[str, Any]:
        """Return the engine's counts and rates by name.

        They are queue_depth (the number of waiting requests) and active (the number of images that
        are in a slot or being copied out of it), ints, and those of `Metrics.summary`: the counts
        submitted, rejected, steps, completed, failed, cancelled and expired, and steps_per_second,
        occupancy (0..1), latency_p50 and latency_p99 (seconds), floats or None.
        """
        with self._changed:
            waiting, active = len(self._waiting), self.active
            return {"queue_depth": waiting, "active": active, **self._metrics.summary()}


def _end_in_child(future: Future[Result]) -> None:
    """Fail a future in a forked child unless it has ended, so that whoever asks it does not wait.

    Its lock is replaced, since a thread of the parent may hold it; its waiters and callbacks are
    dropped, since their threads are not in the child.
    """
    vars(future).update(_condition=threading.Condition(), _waiters=[], _done_callbacks=[])
    if future.cancelled():
        with suppress(RuntimeError):  # that was noted already
            future.set_running_or_notify_cancel()
    elif not future.done():
        future.set_exception(EngineClosed(FORKED))


def _name(outcome: Outcome, wanted: bool) -> str:
    if not wanted:
        return "cancelled"
    if isinstance(outcome, Result):
        return "completed"
    return "expired" if isinstance(outcome, DeadlineExceeded) else "failed"
