"""The service: bits, admission, ends of requests, faults at every stage, threads, asyncio."""

import asyncio
import gc
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flashddpm as fd
from flashddpm.diffusion.plan_options import PlanOptions
from flashddpm.serving import engine as engine_module
from flashddpm.serving import engine_loop, metrics, request_queue, running_batch

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


def arithmetic(x_t, t, labels):
    """Products and sums only: an element's bits depend on nothing but the element."""
    scale = 0.25 + labels * 0.125 + t * 0.001
    return x_t * scale.reshape(-1, 1, 1, 1)


def make_sampler(network=arithmetic, **options):
    options = {"conditioning": fd.Conditioning(3, 3), "call": network} | options
    schedule = fd.NoiseSchedule.create("linear", 50)
    return fd.Sampler(network, schedule, shape=SHAPE, device="cpu", **options)


@pytest.fixture
def sampler():
    return make_sampler()


@pytest.fixture
def start(sampler):
    """A function that makes an engine whose turns the test takes."""

    def make(max_batch=2, of=sampler, **options):
        return fd.Engine(of, max_batch, threaded=False, **options)

    return make


def ask(seed=0, label=1, **options):
    return fd.Request(seed=seed, label=label, **({"num_steps": 3} | options))


def draw(sampler, request, **more):
    options = vars(request) | more
    options.pop("deadline")
    options.pop("index")
    return sampler.sample(options.pop("seed"), options.pop("label"), **options)[0]


def ends(engine):
    counts = engine.metrics()
    return {name: counts[name] for name in ("completed", "failed", "cancelled", "expired")}


