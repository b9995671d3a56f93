"""Benchmarks of the time from the start of a process to its first images, and of the import.

Each is measured in fresh processes, whose compile cache is empty at first.
"""

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
    """Run a command as a child process with a given compile cache and return its standard output.

    Its environment is that of this process, with the folder as TORCHINDUCTOR_CACHE_DIR and
    TRITON_CACHE_DIR.

    Args:
        command: the program and its arguments.
        cache: the folder for the code that Inductor and Triton compile.

    Raises:
        RuntimeError: if the exit status is not 0; its text holds the status and the last line that
            the command wrote to standard error.
        OSError: if the program cannot be started.
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
    """Measure the command ``flashddpm sample`` in fresh processes, and the time of the import.

    Args:
        device: "cpu" or "cuda".

    Yields:
        "first-run": the time from process start to the picture of 64 images, with the command's
        default solver and steps and an empty compile cache: "seconds" (the median of 3 runs),
        "longest_seconds" and "peak_memory_mib" (the largest resident memory of a child process).
        "import": "extra_seconds", how much longer a process that imports flashddpm takes than one
        that imports torch (the median of 5 pairs), and "torch_seconds", the median of the latter.

    Raises:
        RuntimeError: if one of the processes fails.
    """
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
    """Measure the time from process start to one image of 2 steps, with and without compiling.

    The bundled model draws the image by DDIM, in two processes that share a compile cache.

    Args:
        device: "cpu" or "cuda".

    Yields:
        For the compiled and for the uncompiled network: "cold_seconds", of the first process, whose
        compile cache is empty, and "warm_seconds", of the second, which finds what the first has
        left.

    Raises:
        RuntimeError: if one of the processes fails.
    """
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
