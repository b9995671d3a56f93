"""What the first images of a process cost, in parts: import, building, compiling, tuning, capture.

Each part is timed around the piece itself, in a process of its own; tuning is what torch says of
Inductor's search, which compiling contains.
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
from flashddpm.benchmarks.measure.runner import Case

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
"""How the entries of torch's compile times end that are Inductor's search for kernels."""


class Watch:
    """Seconds that calls of methods take; a call within another counts as the other's."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = False

    def over(self, owner: Any, method: str, part: str) -> None:
        """Count the calls of a method to a part, from now on."""
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
    """Return the seconds of Inductor's search, of torch's compile times by name."""
    return sum(sum(values) for name, values in times.items() if name.endswith(TUNING))


def split(
    imported: float, build: float, seconds: Mapping[str, float], tune: float, total: float
) -> dict[str, float]:
    """Return the parts of the first call; they add up to the total.

    Args:
        imported: seconds of ``import flashddpm``, torch included.
        build: of making the sampler, weights included.
        seconds: of "compile", tuning included, and "capture".
        tune: of Inductor's search.
        total: from before the import until the images are there.
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
    """Draw the first images of this process; print what they cost as JSON.

    Args:
        start, imported: readings of the clock before and after ``import flashddpm``.
        name, dtype, batch, device, how: as for pipelines.sampler, and images.
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


def first_call(name: str, dtype: str, batch: int, tune: bool = False) -> Case:
    """Return the case of the first images of a process, the compile cache empty and then warm."""
    case = f"first-call-{name}-{dtype}-batch-{batch}" + ("-tuned" if tune else "")

    def measure(device: str) -> Iterator[Measurement]:
        how = "tuned" if tune else "best"
        command = [sys.executable, "-P", "-c", SCRIPT, name, dtype, str(batch), device, how]
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                values = json.loads(run_child(command, cache).splitlines()[-1])
                note = f"2 steps of ddim, a fresh process, compile cache {state}"
                yield Measurement(f"{case}-{state}", "nothing", note, values)

    return Case(case, "startup", measure)
