"""Timing of two functions in turn, readings of the GPU, and the description of the environment.

Two functions A (ours) and B (a peer: another implementation) are timed in the order A B B A in one
process, so that a drift of the machine falls on both. Results are the medians of both, the median
of the paired ratios B / A with its quartiles, and the spread of A against itself (of the ratios of
the two times of A in each round), which is the noise floor of the comparison.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flashddpm.arguments import resolve_device

PACKAGES = ("triton", "diffusers", "numpy")


@dataclass(frozen=True)
class Comparison:
    """The times of two functions that were called in turn.

    Attributes:
        ours_seconds, peer_seconds: the median time of one call of our function and of the peer's,
            in seconds.
        ratio: the median of peer's time / our time over the pairs: how many times as fast ours is.
        ratio_low, ratio_high: the lower and the upper quartile of these ratios.
        spread: the interquartile range of (second time of ours / first time of ours) over the
            rounds, a difference of ratios: the noise floor of ``ratio``.
        pairs: the number of pairs of one call of ours and one of the peer's.
    """

    ours_seconds: float
    peer_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    spread: float
    pairs: int


def synchronize() -> None:
    """Wait until the current CUDA device has finished all its work; without one do nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall-clock time of one call in seconds, its work on the GPU included.

    Args:
        function: called once without arguments; its result is dropped.
    """
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def compare(
    ours: Any,
    peer: Any,
    rounds: int = 5,
    warm_ups: int = 1,
    clock: Callable[[Any], float] = seconds,
) -> Comparison:
    """Time two functions in turn, in the order ours, peer, peer, ours in each round.

    Args:
        ours: our function, which takes no arguments; with another ``clock``, whatever it takes.
        peer: the function to compare with, of the same kind.
        rounds: the number of rounds, at least 1; each gives two pairs of times.
        warm_ups: how often each function is run by ``clock`` before, its times dropped.
        clock: called with ``ours`` or ``peer``; runs it once and returns its time, in seconds and
            above 0. By default the wall-clock time of one call (`seconds`).

    Returns:
        The medians of both times and of their ratios.

    Raises:
        ValueError: if ``rounds`` is below 1.
    """
    for _ in range(warm_ups):
        clock(ours)
        clock(peer)
    a: list[float] = []
    b: list[float] = []
    for _ in range(rounds):
        a.append(clock(ours))
        b += [clock(peer), clock(peer)]
        a.append(clock(ours))
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    within = sorted(y / x for x, y in zip(a[::2], a[1::2], strict=True))
    return Comparison(
        ours_seconds=statistics.median(a),
        peer_seconds=statistics.median(b),
        ratio=statistics.median(ratios),
        ratio_low=_quantile(ratios, 0.25),
        ratio_high=_quantile(ratios, 0.75),
        spread=_quantile(within, 0.75) - _quantile(within, 0.25),
        pairs=len(ratios),
    )


def _quantile(ordered: list[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def environment(device: str) -> dict[str, Any]:
    """Return the facts about program and machine on which timings depend.

    Args:
        device: where the benchmark runs: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        A dictionary that JSON can hold: "command", the command line of this process; "python", its
        version; "versions", from the names flashddpm, torch, triton, diffusers and numpy to their
        versions, or "not installed"; "commit", the first 12 digits of the git commit, with "+" if
        tracked files were changed since, or None outside of a checkout; "cpu", the processor's name
        and number of cores; "threads", the number of PyTorch's threads; "capability", PyTorch's CPU
        instruction set, such as "AVX2"; "gpu", what `card_state` returns, or None on the CPU.

    Raises:
        ValueError: if the device is of another kind, or there is no such GPU.
        ImportError: if the device is a GPU and pynvml is not installed.
    """
    versions = {"flashddpm": metadata.version("flashddpm"), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": card_state() if resolve_device(device).type == "cuda" else None,
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Return the commit that this file is of, with "+" if the checkout was changed since."""
    here = Path(__file__).resolve()

    def git(*command: str) -> str:
        line = ["git", "-C", str(here.parent), *command]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def _nvml() -> Iterator[tuple[Any, Any]]:
    """Yield NVML and its handle of torch's current card."""
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    finally:
        pynvml.nvmlShutdown()


def sm_clock() -> float | None:
    """Return the present clock rate of the multiprocessors (SMs) of torch's current GPU, in Hz.

    Returns:
        The rate in Hz, a float above 0, read once from NVML; None if pynvml is not installed, or if
        NVML fails or tells no rate, as on virtual or divided cards.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        with _nvml() as (nvml, card):
            return 1e6 * nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM) or None
    except pynvml.NVMLError:  # a virtual or a divided card may not tell
        return None


def joules() -> float:
    """Return the energy that the current GPU has consumed since its driver was loaded, in joules.

    Raises:
        ImportError: if pynvml is not installed.
        pynvml.NVMLError: if the card has no counter of energy.
    """
    with _nvml() as (nvml, card):
        return nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000


def card_state() -> dict[str, Any]:
    """Return the name and the present state of the current GPU, as NVML reads them.

    Returns:
        A dictionary: "name" and "driver" (version), strings; "sm_clock_mhz" and "memory_clock_mhz",
        the clock rates in MHz; "power_limit_w" in watts; "temperature_c" in degrees Celsius;
        "throttle_reasons", the bits of NVML's nvmlClocksThrottleReason constants, an int, 0 for
        none.

    Raises:
        ImportError: if pynvml is not installed.
        pynvml.NVMLError: if the card does not tell one of these.
    """
    with _nvml() as (pynvml, card):
        return {
            "name": pynvml.nvmlDeviceGetName(card),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card),
        }


@dataclass(frozen=True)
class Measurement:
    """One result of a benchmark case, as it is reported: a comparison of two sides, or figures.

    Attributes:
        case: the name of the result, which is the case's or begins with it.
        peer: what it was compared with; "" or "nothing" without a comparison.
        note: a sentence for people: what one timed call does, and how to read the figures.
        values: from name to number: the fields of a `Comparison`, or other figures, whose names
            hold their units ("p50_seconds"); empty if nothing could be measured, for the reason
            that ``peer`` or ``note`` gives.
    """

    case: str
    peer: str
    note: str
    values: dict[str, float]

    @classmethod
    def of(cls, case: str, peer: str, note: str, comparison: Comparison) -> Measurement:
        """Return the measurement that holds a comparison's fields as its values.

        Args:
            case, peer, note: the attributes of the same names.
            comparison: the times of both sides.
        """
        return cls(case, peer, note, asdict(comparison))

    def line(self) -> str:
        """Return the result as one line of text for the terminal.

        A comparison shows its ratio with quartiles, both times in milliseconds and the spread;
        anything else shows its figures by name, or, where it has none, its peer.
        """
        v = self.values
        if "ratio" not in v:
            figures = ", ".join(f"{key} {value:.4g}" for key, value in v.items())
            return f"{self.case}: {figures or self.peer}"
        return (
            f"{self.case} against {self.peer}: {v['ratio']:.2f}x "
            f"[{v['ratio_low']:.2f}, {v['ratio_high']:.2f}], "
            f"{v['ours_seconds'] * 1e3:.3f} ms against {v['peer_seconds'] * 1e3:.3f} ms, "
            f"A/A spread {v['spread']:.3f}"
        )
