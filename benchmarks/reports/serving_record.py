"""A run of the service as it was: which image was in which slot, and when each of its steps ran."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashddpm.serving.engine import Engine
from flashddpm.serving.pending_image import PendingImage
from flashddpm.serving.request import Request, Result


@dataclass(frozen=True)
class Bar:
    """One step of one image.

    Attributes:
        slot: where the image was.
        image: the number of its request.
        solver, num_steps, guidance: of the request.
        step: 0..num_steps - 1.
        start, end: of the turn that took it, in seconds from the beginning.
    """

    slot: int
    image: int
    solver: str
    num_steps: int
    guidance: float
    step: int
    start: float
    end: float


def record(engine: Engine, requests: Sequence[Request], due: NDArray[np.float64]) -> list[Bar]:
    """Turn an engine that has no thread of its own until all requests are answered.

    Args:
        engine: made with threaded=False.
        requests: of 2 steps or more: one of a single step comes and goes within a turn.
        due: when each is submitted, seconds [n], in order.

    Returns:
        A bar for each step of each request, in the order of turns.

    Raises:
        ValueError: a request of one step.
    """
    for request in requests:
        if request.num_steps < 2:
            raise ValueError(f"requests: num_steps={request.num_steps!r}: must be at least 2")
    numbers = {id(request): i for i, request in enumerate(requests)}
    steps: Counter[int] = Counter()
    bars: list[Bar] = []
    futures: list[Future[Result]] = []
    start = time.perf_counter()
    busy = False
    while busy or len(futures) < len(requests):
        now = time.perf_counter() - start
        if not busy:  # nothing to do before the next one comes
            time.sleep(max(0.0, due[len(futures)] - now))
            now = time.perf_counter() - start
        while len(futures) < len(requests) and due[len(futures)] <= now:
            futures.append(engine.submit(requests[len(futures)]))
        before = _running(engine)
        busy = engine.turn()
        end = time.perf_counter() - start
        # Who is finished has left its slot, and who was admitted was not there before.
        entered = set(_running(engine)) - set(before)
        for pending, slot in sorted([*before, *entered], key=lambda pair: pair[1]):
            request = pending.request
            image = numbers[id(request)]
            bars.append(
                Bar(
                    slot,
                    image,
                    str(request.solver),
                    request.num_steps,
                    request.guidance,
                    steps[image],
                    now,
                    end,
                )
            )
            steps[image] += 1
    for future in futures:
        future.result()  # raises what went wrong
    return bars


def _running(engine: Engine) -> list[tuple[PendingImage, int]]:
    """Return the images that have a slot, each with its slot."""
    return list(engine._loop.batch.images.items())
