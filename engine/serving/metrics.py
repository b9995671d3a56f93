"""What an `Engine` counts: totals, and windows of bounded length."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np

WINDOW = 1024
"""How many of the latest steps and images rates and percentiles are taken over."""

OUTCOMES = ("completed", "failed", "cancelled", "expired")
"""How a request that was accepted ends; each ends in exactly one way."""


class Metrics:
    """Counts of one engine; whoever holds its lock calls these.

    Attributes:
        totals: of submitted, rejected, steps and each of `OUTCOMES`.
    """

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def step(self, seconds: float, occupancy: float) -> None:
        """Count a step that took so long, with this fraction of the slots in use."""
        self.totals["steps"] += 1
        self._steps.append((seconds, occupancy))

    def end(self, outcome: str, latency: float) -> None:
        """Count the end of a request, so many seconds after it was submitted."""
        self.totals[outcome] += 1
        if outcome == "completed":
            self._latencies.append(latency)

    def summary(self) -> dict[str, Any]:
        """Return totals, rates and percentiles; None where nothing was counted yet."""
        seconds = sum(step[0] for step in self._steps)
        p50 = p99 = occupancy = None
        if self._latencies:
            p50, p99 = np.percentile(list(self._latencies), (50, 99)).tolist()
        if self._steps:
            occupancy = sum(step[1] for step in self._steps) / len(self._steps)
        return {
            **{name: self.totals[name] for name in ("submitted", "rejected", "steps", *OUTCOMES)},
            "steps_per_second": len(self._steps) / seconds if seconds else None,
            "occupancy": occupancy,
            "latency_p50": p50,
            "latency_p99": p99,
        }
