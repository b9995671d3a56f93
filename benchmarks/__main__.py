"""``python -m flashddpm.benchmarks``: run the cases, print a line each, write JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from flashddpm.arguments import one_of, resolve_device
from flashddpm.benchmarks import harness, operations, sampling, serving, startup
from flashddpm.benchmarks.harness import Result

Case = Callable[[str], Iterator[Result]]
"""From the device to what was measured on it."""


def suites(compiled_peer: bool, eager: bool = False) -> dict[str, list[Case]]:
    """Return the cases of each suite, the most telling first."""
    return {
        "startup": [startup.first_run, startup.first_image],
        "loop": [sampling.loops_without_network],
        "sampling": [lambda device: sampling.whole_runs(device, compiled_peer)],
        "exact": [sampling.price_of_exact],
        "serving": [lambda device: serving.under_load(device, compiled=not eager)],
        "operations": [operations.noise_on_the_cpu, operations.operations_on_a_gpu],
    }


def main(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    suite: Annotated[
        str, typer.Option(help="all, startup, loop, sampling, exact, serving or operations.")
    ] = "all",
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("benchmark.json"),
    compiled_peer: Annotated[
        bool, typer.Option("--compiled-peer", help="Also compile diffusers' U-Net (minutes).")
    ] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="Serve with the network as it is, not compiled.")
    ] = False,
) -> None:
    """Time flashddpm against its peers; let nothing else run meanwhile."""
    kind = resolve_device(device).type
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, for both sides
    cases = suites(compiled_peer, eager)
    chosen = list(cases) if suite == "all" else [one_of("suite", suite, ("all", *cases))]
    where = harness.environment(kind)  # now: files may change while it runs
    results: list[Result] = []
    for name in chosen:
        for case in cases[name]:
            for result in case(kind):
                results.append(result)
                print(result.line(), flush=True)
                harness.write(out, where, results)


if __name__ == "__main__":
    typer.run(main)
