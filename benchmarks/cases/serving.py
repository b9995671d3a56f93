"""Serving under load: in-flight batching against one at a time and full static batches.

Requests arrive by a Poisson process, at shares (loads) of the capacity: the images a second of
full static batches, measured first, so that a load of 1 is what that policy can just do. Latency
is from when a request was due to arrive until its image was there. Every policy sees the same
arrivals, and before anything is timed all must draw the same images.
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
"""The kinds of requests: as many of each, in random order."""

CLASSES = 10  # of the bundled model


@dataclass(frozen=True)
class Setting:
    """How much is measured.

    Attributes:
        max_batch: images at a time, of the engine and of static batches.
        requests: of one run; a multiple of max_batch for each kind lets all static batches fill.
        loads: arrivals a second over capacity.
        repeats: runs of each policy at each load, each with arrivals of its own.
        rounds: of the comparison in which all requests are there at once.
        buckets: of the engine, where the network is compiled; None for its own.
    """

    max_batch: int
    requests: int
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    repeats: int = 3
    rounds: int = 3
    buckets: tuple[int, ...] | None = None


# A spare lane costs a CPU as much as one in use, so there are many buckets.
ON_CPU = Setting(max_batch=16, requests=64, buckets=(1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28))
ON_CUDA = Setting(max_batch=64, requests=1024)


@dataclass(frozen=True)
class Served:
    """One run of one policy.

    Attributes:
        latencies: seconds [n], from when a request was due until its image was there.
        seconds: from the first arrival to the last image.
        images: float32 [n, C, H, W], on the CPU.
    """

    latencies: NDArray[np.float64]
    seconds: float
    images: Tensor

    @property
    def figures(self) -> dict[str, float]:
        """Throughput, and the percentiles of latency."""
        p50, p99 = np.percentile(self.latencies, (50, 99)).tolist()
        return {
            "throughput_per_second": len(self.latencies) / self.seconds,
            "p50_seconds": p50,
            "p99_seconds": p99,
        }


def arrivals(rate: float, count: int, seed: int) -> NDArray[np.float64]:
    """Return when the requests of a Poisson process arrive: seconds [count], ``rate`` a second."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def make_requests(kinds: Sequence[Kind], count: int, seed: int) -> list[Request]:
    """Return as many requests of each kind, in random order; request i has seed i."""
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
    """Submit each request when it is due, in seconds from now; close, and wait for all images.

    Raises:
        whatever a future raises.
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


class Case:
    """One mix on one sampler: its policies, its capacity, and its runs.

    Attributes:
        policies: makes each policy anew, for one run.
    """

    def __init__(
        self, sampler: Sampler, engine: Engine, kinds: Sequence[Kind], setting: Setting
    ) -> None:
        self.sampler, self.engine, self.kinds, self.setting = sampler, engine, kinds, setting
        self.policies: dict[str, Callable[[], Policy]] = {
            "in-flight": lambda: InFlight(engine),
            "one-at-a-time": lambda: Batches(sampler, 1),
            "static": lambda: Batches(sampler, setting.max_batch),
        }

    def check(self) -> None:
        """Refuse to time policies that draw different images.

        Raises:
            AssertionError: they do.
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
        """Return how many images a second full static batches give, over all kinds."""
        size = self.setting.max_batch
        seconds = []
        for kind in self.kinds:
            batch, due = make_requests([kind], size, 0), np.zeros(size)
            runs = [serve(self.policies["static"](), batch, due).seconds for _ in range(3)]
            seconds.append(statistics.median(runs))
        return size / statistics.mean(seconds)

    def run(self, name: str, rate: float | None, repeat: int) -> dict[str, float]:
        """Serve once, all at once for a rate of None; return the figures."""
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
        """Return each policy's figures of every repeat; the order turns round each time."""
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in self.policies}
        for repeat in range(self.setting.repeats):
            for name in list(self.policies)[:: -1 if repeat % 2 else 1]:
                runs[name].append(self.run(name, rate, repeat))
        return runs


def summary(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure, with its quartiles as ..._low and ..._high."""
    values: dict[str, float] = {}
    for name in runs[0]:
        low, middle, high = np.percentile([run[name] for run in runs], (25, 50, 75)).tolist()
        values |= {name: middle, f"{name}_low": low, f"{name}_high": high}
    return values


def shares(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return in-flight's figures as shares of static's on the same arrivals, as `summary` does."""
    return summary(
        [
            {f"{name}_of_static": ours[name] / theirs[name] for name in theirs}
            for ours, theirs in zip(runs["in-flight"], runs["static"], strict=True)
        ]
    )


def under_load(
    device: str, compiled: bool = True, setting: Setting | None = None
) -> Iterator[Measurement]:
    """Latency and throughput of the three policies on the bundled model, at every load and mix."""
    setting = setting or (ON_CUDA if device == "cuda" else ON_CPU)
    sampler = Sampler.from_pretrained(bundled(), device, "float32", compile=compiled)
    for mix, kinds in MIXES.items():
        queue = max(setting.requests, setting.max_batch * len(kinds))
        buckets = setting.buckets if compiled else None
        with Engine(sampler, setting.max_batch, buckets=buckets, queue_size=queue) as engine:
            case = Case(sampler, engine, kinds, setting)
            engine.warm()
            case.check()
            yield from results(case, mix if compiled else f"eager-{mix}")


def results(case: Case, mix: str) -> Iterator[Measurement]:
    """Measure one case, whose policies are warm and draw the same."""
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
