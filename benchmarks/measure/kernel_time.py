"""What a kernel takes on a GPU, the host's part left out: CUDA graphs of many calls, by events.

A call from Python costs more than a small kernel runs, so calls are captured, hundreds in one graph
that is replayed between two events. They take their arguments in turn from as many sets as the L2
cache cannot hold, results included: every call finds its arguments in memory, not in the cache.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

from flashddpm.benchmarks.measure import harness
from flashddpm.kernels.launch import launch

Make = Callable[[], Callable[[], Any]]
"""Returns a call with arguments of its own."""

FEWEST, MOST, MOVED = 8, 256, 2**33  # calls in a graph: as many as move so many bytes
MAX_SETS = 8192
FLUSH = 2  # the sets together, in sizes of the cache
COPIED = 2**28  # float32 elements: 1 GiB, far beyond any cache
BUSY = 0.3  # seconds of work that outlast a reading of the clock


@dataclass(frozen=True)
class Replay:
    """A graph of calls, and what must live as long as it."""

    graph: torch.cuda.CUDAGraph
    functions: Sequence[Callable[[], Any]]
    calls: int

    def __call__(self) -> None:
        """Run the calls."""
        self.graph.replay()


def calls_for(size: int) -> int:
    """Return how many calls of ``size`` bytes take long enough to be timed together."""
    return min(max(FEWEST, MOVED // max(size, 1)), MOST)


def sets_beyond(cache: int, size: int) -> int:
    """Return how many sets of ``size`` bytes a cache of so many bytes cannot hold.

    At most MAX_SETS: tiny sets stay in the cache.
    """
    return min(math.ceil(FLUSH * cache / max(size, 1)) or 1, MAX_SETS)


def capture(make: Make, sets: int, least: int = MOST) -> Replay:
    """Capture calls of ``sets`` functions that ``make`` returns, in turn, ``least`` or more."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the gradient runs on the stream of what it is the gradient of
        functions = [make() for _ in range(sets)]
        for function in functions[:3]:
            function()
    graph = torch.cuda.CUDAGraph()
    calls = sets * math.ceil(least / sets)
    # As many results live at a time as there are sets, or all would be written to one place.
    results: deque[Any] = deque(maxlen=sets)
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            results.append(functions[i % sets]())
    return Replay(graph, functions, calls)


def seconds_a_call(replay: Replay) -> float:
    """Replay the graph once; return its time on the GPU over its calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / replay.calls


def sm_clock(replay: Replay) -> float | None:
    """Return the multiprocessors' clock while the graph runs, in Hz; None where NVML gives none."""
    for _ in range(math.ceil(BUSY / (seconds_a_call(replay) * replay.calls))):
        replay()  # queued: nothing waits, and the clock is read while they run
    clock = harness.sm_clock()
    torch.cuda.synchronize()
    return clock


def median_seconds(make: Make, least: int = MOST, rounds: int = 10) -> float:
    """Return the median time of a call on one set, of ``rounds`` replays after two to warm up."""
    replay = capture(make, 1, least)
    return statistics.median([seconds_a_call(replay) for _ in range(2 + rounds)][2:])


def copy_bandwidth() -> float:
    """Return bytes a second, read and written together, of a copy of 1 GiB."""
    source = torch.rand(COPIED, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: partial(target.copy_, source), FEWEST)


@triton.jit
def _empty_kernel(
    like,  # not read
):
    pass


def empty_seconds() -> float:
    """Return the time of a launch of a kernel that does nothing, in a graph of them."""
    like = torch.zeros(1, device="cuda")
    return median_seconds(lambda: partial(launch, _empty_kernel, (1,), like, like))
