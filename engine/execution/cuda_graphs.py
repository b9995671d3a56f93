"""CUDA graphs of sampling steps: which are kept, how many steps each holds, and what they cost.

`Graphs` decides; only `CaptureDevice` touches the GPU, so that decisions are tested without one.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("flashddpm")

WARM_UPS = 3
UNROLLED = (1, 4, 16)
"""The numbers of steps that a graph of a closed batch may hold; the fastest is kept."""
WORTH = 0.01
"""The fraction of a step's time that a graph of more steps must save to be kept."""
GAP_SECONDS = 20e-6
"""The most seconds that the pause between two replays may cost.

Where the fraction `WORTH` of a step is longer than that, graphs of more steps are not tried.
"""
MEASURED_STEPS = 64
CAPTURING = threading.RLock()
"""The lock of captures: CUDA allows one in a process, and no wait for the device beside it."""


Key = tuple[Any, ...]
Step = Callable[[], Tensor]
Idling = Callable[[], AbstractContextManager[Step]]


class CapturedSteps:
    """A CUDA graph of ``count`` calls of ``step``, captured when made; calling it replays them.

    Whatever the step or CUDA raises during the capture is raised.

    Args:
        step: called without arguments, launches one step on the current stream and returns the
            network's output. It must read no host state that may change, must not wait for the GPU,
            and must have run before, so that compilation and autotuning are over. It is kept alive,
            with its kernels and buffers.
        count: the number of calls, at least 1.
        pool: the handle of the memory pool that all graphs of one executor share, whose replays
            must never overlap.
        stream: the CUDA stream on which to capture.

    Attributes:
        step, count: as above.
        out: what the last call returned, a tensor in memory that every replay overwrites.
    """

    def __init__(self, step: Step, count: int, pool: Any, stream: Any) -> None:
        self.step, self.count = step, count
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            # Other threads of the program may allocate meanwhile.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                for _ in range(count):
                    self.out = step()
            except BaseException:
                with suppress(RuntimeError):  # of a broken capture: what broke it says more
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    def __call__(self) -> Tensor:
        """Replay the steps on the current stream, without waiting for them.

        Returns:
            ``out``, which the next replay overwrites.
        """
        self._graph.replay()
        return self.out


