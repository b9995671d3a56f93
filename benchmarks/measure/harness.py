"""Timing that can be trusted: interleaved pairs, their spread, and what figures depend on.

Two functions are timed in turn, A B B A, in one process: the machine's drift falls on both. Quoted
are the medians, the median of the paired ratios B / A with its quartiles, and the spread of A
against itself (the ratios within the A pairs), which is the noise floor of the comparison.
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
    """What two interleaved functions took.

    Attributes:
        ours_seconds, peer_seconds: median of a call.
        ratio: median of peer / ours over the pairs: how many times as fast ours is.
        ratio_low, ratio_high: its quartiles.
        spread: quartile range of ours / ours within the pairs of A: the noise floor, as a ratio.
        pairs: how many pairs were timed.
    """

    ours_seconds: float
    peer_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    spread: float
    pairs: int


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call, work on the GPU included."""
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
    """Time two functions in turn, ``rounds`` times A B B A; ``clock`` runs one and times it."""
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
    """Return what figures depend on besides their inputs: command, machine, versions, commit."""
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
    """Return the clock of the card's multiprocessors now, in Hz; None where NVML gives none."""
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
    """Return what the card has taken since its driver was loaded, in joules."""
    with _nvml() as (nvml, card):
        return nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000


def card_state() -> dict[str, Any]:
    """Return the card, its driver, clocks, temperature and throttle reasons now."""
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
    """One measured case.

    Attributes:
        case: its name.
        peer: what it was compared with.
        note: what a call does, and what the ratio says.
        values: the comparison's fields, or figures of another kind with their units in the name.
    """

    case: str
    peer: str
    note: str
    values: dict[str, float]

    @classmethod
    def of(cls, case: str, peer: str, note: str, comparison: Comparison) -> Measurement:
        """Return the result of a comparison."""
        return cls(case, peer, note, asdict(comparison))

    def line(self) -> str:
        """Return the result as a line of a table."""
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
