"""Benchmarks of one sampling step: its latency by batch size, its parts, and its lower bounds.

A step's time is the difference between the times of a long and a short run over the difference of
their numbers of steps, so that the costs of a run (making the table of coefficients, drawing x_T,
the last check for NaN) cancel out.
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
from flashddpm.benchmarks.measure.runner import BenchmarkCase
from flashddpm.benchmarks.peers import pipelines
from flashddpm.benchmarks.peers.models import Model, model
from flashddpm.sampling.sampler import Sampler

# Steps of the short and of the long run; the difference takes some seconds on a CPU.
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
LOOP_SPAN = (100, 900)  # the same for a loop without a network, whose steps are short
LAUNCHED = 8
"""The number of steps launched without waiting, small enough for the GPU's launch queue."""

Draw = Callable[[int], Any]
"""A function that draws one batch of images in the given number of steps."""


def drawing(sampler: Sampler, batch: int, solver: str = "ddim") -> Draw:
    """Return a function that draws a batch of images from a sampler, given the number of steps.

    The images have the seeds 0 to batch - 1 and, if the network has classes, the classes in turn as
    labels.

    Args:
        sampler: draws the images, all in one batch.
        batch: the number of images, at least 1.
        solver: the name of a solver, such as "ddim" or "ddpm"; an unknown one makes the function
            raise ValueError when it is called.

    Returns:
        A function: number of steps -> images, float32 [batch, C, H, W] in about [-1, 1], on the
        sampler's device.
    """
    classes = sampler.conditioning.num_classes
    labels = None if classes is None else [i % classes for i in range(batch)]

    def draw(num_steps: int) -> torch.Tensor:
        return sampler.sample(
            range(batch), labels, solver=solver, num_steps=num_steps, batch_size=batch
        )

    return draw


def seconds_a_step(draw: Draw, few: int, many: int, rounds: int = ROUNDS) -> float:
    """Return the median time of one step, in seconds.

    In each round a short and a long run are timed; the difference of their times, divided by the
    difference of their numbers of steps, is one measurement. The result is the median of the
    measurements (a float, which noise can make negative), without that of a first round, which is
    a warm-up.

    Args:
        draw: called with a number of steps (int); draws one batch in so many. Its result is
            dropped.
        few: the number of steps of the short run, at least 1.
        many: the number of steps of the long run, above ``few`` (not checked).
        rounds: the number of rounds that count, at least 1.

    Raises:
        ZeroDivisionError: if ``few`` and ``many`` are equal.
        ValueError: if ``rounds`` is below 1.
    """
    found = []
    for _ in range(1 + rounds):
        short, long = (harness.seconds(partial(draw, n)) for n in (few, many))
        found.append((long - short) / (many - few))
    return statistics.median(found[1:])


def latency(name: str, dtype: str, batch: int) -> BenchmarkCase:
    """Return the benchmark case of one step of DDIM, of our compiled sampler.

    It measures "ms_a_step" (milliseconds of a step), "image_steps_a_second" (batch over seconds of
    a step), the work of a step and its lower bounds (see ``shares``), and "loop_ms" (milliseconds
    of a step whose network returns its input). On CUDA also "peak_memory_mib" (MiB),
    "host_ms_a_step" (milliseconds of the host to launch a step), and "kernels" and "launches" (the
    mean numbers of both in a step).

    Args:
        name: the model: "bundled", "cifar10" or, on CUDA only, "pixels256".
        dtype: the network's dtype: "float32" or "bfloat16".
        batch: the number of images.
    """
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

    return BenchmarkCase(case, "step", measure)