class TestImages:
    def test_any_mixture_equals_sample(self, sampler):
        requests = [ask(i, i % 3, **MANY[i % 8]) for i in range(24)]
        with fd.Engine(sampler, max_batch=4) as engine:
            futures = [engine.submit(request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            result = future.result()
            assert result.request is request
            assert result.image.shape == SHAPE and result.image.dtype is torch.float32
            assert result.image.is_contiguous()
            assert torch.equal(result.image, draw(sampler, request))
            assert 0 <= result.timings.queued <= result.timings.total
        assert len({tuple(f.result().image.flatten().tolist()) for f in futures}) == 24

    @pytest.mark.parametrize("options", MANY)
    def test_bits_are_the_same_alone_in_a_crowd_early_and_late(self, start, options):
        request = ask(7, 2, **options)
        engine = start(5)
        alone = engine.submit(request)
        engine.drain()
        images = []
        for before in range(6):
            futures = [engine.submit(ask(9 + i, i % 3, **MANY[i % 8])) for i in range(before)]
            engine.turn()
            future = engine.submit(request)
            futures[:1] and futures[0].cancel()
            engine.drain()
            images.append(future.result().image)
        assert all(torch.equal(image, alone.result().image) for image in images)

    def test_a_plan_of_ones_own(self, sampler, start):
        plan = sampler.plan("ddpm", 4)
        engine = start()
        future = engine.submit(fd.Request(seed=3, label=0, solver=plan))
        engine.drain()
        assert torch.equal(future.result().image, sampler.sample(3, 0, solver=plan)[0])

    def test_a_held_image_never_changes(self, start):
        engine = start(1)
        image, copies = engine.submit(ask(1)), []
        engine.drain()
        copies.append(image.result().image.clone())
        engine.submit(ask(2))
        engine.drain()
        assert torch.equal(image.result().image, copies[0])

    def test_a_held_request_never_changes(self, sampler, start):
        mine = torch.full(SHAPE, 0.5)
        engine = start()
        request = ask(1, image=mine, strength=0.7, num_steps=6)
        future = engine.submit(request)
        wanted = draw(sampler, request)
        mine.zero_()
        engine.drain()
        assert torch.equal(future.result().image, wanted)

    def test_timesteps_are_whole_again_when_a_fractional_plan_has_left(self, start):
        kinds = []

        def network(x_t, t, labels):
            kinds.append(t.dtype)
            return arithmetic(x_t, t, labels)

        engine = start(2, make_sampler(network))
        engine.submit(ask(1, num_steps=4))
        engine.submit(ask(2, solver="euler", timesteps=[30.5, 3.25]))
        engine.drain()
        assert kinds == [torch.float32] * 2 + [torch.int64] * 2

    def test_more_plans_than_rows(self, sampler, start, monkeypatch):
        monkeypatch.setattr(running_batch, "PLAN_ROWS", 60)
        engine = start(4)
        requests = [ask(i, solver="ddpm", num_steps=20 + i) for i in range(12)]
        futures = [engine.submit(request) for request in requests]
        engine.turn()
        assert engine.metrics()["active"] == 2  # 20 + 21 rows of 60; a third has no room
        engine.drain()
        for request, future in zip(requests, futures, strict=True):
            assert torch.equal(future.result().image, draw(sampler, request))

    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_previews_are_those_of_sample(self, sampler, start, guidance):
        for options in MANY:
            request = ask(4, 2, **options | {"guidance": guidance})
            seen: list = []
            wanted: list = []
            engine = start(3)
            engine.submit(ask(8, num_steps=2))
            engine.turn()
            future = engine.submit(request, on_step=seen.append)
            engine.drain()
            keep = {
                k: v for k, v in vars(request).items() if k not in ("deadline", "index", "seed")
            }
            labels = keep.pop("label")
            image = sampler.sample(
                4, labels, on_step=lambda i, x, to=wanted: to.append(x[0]), **keep
            )
            assert len(seen) == len(wanted) > 0
            assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
            assert torch.equal(future.result().image, image[0])


@pytest.fixture(scope="module")
def compiled():
    """A network whose images fill whole vectors: only then are compiled bits free of the lane."""
    config = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "num_class_embeds": 4,
    }
    unet = fd.UNet(fd.UNetConfig(**config)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return fd.Sampler(
        unet,
        fd.NoiseSchedule.create("squaredcos_cap_v2", 50),
        shape=(1, 4, 4),
        prediction_type="v_prediction",
        conditioning=fd.Conditioning(3, 3),
        device="cpu",
    )


class TestExact:
    @pytest.mark.parametrize(
        "threads", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 5))]
    )
    def test_bits_do_not_depend_on_load_slot_or_neighbours(self, compiled, threads):
        """Dynamo compiles again for another number of threads, hence the marks."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            engine = fd.Engine(compiled, 7, exact=True, threaded=False)
            for options in MANY[:2]:
                request = ask(7, 2, **options)
                alone = engine.submit(request)
                engine.drain()
                image = alone.result().image
                assert image.std() > 0.1
                assert torch.equal(image, draw(compiled, request, exact=True, batch_size=7))
                for crowd in (1, 2, 6, 11):
                    for i in range(crowd):
                        engine.submit(ask(20 + i, i % 3, guidance=3.0, num_steps=6 + i))
                    engine.turn()
                    again = engine.submit(request)
                    engine.drain()
                    assert torch.equal(again.result().image, image)
        finally:
            torch.set_num_threads(before)

    def test_one_bucket_and_the_compiled_network(self, compiled, monkeypatch):
        taken = []

        def take_step(slots, compiled, stats, fractional):
            taken.append((len(slots.lane_slot), compiled))
            return slots.net_in

        engine = fd.Engine(compiled, 3, exact=True, threaded=False)
        monkeypatch.setattr(compiled.execution, "prove_exact", lambda lanes: None)
        monkeypatch.setattr(compiled.execution, "take_step", take_step)
        engine.submit(ask(0))
        engine.submit(ask(1, guidance=2.0))
        engine.drain()
        assert taken == [(6, True)] * 3
        engine.submit(ask(solver="euler", timesteps=[20.5, 3.25]))  # of embeddings by row
        engine.drain()
        assert taken == [(6, True)] * 5

    def test_a_request_fails_where_bits_depend_on_the_lane(self, compiled, monkeypatch):
        """Tried before the first step; no image is handed out as exact that is not."""

        def refuse(lanes):
            raise ValueError(f"exact=True: other bits in other lanes of {lanes}")

        monkeypatch.setattr(compiled.execution, "prove_exact", refuse)
        engine = fd.Engine(compiled, 3, exact=True, threaded=False)
        future = engine.submit(ask(0))
        engine.drain()
        with pytest.raises(fd.RequestFailed, match="other bits in other lanes of 6"):
            future.result(0)

    def test_lanes_are_tried_once(self, compiled, monkeypatch):
        network, tried = compiled.execution.compiled, []

        def prove(image, told, L, labelled):
            tried.append(L)
            network.exact.add(L)

        monkeypatch.setattr(network, "exact", set())
        monkeypatch.setattr(network, "prove_exact", prove)
        drawn, real = [], compiled.execution.draw
        monkeypatch.setattr(compiled.execution, "draw", lambda *a: (drawn.append(a), real(*a))[1])
        engine = fd.Engine(compiled, 3, exact=True, threaded=False)
        for seed in range(2):
            future = engine.submit(ask(seed, num_steps=3))
            engine.drain()
            assert future.result().image.isfinite().all()
        assert tried == [6] and len(drawn) == 3  # once to try, and what the two images begin at

    def test_refused_where_nothing_is_compiled(self, tiny_sampler):
        for of in (make_sampler(), tiny_sampler(backend="reference"), tiny_sampler()):
            with pytest.raises(ValueError, match=r"exact=True.*compile=False"):
                fd.Engine(of, exact=True, threaded=False)


class TestAdmission:
    def test_enters_at_the_next_boundary_and_leaves_at_once(self, start):
        engine = start(2)
        long = engine.submit(ask(1, num_steps=5))
        engine.turn()
        short, later = engine.submit(ask(2, num_steps=1)), engine.submit(ask(3, num_steps=1))
        engine.turn()
        assert short.done() and not later.done() and not long.done()
        engine.turn()
        assert later.done() and engine.metrics()["steps"] == 3
        engine.turn()
        assert not long.done()
        assert not engine.turn() and long.done()

    def test_the_network_runs_on_the_lanes_in_use(self, start):
        sizes = []

        def network(x_t, t, labels):
            sizes.append((len(x_t), labels.tolist()))
            return arithmetic(x_t, t, labels)

        engine = start(4, make_sampler(network))
        engine.submit(ask(1, 0, num_steps=3))
        engine.turn()
        engine.submit(ask(2, 2, num_steps=2, guidance=3.0))
        engine.drain()
        assert sizes == [(1, [0]), (3, [0, 2, 3]), (3, [0, 2, 3])]

    def test_a_full_queue_refuses_at_once(self, start):
        engine = start(1, queue_size=2)
        waiting = [engine.submit(ask(i)) for i in range(2)]
        with pytest.raises(fd.QueueFull, match="queue_size=2"):
            engine.submit(ask(2))
        engine.turn()  # one of them is in a slot now
        engine.submit(ask(3))
        with pytest.raises(fd.QueueFull):
            engine.submit(ask(4))
        waiting[1].cancel()  # its place is free without a turn
        engine.submit(ask(5))
        assert engine.metrics()["rejected"] == 2
        engine.drain()
        assert ends(engine) == {"completed": 3, "failed": 0, "cancelled": 1, "expired": 0}

    def test_request_has_every_option_of_sample(self, sampler):
        sample = inspect.signature(sampler.sample).parameters
        request = inspect.signature(fd.Request).parameters
        of_many = {
            *("seeds", "labels", "batch_size", "bucket", "exact", "progress", "on_step", "options"),
            *("initial_noise", "step_noise"),
        }
        single = {"seed", "label", "index", "deadline"}
        assert set(request) - single == {*sample, *PlanOptions.__annotations__} - of_many
        for name, parameter in request.items():
            if name not in ("seed", "index"):
                default = sample[name].default if name in sample else None
                assert parameter.default == default

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"seed": 1.5}, "1.5"),
            ({"seed": 2**64}, str(2**64)),
            ({"seed": [1, 2]}, "must be one integer"),
            ({"label": 3}, "labels=3"),
            ({"label": "1"}, "labels"),
            ({"guidance": float("nan")}, "guidance=nan"),
            ({"guidance": 2.0, "label": None}, "guidance=2.0"),
            ({"solver": "heun"}, "solver='heun'"),
            ({"num_steps": 0}, "num_steps=0"),
            ({"num_steps": 51}, "num_steps=51"),
            ({"eta": True}, "eta=True"),
            ({"eta": [1]}, "eta"),
            ({"spacing": "odd"}, "spacing='odd'"),
            ({"deadline": -1}, "deadline=-1"),
            ({"deadline": "soon"}, "deadline='soon'"),
        ],
    )
    def test_bad_requests_are_refused_before_they_are_queued(self, start, bad, message):
        engine = start()
        engine.submit(ask(eta=1.0))  # a plan that equals one with eta=True is cached
        with pytest.raises(ValueError, match=message):
            engine.submit(fd.Request(**{"seed": 0, "label": 1, "num_steps": 3} | bad))
        assert engine.metrics()["submitted"] == 1
        engine.drain()

    def test_other_bad_arguments(self, sampler, start):
        with pytest.raises(ValueError, match="must be a Request"):
            start().submit({"seed": 1})
        for name, bad in [
            ("max_batch", 0), ("queue_size", 0), ("max_failures", 0), ("exact", 1), ("threaded", 0)
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=f"{name}={bad}"):
                fd.Engine(sampler, **{name: bad})
        with fd.Engine(sampler) as engine, pytest.raises(RuntimeError, match="threaded"):
            engine.turn()

    def test_plans_are_made_once_and_the_cache_is_bounded(self, sampler, start, monkeypatch):
        made, real = [], sampler.plan

        def plan(*args, **options):
            made.append(1)
            return real(*args, **options)

        monkeypatch.setattr(sampler, "plan", plan)
        monkeypatch.setattr(engine_module, "CACHED_PLANS", 2)
        engine = start()
        for _ in range(5):
            engine.submit(ask(num_steps=3))
        assert len(made) == 1
        for steps in (4, 5, 3):  # the last was dropped for the others
            engine.submit(ask(num_steps=steps))
        assert len(made) == 4


class Clock(SimpleNamespace):
    now = 0.0

    def monotonic(self):
        return self.now


class TestEnds:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = Clock()
        for module in (request_queue, engine_loop, engine_module):
            monkeypatch.setattr(module, "time", clock)
        return clock

    def test_cancelling_frees_the_slot_and_changes_no_other(self, sampler, start):
        engine = start(2)
        kept, gone = ask(1, solver="ddpm", num_steps=6), ask(2, solver="ddpm", num_steps=6)
        a, b = engine.submit(kept), engine.submit(gone)
        third = engine.submit(ask(3, num_steps=1))
        engine.turn()
        assert b.cancel() and b.cancelled()
        engine.turn()
        assert third.done()  # it had the slot in the very next step
        assert wait_for([b], 0).done == {b}
        engine.drain()
        assert torch.equal(a.result().image, draw(sampler, kept))
        assert not a.cancel() and a.result()

    def test_deadlines_hold_in_the_queue_and_in_a_slot(self, start, clock):
        engine = start(1)
        slow = engine.submit(ask(1, num_steps=9, deadline=2.5))
        soon, then, late = (engine.submit(ask(i, deadline=i)) for i in (1, 2, 99))
        for done in ([], [soon], [soon, then], [soon, then, slow]):
            engine.turn()
            assert [f for f in (soon, then, slow, late) if f.done()] == done
            clock.now += 1
        with pytest.raises(fd.DeadlineExceeded, match=r"deadline=2.5"):
            slow.result()
        assert isinstance(soon.exception(), TimeoutError)
        engine.drain()
        assert late.result() and ends(engine)["expired"] == 3

    def test_metrics(self, start, clock):
        engine = start(4)
        empty = engine.metrics()
        assert empty["steps_per_second"] is empty["latency_p50"] is empty["occupancy"] is None
        for i in range(3):
            engine.submit(ask(i, num_steps=1 + i))
        engine.turn()
        clock.now = 2.0
        engine.drain()
        counts = engine.metrics()
        assert counts["submitted"] == counts["completed"] == counts["steps"] == 3
        assert counts["occupancy"] == pytest.approx((3 + 2 + 1) / 12)
        assert counts["latency_p50"] == 2 and 1.9 < counts["latency_p99"] <= 2

    def test_shutdown_finishes_or_cancels(self, start, sampler):
        engine = start(1)
        futures = [engine.submit(ask(i)) for i in range(3)]
        engine.shutdown()
        assert all(future.result() for future in futures)
        engine = start(1)
        futures = [engine.submit(ask(i)) for i in range(3)]
        engine.turn()
        engine.shutdown(cancel=True)
        assert all(future.cancelled() for future in futures)
        for _ in range(2):
            engine.shutdown()
            with pytest.raises(fd.EngineClosed):
                engine.submit(ask())

    @pytest.mark.parametrize("error", [False, True])
    def test_leaving_the_block(self, sampler, error):
        futures = []
        try:
            with fd.Engine(sampler, 1) as engine:
                futures = [engine.submit(ask(i, num_steps=40)) for i in range(50)]
                assert error is False or 1 / 0
        except ZeroDivisionError:
            pass
        assert all(future.done() for future in futures)
        assert any(future.cancelled() for future in futures) == error
        assert not any(thread.name == "flashddpm" for thread in threading.enumerate())

    def test_graphs_are_let_go(self, sampler, start, monkeypatch):
        forgotten, graphs = [], sampler.execution.graphs
        monkeypatch.setattr(graphs, "forget", forgotten.append)
        monkeypatch.setattr(graphs, "sweep", lambda: forgotten.append("swept"))
        engine = start()
        engine.shutdown()
        assert forgotten == [engine._loop.flight.slots.token, "swept"]

    def test_callbacks_may_call_the_engine(self, sampler):
        more, ready, returned = [], threading.Event(), threading.Event()
        with fd.Engine(sampler, 2) as engine:

            def again(_):
                more.append(engine.submit(ask(2)))
                more[0].add_done_callback(lambda _: (engine.shutdown(), returned.set()))
                ready.set()

            engine.submit(ask(1)).add_done_callback(again)
            assert ready.wait(30) and returned.wait(30)
        assert more[0].result()


class Fault(Exception):
    pass


def on_call(monkeypatch, owner, name, numbers, error=Fault):
    """Make these calls of a method raise, counted from 0."""
    real, calls = getattr(owner, name), []

    def faulty(*args, **options):
        calls.append(1)
        if len(calls) - 1 in numbers:
            raise error(name)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, faulty)


class TestFaults:
    """Four requests of three steps in two slots; a fault; who fails, and the others' bits."""

    def run(self, sampler, engine, failing, stage=None):
        requests = [ask(i) for i in range(4)]
        resolved, futures = [], []
        for request in requests:
            futures.append(engine.submit(request))
            futures[-1].add_done_callback(resolved.append)
        engine.drain()
        assert len(resolved) == 4
        for i, (request, future) in enumerate(zip(requests, futures, strict=True)):
            if i not in failing:
                assert torch.equal(future.result().image, draw(sampler, request))
                continue
            assert isinstance(future.exception(), fd.RequestFailed)
            assert isinstance(future.exception().__cause__, Fault)
            assert str(future.exception()).startswith(stage)
        errors = [futures[i].exception() for i in failing]
        assert len({id(error) for error in errors}) == len(failing)
        self.is_as_new(engine, sampler)

    def is_as_new(self, engine, sampler):
        futures = [engine.submit(ask(i)) for i in range(5)]
        engine.drain()
        assert all(
            torch.equal(f.result().image, draw(sampler, f.result().request)) for f in futures
        )
        flight = engine._loop.flight
        assert not flight.jobs and not flight._slot_of and not len(flight.batch)
        assert not flight.table._users
        assert engine.metrics()["active"] == engine.metrics()["queue_depth"] == 0

    def test_plan(self, sampler, start, monkeypatch):
        engine = start()
        on_call(monkeypatch, engine, "_cached_plan", {0})
        with pytest.raises(Fault):
            engine.submit(ask())
        assert engine.metrics()["submitted"] == 0
        self.is_as_new(engine, sampler)

    @pytest.mark.parametrize(
        ("where", "name", "call", "stage", "failing"),
        [
            ("table", "acquire", 1, "admission", {1}),
            ("table", "_place", 0, "admission", {0}),
            ("slots", "load_plan", 0, "admission", {0}),
            ("flight", "draw", 0, "admission", {0, 1}),
            ("batch", "admit", 2, "admission", {2}),
            ("batch", "upload", 0, "step", {0, 1}),
            ("execution", "take_step", 4, "step", {2, 3}),
            ("batch", "advance", 1, "step", {0, 1}),
            ("flight", "take", 1, "harvest", {1}),
        ],
    )
    def test_a_stage(self, sampler, start, monkeypatch, where, name, call, stage, failing):
        engine = start()
        flight = engine._loop.flight
        owner = flight if where == "flight" else getattr(flight, where)
        on_call(monkeypatch, owner, name, {call})
        self.run(sampler, engine, failing, stage)

    @pytest.mark.parametrize("name", ["evaluate", "update"])
    def test_network_and_update(self, sampler, start, monkeypatch, name):
        from flashddpm.execution import executor

        on_call(monkeypatch, executor, name, {1})
        engine = start()
        with monkeypatch.context():
            requests = [ask(i) for i in range(4)]
            futures = [engine.submit(request) for request in requests]
            engine.drain()
        assert [type(f.exception()) for f in futures] == [fd.RequestFailed] * 2 + [type(None)] * 2
        monkeypatch.undo()
        for request, future in zip(requests[2:], futures[2:], strict=True):
            assert torch.equal(future.result().image, draw(sampler, request))
        self.is_as_new(engine, sampler)

    def test_preview(self, sampler, start):
        engine = start()

        def broken(x0):
            raise Fault

        futures = [engine.submit(ask(0), on_step=broken), engine.submit(ask(1))]
        engine.turn()
        assert futures[0].done() and not futures[1].done()
        engine.drain()
        assert isinstance(futures[0].exception().__cause__, Fault)
        assert torch.equal(futures[1].result().image, draw(sampler, ask(1)))
        self.is_as_new(engine, sampler)

    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_an_image_that_is_not_finite_fails_alone(self, start, guidance):
        def network(x_t, t, labels):
            bad = (labels == 2) & (t == 20)
            return torch.where(bad.reshape(-1, 1, 1, 1), torch.inf, arithmetic(x_t, t, labels))

        of = make_sampler(network)
        engine = start(3, of)
        plan = of.plan("ddpm", 5)
        step = plan.timesteps.tolist().index(20)
        engine.submit(ask(9, 0, num_steps=4))
        engine.turn()
        bad = engine.submit(ask(5, 2, solver="ddpm", num_steps=5, guidance=guidance))
        good = engine.submit(ask(6, 1, solver="ddpm", num_steps=5, guidance=guidance))
        engine.drain()
        with pytest.raises(fd.NonFiniteError, match=f"seed 5 is not finite at step {step} of 5"):
            bad.result()
        assert torch.equal(good.result().image, draw(of, good.result().request))
        again = engine.submit(ask(5, 1, solver="ddpm", num_steps=5))  # the flag is gone
        engine.drain()
        assert again.result().image.isfinite().all()

    def test_closes_after_failures_in_a_row(self, start, sampler, monkeypatch):
        engine = start(1, max_failures=3)
        on_call(monkeypatch, sampler.execution, "take_step", {0, 1, 4, 5, 6})
        futures = [engine.submit(ask(i, num_steps=2)) for i in range(9)]
        engine.drain()
        kinds = [type(future.exception()) for future in futures]
        failed, none = fd.RequestFailed, type(None)
        assert kinds == [failed] * 2 + [none] + [failed] * 3 + [fd.EngineClosed] * 3
        assert all(isinstance(f.exception().__cause__, Fault) for f in futures if f.exception())
        with pytest.raises(fd.EngineClosed) as error:
            engine.submit(ask())
        assert isinstance(error.value.__cause__, Fault)

    @pytest.mark.filterwarnings("error")
    def test_whatever_kills_the_thread_resolves_everything(self, sampler, monkeypatch, caplog):
        on_call(monkeypatch, sampler.execution, "take_step", {5}, SystemExit)
        resolved = []
        with fd.Engine(sampler, 2) as engine:
            with engine._desk._changed:  # nothing starts before all are queued
                futures = [engine.submit(ask(i)) for i in range(20)]
                for future in futures:
                    future.add_done_callback(resolved.append)
            wait_for(futures, 30)
            engine._thread.join(30)
            with pytest.raises(fd.EngineClosed):
                engine.submit(ask())
        kinds = [type(future.exception()) for future in futures]
        assert kinds[:4] == [type(None)] * 2 + [fd.RequestFailed] * 2
        assert set(kinds[4:]) == {fd.EngineClosed}
        assert len(resolved) == 20

    def test_a_callback_that_exits_keeps_nobody_waiting(self, sampler):
        def leave(future):
            raise SystemExit

        with fd.Engine(sampler, 2) as engine:
            with engine._desk._changed:
                futures = [engine.submit(ask(i, num_steps=1 + i)) for i in range(6)]
                for future in futures:
                    future.add_done_callback(leave)
            assert not wait_for(futures, 30).not_done


