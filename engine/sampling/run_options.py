"""How a sampler runs, by name and type."""

from __future__ import annotations

from typing import TypedDict


class RunOptions(TypedDict, total=False):
    """Options that choose how a sampler runs; `Sampler` describes them."""

    backend: str
    compile: bool | str
    capture: bool | str
    tune: bool
    graph_memory: int | None