def shares(
    of: Model, dtype: torch.dtype, batch: int, seconds: float, speed: roofline.Speed
) -> dict[str, float]:
    """Return the work of one step, the machine's speeds, and how near the step is to its bounds.

    Args:
        of: the model.
        dtype: the network's dtype.
        batch: the number of images.
        seconds: the measured time of a step, in seconds, above 0.
        speed: the measured speeds of the machine.

    Returns:
        "gflop" (1e9 operations of a step), "mbytes" (1e6 bytes that a step moves), "of_flop_floor"
        and "of_byte_floor" (the least times of the operations and of the bytes as fractions of
        ``seconds``), "tflop_a_second_peak" (1e12 operations a second) and "gbyte_a_second_peak"
        (1e9 bytes a second).
    """
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
    """Return a sampler of the same images whose network returns its input, to time the loop alone.

    Args:
        of: the model, whose schedule, shape of images and labels the sampler has.
        device: "cpu" or "cuda"; on CUDA its steps are captured as CUDA graphs.
    """
    captured = device == "cuda"
    return of.around(lambda x, t, labels=None: x, device, compile=False, capture=captured)


def host_seconds(sampler: Sampler, batch: int) -> float:
    """Return the median time that the host takes to launch one step on the GPU, in seconds.

    The steps are those of DDIM; the GPU is not waited for between them.

    Args:
        sampler: a sampler on CUDA.
        batch: the number of images, at least 1.
    """
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
    """Return the mean numbers of GPU kernels and of launches of one step, by torch's profiler.

    Args:
        draw: called with a number of steps (int); draws one batch in so many, on CUDA.
        few: the number of steps of the short run that is profiled.
        many: the number of steps of the long run, above ``few``.

    Returns:
        "kernels": GPU kernels of a step, copies and fills left out; "launches": calls of the host
        that launch a kernel or a CUDA graph. Both are floats: the counts of the long run less those
        of the short one, divided by the difference of their steps.

    Raises:
        ZeroDivisionError: if ``few`` and ``many`` are equal.
    """
    counts = []
    for num_steps in (few, many):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            draw(num_steps)
            harness.synchronize()
        counts.append(count(profile.events()))
    return {key: (counts[1][key] - counts[0][key]) / (many - few) for key in counts[0]}


def count(events: Iterable[Any]) -> dict[str, int]:
    """Count the GPU kernels and the launches among a profile's events.

    Args:
        events: the events of ``torch.profiler.profile``, with ``device_type`` and ``name``.

    Returns:
        "kernels": events on the GPU other than copies and fills of memory; "launches": calls of the
        host that launch a kernel or a CUDA graph.
    """
    found = {"kernels": 0, "launches": 0}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found["kernels"] += not event.name.startswith(("Memcpy", "Memset"))
        else:
            found["launches"] += event.name.startswith(
                ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
            )
    return found


def graph(name: str, dtype: str, batch: int) -> BenchmarkCase:
    """Return the benchmark case of steps in CUDA graphs against the same steps launched singly.

    Both are compiled alike. The case needs CUDA. Its ``measure`` yields one comparison, of the
    seconds of a whole run of DDIM in graphs ("ours") and launched singly ("peer"); it raises
    AssertionError if the two draw different images.

    Args:
        name: the model: "bundled", "cifar10" or "pixels256".
        dtype: the network's dtype: "float32" or "bfloat16".
        batch: the number of images.
    """
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

    return BenchmarkCase(case, "step", measure)


def latencies(device: str) -> list[BenchmarkCase]:
    """Return the cases of a step's latency, for each model, dtype and batch size of a device.

    Args:
        device: "cpu" or "cuda".

    Raises:
        KeyError: if the device is neither "cpu" nor "cuda".
    """
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    sizes = BATCHES[device]
    return [latency(name, d, batch) for name in sizes for d in dtypes for batch in sizes[name]]


def graphs(device: str) -> list[BenchmarkCase]:
    """Return the cases that show what CUDA graphs gain, one for each batch size of cifar10.

    They are in bfloat16.

    Args:
        device: "cuda"; for "cpu" the list is empty.
    """
    if device != "cuda":
        return []
    return [graph("cifar10", "bfloat16", batch) for batch in BATCHES["cuda"]["cifar10"]]
