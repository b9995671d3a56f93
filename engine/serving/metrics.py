"""`Metrics`: what an `Engine` counts: totals, and windows of the latest steps and images."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np

WINDOW = 1024
"""The number of the latest steps and images over which rates and percentiles are taken."""

OUTCOMES = ("completed", "failed", "cancelled", "expired")
"""The ways in which a request that was accepted can end; each ends in exactly one."""


class Metrics:
    """The counts of one engine; whoever calls a method holds the engine's lock.

    Attributes:
        totals: counts, ints by name: submitted, rejected, steps and each of `OUTCOMES`.
    """

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def step(self, seconds: float, occupancy: float) -> None:
        """Count a step.

        Args:
            seconds: the time that it took, in seconds.
            occupancy: the fraction (0..1) of the slots (places of images in the batch) in use.
        """
        self.totals["steps"] += 1
        self._steps.append((seconds, occupancy))

    def end(self, outcome: str, latency: float) -> None:
        """Count the end of a request.

        Args:
            outcome: how it ended, one of `OUTCOMES`; not checked.
            latency: the time since it was submitted, in seconds; kept for "completed" only.
        """
        self.totals[outcome] += 1
        if outcome == "completed":
            self._latencies.append(latency)

    def summary(self) -> dict[str, Any]:
        """Return the counts, rates and percentiles by name.

        Returns:
            A dict of the counts submitted, rejected, steps, completed, failed, cancelled and
            expired, ints; and of floats, taken over the latest 1024 steps or completed images, each
            None before the first one: steps_per_second (of the time spent in steps), occupancy (the
            mean fraction, 0..1, of slots in use), and latency_p50 and latency_p99 (percentiles of
            the seconds from ``submit`` to the image).
        """
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
