"""How far the host may launch steps ahead of a GPU that has yet to run them."""

from __future__ import annotations

from collections import deque

import torch

STEPS_AHEAD = 2
"""How many steps the host may be ahead of a GPU: enough to keep it busy, few enough that a new
request does not wait behind a long queue of launches."""


class LaunchLimiter:
    """Keeps the host at most `STEPS_AHEAD` steps ahead of a GPU; a CPU runs a step at once.

    Args:
        device: the device on which the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launched: deque[torch.cuda.Event] = deque()

    def event(self) -> torch.cuda.Event | None:
        """Return an event that comes after all that was launched so far; None on the CPU."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def mark(self) -> None:
        """Note that a step was launched."""
        event = self.event()
        if event is not None:
            self._launched.append(event)

    def wait(self) -> None:
        """Wait until fewer than `STEPS_AHEAD` of the launched steps have yet to end."""
        while len(self._launched) >= STEPS_AHEAD:
            self._launched.popleft().synchronize()
