"""Steps captured as CUDA graphs: which are kept, how many steps each holds, and what they cost.

`Graphs` decides; `Card` is all that touches the GPU, so that the decisions are tested without one.
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
"""Numbers of steps that a graph for closed batches may hold; measured, the best is kept."""
WORTH = 0.01
"""What a longer graph must save of a step's time to be kept."""
GAP_SECONDS = 20e-6
"""The most that the pause between two replays may cost: where a step is so long that WORTH of it is
more, longer graphs are not tried."""
MEASURED_STEPS = 64
CAPTURING = threading.RLock()
"""CUDA takes one capture at a time in a process, and none beside a wait for the whole device."""


Key = tuple[Any, ...]
Step = Callable[[], Tensor]
Idling = Callable[[], AbstractContextManager[Step]]


class CapturedSteps:
    """``count`` calls of ``step`` as one CUDA graph; calling this replays it.

    Args:
        step: a function without arguments that launches on the current stream, reads no host state
            that may change and does not wait. It ran before, so that compilation, autotuning and
            the initialisation of libraries are over. It is kept, and with it kernels and buffers.
        count: how many.
        pool: the memory that all graphs of one engine share; their replays never overlap.
        stream: to capture on.

    Attributes:
        count: as above.
        out: what the last of the calls returned, in memory that every replay writes again.
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
        """Replay on the current stream; return ``out``."""
        self._graph.replay()
        return self.out


class Card:
    """A GPU, as far as `Graphs` needs it.

    Steps are captured on a stream that nothing else ever runs on. A library's scratch memory
    belongs to a stream, and torch frees cuBLAS's when a graph that was captured on the stream is
    destroyed: got while capturing, it lies in the graphs' own pool, which lives as long as any.
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
        """Return how much memory the card has left, torch's unused reserve included."""
        reserve = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + reserve

    def pool_bytes(self) -> int:
        """Return how much memory the graphs hold."""
        parts = [part for pool in self._pools for part in torch.cuda.memory_snapshot(pool)]
        return sum(part["total_size"] for part in parts)

    def warm(self, step: Step) -> int:
        """Run the step aside from other work; return the most bytes it allocated at a time.

        torch's statistics of the peak begin anew with it.
        """
        with CAPTURING:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._run(step, WARM_UPS)
            return torch.cuda.max_memory_allocated(self.device) - before

    def capture(self, step: Step, count: int) -> CapturedSteps:
        """Return the captured steps; if it raises, the next ones get a pool of their own."""
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
        """Return what one step of the graph takes when replays follow one another."""
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
        """Give back what nothing uses any more: of graphs let go, or of a capture that failed."""
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
    """Keep the garbage collector from destroying some other graph meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graphs:
    """The captured steps of one engine, by key; a key is a tuple that begins with a token.

    A step is given as a context manager: within it the step may run and change nothing, for all
    slots are idle. Callers see to it that no two calls overlap; `forget`, `bytes` and ``len`` may
    be called at any time by anyone.

    Args:
        card: the GPU.
        limit: bytes that graphs may hold, past which a step is not captured; None is half of what
            is free when the first is.
    """

    def __init__(self, card: Card, limit: int | None = None) -> None:
        self.card, self._limit = card, limit
        self._needs: dict[Key, int] = {}
        self._kept: dict[tuple[Key, int], CapturedSteps | None] = {}  # None: declined
        self._best: dict[Key, int] = {}
        self._unwanted: deque[object] = deque()

    def __len__(self) -> int:
        return sum(graph is not None for graph in list(self._kept.values()))

    @property
    def bytes(self) -> int:
        """How much memory the graphs hold."""
        return self.card.pool_bytes() if len(self) else 0

    def warm(self, key: Key, idling: Idling) -> None:
        """Run the step before anything is captured, once, and note the bytes it takes."""
        if key not in self._needs:
            with idling() as step:
                self._needs[key] = self.card.warm(step)

    def get(self, key: Key, idling: Idling, count: int = 1) -> CapturedSteps | None:
        """Return ``count`` steps as a graph, captured at the first call; None if declined."""
        if self._unwanted:
            self.sweep()
        if (key, count) not in self._kept:
            self._kept[key, count] = self._capture(key, idling, count)
        return self._kept[key, count]

    def best(self, key: Key, idling: Idling) -> CapturedSteps | None:
        """Return the graph of as many steps as pay; the first call times each of `UNROLLED`."""
        if key not in self._best:
            best = self._best[key] = self._choose(key, idling)
            self._drop(lambda other, count: other == key and count not in (1, best))
        return self.get(key, idling, self._best[key])

    def forget(self, token: object) -> None:
        """Have the graphs of this token dropped, by whoever comes next or calls `sweep`.

        A graph must not be destroyed while another is captured, and this may be called then: a
        finalizer runs where it likes.
        """
        self._unwanted.append(token)

    def sweep(self) -> None:
        """Drop what is to be forgotten."""
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
