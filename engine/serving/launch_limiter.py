"""`LaunchLimiter`: a limit on how many steps the host launches ahead of the GPU that runs them."""

from __future__ import annotations

from collections import deque

import torch

STEPS_AHEAD = 2
"""The number of steps that the host may be ahead of a GPU: enough to keep it busy, few enough that
a new request does not wait behind a long queue of launches."""


class LaunchLimiter:
    """Keeps the host at most `STEPS_AHEAD` steps ahead of a GPU; a CPU runs a step at once.

    Call `wait` before and `mark` after the launch of a step.

    Args:
        device: the device on which the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launched: deque[torch.cuda.Event] = deque()

    def event(self) -> torch.cuda.Event | None:
        """Return a CUDA event after all work launched on the current stream; None on the CPU."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def mark(self) -> None:
        """Note that a step was launched, by an event after it."""
        event = self.event()
        if event is not None:
            self._launched.append(event)

    def wait(self) -> None:
        """Wait until fewer than `STEPS_AHEAD` of the launched steps are unfinished."""
        while len(self._launched) >= STEPS_AHEAD:
            self._launched.popleft().synchronize()
