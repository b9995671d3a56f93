"""The list of all benchmark cases, the most telling first, and the names of their suites.

A run with a limit of time measures the cases in this order and leaves out those at the end.
"""

from __future__ import annotations

from flashddpm.benchmarks.cases import (
    energy,
    first_call,
    loops,
    operations,
    sampling,
    serving,
    startup,
    steps,
    training,
)
from flashddpm.benchmarks.measure.runner import BenchmarkCase

SUITES = ("sampling", "step", "kernels", "training", "startup", "serving")


def cases(device: str, eager: bool = False) -> list[BenchmarkCase]:
    """Return the benchmark cases of a device, the most telling first.

    Args:
        device: "cpu" or "cuda".
        eager: whether the cases of serving run the network as it is instead of compiled; other
            cases do not depend on it.

    Raises:
        KeyError: if the device is neither "cpu" nor "cuda".
    """
    low = "bfloat16" if device == "cuda" else "float32"
    return [
        *sampling.headline(device),
        *sampling.other_models(device),
        first_call.first_call("cifar10", low, 1),
        *steps.latencies(device),
        *steps.graphs(device),
        *sampling.other_peers(device),
        *operations.operations(device),
        *training.cases(device),
        *energy.energies(device),
        BenchmarkCase("first-run", "startup", startup.first_run),
        BenchmarkCase("loop", "sampling", loops.against_schedulers, ("diffusers",)),
        BenchmarkCase(
            "loop-ddpt", "sampling", loops.against_ddpt, ("denoising_diffusion_pytorch",)
        ),
        BenchmarkCase("exact", "sampling", loops.price_of_exact),
        BenchmarkCase("first-image", "startup", startup.first_image),
        *([first_call.first_call("cifar10", low, 1, tune=True)] if device == "cuda" else []),
        BenchmarkCase(
            "serving",
            "serving",
            lambda device: serving.under_load(device, compiled=not eager),
        ),
    ]


def chosen(device: str, suite: str, eager: bool = False) -> list[BenchmarkCase]:
    """Return the benchmark cases of one suite, or of all, the most telling first.

    Args:
        device: "cpu" or "cuda".
        suite: "sampling", "step", "kernels", "training", "startup", "serving" or "all"; the list is
            empty for any other name.
        eager: whether the cases of serving run the network as it is instead of compiled; other
            cases do not depend on it.

    Raises:
        KeyError: if the device is neither "cpu" nor "cuda".
    """
    return [case for case in cases(device, eager) if suite in ("all", case.suite)]
