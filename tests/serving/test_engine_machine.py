"""The service against a queue model: any order of submit, cancel, step, time and drain."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import flashddpm as fd
from flashddpm.serving import engine, engine_loop, request_scheduler

SHAPE = (1, 2, 3)


def network(x_t, t, labels):
    """Products and sums only: an element's bits depend on nothing but the element."""
    return x_t * 0.5 + labels.reshape(-1, 1, 1, 1) * 0.125


SAMPLER = fd.Sampler(
    network,
    fd.NoiseSchedule.create("linear", 20),
    shape=SHAPE,
    call=network,
    conditioning=fd.Conditioning(3, 3),
    device="cpu",
)
WANTED: dict[tuple, torch.Tensor] = {}


def wanted(request):
    """The image that ``Sampler.sample`` draws."""
    options = {
        name: value for name, value in vars(request).items() if name not in ("deadline", "index")
    }
    key = tuple(options.values())
    if key not in WANTED:
        seed, label = options.pop("seed"), options.pop("label")
        WANTED[key] = SAMPLER.sample(seed, label, **options)[0]
    return WANTED[key]


@dataclass(eq=False)
class Expected:
    """What the model knows of a request."""

    request: fd.Request
    future: object
    left: int
    deadline: float
    state: str = "waiting"
    resolutions: list = field(default_factory=list)


class Service(RuleBasedStateMachine):
    @initialize(max_batch=st.integers(1, 3), queue_size=st.integers(1, 4))
    def begin(self, max_batch, queue_size):
        self.now = 0.0
        self.patch = pytest.MonkeyPatch()
        for module in (request_scheduler, engine_loop, engine):
            self.patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.max_batch, self.queue_size = max_batch, queue_size
        self.engine = fd.Engine(SAMPLER, max_batch=max_batch, queue_size=queue_size, threaded=False)
        self.all: list[Expected] = []
        self.rejected = self.steps = 0

    def of(self, state):
        return [one for one in self.all if one.state == state]

    @rule(
        seed=st.integers(0, 3),
        label=st.integers(0, 2),
        guidance=st.sampled_from([1.0, 2.0]),
        solver=st.sampled_from(["ddim", "ddpm", "dpmpp_2m"]),
        num_steps=st.integers(1, 4),
        deadline=st.none() | st.integers(1, 5),
    )
    def submit(self, deadline, num_steps, **options):
        request = fd.Request(num_steps=num_steps, deadline=deadline, **options)
        if len(self.of("waiting")) == self.queue_size:
            with pytest.raises(fd.QueueFull):
                self.engine.submit(request)
            self.rejected += 1
            return
        future = self.engine.submit(request)
        limit = float("inf") if deadline is None else self.now + deadline
        one = Expected(request, future, num_steps, limit)
        future.add_done_callback(one.resolutions.append)
        self.all.append(one)

    @precondition(lambda self: any(one.state in ("waiting", "active") for one in self.all))
    @rule(data=st.data())
    def cancel(self, data):
        one = data.draw(st.sampled_from(self.of("waiting") + self.of("active")))
        assert one.future.cancel()
        one.state = "cancelled" if one.state == "waiting" else "leaving"

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds):
        self.now += seconds

    def model_turn(self):
        for one in self.of("leaving"):
            one.state = "cancelled"
        for one in self.of("waiting") + self.of("active"):
            if self.now >= one.deadline:
                one.state = "expired"
        for one in self.of("waiting")[: self.max_batch - len(self.of("active"))]:
            one.state = "active"
        self.steps += bool(self.of("active"))
        for one in self.of("active"):
            one.left -= 1
            if one.left == 0:
                one.state = "completed"
        return bool(self.of("waiting") or self.of("active"))

    @rule()
    def step(self):
        assert self.engine.turn() == self.model_turn()

    @rule()
    def drain(self):
        assert self.engine.drain()
        while self.model_turn():
            pass

    @rule(cancel=st.booleans())
    def shutdown(self, cancel):
        self.engine.shutdown(cancel=cancel)
        if cancel:
            for one in self.of("waiting") + self.of("active"):
                one.state = "cancelled"
        while self.model_turn():
            pass
        with pytest.raises(fd.EngineClosed):
            self.engine.submit(fd.Request(seed=0, label=0, num_steps=1))
        self.check()
        self.teardown()
        self.begin(self.max_batch, self.queue_size)

    @invariant()
    def check(self):
        metrics = self.engine.metrics()
        counts = {"rejected": self.rejected, "steps": self.steps, "failed": 0}
        for state in ("completed", "cancelled", "expired"):
            counts[state] = len(self.of(state))
        counts["queue_depth"] = len(self.of("waiting"))
        counts["active"] = len(self.of("active") + self.of("leaving"))
        counts["submitted"] = len(self.all)
        assert {name: metrics[name] for name in counts} == counts
        for one in self.all:
            resolved = one.state not in ("waiting", "active")
            assert one.future.done() == resolved and len(one.resolutions) == resolved
            if one.state == "completed":
                assert torch.equal(one.future.result().image, wanted(one.request))
            if one.state == "expired":
                assert isinstance(one.future.exception(), fd.DeadlineExceeded)
            assert one.future.cancelled() == (one.state in ("cancelled", "leaving"))

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()


TestService = Service.TestCase
TestService.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