def resident_bytes():
    statm = Path("/proc/self/statm")  # Linux; elsewhere objects alone are counted
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


class TestThreads:
    def test_many_callers_and_the_samplers_own(self, sampler):
        def ask_for(i):
            if i % 4 == 0:
                return i, sampler.sample(i, 1, num_steps=3)[0]
            return i, engine.submit(ask(i)).result(60).image

        with fd.Engine(sampler, 3) as engine, ThreadPoolExecutor(8) as pool:
            for i, image in pool.map(ask_for, range(60)):
                assert torch.equal(image, make_sampler().sample(i, 1, num_steps=3)[0])

    def test_weights_change_between_steps(self, tiny_sampler, tiny_unet, monkeypatch):
        sampler, inside, seen = tiny_sampler(), threading.Lock(), []
        step, load = sampler.execution.take_step, sampler.execution.update_weights
        stepping = threading.Event()

        def take_step(*args):
            assert inside.acquire(blocking=False)
            stepping.set()
            try:
                return step(*args)
            finally:
                inside.release()

        def update(state):
            assert inside.acquire(blocking=False)
            load(state)
            seen.append(engine.metrics()["completed"])
            inside.release()

        monkeypatch.setattr(sampler.execution, "take_step", take_step)
        monkeypatch.setattr(sampler.execution, "update_weights", update)
        new = tiny_unet(1, num_class_embeds=4).state_dict()
        with fd.Engine(sampler, 1) as engine:
            futures = [engine.submit(ask(i, num_steps=20)) for i in range(20)]
            assert stepping.wait(60)
            sampler.update_weights(new)
            last = engine.submit(ask(50))
        assert seen[0] < 20 and all(future.exception() is None for future in futures)
        monkeypatch.undo()
        assert (last.result().image - sampler.sample(50, 1, num_steps=3)[0]).abs().max() < 1e-5

    def test_soak(self, sampler, monkeypatch):
        """Ten thousand requests: each resolved once, memory flat."""
        monkeypatch.setattr(metrics, "WINDOW", 64)  # full before the count begins
        resolved = [0]

        def count(future):
            resolved[0] += 1

        def burst(engine):
            for i in range(2000):
                if engine.metrics()["queue_depth"] == 512:
                    engine.drain()
                future = engine.submit(ask(i, num_steps=1 + i % 3, eta=(i % 300) / 300))
                future.add_done_callback(count)
                if i % 50 == 0:
                    future.cancel()
            engine.drain()
            gc.collect()
            return len(gc.get_objects()), resident_bytes()

        with fd.Engine(sampler, 64, queue_size=512) as engine:
            sizes = [burst(engine) for _ in range(5)]
        counts = engine.metrics()
        assert counts["completed"] + counts["cancelled"] == counts["submitted"] == 10_000
        assert counts["completed"] >= 9_800 and resolved[0] == 10_000
        (objects, memory), (objects_after, memory_after) = sizes[1], sizes[-1]
        assert objects_after - objects < 600  # 6,000 requests: a tenth of an object each
        assert memory_after - memory < 8 << 20


