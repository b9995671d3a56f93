"""Benchmarks of serving under load: in-flight batching against one at a time and static batches.

In-flight batching (the Engine) lets requests enter and leave the running batch between steps; a
static batch waits until it is full. Requests arrive by a Poisson process. A load is their rate as a
fraction of the capacity, which is the images a second of full static batches, measured first, so
that a load of 1 is what static batches can just do. Latency is the time from when a request was due
to arrive until its image was there. Every policy (way to serve) sees the same arrivals, and before
anything is timed all must draw the same images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.measure.agreement import check
from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.peers.serving_policies import Batches, InFlight, Kind, Policy
from flashddpm.checkpoints.bundled import bundled
from flashddpm.sampling.sampler import Sampler
from flashddpm.serving.engine import Engine
from flashddpm.serving.request import Request, Result

MIXES: dict[str, tuple[Kind, ...]] = {
    "uniform": (("ddim", 10, 1.0),),
    "mixed": (("ddim", 5, 1.0), ("dpmpp_2m", 8, 1.0), ("ddim", 8, 2.0), ("ddpm", 16, 1.0)),
}
"""A mix's name -> kinds of requests (solver, steps, guidance): as many of each, in random order."""

CLASSES = 10  # the number of classes of the bundled model


@dataclass(frozen=True)
class ServingSetting:
    """The size of a serving benchmark; there is one for the CPU and one for CUDA.

    Attributes:
        max_batch: the number of images at a time, of the engine and of static batches.
        requests: the number of requests of one run; a multiple of max_batch for each kind of
            request lets all static batches fill.
        loads: arrivals a second, as fractions of the images a second of full static batches.
        repeats: the number of runs of each policy (way to serve) at each load, each with other
            arrivals.
        rounds: the number of rounds of the comparison in which all requests arrive at once.
        buckets: the engine's buckets (numbers of network evaluations in one call that the network
            is compiled for), or None for the engine's default.
    """

    max_batch: int
    requests: int
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    repeats: int = 3
    rounds: int = 3
    buckets: tuple[int, ...] | None = None


# A spare lane (network evaluation) costs a CPU as much as one in use: hence many buckets.
ON_CPU = ServingSetting(
    max_batch=16, requests=64, buckets=(1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28)
)
ON_CUDA = ServingSetting(max_batch=64, requests=1024)


@dataclass(frozen=True)
class Served:
    """The outcome of one run of one policy.

    Attributes:
        latencies: float64 [n], the seconds from when each request was due until its image was
            there.
        seconds: the seconds from the first arrival to the last image.
        images: float32 [n, C, H, W] in about [-1, 1], on the CPU, in the order of the requests.
    """

    latencies: NDArray[np.float64]
    seconds: float
    images: Tensor

    @property
    def figures(self) -> dict[str, float]:
        """The throughput and latency of the run, a dictionary.

        Its keys are "throughput_per_second" (images a second), "p50_seconds" and "p99_seconds" (the
        50th and 99th percentile of latency).
        """
        p50, p99 = np.percentile(self.latencies, (50, 99)).tolist()
        return {
            "throughput_per_second": len(self.latencies) / self.seconds,
            "p50_seconds": p50,
            "p99_seconds": p99,
        }


def arrivals(rate: float, count: int, seed: int) -> NDArray[np.float64]:
    """Draw the arrival times of the requests of a Poisson process.

    Args:
        rate: the mean number of arrivals a second, above 0.
        count: the number of requests.
        seed: the seed of the random numbers, at least 0.

    Returns:
        float64 [count], seconds from the start, ascending.

    Raises:
        ZeroDivisionError: if the rate is 0.
        ValueError: if the rate, the count or the seed is negative.
    """
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def make_requests(kinds: Sequence[Kind], count: int, seed: int) -> list[Request]:
    """Make requests of several kinds in random order, as many of each kind as of every other.

    Request i has seed i and label i modulo 10, the number of classes of the bundled model.

    Args:
        kinds: (solver, number of steps, guidance scale w) of each kind, at least one.
        count: the number of requests; if no multiple of the number of kinds, the first kinds have
            one request more.
        seed: the seed of the order, at least 0.

    Raises:
        ValueError: if the seed is negative.
        IndexError: if there are no kinds.
    """
    order = np.random.default_rng(seed).permutation(count) % len(kinds)
    requests = []
    for i, kind in enumerate(order.tolist()):
        solver, num_steps, guidance = kinds[kind]
        requests.append(
            Request(
                seed=i,
                label=i % CLASSES,
                guidance=guidance,
                solver=solver,
                num_steps=num_steps,
            )
        )
    return requests


