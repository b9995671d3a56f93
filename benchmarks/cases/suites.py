"""Every case, in the order of what it tells: where a budget ends is what it left out."""

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
from flashddpm.benchmarks.measure.runner import Case

SUITES = ("sampling", "step", "kernels", "training", "startup", "serving")


def cases(device: str, eager: bool = False) -> list[Case]:
    """Return all cases, the most telling first.

    Args:
        device: "cpu" or "cuda".
        eager: serve with the network as it is, not compiled.
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
        Case("first-run", "startup", startup.first_run),
        Case("loop", "sampling", loops.against_schedulers, ("diffusers",)),
        Case("loop-ddpt", "sampling", loops.against_ddpt, ("denoising_diffusion_pytorch",)),
        Case("exact", "sampling", loops.price_of_exact),
        Case("first-image", "startup", startup.first_image),
        *([first_call.first_call("cifar10", low, 1, tune=True)] if device == "cuda" else []),
        Case(
            "serving",
            "serving",
            lambda device: serving.under_load(device, compiled=not eager),
        ),
    ]


def chosen(device: str, suite: str, eager: bool = False) -> list[Case]:
    """Return the cases of one suite, or of all."""
    return [case for case in cases(device, eager) if suite in ("all", case.suite)]
