"""One step: its latency by batch, what it is made of, and how far it is from the floors.

A step's time is the difference between a long run and a short one over the difference of their
steps: what a run costs once (the plan, x_T, the last check) is in neither.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from flashddpm.benchmarks.cases import roofline
from flashddpm.benchmarks.cases.sampling import DTYPES
from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.measure.agreement import check, check_low
from flashddpm.benchmarks.measure.harness import Measurement, compare
from flashddpm.benchmarks.measure.runner import Case
from flashddpm.benchmarks.peers import pipelines
from flashddpm.benchmarks.peers.models import Model, model
from flashddpm.sampling.sampler import Sampler

# Steps of the short run and of the long one: so many that the difference is some seconds on a CPU.
SPAN = {
    "cpu": {"bundled": (2, 18), "cifar10": (1, 3)},
    "cuda": {"bundled": (4, 68), "cifar10": (4, 36), "pixels256": (2, 10)},
}
BATCHES = {
    "cpu": {"bundled": (1, 4, 16, 64), "cifar10": (1, 4, 16)},
    "cuda": {
        "cifar10": (1, 2, 4, 8, 16, 32, 64, 128, 256),
        "bundled": (1, 4, 16, 64, 256),
        "pixels256": (1, 4, 16),
    },
}
ROUNDS = 3
LOOP_SPAN = (100, 900)  # of a loop without network, whose steps are short
LAUNCHED = 8
"""Steps that are launched without waiting, so few that the queue of the card takes them all."""

Draw = Callable[[int], Any]
"""Draws a batch in so many steps."""


def drawing(sampler: Sampler, batch: int, solver: str = "ddim") -> Draw:
    """Return what draws a batch of the sampler's, in a number of steps."""
    classes = sampler.conditioning.num_classes
    labels = None if classes is None else [i % classes for i in range(batch)]

    def draw(num_steps: int) -> torch.Tensor:
        return sampler.sample(
            range(batch), labels, solver=solver, num_steps=num_steps, batch_size=batch
        )

    return draw


def seconds_a_step(draw: Draw, few: int, many: int, rounds: int = ROUNDS) -> float:
    """Return the median seconds of a step, of ``rounds`` differences, after one to warm up."""
    found = []
    for _ in range(1 + rounds):
        short, long = (harness.seconds(partial(draw, n)) for n in (few, many))
        found.append((long - short) / (many - few))
    return statistics.median(found[1:])


def latency(name: str, dtype: str, batch: int) -> Case:
    """Return the case of a step of so many images: seconds, images a second, shares of floors."""
    case = f"step-{name}-{dtype}-batch-{batch}"

    def measure(device: str) -> Iterator[Measurement]:
        of, kind = model(name), DTYPES[dtype]
        sampler = pipelines.sampler(name, kind, device)
        few, many = SPAN[device][name]
        draw = drawing(sampler, batch)
        draw(few)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_a_step(draw, few, many)
        values = {"ms_a_step": seconds * 1e3, "image_steps_a_second": batch / seconds}
        values |= shares(of, kind, batch, seconds, roofline.speed(device, kind))
        values["loop_ms"] = 1e3 * seconds_a_step(
            drawing(without_network(of, device), batch), *LOOP_SPAN
        )
        if device == "cuda":
            values["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
            values["host_ms_a_step"] = 1e3 * host_seconds(sampler, batch)
            values |= launches(draw, few, many)
        note = (
            f"a step of ddim, {many} steps less {few}, ours compiled, {ROUNDS} rounds; loop_ms: "
            "the same with a network that returns its input; floors: operations over a measured "
            "product, bytes over a measured copy"
        )
        yield Measurement(case, "nothing", note, values)

    return Case(case, "step", measure)


def shares(
    of: Model, dtype: torch.dtype, batch: int, seconds: float, speed: roofline.Speed
) -> dict[str, float]:
    """Return the work of a step and how much of its time each floor is."""
    work = roofline.work_of(of, dtype, batch)
    return {
        "gflop": work.flops / 1e9,
        "mbytes": work.bytes / 1e6,
        "of_flop_floor": work.flops / speed.flops / seconds,
        "of_byte_floor": work.bytes / speed.bytes / seconds,
        "tflop_a_second_peak": speed.flops / 1e12,
        "gbyte_a_second_peak": speed.bytes / 1e9,
    }


def without_network(of: Model, device: str) -> Sampler:
    """Return a sampler for the same images whose network returns its input."""
    captured = device == "cuda"
    return of.around(lambda x, t, labels=None: x, device, compile=False, capture=captured)


def host_seconds(sampler: Sampler, batch: int) -> float:
    """Return what the host takes to launch a step, waiting for none."""
    classes = sampler.conditioning.num_classes
    labels = None if classes is None else [i % classes for i in range(batch)]
    found = []
    for _ in range(1 + ROUNDS):
        steps = sampler.trajectory(range(batch), labels, num_steps=2 * LAUNCHED)
        steps.step(LAUNCHED)  # compiles and captures
        harness.synchronize()
        start = time.perf_counter()
        with sampler.executor.exclusive(), torch.no_grad():
            for _ in range(LAUNCHED):  # Trajectory.step, which waits at its end, without that
                steps._executor.take_step(steps._slots, steps._compiled, stats=False)
                steps._table.advance()
        found.append((time.perf_counter() - start) / LAUNCHED)
        harness.synchronize()
    return statistics.median(found[1:])


def launches(draw: Draw, few: int, many: int) -> dict[str, float]:
    """Return the kernels that a step runs on the card, and the calls that launch them."""
    counts = []
    for num_steps in (few, many):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            draw(num_steps)
            harness.synchronize()
        counts.append(count(profile.events()))
    return {key: (counts[1][key] - counts[0][key]) / (many - few) for key in counts[0]}


def count(events: Iterable[Any]) -> dict[str, int]:
    """Return how many of a profile's events are kernels, and how many launch kernels or graphs."""
    found = {"kernels": 0, "launches": 0}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found["kernels"] += not event.name.startswith(("Memcpy", "Memset"))
        else:
            found["launches"] += event.name.startswith(
                ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
            )
    return found


def graph(name: str, dtype: str, batch: int) -> Case:
    """Return the case of captured steps against the same steps launched one by one."""
    case = f"graph-{name}-{dtype}-batch-{batch}"

    def measure(device: str) -> Iterator[Measurement]:
        kind = DTYPES[dtype]
        few, many = SPAN[device][name]
        sides = [
            drawing(pipelines.sampler(name, kind, device, how), batch)
            for how in ("best", "uncaptured")
        ]
        ours, peer = (partial(draw, many) for draw in sides)
        captured, plain = ours(), peer()
        if dtype == "float32":
            check(captured, plain, case, "the same steps uncaptured")
        else:
            check_low(captured, plain, plain, case)
        comparison = compare(ours, peer, rounds=ROUNDS)
        note = f"{many} steps of ddim, {dtype}, compiled alike: where the graph stops paying"
        yield Measurement.of(case, "the same steps uncaptured", note, comparison)

    return Case(case, "step", measure)


def latencies(device: str) -> list[Case]:
    """Return the cases of latency."""
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    sizes = BATCHES[device]
    return [latency(name, d, batch) for name in sizes for d in dtypes for batch in sizes[name]]


def graphs(device: str) -> list[Case]:
    """Return the cases of the graph's worth, by batch, on CUDA."""
    if device != "cuda":
        return []
    return [graph("cifar10", "bfloat16", batch) for batch in BATCHES["cuda"]["cifar10"]]
