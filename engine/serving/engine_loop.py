"""`EngineLoop`: the loop of in-flight (continuous) batching: schedule, execute, update, and again.

Each turn is a step boundary. A failure ends the requests that it concerns and no others: one
request where its rows, its slot, its ``on_step`` or the copy of its image fail; those that enter
together where their weights or their x_T do; all of the batch where the step does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress

from flashddpm.errors import NonFiniteError
from flashddpm.host import isolated
from flashddpm.serving.pending_image import FinishedCopy, Outcome, PendingImage, failure
from flashddpm.serving.request import DeadlineExceeded, Result, Timings
from flashddpm.serving.request_scheduler import RequestScheduler
from flashddpm.serving.running_batch import RunningBatch

log = logging.getLogger("flashddpm")


class EngineLoop:
    """Moves requests from the scheduler through the running batch, turn by turn.

    A turn fills free slots, takes one step of all images and hands out finished ones; one thread at
    a time takes them.

    Args:
        scheduler: the requests, which begin and end there.
        batch: the running batch: the slots (places of images) and the step that they take together.
            Calls of its sampler take turns with the steps here.
        max_failures: the number of failed steps in a row after which the loop closes.

    Attributes:
        scheduler, batch, max_failures: the arguments.
        executor: the `Executor` of the batch, which runs the network.
        turning: the identifier (threading.get_ident) of the thread that takes a turn now, or None.
    """

    def __init__(self, scheduler: RequestScheduler, batch: RunningBatch, max_failures: int) -> None:
        self.scheduler, self.batch, self.executor = scheduler, batch, batch.executor
        self.max_failures = max_failures
        self.turning: int | None = None
        self._failures = 0  # in a row
        self._leaving: deque[tuple[PendingImage, FinishedCopy]] = deque()

    @isolated(grad=False)
    def turn(self) -> bool:
        """Take one turn: fill free slots, take one step of all images, hand out finished ones.

        An Exception of a request or step ends the requests that it concerns, and is not raised.

        Returns:
            Whether some request has not ended.
        """
        self.turning = threading.get_ident()
        try:
            with self.executor.on_device():
                self._schedule()
                if self.batch:
                    self._execute()
                self._update()
        finally:
            self.turning = None
        return self.scheduler.busy

    def run(self) -> None:
        """Take turns until no more is accepted and every request has ended, then close.

        It also closes, with a line in the log, if anything is raised; it raises nothing itself.
        """
        cause: BaseException | None = None
        try:
            while self.scheduler.wait_for_work():
                self.turn()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            log.exception("the engine closes")
            cause = error
        finally:
            self.close(cause)

    def close(self, cause: BaseException | None) -> None:
        """Hand out finished images, fail all other requests with EngineClosed, and free the graphs.

        Args:
            cause: the error because of which the engine closes, the ``__cause__`` of those that
                requests fail with; None for none.
        """
        while self._leaving:
            with suppress(BaseException):  # a callback's SystemExit keeps nobody else waiting
                self._hand_out(*self._leaving.popleft())
        self.scheduler.close(cause)
        self.batch.close()
        # Refused to a callback of the executor's own call.
        with suppress(RuntimeError), self.executor.exclusive():
            self.executor.graphs.sweep()

    def after_fork(self) -> None:
        """Forget the images under way: no thread takes turns in a forked child."""
        self._leaving.clear()
        self.batch.after_fork()

    def _schedule(self) -> None:
        """End the late and the cancelled requests, and fill free slots from the queue."""
        for image in self.scheduler.late(time.monotonic()):
            self._end(image, DeadlineExceeded(f"deadline={image.request.deadline}: has passed"))
        for image in self.scheduler.cancelled():
            self._end(image, None)
        entering = self.scheduler.schedule()
        if entering:
            self._admit(entering)

    def _admit(self, entering: list[PendingImage]) -> None:
        """Put scheduled images into free slots, at x_T."""
        failed: dict[PendingImage, BaseException] = {}
        problem: BaseException | None = None
        try:
            with self.executor.exclusive():
                self.batch.follow_weights()
            for image in entering:
                image.admitted = time.monotonic()
                try:
                    self.batch.admit(image)
                except Exception as error:
                    failed[image] = error
            self.batch.start([image for image in entering if image in self.batch])
        except BaseException as error:  # an interrupt too: no image without its x_T may be stepped
            problem = error
            failed = dict.fromkeys(entering, error) | failed
        self._fail(failed, "admission")
        if problem is not None and not isinstance(problem, Exception):
            raise problem

    def _execute(self) -> None:
        """Take one step of all slots, and call each ``on_step`` with the x0 predicted."""
        began, occupancy = time.monotonic(), len(self.batch) / self.batch.max_batch
        problem: BaseException | None = None
        with self.executor.exclusive():
            try:
                previews = self.batch.step()
            except BaseException as error:
                problem = error
        if problem is not None:
            self._fail_step(problem)
            if isinstance(problem, Exception):
                return
            raise problem
        self._failures = 0
        self.scheduler.count_step(time.monotonic() - began, occupancy)
        for image, x0 in previews:
            try:
                assert image.on_step is not None
                image.on_step(x0)
            except Exception as error:
                self._fail({image: error}, "on_step")

    def _fail_step(self, error: BaseException) -> None:
        """Fail every image of the batch, whose state is lost; close after too many in a row."""
        log.warning("a step of %d images failed: %r", len(self.batch), error)
        self._fail(dict.fromkeys(self.batch.images, error), "step")
        self._failures += 1
        if self._failures >= self.max_failures:
            self.close(error)

    def _update(self) -> None:
        """Take finished images out of their slots, and hand out those taken out in the turn before.

        So on a GPU the images of a step are handed out while the next one runs, and the device
        never waits for the host. On the CPU, or with no image left in the batch, those of this turn
        are handed out too.
        """
        there = len(self._leaving)
        for image in self.batch.finished:
            try:
                copy = self.batch.take(image)
                self.batch.remove(image)
            except Exception as error:
                self._fail({image: error}, "harvest")
                continue
            self.scheduler.leave(image)
            self._leaving.append((image, copy))
        if self._leaving and (not self.batch or self._leaving[-1][1].event is None):
            there = len(self._leaving)
        for _ in range(there):
            self._hand_out(*self._leaving.popleft())

    def _hand_out(self, image: PendingImage, copy: FinishedCopy) -> None:
        """Resolve the future of a finished image."""
        try:
            x0 = image.wait(copy)
        except NonFiniteError as error:
            self._end(image, error)
            return
        except Exception as error:
            self._fail({image: error}, "harvest")
            return
        now = time.monotonic()
        timings = Timings(image.admitted - image.submitted, now - image.admitted)
        self._end(image, Result(x0, image.request, timings))

    def _fail(self, failed: dict[PendingImage, BaseException], stage: str) -> None:
        """End images with `RequestFailed` errors that name the stage of the turn that failed.

        All slots are free before the first future is resolved, whose callback may turn the engine;
        and all futures are resolved, whatever the callbacks of one raise.
        """
        for image in failed:
            if image in self.batch:
                self.batch.remove(image)
        with ExitStack() as ends:
            for image, error in reversed(failed.items()):
                ends.callback(self.scheduler.end, image, failure(stage, error))

    def _end(self, image: PendingImage, outcome: Outcome) -> None:
        """Free the slot that the image holds and resolve its future."""
        if image in self.batch:
            self.batch.remove(image)
        self.scheduler.end(image, outcome)
