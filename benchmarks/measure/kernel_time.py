"""Timing of kernels on a GPU without the host's part: CUDA graphs of many calls, timed by events.

A call from Python takes longer than a small kernel runs, so up to hundreds of calls are captured in
one CUDA graph, which is replayed between two events. The calls use in turn so many sets of
arguments that the L2 cache cannot hold them, results included: every call finds its arguments in
memory, not in the cache.
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
"""A function without arguments that returns a call: a function without arguments, which runs the
operation on a fresh set of tensors."""

FEWEST, MOST, MOVED = 8, 256, 2**33  # limits of calls in a graph; bytes that they should move
MAX_SETS = 8192
FLUSH = 2  # size of all sets together, in sizes of the cache
COPIED = 2**28  # float32 elements: 1 GiB, far beyond any cache
BUSY = 0.3  # seconds of queued work, which last longer than a reading of the clock rate


@dataclass(frozen=True)
class Replay:
    """A captured CUDA graph of many calls of an operation; calling it replays the graph.

    Attributes:
        graph: the CUDA graph.
        functions: the calls that were captured, one for each set of arguments; they keep the
            tensors alive that the graph reads.
        calls: how many calls one replay runs, at least 1.
    """

    graph: torch.cuda.CUDAGraph
    functions: Sequence[Callable[[], Any]]
    calls: int

    def __call__(self) -> None:
        """Replay the graph on the current stream, without waiting for its end."""
        self.graph.replay()


def calls_for(size: int) -> int:
    """Return how many calls a CUDA graph should hold to take long enough to be timed.

    Args:
        size: the bytes that one call moves, at least 0.

    Returns:
        The number of calls that move 8 GiB together, but no fewer than 8 and no more than 256.
    """
    return min(max(FEWEST, MOVED // max(size, 1)), MOST)


def sets_beyond(cache: int, size: int) -> int:
    """Return how many sets of arguments are needed so that a cache cannot hold them.

    Calls that use so many sets in turn find none of their arguments in the cache.

    Args:
        cache: the size of the cache, in bytes, at least 0.
        size: the size of one set (the arguments and results of one call), in bytes, at least 0.

    Returns:
        The number of sets whose sizes add up to twice the cache or more, at least 1, but at most
        MAX_SETS (8192), even if so many tiny sets still fit in the cache.
    """
    return min(math.ceil(FLUSH * cache / max(size, 1)) or 1, MAX_SETS)


def capture(make: Make, sets: int, least: int = MOST) -> Replay:
    """Capture a CUDA graph of many calls that use several sets of arguments in turn.

    Three of the calls at most are run before, uncaptured, to compile what they need.

    Args:
        make: called ``sets`` times without arguments; returns a call, a function without arguments
            that runs the operation on a fresh set of tensors on the current GPU.
        sets: the number of sets of arguments, at least 1.
        least: the least number of calls in the graph, at least 1; rounded up to a multiple of
            ``sets``.

    Returns:
        The graph, with the calls that it keeps alive.

    Raises:
        RuntimeError: if there is no GPU, or a call does what a CUDA graph cannot hold, such as
            waiting for the GPU.
    """
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
    """Replay a graph once, wait, and return the mean time of one of its calls in seconds.

    The time is the GPU's own, between two CUDA events.

    Args:
        replay: the captured graph.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / replay.calls


def sm_clock(replay: Replay) -> float | None:
    """Return the clock rate of the GPU's multiprocessors while a graph runs, in Hz.

    The graph is replayed for about 0.3 seconds, during which NVML is asked for the rate once.

    Args:
        replay: the captured graph.

    Returns:
        The rate in Hz, a float; None if pynvml is not installed or NVML tells no rate.
    """
    for _ in range(math.ceil(BUSY / (seconds_a_call(replay) * replay.calls))):
        replay()  # queued: nothing waits, and the clock is read while they run
    clock = harness.sm_clock()
    torch.cuda.synchronize()
    return clock


def median_seconds(make: Make, least: int = MOST, rounds: int = 10) -> float:
    """Return the median time of one call on the GPU in seconds, always on the same arguments.

    Small arguments are therefore in the cache. The graph is replayed twice to warm up.

    Args:
        make: called once without arguments; returns the call, a function without arguments.
        least: the number of calls in the graph, at least 1.
        rounds: the number of timed replays, at least 1, over which the median is taken.

    Raises:
        RuntimeError: if there is no GPU, or the call cannot be captured (`capture`).
        ValueError: if ``rounds`` is below 1.
    """
    replay = capture(make, 1, least)
    return statistics.median([seconds_a_call(replay) for _ in range(2 + rounds)][2:])


def copy_bandwidth() -> float:
    """Measure the GPU's memory bandwidth by a copy of 1 GiB within its memory.

    Returns:
        The bandwidth in bytes per second; bytes read and bytes written both count.

    Raises:
        RuntimeError: if there is no GPU.
    """
    source = torch.rand(COPIED, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: partial(target.copy_, source), FEWEST)


@triton.jit
def _empty_kernel(
    like,  # not read
):
    pass


def empty_seconds() -> float:
    """Return the median time in seconds of an empty kernel, among 256 in one CUDA graph."""
    like = torch.zeros(1, device="cuda")
    return median_seconds(lambda: partial(launch, _empty_kernel, (1,), like, like))