class CaptureDevice:
    """The operations on a GPU that `Graphs` needs: memory, warm-ups, captures and timing.

    Steps are captured on a stream that nothing else runs on. A library's scratch memory belongs to
    a stream, and torch frees cuBLAS's when a graph captured on that stream is destroyed; allocated
    during a capture, it lies in the pool of the graphs, which lives as long as any of them.

    Args:
        device: the CUDA device; nothing is done on it yet.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pools: list[Any] = []  # captures go into the last

    @cached_property
    def _aside(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device, priority=-1)  # a set of streams that few programs use

    def free_bytes(self) -> int:
        """Return the bytes of free GPU memory, those that torch holds but does not use included."""
        reserve = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + reserve

    def pool_bytes(self) -> int:
        """Return the bytes of GPU memory that the pools of the graphs hold."""
        parts = [part for pool in self._pools for part in torch.cuda.memory_snapshot(pool)]
        return sum(part["total_size"] for part in parts)

    def warm(self, step: Step) -> int:
        """Run a step three times, uncaptured, and return the most bytes it had allocated at once.

        It waits for the whole device, and resets torch's statistics of the peak of memory.

        Args:
            step: called without arguments, launches one step on the current stream.
        """
        with CAPTURING:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._run(step, WARM_UPS)
            return torch.cuda.max_memory_allocated(self.device) - before

    def capture(self, step: Step, count: int) -> CapturedSteps:
        """Capture calls of a step as a graph, after one call that is not captured.

        Whatever the step or CUDA raises is raised; later captures then use a memory pool of their
        own.

        Args:
            step: called without arguments, launches one step (`CapturedSteps` says what it must not
                do).
            count: the number of calls.
        """
        with CAPTURING, _uncollected():
            self._run(step, 1)  # libraries have a handle for each thread
            torch.cuda.empty_cache()
            if not self._pools:
                self._pools.append(torch.cuda.graph_pool_handle())
            pool = self._pools[-1]
            try:
                return CapturedSteps(step, count, pool, self._stream)
            except BaseException:
                self._pools.append(torch.cuda.graph_pool_handle())
                # torch 2.11 leaves a broken capture's pool as if it were still being filled.
                with suppress(AttributeError, RuntimeError):
                    torch._C._cuda_endAllocateToPool(self.device.index, pool)
                raise

    def seconds(self, graph: CapturedSteps) -> float:
        """Return the GPU time of one step of a graph in seconds, a mean of at least 64 steps.

        Args:
            graph: the captured steps, which are replayed one after another.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph()
        start.record()
        replays = -(-MEASURED_STEPS // graph.count)
        for _ in range(replays):
            graph()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (replays * graph.count)

    def release(self) -> None:
        """Wait for the device, then give the memory that torch holds unused back to the GPU.

        That includes the memory of graphs that were dropped, and of captures that failed.
        """
        with CAPTURING:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _run(self, step: Step, times: int) -> None:
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._aside):
            for _ in range(times):
                step()
        torch.cuda.synchronize(self.device)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disable Python's garbage collector, which might destroy another graph during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graphs:
    """The captured steps of one `Executor` by key; ``len`` of it is how many graphs are kept.

    A key is a tuple that begins with a token, an object that stands for the step's buffers. A step
    is given as ``idling``: called without arguments, it returns a context manager that gives the
    step and keeps all slots (places of images) idle, so that running the step changes nothing.
    Callers must not overlap calls, except that `forget`, `bytes` and ``len`` are safe in any
    thread.

    Args:
        card: the operations on the GPU.
        limit: the most bytes of GPU memory that graphs may hold, beyond which steps are not
            captured; None for half of what is free at the first capture.

    Attributes:
        card: as above.
    """

    def __init__(self, card: CaptureDevice, limit: int | None = None) -> None:
        self.card, self._limit = card, limit
        self._needs: dict[Key, int] = {}
        self._kept: dict[tuple[Key, int], CapturedSteps | None] = {}  # None: declined
        self._best: dict[Key, int] = {}
        self._unwanted: deque[object] = deque()

    def __len__(self) -> int:
        return sum(graph is not None for graph in list(self._kept.values()))

    @property
    def bytes(self) -> int:
        """The bytes of GPU memory that the graphs hold, an int."""
        return self.card.pool_bytes() if len(self) else 0

    def warm(self, key: Key, idling: Idling) -> None:
        """Run a key's step before any capture, and note the bytes it takes; later calls do nothing.

        Args:
            key: the key, a tuple that begins with a token.
            idling: returns the context manager that gives the step, with all slots idle.
        """
        if key not in self._needs:
            with idling() as step:
                self._needs[key] = self.card.warm(step)

    def get(self, key: Key, idling: Idling, count: int = 1) -> CapturedSteps | None:
        """Return the graph of a key's steps, which the first call captures.

        A capture that fails, or needs more memory than the limit, is declined: it is not tried
        again for this key and count, and a warning is logged. Nothing is raised for it.

        Args:
            key: the key, a tuple that begins with a token.
            idling: returns the context manager that gives the step, with all slots idle.
            count: the number of steps in the graph.

        Returns:
            The captured steps; None if they were declined, now or in an earlier call.
        """
        if self._unwanted:
            self.sweep()
        if (key, count) not in self._kept:
            self._kept[key, count] = self._capture(key, idling, count)
        return self._kept[key, count]

    def best(self, key: Key, idling: Idling) -> CapturedSteps | None:
        """Return the graph of a key with the fastest number of steps, of 1, 4 and 16.

        The first call captures and times graphs of these numbers, and drops those that are neither
        the fastest nor of one step. Larger ones are not tried where little is to be gained.

        Args:
            key: the key, a tuple that begins with a token.
            idling: returns the context manager that gives the step, with all slots idle.

        Returns:
            The captured steps; None if a graph of one step was declined (`get`).
        """
        if key not in self._best:
            best = self._best[key] = self._choose(key, idling)
            self._drop(lambda other, count: other == key and count not in (1, best))
        return self.get(key, idling, self._best[key])

    def forget(self, token: object) -> None:
        """Mark the graphs of a token, to be destroyed by the next call of `get` or `sweep`.

        A graph must not be destroyed during a capture, and a finalizer may call this at any moment.

        Args:
            token: the object with which the keys of these graphs begin.
        """
        self._unwanted.append(token)

    def sweep(self) -> None:
        """Destroy the graphs that `forget` marked, once the GPU has finished with them."""
        tokens = {self._unwanted.popleft() for _ in range(len(self._unwanted))}
        self._needs = {key: n for key, n in self._needs.items() if key[0] not in tokens}
        self._best = {key: n for key, n in self._best.items() if key[0] not in tokens}
        self._drop(lambda key, count: key[0] in tokens)

    def _drop(self, unwanted: Callable[[Key, int], bool]) -> None:
        gone = [key for key in self._kept if unwanted(*key)]
        if not gone:
            return
        self.card.release()  # waits for the last replay
        for key in gone:
            del self._kept[key]
        self.card.release()

    def _choose(self, key: Key, idling: Idling) -> int:
        chosen, least = 1, float("inf")
        for count in UNROLLED:
            graph = self.get(key, idling, count)
            if graph is None:
                break
            with idling():
                seconds = self.card.seconds(graph)
            if seconds < (1 - WORTH) * least:
                chosen, least = count, seconds
                log.info("%d steps a graph: %.3f ms each", count, seconds * 1e3)
            if seconds * WORTH > GAP_SECONDS:
                break
        return chosen

    def _capture(self, key: Key, idling: Idling, count: int) -> CapturedSteps | None:
        if self._limit is None:
            self._limit = self.card.free_bytes() // 2
        self.warm(key, idling)
        try:
            needs = max(self._needs[key], self.bytes)
            if needs <= self._limit:
                with idling() as step:
                    return self.card.capture(step, count)
            problem = f"{needs} bytes, of {self._limit} that graphs may hold"
        except Exception as error:
            # Not the error itself: its traceback holds the step's tensors.
            problem = f"{type(error).__name__}: {error}"
        self.card.release()
        log.warning("not captured, so steps run one by one: %s", problem)
        return None
