"""Policies of serving that are compared: in flight, one image at a time, and static batches.

All take requests by ``submit``, which returns the future of a `Result`, and answer whatever is left
when ``close`` is called. `InFlight` is our engine, whose requests enter and leave the batch at any
step. `Batches` serves the other two: a static batch of one image never waits for another request.
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
"""The solver's name, number of steps and guidance scale, which images of one static batch share."""


def kind_of(request: Request) -> Kind:
    """Return what requests must have in common to share a static batch.

    Args:
        request: a request whose solver is given by name. Its seed, label and further options do not
            matter.

    Returns:
        The request's (solver, num_steps, guidance): a str, an int and a float, unchanged.

    Raises:
        AssertionError: if its solver is a `Plan` (a table of steps made beforehand), not a name.
    """
    assert isinstance(request.solver, str)
    return request.solver, request.num_steps, request.guidance


class Policy(Protocol):
    """A way to serve requests, as the benchmark of serving calls it; one object serves one run."""

    def submit(self, request: Request) -> Future[Result]:
        """Take a request, without waiting for its image, and return the future of its result.

        The future holds a `Result`, or the exception that drawing the image raised.
        """

    def close(self) -> None:
        """Serve what was submitted to the end, and return when every future is resolved."""


class InFlight:
    """The policy of in-flight batching: requests enter an engine's running batch at any step.

    ``close`` leaves the engine running, so that the next policy uses its graphs and compiled code.

    Args:
        engine: the engine that draws the images.

    Attributes:
        engine: as given.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._steps_before: int = engine.metrics()["steps"]

    def submit(self, request: Request) -> Future[Result]:
        """Submit a request to the engine and return the future of its result.

        Raises:
            ValueError: if the request has an argument that is not allowed.
            QueueFull: if the engine's queue is full.
            EngineClosed: if the engine was shut down.
        """
        return self.engine.submit(request)

    def close(self) -> None:
        """Wait until the engine has resolved every future; the engine itself stays open."""
        self.engine.drain()

    def occupancy(self, image_steps: int) -> float:
        """Return the mean fraction of the engine's slots that were in use, from 0 to 1.

        A slot is the place of one image in the batch. The mean is over the engine's steps since
        this object was made.

        Args:
            image_steps: the number of steps that all images took together since then.

        Raises:
            ZeroDivisionError: if the engine has taken no step since then.
        """
        steps = self.engine.metrics()["steps"] - self._steps_before
        return image_steps / (steps * self.engine.max_batch)


class Batches:
    """The policy of static batches: a thread waits for ``size`` like requests, then draws them.

    Only requests of one solver, number of steps and guidance scale share a batch; of their other
    options only seed and label count, and if one of a batch has no label, all are drawn without. A
    batch that is not full at ``close`` is filled up with copies of its last request, so that a
    compiled network keeps its shape.

    Args:
        sampler: the sampler that draws the batches.
        size: the number of images of a batch, at least 1; 1 serves one request at a time.

    Attributes:
        sampler, size: as given.
    """

    def __init__(self, sampler: Sampler, size: int) -> None:
        self.sampler, self.size = sampler, size
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Result]:
        """Queue a request and return the future of its result.

        The future fails with whatever `Sampler.sample` raises for its batch. Nothing is checked
        here: a request whose solver is a `Plan` ends the thread, and its future is never resolved.

        Args:
            request: a request whose solver is a name, not a `Plan` (a table of steps).
        """
        waiting = _Waiting(request)
        self._queue.put(waiting)
        return waiting.future

    def close(self) -> None:
        """Draw the batches that are not full, wait for all images, and end the thread."""
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
    """A request that waits for its batch, its future, and when it was submitted, in seconds."""

    def __init__(self, request: Request) -> None:
        self.request, self.submitted = request, time.perf_counter()
        self.future: Future[Result] = Future()
