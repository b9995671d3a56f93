"""What a first run costs: a fresh process, an empty compile cache, the command's defaults."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashddpm.benchmarks.measure.harness import Measurement

RUNS, IMPORTS = 3, 5
FIRST_IMAGE = """
import sys, flashddpm as fd
sampler = fd.Sampler.from_pretrained(fd.bundled(), sys.argv[1], compile=sys.argv[2] == "compiled")
image = sampler.sample(0, 0, num_steps=2).cpu()
"""


def run_child(command: Sequence[str], cache: str) -> str:
    """Run a command with this folder for compiled code; return what it printed.

    Raises:
        RuntimeError: it failed; with the last line of its errors.
    """
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process ended with {done.returncode}: {last}")
    return done.stdout


def _run(*command: str, cache: str) -> tuple[float, float]:
    """Return the wall seconds of a command and the largest memory of any child so far, in MiB."""
    start = time.perf_counter()
    run_child(command, cache)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def first_run(device: str) -> Iterator[Measurement]:
    """64 images from process start to the picture, and import over torch's own."""
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-P", "-m", "flashddpm", "sample", "--device", device)
        runs = []
        for i in range(RUNS):
            fresh = Path(folder) / str(i)
            runs.append(_run(*command, "--out", str(fresh / "samples.png"), cache=str(fresh)))
        yield Measurement(
            "first-run",
            "nothing",
            "process start to samples.png: 64 images, the command's default solver and steps, "
            f"compile cache empty; the median and the longest of {RUNS}",
            {
                "seconds": statistics.median(seconds for seconds, _ in runs),
                "longest_seconds": max(seconds for seconds, _ in runs),
                "peak_memory_mib": max(memory for _, memory in runs),
            },
        )
        ours, torch_alone = [], []
        for _ in range(IMPORTS):
            ours.append(_run(sys.executable, "-P", "-c", "import flashddpm", cache=folder)[0])
            torch_alone.append(_run(sys.executable, "-P", "-c", "import torch", cache=folder)[0])
        extra = sorted(a - b for a, b in zip(ours, torch_alone, strict=True))
        yield Measurement(
            "import",
            "import torch",
            f"seconds of a process that imports flashddpm beyond one that imports torch, the "
            f"median of {IMPORTS} pairs",
            {
                "extra_seconds": extra[IMPORTS // 2],
                "torch_seconds": sorted(torch_alone)[IMPORTS // 2],
            },
        )


def first_image(device: str) -> Iterator[Measurement]:
    """One image in a fresh process, compiled and not: with an empty compile cache, then again."""
    for how in ("compiled", "uncompiled"):
        command = (sys.executable, "-P", "-c", FIRST_IMAGE, device, how)
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (_run(*command, cache=cache)[0] for _ in range(2))
        yield Measurement(
            f"first-image-{how}",
            "nothing",
            "process start to one image of 2 steps: the first process with an empty compile "
            "cache, and a second one that finds what the first has left",
            {"cold_seconds": cold, "warm_seconds": warm},
        )
