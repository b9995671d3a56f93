"""Steps captured as CUDA graphs: which are kept, how many steps each holds, and what they cost.

`Graphs` decides; `Card` is all that touches the GPU, so that the decisions are tested without one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
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
MEASURED_STEPS = 32
CAPTURING = threading.Lock()  # CUDA takes one capture at a time in a process


Step = Callable[[], Tensor]
Resting = Callable[[], AbstractContextManager[Step]]


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
            finally:
                self._graph.capture_end()

    def __call__(self) -> Tensor:
        """Replay on the current stream; return ``out``."""
        self._graph.replay()
        return self.out


class Card:
    """A GPU, as far as `Graphs` needs it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def free_bytes(self) -> int:
        """Return how much memory the card has left, torch's unused reserve included."""
        reserve = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + reserve

    def pool_bytes(self) -> int:
        """Return how much memory the graphs hold."""
        return sum(part["total_size"] for part in torch.cuda.memory_snapshot(self._pool))

    def warm(self, step: Step) -> int:
        """Run the step aside from other work; return the most bytes it allocated at a time."""
        self._join()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def capture(self, step: Step, count: int) -> CapturedSteps:
        """Return the captured steps."""
        with CAPTURING:
            self._join()
            torch.cuda.empty_cache()
            return CapturedSteps(step, count, self._pool, self._stream)

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
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def _join(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)


class Graphs:
    """The captured steps of one engine, by key.

    A step is given as a context manager: within it the step may run and change nothing, for all
    slots rest. Callers see to it that no two calls overlap.

    Args:
        card: the GPU.
        limit: bytes that graphs may hold, past which a step is not captured; None is half of what
            is free when the first is.
    """

    def __init__(self, card: Card, limit: int | None = None) -> None:
        self.card, self._limit = card, limit
        self._needs: dict[Hashable, int] = {}
        self._kept: dict[tuple[Hashable, int], CapturedSteps | None] = {}  # None: declined
        self._best: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._kept.values())

    @property
    def bytes(self) -> int:
        """How much memory the graphs hold."""
        return self.card.pool_bytes() if len(self) else 0

    def warm(self, key: Hashable, resting: Resting) -> None:
        """Run the step before anything is captured, once, and note the bytes it takes."""
        if key not in self._needs:
            with resting() as step:
                self._needs[key] = self.card.warm(step)

    def get(self, key: Hashable, resting: Resting, count: int = 1) -> CapturedSteps | None:
        """Return ``count`` steps as a graph, captured at the first call; None if without room."""
        if (key, count) not in self._kept:
            self._kept[key, count] = self._capture(key, resting, count)
        return self._kept[key, count]

    def best(self, key: Hashable, resting: Resting) -> CapturedSteps | None:
        """Return the graph of as many steps as pay; the first call times each of `UNROLLED`."""
        if key not in self._best:
            best = self._best[key] = self._choose(key, resting)
            self._drop(lambda other, count: other == key and count not in (1, best))
        return self.get(key, resting, self._best[key])

    def forget(self, unwanted: Callable[[Any], bool]) -> None:
        """Let go of the graphs whose key is unwanted."""
        self._needs = {key: n for key, n in self._needs.items() if not unwanted(key)}
        self._best = {key: n for key, n in self._best.items() if not unwanted(key)}
        self._drop(lambda key, count: unwanted(key))

    def _drop(self, unwanted: Callable[[Any, int], bool]) -> None:
        gone = [key for key in self._kept if unwanted(*key)]
        graphs = [self._kept.pop(key) for key in gone]
        if any(graphs):
            graphs.clear()
            self.card.release()

    def _choose(self, key: Hashable, resting: Resting) -> int:
        chosen, least = 1, float("inf")
        for count in UNROLLED:
            graph = self.get(key, resting, count)
            if graph is None:
                break
            with resting():
                seconds = self.card.seconds(graph)
            if seconds < (1 - WORTH) * least:
                chosen, least = count, seconds
            if seconds * WORTH > GAP_SECONDS:
                break
        log.info("%d steps a graph, %.3f ms each", chosen, least * 1e3)
        return chosen

    def _capture(self, key: Hashable, resting: Resting, count: int) -> CapturedSteps | None:
        if self._limit is None:
            self._limit = self.card.free_bytes() // 2
        try:
            self.warm(key, resting)
            needs = max(self._needs[key], self.bytes)
            if needs <= self._limit:
                with resting() as step:
                    graph = self.card.capture(step, count)
                log.info("captured %d steps; graphs hold %d bytes", count, self.bytes)
                return graph
            problem = f"{needs} bytes, of {self._limit} that graphs may hold"
        except torch.cuda.OutOfMemoryError as error:
            problem = str(error)  # not the error itself: its traceback holds the step's tensors
        self.card.release()
        log.warning("not captured, so steps run one by one: %s", problem)
        return None
