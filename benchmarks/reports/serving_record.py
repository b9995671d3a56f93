"""A recording of an engine's run: which image was in which slot, and when each step ran."""

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
    """One step of one image in a recorded run: a rectangle of the picture of slots over time.

    Attributes:
        slot: the number of the slot (place in the engine's batch) that the image was in, from 0.
        image: the number of the image's request, from 0.
        solver, num_steps, guidance: the request's solver, number of steps and guidance scale.
        step: the number of the step, 0..num_steps - 1.
        start, end: when the engine's turn that took the step began and ended, in seconds from the
            beginning of the recording. In a turn the engine fills free slots, takes one step of all
            images, and hands out finished ones.
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
    """Serve requests by an engine until all images are finished, and record each of their steps.

    Args:
        engine: an engine without a thread of its own (threaded=False); its turns are called here.
        requests: n different `Request` objects of at least 2 steps each: an image of a single step
            enters and leaves its slot within one turn, unseen.
        due: when each request is to be submitted, float64 [n], in seconds from the beginning, in
            ascending order; a request that is due during a turn is submitted after it.

    Returns:
        A bar for each step of each image, in the order in which they ran.

    Raises:
        ValueError: if a request has fewer than 2 steps, or the engine refuses it.
        RuntimeError: if the engine has a thread of its own, its queue is full, it was shut down, or
            a step of an image failed.
        NonFiniteError: if the network's output turned NaN or infinite.
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
    """Return the images that are in a slot, each with the number of its slot."""
    return list(engine._loop.batch.images.items())