def serve(policy: Policy, requests: Sequence[Request], due: NDArray[np.float64]) -> Served:
    """Submit each request to a policy when it is due, then wait for all images.

    Args:
        policy: the way to serve; it is closed at the end, but not if a submission raises.
        requests: n requests, at least 1, in the order in which they are submitted.
        due: float64 [n], ascending: when each request arrives, in seconds from now.

    Returns:
        The latencies, the length of the run, and the images.

    Raises:
        ValueError: if there are not as many arrival times as requests; found after those that have
            both are submitted.
        Exception: whatever the policy raises at submission, or as the outcome of a request.
    """
    ends: SimpleQueue[tuple[int, float]] = SimpleQueue()

    def ended(i: int, future: Future[Result]) -> None:
        ends.put((i, time.perf_counter()))

    futures = []
    start = time.perf_counter()
    for i, (request, at) in enumerate(zip(requests, due.tolist(), strict=True)):
        time.sleep(max(0.0, start + at - time.perf_counter()))
        futures.append(policy.submit(request))
        futures[-1].add_done_callback(partial(ended, i))
    policy.close()
    images = torch.stack([future.result().image for future in futures]).cpu()
    finished = np.empty(len(requests))
    for _ in requests:  # a future wakes who waits for it before it calls back
        i, now = ends.get()
        finished[i] = now - start
    return Served(finished - due, float(finished.max() - due.min()), images)


class ServingMix:
    """A serving benchmark of one mix of requests: its policies, its capacity and its runs.

    Args:
        sampler: draws the images of the policies "one-at-a-time" and "static".
        engine: serves the policy "in-flight".
        kinds: (solver, number of steps, guidance scale w) of each kind of request.
        setting: how much is measured.

    Attributes:
        sampler, engine, kinds, setting: as given.
        policies: the name of a policy ("in-flight", "one-at-a-time" or "static") -> a function
            without arguments that makes the policy anew, for one run.
    """

    def __init__(
        self, sampler: Sampler, engine: Engine, kinds: Sequence[Kind], setting: ServingSetting
    ) -> None:
        self.sampler, self.engine, self.kinds, self.setting = sampler, engine, kinds, setting
        self.policies: dict[str, Callable[[], Policy]] = {
            "in-flight": lambda: InFlight(engine),
            "one-at-a-time": lambda: Batches(sampler, 1),
            "static": lambda: Batches(sampler, setting.max_batch),
        }

    def check(self) -> None:
        """Check that all policies draw the same images for the same requests, before any is timed.

        Raises:
            AssertionError: if the images of two policies differ by more than 1e-3.
        """
        count = self.setting.max_batch * len(self.kinds)
        requests = make_requests(self.kinds, count, 0)
        drawn = {
            name: serve(make(), requests, np.zeros(count)).images
            for name, make in self.policies.items()
        }
        for name, images in drawn.items():
            check(images, drawn["one-at-a-time"], f"serving, {name}", "one at a time")

    def capacity(self) -> float:
        """Return the images a second of full static batches, over all kinds of requests alike.

        Of each kind one batch is drawn three times, and the median time counts.
        """
        size = self.setting.max_batch
        seconds = []
        for kind in self.kinds:
            batch, due = make_requests([kind], size, 0), np.zeros(size)
            runs = [serve(self.policies["static"](), batch, due).seconds for _ in range(3)]
            seconds.append(statistics.median(runs))
        return size / statistics.mean(seconds)

    def run(self, name: str, rate: float | None, repeat: int) -> dict[str, float]:
        """Serve the requests of one run by one policy and return its figures.

        Args:
            name: the policy: "in-flight", "one-at-a-time" or "static".
            rate: the mean number of arrivals a second, above 0, or None if all arrive at once.
            repeat: the number of the run, from 0: the seed of its arrivals and of its requests'
                order.

        Returns:
            "throughput_per_second" (images a second), "p50_seconds" and "p99_seconds" (percentiles
            of latency); for "in-flight" also "occupancy", the mean fraction (0..1) of the engine's
            slots (places for one image) in use in a step.

        Raises:
            KeyError: if there is no such policy.
        """
        count = self.setting.requests
        requests = make_requests(self.kinds, count, repeat)
        due = np.zeros(count) if rate is None else arrivals(rate, count, repeat)
        policy = self.policies[name]()
        served = serve(policy, requests, due)
        figures = served.figures
        if isinstance(policy, InFlight):
            steps = sum(request.num_steps for request in requests)
            figures["occupancy"] = policy.occupancy(steps)
        return figures

    def under_load(self, rate: float) -> dict[str, list[dict[str, float]]]:
        """Run every policy several times at one rate of arrivals, in alternating order.

        Args:
            rate: the mean number of arrivals a second, above 0.

        Returns:
            The name of a policy -> the figures of each of its runs, as ``run`` returns them. Run i
            of every policy has the same arrivals.
        """
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in self.policies}
        for repeat in range(self.setting.repeats):
            for name in list(self.policies)[:: -1 if repeat % 2 else 1]:
                runs[name].append(self.run(name, rate, repeat))
        return runs


