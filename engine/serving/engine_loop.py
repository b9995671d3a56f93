"""The loop of in-flight batching: admit, step, harvest.

Each turn is a step boundary. Whatever raises ends the jobs that it concerns and no other: in
admission, in ``on_step`` and in the harvest one job, in the step those that took part.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress

from flashddpm.errors import NonFiniteError
from flashddpm.execution.executor import Executor
from flashddpm.host import isolated
from flashddpm.serving.request import DeadlineExceeded, Job, Result, Timings
from flashddpm.serving.request_queue import Desk, Outcome, failure
from flashddpm.serving.running_batch import Flight, Landing

log = logging.getLogger("flashddpm")


class Loop:
    """Moves jobs from the desk through the flight; used by one thread at a time.

    Args:
        desk: where jobs come from and end.
        flight: the batch.
        executor: what runs the network; the calls of its sampler and the steps here take turns.
        max_batch: images at a time.
        max_failures: failed steps in a row after which it closes.
    """

    def __init__(
        self, desk: Desk, flight: Flight, executor: Executor, max_batch: int, max_failures: int
    ) -> None:
        self.desk, self.flight, self.executor = desk, flight, executor
        self.max_batch, self.max_failures = max_batch, max_failures
        self.turning: int | None = None  # the thread that takes a turn now
        self._failures = 0
        self._landing: deque[Landing] = deque()

    @isolated(grad=False)
    def turn(self) -> bool:
        """Admit, step and harvest, once; return whether work is left."""
        self.turning = threading.get_ident()
        try:
            with self.executor.on_device():
                self._drop_unwanted()
                self._admit()
                if self.flight:
                    self._step()
                self._harvest()
        finally:
            self.turning = None
        return self.desk.busy

    def run(self) -> None:
        """Turn until the desk accepts no more and nothing is open; no future stays unresolved."""
        cause: BaseException | None = None
        try:
            while self.desk.wait_for_work():
                self.turn()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            log.exception("the engine closes")
            cause = error
        finally:
            self.close(cause)

    def close(self, cause: BaseException | None) -> None:
        """Hand out what is finished, fail what is open and let go of the graphs."""
        while self._landing:
            with suppress(BaseException):  # a callback's SystemExit keeps nobody else waiting
                self._hand_out(self._landing.popleft())
        self.desk.close(cause)
        self.flight.close()
        with (
            suppress(RuntimeError),
            self.executor.exclusive(),
        ):  # not from a callback of its own
            self.executor.graphs.sweep()

    def after_fork(self) -> None:
        """Forget what is under way: nobody turns in a forked child."""
        self._landing.clear()
        self.flight.after_fork()

    def _drop_unwanted(self) -> None:
        """Let go of what is too late, waiting or in a slot, and of what was cancelled in one."""
        now = time.monotonic()
        late = [job for job in self.flight.jobs.values() if now >= job.deadline]
        for job in (*self.desk.late(now), *late):
            self._end(job, DeadlineExceeded(f"deadline={job.request.deadline}: has passed"))
        for job in list(self.flight.jobs.values()):
            if job.future.cancelled():
                self._end(job, None)

    def _admit(self) -> None:
        """Put waiting jobs into free slots, in their order."""
        entering = self._reserve(self.max_batch - len(self.flight))
        if not entering:
            return
        try:
            with self.executor.exclusive():
                self.flight.follow_weights()
        except Exception as error:
            for job in entering:
                self.flight.release(job)
                self._end(job, failure("admission", error))
            return
        for job in entering:
            job.admitted = time.monotonic()
            try:
                self.flight.admit(job)
            except Exception as error:
                self.flight.release(job)
                self._end(job, failure("admission", error))
        admitted = [job for job in entering if job in self.flight]
        try:
            self.flight.start(admitted)
        except Exception as error:
            for job in admitted:
                self._end(job, failure("admission", error))

    def _reserve(self, room: int) -> list[Job]:
        """Take up to ``room`` jobs off the queue, while the table has room for their plans."""
        entering: list[Job] = []
        while len(entering) < room and (job := self.desk.first()):
            try:
                if not self.flight.reserve(job):
                    break  # the first waits for rows, and those behind it for their turn
            except Exception as error:
                self._end(job, failure("admission", error))
                continue
            if self.desk.take(job):
                entering.append(job)
            else:  # cancelled just now, or to wait for new weights
                self.flight.release(job)
        return entering

    def _step(self) -> None:
        """Take one step of all slots, and show what it predicts to those who asked."""
        began, occupancy = time.monotonic(), len(self.flight) / self.max_batch
        problem: BaseException | None = None
        with self.executor.exclusive():
            try:
                previews = self.flight.step()
            except BaseException as error:
                problem = error
        if problem is not None:
            self._fail_step(problem)
            if isinstance(problem, Exception):
                return
            raise problem
        self._failures = 0
        self.desk.count_step(time.monotonic() - began, occupancy)
        for job, x0 in previews:
            try:
                assert job.on_step is not None
                job.on_step(x0)
            except Exception as error:
                self._end(job, failure("on_step", error))

    def _fail_step(self, error: BaseException) -> None:
        """Fail every image of the batch, whose state is lost; close after too many in a row."""
        log.warning("a step of %d images failed: %r", len(self.flight), error)
        for job in list(self.flight.jobs.values()):
            self._end(job, failure("step", error))
        self._failures += 1
        if self._failures >= self.max_failures:
            self.close(error)

    def _harvest(self) -> None:
        """Take the images that are finished out of their slots, and hand out those that are there.

        On a GPU the images of a step are handed out while the next one runs, so that the device
        never waits for the host.
        """
        there = len(self._landing)
        for job in self.flight.finished:
            try:
                landing = self.flight.take(job)
                self.flight.remove(job)
            except Exception as error:
                self._end(job, failure("harvest", error))
                continue
            self._landing.append(landing)
        if self._landing and (not self.flight or self._landing[-1].event is None):
            there = len(self._landing)
        for _ in range(there):
            self._hand_out(self._landing.popleft())

    def _hand_out(self, landing: Landing) -> None:
        """Resolve the future of a finished image."""
        job = landing.job
        try:
            image = landing.wait()
        except NonFiniteError as error:
            self._end(job, error)
            return
        except Exception as error:
            self._end(job, failure("harvest", error))
            return
        now = time.monotonic()
        timings = Timings(job.admitted - job.submitted, now - job.admitted)
        self._end(job, Result(image, job.request, timings))

    def _end(self, job: Job, outcome: Outcome) -> None:
        """Free what the job holds and resolve its future."""
        if job in self.flight:
            self.flight.remove(job)
        self.desk.end(job, outcome)
