"""Energy an image on a GPU: the card's counter over windows of ten seconds, idle subtracted.

    energy = (E_window - P_idle t_window) / images

with P_idle the power over an idle window just before. The counter is NVML's total energy, whose
steps are coarse, so that windows are long; figures are quoted relative to a peer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flashddpm.benchmarks.cases import sampling
from flashddpm.benchmarks.cases.sampling import PEERS, Setting
from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runner import Case

WINDOW = 10.0
"""The least seconds of a window."""


@dataclass(frozen=True)
class Window:
    """What a window took: joules, seconds, and how often the work was done."""

    joules: float
    seconds: float
    calls: int


def window(work: Callable[[], Any], joules: Callable[[], float], least: float) -> Window:
    """Do the work again and again for ``least`` seconds or more.

    Args:
        work: is waited for at the end of the window, and after each call.
        joules: reads the counter.
        least: seconds.
    """
    harness.synchronize()
    start, before, calls = time.perf_counter(), joules(), 0
    while True:
        work()
        harness.synchronize()
        calls += 1
        seconds = time.perf_counter() - start
        if seconds >= least:
            return Window(joules() - before, seconds, calls)


def joules_an_image(idle: Window, busy: Window, batch: int) -> float:
    """Return the energy of an image beyond what the card takes idle."""
    power = idle.joules / idle.seconds
    return (busy.joules - power * busy.seconds) / (busy.calls * batch)


def energy(setting: Setting, peer: str = "best") -> Case:
    """Return the case of the energy of an image, ours and a peer's, on CUDA."""
    case = f"energy-{setting.name}"

    def measure(device: str) -> Iterator[Measurement]:
        sampling.agree(setting, peer, device)
        sides = (sampling.ours(setting, device), sampling.theirs(setting, peer, device))
        found = []
        for side in sides:
            side.timed()
            idle = window(lambda: time.sleep(0.1), harness.joules, WINDOW)
            found.append(
                joules_an_image(idle, window(side.timed, harness.joules, WINDOW), setting.batch)
            )
        values = {
            "ours_joules_an_image": found[0],
            "peer_joules_an_image": found[1],
            "ours_of_peer": found[0] / found[1],
        }
        note = f"{setting.note}; against {PEERS[peer]}; windows of {WINDOW:g} s, idle subtracted"
        yield Measurement(case, PEERS[peer], note, values)

    return Case(case, "step", measure, ("diffusers",))


def energies(device: str) -> list[Case]:
    """Return the cases, on CUDA."""
    if device != "cuda":
        return []
    return [
        energy(setting)
        for name in ("cifar10", "bundled")
        for setting in sampling.settings(device, name, "bfloat16", "ddim")[-1:]
    ]