class TestAsyncio:
    @pytest.fixture
    def gated(self):
        """A sampler that waits in its second step until the gate opens, and the gate."""
        gate, calls = threading.Event(), []

        def network(x_t, t, labels):
            calls.append(1)
            assert len(calls) == 1 or gate.wait(60)
            return arithmetic(x_t, t, labels)

        return make_sampler(network), gate

    def test_generate(self, sampler):
        async def main(engine):
            results = await asyncio.gather(*(engine.generate(ask(i)) for i in range(6)))
            with pytest.raises(ValueError, match="labels=7"):
                await engine.generate(ask(0, 7))
            return results

        with fd.Engine(sampler, 2) as engine:
            results = asyncio.run(main(engine))
        for result in results:
            assert torch.equal(result.image, draw(sampler, result.request))

    def test_cancelling_the_task_cancels_the_request(self, gated):
        sampler, gate = gated

        async def main(engine):
            task = asyncio.create_task(engine.generate(ask(9, num_steps=50)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()

        with fd.Engine(sampler, 2) as engine:
            asyncio.run(main(engine))
        assert ends(engine)["cancelled"] == 1 and engine.metrics()["steps"] <= 2

    def test_stream(self, sampler):
        async def main(engine):
            return [item async for item in engine.stream(ask(3, num_steps=5))]

        with fd.Engine(sampler, 2) as engine:
            *previews, result = asyncio.run(main(engine))
        seen = []
        image = sampler.sample(3, 1, num_steps=5, on_step=lambda i, x: seen.append(x[0]))[0]
        assert torch.equal(result.image, image) and len(previews) == 5
        assert all(torch.equal(a, b) for a, b in zip(previews, seen, strict=True))

    def test_leaving_a_stream_cancels(self, gated):
        sampler, gate = gated

        async def main(engine):
            stream = engine.stream(ask(3, num_steps=50))
            async for _ in stream:
                break
            await stream.aclose()
            gate.set()

        with fd.Engine(sampler, 2) as engine:
            asyncio.run(main(engine))
        assert ends(engine)["cancelled"] == 1 and engine.metrics()["steps"] <= 2

    def test_a_loop_that_is_gone_fails_its_own_request(self, gated):
        sampler, gate = gated
        with fd.Engine(sampler, 2) as engine:
            events = asyncio.new_event_loop()
            stream = engine.stream(ask(3))
            events.run_until_complete(anext(stream))
            other = engine.submit(ask(4))
            events.close()
            gate.set()
            assert torch.equal(other.result().image, draw(sampler, ask(4)))
        assert ends(engine) == {"completed": 1, "failed": 1, "cancelled": 0, "expired": 0}

    def test_a_failure_comes_through_a_stream(self, sampler, monkeypatch):
        on_call(monkeypatch, sampler.execution, "take_step", range(99))

        async def main(engine):
            with pytest.raises(fd.RequestFailed):
                async for _ in engine.stream(ask(4)):
                    raise AssertionError("no step was taken")

        with fd.Engine(sampler, 2) as engine:
            asyncio.run(main(engine))


def test_made_within_inference_mode(tiny_sampler, tmp_path):
    """What is made there could not be written to elsewhere."""
    with torch.inference_mode():
        sampler = tiny_sampler()
        engine = fd.Engine(sampler, 2)
        trajectory = sampler.trajectory([1], 0, num_steps=3)
        trajectory.step()
        trajectory.save(tmp_path / "state")
        resumed = sampler.resume(tmp_path / "state")
    with engine:
        image = engine.submit(fd.Request(seed=1, label=0, num_steps=3)).result().image
    assert (image - trajectory.run()[0]).abs().max() <= 1e-5
    assert torch.equal(resumed.run(), trajectory.x)
