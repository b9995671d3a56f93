"""A step captured as a CUDA graph and replayed.

Written to the contract of the design and exercised by tests marked ``gpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3


class CapturedStep:
    """One call of ``step`` as a CUDA graph; calling this replays it.

    ``step`` runs a few times outside the capture first, so that compilation, autotuning and the
    initialisation of libraries are over; the caller makes those runs harmless (all slots at rest).

    Args:
        step: a function without arguments that launches on the current stream, reads no host
            state that may change and does not wait.
        device: the CUDA device.
        pool: the memory pool that all graphs of one engine share; their replays never overlap.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, pool: Any) -> None:
        self.step = step  # keeps kernels and buffers alive as long as the graph
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            step()

    def __call__(self) -> None:
        """Replay on the current stream."""
        self.graph.replay()
