"""The benchmark of the energy that one image costs on a GPU, in joules.

The card's energy counter is read before and after a window of ten seconds of sampling, and the
power of the idle card is subtracted:

    energy = (E_window - P_idle t_window) / images

with P_idle the mean power over an idle window just before. The counter is NVML's total energy,
which advances in coarse steps: therefore windows are long, and energies are quoted relative to the
energy of a peer (another implementation that draws the same images).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flashddpm.benchmarks.cases import sampling
from flashddpm.benchmarks.cases.sampling import PEERS, SamplingSetting
from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runner import BenchmarkCase

WINDOW = 10.0
"""The least length of a window of measurement, in seconds."""


@dataclass(frozen=True)
class Window:
    """The energy and the time that one window of measurement took.

    Attributes:
        joules: the energy that the card consumed during the window, in joules.
        seconds: the length of the window, in seconds.
        calls: how many times the work was done in the window, at least 1.
    """

    joules: float
    seconds: float
    calls: int


def window(work: Callable[[], Any], joules: Callable[[], float], least: float) -> Window:
    """Repeat a piece of work for ``least`` seconds or more and measure its energy.

    Args:
        work: called without arguments, at least once; its result is ignored. The GPU is waited for
            after each call.
        joules: called without arguments; returns the reading of an energy counter, in joules.
        least: the least length of the window, in seconds; the call under way is finished. With 0
            or less the work is done once.

    Returns:
        The energy, length and number of calls of the window.
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
    """Return the energy of one image in joules, beyond what the idle card consumes.

    It may be negative, if the busy window took less power than the idle one.

    Args:
        idle: a window in which the card did nothing; its mean power is subtracted.
        busy: a window in which each call of the work drew one batch.
        batch: the number of images of one call, at least 1.
    """
    power = idle.joules / idle.seconds
    return (busy.joules - power * busy.seconds) / (busy.calls * batch)


def energy(setting: SamplingSetting, peer: str = "best") -> BenchmarkCase:
    """Return the benchmark case that compares our energy of one image with a peer's.

    The case needs CUDA, diffusers and pynvml. It measures "ours_joules_an_image",
    "peer_joules_an_image" and "ours_of_peer", their ratio. Its ``measure`` raises AssertionError if
    the two draw different images from the same noise.

    Args:
        setting: what is drawn: model, dtype, solver, batch size and number of steps.
        peer: the implementation to compare with, a key of ``sampling.PEERS``: "graphs", "best" or
            "eager" (diffusers), "unet" (its U-Net in our loop), "reference" or "tuned" (ours). It
            is not checked here: another makes ``measure`` raise KeyError.
    """
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

    return BenchmarkCase(case, "step", measure, ("diffusers",))


def energies(device: str) -> list[BenchmarkCase]:
    """Return the benchmark cases of energy: one for each of the models "cifar10" and "bundled".

    Each draws the largest batch of its model (256 images) in bfloat16 by DDIM, against the peer
    "best".

    Args:
        device: "cuda"; for "cpu" the list is empty.
    """
    if device != "cuda":
        return []
    return [
        energy(setting)
        for name in ("cifar10", "bundled")
        for setting in sampling.settings(device, name, "bfloat16", "ddim")[-1:]
    ]
