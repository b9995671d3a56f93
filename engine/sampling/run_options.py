"""`RunOptions`: the arguments of a sampler that choose how it runs, by name and type."""

from __future__ import annotations

from typing import TypedDict


class RunOptions(TypedDict, total=False):
    """The options that choose how a sampler runs, all of which may be left out.

    Left out, the first three are "auto", tune is False and graph_memory None.

    Attributes:
        backend: "reference" for plain PyTorch, "fused" for the fast path, or "auto", which is
            "fused" (on CUDA without Triton, "reference").
        compile: True, False, or "auto": on CUDA always for flashddpm's networks, on the CPU where
            it repays its cost, never for others.
        capture: whether steps become CUDA graphs: True, False, or "auto", which is on CUDA for
            flashddpm's networks.
        tune: whether the compiler tries many kernels for each operation, for minutes.
        graph_memory: the most bytes of GPU memory that captured steps may hold; None for half of
            what is free at the first capture.
    """

    backend: str
    compile: bool | str
    capture: bool | str
    tune: bool
    graph_memory: int | None
