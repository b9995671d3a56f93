"""Three ways to serve requests for images: in flight, one at a time, in full static batches.

All take requests by ``submit``, which returns a future of a `Result`, and answer what is left at
``close``. The last two are one class: a batch of one never waits for another.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

from flashddpm.benchmarks.measure import harness
from flashddpm.sampling.sampler import Sampler
from flashddpm.serving.engine import Engine
from flashddpm.serving.request import Request, Result, Timings

Kind = tuple[str, int, float]
"""What images of one call of `Sampler.sample` share: solver, number of steps, guidance."""


def kind_of(request: Request) -> Kind:
    """Return the kind of a request whose solver has a name and that has no further options."""
    assert isinstance(request.solver, str)
    return request.solver, request.num_steps, request.guidance


class Policy(Protocol):
    """A way to serve."""

    def submit(self, request: Request) -> Future[Result]:
        """Take a request; return the future of its result."""

    def close(self) -> None:
        """Say that no more will come; return when everything is answered."""


class InFlight:
    """An engine, which goes on after ``close``: its graphs and compiled code serve the next."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._steps_before: int = engine.metrics()["steps"]

    def submit(self, request: Request) -> Future[Result]:
        """Hand the request to the engine."""
        return self.engine.submit(request)

    def close(self) -> None:
        """Wait until the engine has answered."""
        self.engine.drain()

    def occupancy(self, image_steps: int) -> float:
        """Return the mean share of slots in use in a step, if the images took so many steps."""
        steps = self.engine.metrics()["steps"] - self._steps_before
        return image_steps / (steps * self.engine.max_batch)


class Batches:
    """A thread that waits until ``size`` requests of one kind are there, and draws them together.

    Requests of different kinds do not fit into one call, so each kind fills a batch of its own. A
    batch that ``close`` cuts short is filled up with copies of its last request, so that a
    compiled network keeps its shape.
    """

    def __init__(self, sampler: Sampler, size: int) -> None:
        self.sampler, self.size = sampler, size
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Result]:
        """Queue the request."""
        waiting = _Waiting(request)
        self._queue.put(waiting)
        return waiting.future

    def close(self) -> None:
        """Draw the batches that are not full, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        groups: defaultdict[Kind, list[_Waiting]] = defaultdict(list)
        while (waiting := self._queue.get()) is not None:
            kind = kind_of(waiting.request)
            groups[kind].append(waiting)
            if len(groups[kind]) == self.size:
                self._answer(kind, groups.pop(kind))
        for kind, group in groups.items():
            self._answer(kind, group)

    def _answer(self, kind: Kind, group: Sequence[_Waiting]) -> None:
        """Draw a batch and resolve its futures."""
        began = time.perf_counter()
        requests = [waiting.request for waiting in group]
        requests += requests[-1:] * (self.size - len(group))
        solver, num_steps, guidance = kind
        labels = [request.label for request in requests]
        try:
            images = self.sampler.sample(
                [request.seed for request in requests],
                None if None in labels else [label for label in labels if label is not None],
                guidance,
                solver,
                num_steps,
                batch_size=self.size,
            )
            harness.synchronize()
        except Exception as error:
            for waiting in group:
                waiting.future.set_exception(error)
            return
        now = time.perf_counter()
        for waiting, image in zip(group, images, strict=False):
            timings = Timings(began - waiting.submitted, now - began)
            waiting.future.set_result(Result(image, waiting.request, timings))


class _Waiting:
    """A request, its future, and when it came."""

    def __init__(self, request: Request) -> None:
        self.request, self.submitted = request, time.perf_counter()
        self.future: Future[Result] = Future()
