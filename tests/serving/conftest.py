"""Engines whose turns the test takes, requests of many plans, and faults."""

from types import SimpleNamespace

import pytest
import torch

import flashddpm as fd
from flashddpm.serving import engine, engine_loop, request_scheduler

SHAPE = (1, 3, 5)
MANY = [
    {"solver": "ddim", "num_steps": 6},
    {"solver": "ddpm", "num_steps": 5, "guidance": 2.0},
    {"solver": "dpmpp_2m", "num_steps": 7, "guidance": 0.5, "guidance_rescale": 0.7},
    {"solver": "ddim", "num_steps": 4, "eta": 1.0, "threshold": 0.9, "clip": 2.0},
    {"solver": "ddpm", "num_steps": 9, "spacing": "trailing", "variance_type": "fixed_large"},
    {"solver": "euler_ancestral", "num_steps": 5, "sigmas": "karras"},
    {"solver": "dpmpp_2m_sde", "num_steps": 6, "image": torch.full(SHAPE, 0.5), "strength": 0.7},
    {"solver": "ddim", "num_steps": 4, "guidance": 3.0, "guidance_interval": (0.1, 5.0)},
]


@pytest.fixture
def many():
    """Options of requests whose plans differ in every way."""
    return MANY


@pytest.fixture(params=MANY)
def options(request):
    """Each of ``many``."""
    return request.param


def _arithmetic(x_t, t, labels):
    scale = 0.25 + labels * 0.125 + t * 0.001
    return x_t * scale.reshape(-1, 1, 1, 1)


@pytest.fixture
def arithmetic():
    """A network of products and sums only: an element's bits depend on nothing but the element."""
    return _arithmetic


@pytest.fixture
def make_sampler():
    """A function that makes a sampler of a network, three classes and a null class."""

    def make(network=_arithmetic, **options):
        options = {"conditioning": fd.Conditioning(3, 3), "call": network} | options
        schedule = fd.NoiseSchedule.create("linear", 50)
        return fd.Sampler(network, schedule, shape=SHAPE, device="cpu", **options)

    return make


@pytest.fixture
def sampler(make_sampler):
    return make_sampler()


@pytest.fixture
def start(sampler):
    """A function that makes an engine whose turns the test takes."""

    def make(max_batch=2, of=sampler, **options):
        return fd.Engine(of, max_batch, threaded=False, **options)

    return make


@pytest.fixture
def ask():
    """A function that makes a request of three steps."""

    def make(seed=0, label=1, **options):
        return fd.Request(seed=seed, label=label, **({"num_steps": 3} | options))

    return make


@pytest.fixture
def draw():
    """A function: the image of a request, by ``Sampler.sample``."""

    def image(sampler, request, **more):
        options = vars(request) | more
        options.pop("deadline")
        options.pop("index")
        return sampler.sample(options.pop("seed"), options.pop("label"), **options)[0]

    return image


@pytest.fixture
def ends():
    """A function: how many requests of an engine ended in each way."""

    def counted(engine):
        counts = engine.metrics()
        return {name: counts[name] for name in ("completed", "failed", "cancelled", "expired")}

    return counted


class Clock(SimpleNamespace):
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The engine's time; it stands still until the test sets ``now``."""
    clock = Clock()
    for module in (request_scheduler, engine_loop, engine):
        monkeypatch.setattr(module, "time", clock)
    return clock


class _Fault(Exception):
    pass


@pytest.fixture(name="Fault")
def _fault():
    return _Fault


@pytest.fixture
def on_call(monkeypatch):
    """A function that makes these calls of a method raise, counted from 0."""

    def plant(owner, name, numbers, error=_Fault):
        real, calls = getattr(owner, name), []

        def faulty(*args, **options):
            calls.append(1)
            if len(calls) - 1 in numbers:
                raise error(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, faulty)

    return plant


@pytest.fixture
def is_as_new(sampler, ask, draw):
    """A function: the engine draws as before, and holds nothing."""

    def check(engine):
        futures = [engine.submit(ask(i)) for i in range(5)]
        engine.drain()
        assert all(
            torch.equal(f.result().image, draw(sampler, f.result().request)) for f in futures
        )
        batch, scheduler = engine._loop.batch, engine._scheduler
        assert not batch.images and not len(batch) and not len(batch.slot_table)
        assert not scheduler._waiting and not scheduler._running and not scheduler._leaving
        assert not batch.plan_table._users
        assert engine.metrics()["active"] == engine.metrics()["queue_depth"] == 0

    return check
