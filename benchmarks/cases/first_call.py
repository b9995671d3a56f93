"""The benchmark of the first images of a process, whose time is split into parts.

The parts are the import, building the sampler, compiling the network, tuning (Inductor's search for
the fastest kernels), capturing CUDA graphs, and the rest. A process of its own measures them, each
around the calls that do it. Compiling contains tuning, whose time is what torch reports of it; it
is subtracted from compiling.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flashddpm.benchmarks.cases.startup import run_child
from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runner import BenchmarkCase

SCRIPT = """
import sys, time
start = time.perf_counter()
import flashddpm
imported = time.perf_counter()
from flashddpm.benchmarks.cases import first_call
first_call.main(start, imported, *sys.argv[1:])
"""
PARTS = ("import", "build", "compile", "tune", "capture", "rest")
TUNING = ("_template_autotuning", "_template_precompiling")
"""The suffixes of the entries of torch's compile times that are Inductor's search for kernels."""


class Watch:
    """A stopwatch of methods: adds up the seconds that their calls take, by part.

    While one watched call runs, the time of other watched calls within it counts as the outer
    call's. It is for one thread.

    Attributes:
        seconds: the name of a part -> the seconds that its calls have taken so far.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = False

    def over(self, owner: Any, method: str, part: str) -> None:
        """Wrap a method so that its calls are timed, from now on until the process ends.

        Args:
            owner: the class (or object) whose attribute is replaced by a timed version.
            method: the name of the method.
            part: the name of the part that the seconds of its calls are added to.

        Raises:
            AttributeError: if the owner has no such method.
        """
        original = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return original(*arguments, **options)
            self._inside, start = True, time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                self._inside = False
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, method, timed)


def tuning(times: Mapping[str, Sequence[float]]) -> float:
    """Return the seconds that Inductor spent in its search for the fastest kernels.

    Args:
        times: the name of an entry -> the seconds of each of its occurrences, as in
            ``torch._dynamo.utils.compilation_time_metrics``. Entries whose name ends with
            "_template_autotuning" or "_template_precompiling" (TUNING) are added up.
    """
    return sum(sum(values) for name, values in times.items() if name.endswith(TUNING))


def split(
    imported: float, build: float, seconds: Mapping[str, float], tune: float, total: float
) -> dict[str, float]:
    """Split the time of a process's first images into parts that add up to the total.

    Args:
        imported: seconds that ``import flashddpm`` took, torch included.
        build: seconds that making the sampler took, the weights included.
        seconds: seconds of the parts "compile" (tuning included) and "capture" (CUDA graphs); a
            part that is missing took 0.
        tune: seconds that Inductor's search for kernels took.
        total: seconds from before the import until the images are there.

    Returns:
        Seconds under the keys "import_seconds", "build_seconds", "compile_seconds" (without
        tuning), "tune_seconds", "capture_seconds", "rest_seconds" (what no other part accounts for)
        and "seconds" (the total).
    """
    parts = {
        "import": imported,
        "build": build,
        "compile": seconds.get("compile", 0.0) - tune,
        "tune": tune,
        "capture": seconds.get("capture", 0.0),
    }
    parts["rest"] = total - sum(parts.values())
    return {f"{name}_seconds": parts[name] for name in PARTS} | {"seconds": total}


def main(
    start: float, imported: float, name: str, dtype: str, batch: str, device: str, how: str
) -> None:
    """Draw the first images of this process by 2 steps of DDIM and print what they cost as JSON.

    The line printed holds the seconds that ``split`` returns, and "peak_host_memory_mib", the peak
    resident memory of the process in MiB. SCRIPT calls this with the arguments of its command line.

    Args:
        start, imported: readings of ``time.perf_counter`` before and after ``import flashddpm``, in
            seconds.
        name: the model: "bundled", "cifar10" or "pixels256".
        dtype: the name of the network's dtype: "float32" or "bfloat16".
        batch: the number of images, as a decimal string, at least "1".
        device: "cpu" or "cuda".
        how: how the sampler runs the network: "best" (compiled), "tuned" (compiled by
            max-autotune), "uncaptured" (compiled, without CUDA graphs), "reference" (plain PyTorch)
            or "diffusers" (diffusers' U-Net in our loop).

    Raises:
        KeyError: if there is no such model or no such ``how``.
        AttributeError: if torch has no attribute of the dtype's name.
        ValueError: if ``batch`` is not a positive integer.
    """
    import torch

    from flashddpm.benchmarks.cases import steps
    from flashddpm.benchmarks.peers import pipelines
    from flashddpm.execution.compiled_network import CompiledNetwork
    from flashddpm.execution.cuda_graphs import Graphs

    watch = Watch()
    watch.over(CompiledNetwork, "prepare", "compile")
    for method in ("get", "best"):
        watch.over(Graphs, method, "capture")
    began = time.perf_counter()
    sampler = pipelines.sampler(name, getattr(torch, dtype), device, how)
    build = time.perf_counter() - began
    steps.drawing(sampler, int(batch))(2).cpu()
    total = time.perf_counter() - start
    tune = tuning(torch._dynamo.utils.compilation_time_metrics)
    found = split(imported - start, build, watch.seconds, tune, total)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found | {"peak_host_memory_mib": peak}))


def first_call(name: str, dtype: str, batch: int, tune: bool = False) -> BenchmarkCase:
    """Return the benchmark case of the first images of a process, timed in parts.

    It runs ``main`` in two fresh processes, one after the other: the first finds an empty compile
    cache, the second the cache that the first has left. Their measurements have the case's name
    with "-cold" and "-warm" appended, and as values the seconds of each part as `split` returns
    them ("import_seconds", ..., "seconds" in all) and "peak_host_memory_mib" (MiB). Its
    ``measure`` raises RuntimeError if a process fails.

    Args:
        name: the model: "bundled", "cifar10" or "pixels256".
        dtype: the network's dtype: "float32" or "bfloat16".
        batch: the number of images, at least 1. None of the three is checked here: an
            unknown name or a batch below 1 makes the process fail.
        tune: whether the network is compiled with tuning (max-autotune).
    """
    case = f"first-call-{name}-{dtype}-batch-{batch}" + ("-tuned" if tune else "")

    def measure(device: str) -> Iterator[Measurement]:
        how = "tuned" if tune else "best"
        command = [sys.executable, "-P", "-c", SCRIPT, name, dtype, str(batch), device, how]
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                values = json.loads(run_child(command, cache).splitlines()[-1])
                note = f"2 steps of ddim, a fresh process, compile cache {state}"
                yield Measurement(f"{case}-{state}", "nothing", note, values)

    return BenchmarkCase(case, "startup", measure)
