"""The launch limiter: how many steps the host may be ahead of the device."""

from itertools import count
from types import SimpleNamespace

import torch

from flashddpm.serving.launch_limiter import STEPS_AHEAD, LaunchLimiter


def test_the_host_waits_for_the_oldest_of_the_steps_ahead(monkeypatch):
    limiter, numbers, did = LaunchLimiter(torch.device("cpu")), count(), []

    def event():
        number = next(numbers)
        did.append(("launched", number))
        return SimpleNamespace(synchronize=lambda: did.append(("waited for", number)))

    monkeypatch.setattr(limiter, "event", event)
    for _ in range(5):
        limiter.wait()
        limiter.mark()
    wanted = []
    for number in range(5):
        if number >= STEPS_AHEAD:
            wanted.append(("waited for", number - STEPS_AHEAD))
        wanted.append(("launched", number))
    assert did == wanted


def test_on_the_cpu_nobody_waits():
    limiter = LaunchLimiter(torch.device("cpu"))
    for _ in range(5):
        limiter.mark()
        limiter.wait()
    assert limiter.event() is None