def summary(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median and the quartiles of each figure over several runs.

    Args:
        runs: the figures of each run, with the same keys; at least one run.

    Returns:
        For each key of the figures, its median, and under the key with "_low" and "_high" appended
        the first and third quartile.

    Raises:
        IndexError: if there are no runs.
    """
    values: dict[str, float] = {}
    for name in runs[0]:
        low, middle, high = np.percentile([run[name] for run in runs], (25, 50, 75)).tolist()
        values |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    return values


def shares(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return the figures of in-flight batching as multiples of those of static batches.

    Args:
        runs: the figures of each run of "in-flight" and "static", by policy; run i of both has the
            same arrivals.

    Returns:
        The median and quartiles, as ``summary`` returns them, of the ratios of each run, under keys
        such as "p50_seconds_of_static".

    Raises:
        ValueError: if the two policies have different numbers of runs.
    """
    return summary(
        [
            {f"{name}_of_static": ours[name] / theirs[name] for name in theirs}
            for ours, theirs in zip(runs["in-flight"], runs["static"], strict=True)
        ]
    )


def under_load(
    device: str, compiled: bool = True, setting: ServingSetting | None = None
) -> Iterator[Measurement]:
    """Measure latency and throughput of the policies on the bundled model, by mix and load.

    Args:
        device: "cpu" or "cuda".
        compiled: whether the network is compiled.
        setting: how much is measured; by default ON_CUDA or ON_CPU.

    Yields:
        For each mix of requests, "uniform" and "mixed": at each load the figures of each policy and
        a comparison of two of them, then one with all requests at once, as ``results`` says.

    Raises:
        AssertionError: if the images of two policies differ by more than 1e-3.
    """
    setting = setting or (ON_CUDA if device == "cuda" else ON_CPU)
    sampler = Sampler.from_pretrained(bundled(), device, "float32", compile=compiled)
    for mix, kinds in MIXES.items():
        queue = max(setting.requests, setting.max_batch * len(kinds))
        buckets = setting.buckets if compiled else None
        with Engine(sampler, setting.max_batch, buckets=buckets, queue_size=queue) as engine:
            case = ServingMix(sampler, engine, kinds, setting)
            engine.warm()
            case.check()
            yield from results(case, mix if compiled else f"eager-{mix}")


def results(case: ServingMix, mix: str) -> Iterator[Measurement]:
    """Measure one mix of requests at every load, and with all requests arriving at once.

    Args:
        case: the benchmark, whose policies are compiled already and draw the same images.
        mix: the name of the mix, for the names of the measurements.

    Yields:
        For each load: for each of three policies "load" (a fraction), "offered_per_second"
        (requests a second) and the figures of ``ServingMix.run``, medians with quartiles; then the
        figures of in-flight batching as multiples of those of static batches, as ``shares`` returns
        them. At last the comparison of the seconds that a run of each takes, all requests at once.
    """
    setting, capacity = case.setting, case.capacity()
    steps = ", ".join(
        f"{solver} {num_steps}" + (f" guided w={w:g}" if w != 1 else "")
        for solver, num_steps, w in case.kinds
    )
    note = (
        f"bundled model, float32, {setting.requests} requests ({steps}), at most "
        f"{setting.max_batch} at a time; {setting.repeats} runs: medians, and quartiles"
    )
    for load in setting.loads:
        offered = {"load": load, "offered_per_second": load * capacity}
        runs = case.under_load(load * capacity)
        for name, each in runs.items():
            yield Measurement(
                f"serving-{mix}-{load:g}-{name}", "nothing", note, offered | summary(each)
            )
        yield Measurement(f"serving-{mix}-{load:g}", "static", f"{note} of ratios", shares(runs))

    def seconds(name: str) -> float:
        return setting.requests / case.run(name, None, 0)["throughput_per_second"]

    comparison = harness.compare("in-flight", "static", setting.rounds, clock=seconds)
    yield Measurement.of(
        f"serving-{mix}-all-at-once",
        "static batches",
        f"{setting.requests} requests at once ({steps}): the time to the last image, so that the "
        "ratio is of throughput, in flight over static",
        comparison,
    )
