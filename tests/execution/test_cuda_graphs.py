"""Which steps are captured, when, and what a replay gives: on a card that only pretends to be one.

The pretended graph calls its step, as a captured one repeats its launches.
"""

import gc
import logging
from contextlib import contextmanager

import pytest
import torch

import flashddpm as fd
from flashddpm.execution.cuda_graphs import CapturedSteps, Graphs

RUN = {"labels": 1, "guidance": [1.0, 2.0, 1.0], "solver": "ddpm"}


class Graph:
    def __init__(self, card, step, count):
        self.card, self.step, self.count = card, step, count

    def __call__(self):
        self.card.replayed.append(self.count)
        for _ in range(self.count):
            self.out = self.step()
        return self.out


class Card:
    """Remembers what it was asked; ``seconds`` of a step by how many a graph holds."""

    def __init__(self, free=1000, needs=100, seconds=None):
        self.free, self.needs = free, needs
        self.times = seconds or {1: 1e-3, 4: 0.9e-3, 16: 0.9e-3}
        self.log, self.replayed, self.held = [], [], 0
        self.full = False

    def free_bytes(self):
        return self.free

    def pool_bytes(self):
        return self.held

    def warm(self, step):
        self.log.append(("warm", len(step())))
        return self.needs

    def capture(self, step, count):
        if self.full:
            raise self.full if self.full is not True else torch.cuda.OutOfMemoryError("no room")
        self.log.append(("capture", len(step()), count))
        self.held = max(self.held, self.needs)
        return Graph(self, step, count)

    def seconds(self, graph):
        graph()
        return self.times[graph.count]

    def release(self):
        self.log.append("release")


def resting():
    @contextmanager
    def rest():
        yield lambda: torch.zeros(3)

    return rest


@pytest.fixture
def captured(tiny_sampler):
    """Returns a sampler on the CPU whose steps are "captured", and its card."""

    def make(limit=None, **options):
        sampler, card = tiny_sampler(), Card(**options)
        sampler.execution.capture = True
        sampler.execution.graphs = Graphs(card, limit)
        return sampler, card

    return make


class TestGraphs:
    def test_a_step_is_warmed_captured_and_kept(self):
        card = Card()
        graphs = Graphs(card)
        assert graphs.bytes == 0
        first = graphs.get("key", resting())
        assert graphs.get("key", resting()) is first and graphs.get("other", resting()) is not first
        assert card.log == [("warm", 3), ("capture", 3, 1)] * 2
        assert len(graphs) == 2 and graphs.bytes == 100

    def test_the_limit_declines_with_one_line(self, caplog):
        for limit, free, needs in (
            (99, 1000, 100),
            (None, 200, 101),
        ):  # given; half of what is free
            card = Card(free=free, needs=needs)
            graphs = Graphs(card, limit)
            caplog.clear()
            with caplog.at_level(logging.WARNING, "flashddpm"):
                assert graphs.get("key", resting()) is None
                assert graphs.get("key", resting()) is None
                assert graphs.best("key", resting()) is None
            assert len(caplog.records) == 1
            assert f"{needs} bytes, of {limit or free // 2}" in caplog.text
            assert len(graphs) == 0 and ("capture", 3, 1) not in card.log

    def test_what_the_graphs_hold_counts_too(self):
        card = Card()
        graphs = Graphs(card, 150)
        assert graphs.get("a", resting()) is not None
        card.held = 151
        assert graphs.get("b", resting()) is None
        assert graphs.get("a", resting()) is not None

    def test_out_of_memory_while_capturing_declines_and_others_go_on(self):
        card = Card()
        graphs = Graphs(card)
        assert graphs.get("a", resting()) is not None
        card.full = True
        assert graphs.get("b", resting()) is None
        assert card.log[-1] == "release"
        card.full = False
        assert graphs.get("b", resting()) is None  # not tried again at every step
        graphs.forget("b")
        assert graphs.get("b", resting()) is not None

    def test_any_failure_of_a_capture_declines_it_and_says_why(self, caplog):
        card = Card()
        graphs = Graphs(card)
        card.full = RuntimeError("operation not permitted when stream is capturing")
        with caplog.at_level(logging.WARNING, "flashddpm"):
            assert graphs.get("a", resting()) is None
        assert "RuntimeError: operation not permitted" in caplog.text

    def test_what_is_forgotten_is_dropped_by_whoever_comes_next(self):
        """A finalizer may run while something is captured: it only leaves a note."""
        card = Card()
        graphs = Graphs(card)
        kept = graphs.get("ab", resting())
        graphs.get("xy", resting())
        graphs.get("xz", resting(), 4)
        before = list(card.log)
        graphs.forget("x")
        assert card.log == before and len(graphs) == 3
        assert graphs.get("ab", resting()) is kept
        assert len(graphs) == 1 and card.log == [*before, "release", "release"]
        assert graphs.get("xy", resting()) is not None
        assert card.log[-2:] == [("warm", 3), ("capture", 3, 1)]  # warmed anew

    @pytest.mark.parametrize(
        ("seconds", "best"),
        [
            ({1: 1e-3, 4: 0.9e-3, 16: 0.8e-3}, 16),
            ({1: 1e-3, 4: 0.9e-3, 16: 0.895e-3}, 4),  # too little for the longer one
            ({1: 1e-3, 4: 0.995e-3, 16: 1.1e-3}, 1),
            ({1: 5e-3}, 1),  # so long that the pause between replays is nothing: none is tried
        ],
    )
    def test_as_many_steps_as_pay(self, seconds, best):
        card = Card(seconds=seconds)
        graphs = Graphs(card)
        assert graphs.best("key", resting()).count == best
        tried = len(card.log)
        assert graphs.best("key", resting()).count == best and len(card.log) == tried
        assert graphs.get("key", resting()).count == 1
        assert len(graphs) == (1 if best == 1 else 2)  # what does not pay is let go

    def test_a_failing_step_ends_the_capture(self, monkeypatch):
        calls = []

        class CUDAGraph:
            def capture_begin(self, pool, capture_error_mode):
                calls.append(("begin", pool, capture_error_mode))

            def capture_end(self):
                calls.append("end")

            def replay(self):
                calls.append("replay")

        @contextmanager
        def stream(which):
            calls.append(which)
            try:
                yield
            finally:
                calls.append("left")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "stream", stream)

        def fail():
            raise RuntimeError("not allowed while capturing")

        around = ["aside", ("begin", "pool", "thread_local"), "end", "left"]
        with pytest.raises(RuntimeError, match="not allowed while"):
            CapturedSteps(fail, 2, "pool", "aside")
        assert calls == around
        calls.clear()
        ran = []
        graph = CapturedSteps(lambda: ran.append(1) or "out", 3, "pool", "aside")
        assert calls == around and len(ran) == graph.count == 3
        assert graph() == "out" and calls[-1] == "replay"


class TestSampler:
    @pytest.mark.parametrize("num_steps", [1, 4, 10, 37])
    def test_replays_give_what_the_loop_gives(self, tiny_sampler, captured, num_steps):
        want = tiny_sampler().sample(range(3), num_steps=num_steps, **RUN)
        sampler, card = captured()
        for _ in range(2):
            card.replayed.clear()
            got = sampler.sample(range(3), num_steps=num_steps, **RUN)
            assert (got - want).abs().max() <= 1e-5  # four lanes, of which none is spare
        long, short = divmod(num_steps, 4)
        assert card.replayed == [4] * long + [1] * short

    def test_one_graph_serves_every_plan_and_number_of_images(self, tiny_sampler, captured):
        sampler, card = captured()
        plain = tiny_sampler()
        for options in (
            {"solver": "ddim"},
            {"solver": "dpmpp_2m"},
            {"solver": "ddim", "threshold": 0.9, "clip": 2.0},
            {"guidance_rescale": 0.7},
            {"seeds": [5, 6]},
        ):
            ask = {"seeds": range(3), "num_steps": 9, **RUN, **options}
            ask["guidance"] = 2.0  # 6 lanes, or 4 in a bucket of 8 or 4
            got, want = sampler.sample(**ask), plain.sample(**ask)
            assert (got - want).abs().max() <= 1e-5, options
        captures = [entry[1:] for entry in card.log if entry[0] == "capture"]
        assert captures == [(n, count) for n in (8, 4) for count in (1, 4, 16)]
        assert len(sampler.execution.graphs) == 4

    def test_buckets_share_buffers_that_only_grow(self, captured):
        sampler, card = captured()
        buffers = []
        for count, batch in ((3, 4), (1, 4), (4, 4), (2, 2), (5, 8), (1, 4)):
            sampler.sample(range(count), 0, num_steps=2, batch_size=batch)
            buffers.append(sampler.execution._slots)
        assert len({id(b) for b in buffers[:4]}) == 1 and buffers[4] is buffers[5] is not buffers[0]
        assert len(buffers[0].idx) == 4 and len(buffers[4].idx) == 8
        keys = {key[0] for key, _ in sampler.execution.graphs._kept}
        assert keys == {buffers[4].token}  # the graphs of the old ones are gone

    def test_without_room_steps_run_one_by_one(self, tiny_sampler, captured):
        want = tiny_sampler().sample(range(3), num_steps=5, **RUN)
        sampler, card = captured(limit=1)
        assert (sampler.sample(range(3), num_steps=5, **RUN) - want).abs().max() <= 1e-5
        assert card.replayed == []

    def test_previews_of_captured_steps(self, tiny_sampler, captured):
        for options in ({}, {"threshold": 0.9, "clip": 2.0, "guidance_rescale": 0.5}):
            runs = []
            for sampler in (tiny_sampler(), captured()[0]):
                seen = []
                x = sampler.sample(
                    range(3),
                    1,
                    [1.0, 2.0, 1.0],
                    "ddim",
                    6,
                    on_step=lambda i, x0, seen=seen: seen.append(x0.clone()),
                    **options,
                )
                runs.append(torch.stack([*seen, x]))
            assert len(runs[0]) == 7 and (runs[0] - runs[1]).abs().max() <= 1e-5

    def test_a_held_result_stays_as_it_is(self, captured):
        sampler, _ = captured()
        first = sampler.sample(range(2), 0, num_steps=3)
        kept = first.clone()
        sampler.sample(range(7, 9), 1, num_steps=3)
        assert torch.equal(first, kept)

    def test_new_weights_are_not_stale(self, tiny_unet, tiny_sampler, captured):
        sampler, card = captured()
        sampler.sample(range(2), 0, num_steps=3)
        before = len(card.log)
        sampler.update_weights(tiny_unet(seed=5, num_class_embeds=4).state_dict())
        got = sampler.sample(range(2), 0, num_steps=3)
        other = tiny_sampler()
        other.update_weights(sampler.network.state_dict())
        assert (got - other.sample(range(2), 0, num_steps=3)).abs().max() <= 1e-5
        assert len(card.log) == before  # the same graphs

    def test_moved_weights_are_refused(self, captured):
        sampler, _ = captured()
        sampler.sample(range(2), 0, num_steps=3)
        for parameter in sampler.network.parameters():
            parameter.data = parameter.data.clone()
            break
        with pytest.raises(RuntimeError, match="moved or replaced under its graphs"):
            sampler.sample(range(2), 0, num_steps=3)

    def test_trajectories_take_their_graphs_with_them(self, captured):
        sampler, card = captured()
        for _ in range(3):
            trajectory = sampler.trajectory(range(3), 0, num_steps=3)
            want = trajectory.run()
            assert len(sampler.execution.graphs) == 1
            log = list(card.log)
            del trajectory
            gc.collect()
            assert card.log == log  # it only left a note
        assert want.isfinite().all()
        assert [entry for entry in card.log if entry[0] == "capture"] == [("capture", 4, 1)] * 3

    @pytest.mark.parametrize("bad", [-1, 1.5, "1", True])
    def test_bad_memory(self, tiny_unet, bad):
        with pytest.raises(ValueError, match="graph_memory="):
            fd.Sampler(tiny_unet(), fd.NoiseSchedule.create(), shape=(1, 8, 8), graph_memory=bad)


class TestEngine:
    def ask(self, seed, **options):
        given = {"label": seed % 3, "num_steps": 3 + seed, "solver": "ddpm", **options}
        return fd.Request(seed=seed, **given)

    def test_capturing_a_new_bucket_changes_nothing_in_flight(self, tiny_sampler, captured):
        sampler, card = captured()
        engine = fd.Engine(sampler, 4, threaded=False)
        futures = []
        for seed in range(4):  # 1, 2, 4 and 5 lanes, each captured while others are under way
            ask = self.ask(seed, guidance=1.0 + (seed == 2), num_steps=6 + seed)
            futures.append(engine.submit(ask))
            engine.turn()
        engine.drain()
        plain = tiny_sampler()
        for future in futures:
            image, asked = future.result().image, future.result().request
            want = plain.sample(
                asked.seed, asked.label, asked.guidance, asked.solver, asked.num_steps
            )
            assert (image - want[0]).abs().max() <= 1e-5
        assert [entry[1] for entry in card.log if entry[0] == "capture"] == [1, 2, 4, 8]
        assert set(card.replayed) == {1}
        assert engine.metrics()["graph_bytes"] == 100
        engine.shutdown()
        assert engine.metrics()["graph_bytes"] == 0

    def test_warm_readies_every_bucket_and_then_captures_the_largest_first(self, captured):
        sampler, card = captured()
        engine = fd.Engine(sampler, 3, threaded=False)
        engine.warm()
        ready = list(card.log)
        assert ready == [("warm", n) for n in (6, 4, 2, 1)] + [
            ("capture", n, 1) for n in (6, 4, 2, 1)
        ]
        futures = [engine.submit(self.ask(seed)) for seed in range(5)]
        engine.drain()
        assert all(future.done() for future in futures) and card.log == ready
        engine.shutdown()

    def test_buckets_of_ones_own(self, captured):
        sampler, card = captured()
        engine = fd.Engine(sampler, 4, threaded=False, buckets=[3, 5, 3])
        engine.warm()
        assert [entry[1] for entry in card.log if entry[0] == "capture"] == [8, 5, 3]
        futures = [engine.submit(self.ask(seed)) for seed in range(5)]
        engine.drain()
        assert all(future.result().image.isfinite().all() for future in futures)
        assert {entry[1] for entry in card.log if entry[0] == "capture"} == {3, 5, 8}
        for bad in ([0], [9], [1.5], ["1"]):
            with pytest.raises(ValueError, match="buckets="):
                fd.Engine(sampler, 4, threaded=False, buckets=bad)
        with pytest.raises(ValueError, match="must not be given beside exact"):
            fd.Engine(sampler, 4, exact=True, buckets=[1])

    def test_previews_in_flight(self, tiny_sampler, captured):
        runs = []
        for sampler in (tiny_sampler(), captured()[0]):
            engine = fd.Engine(sampler, 2, threaded=False)
            seen = []
            engine.submit(self.ask(5, guidance=3.0), on_step=seen.append)
            engine.submit(self.ask(1))
            engine.drain()
            runs.append(torch.stack(seen))
        assert len(runs[0]) == 8 and (runs[0] - runs[1]).abs().max() <= 1e-5

    def test_images_land_while_the_next_step_runs(self, captured):
        """Where the device runs behind, nobody waits for it before there is nothing else to do."""
        sampler, _ = captured()
        engine = fd.Engine(sampler, 2, threaded=False)
        log = []

        class Event:
            def synchronize(self):
                log.append("wait")

        flight = engine._loop.flight
        flight._pace.event = Event
        real = flight.step
        flight.step = lambda: (log.append("step"), real())[1]
        a = engine.submit(self.ask(0, num_steps=2))
        b = engine.submit(self.ask(1, num_steps=4))
        for _ in range(2):
            engine.turn()
        assert not a.done() and len(flight) == 1 and engine.metrics()["active"] == 2
        engine.turn()
        assert a.done() and not b.done()
        engine.turn()
        assert b.done()
        # (a step also waits for the one before the last)
        assert [x for x in log if x == "step"] == ["step"] * 4
        assert torch.isfinite(a.result().image).all() and not engine.turn()

    def test_an_engine_that_is_dropped_leaves_no_graphs(self, captured):
        sampler, _ = captured()
        for _ in range(3):
            engine = fd.Engine(sampler, 2, threaded=False)
            engine.submit(self.ask(0)).add_done_callback(lambda future: None)
            engine.drain()
            del engine
            gc.collect()
        sampler.execution.graphs.sweep()
        assert len(sampler.execution.graphs) == 0

    def test_a_callback_that_exits_loses_no_image_of_others(self, captured):
        sampler, _ = captured()
        engine = fd.Engine(sampler, 3, threaded=False)
        futures = [engine.submit(self.ask(seed, num_steps=2)) for seed in range(3)]

        def leave(future):
            raise SystemExit

        futures[0].add_done_callback(leave)
        engine.turn()
        with pytest.raises(SystemExit):
            engine.turn()
        assert engine.turn() is False
        assert all(future.result().image.isfinite().all() for future in futures)

    def test_a_finished_image_is_handed_out_when_the_engine_closes(self, captured):
        sampler, _ = captured()
        engine = fd.Engine(sampler, 2, threaded=False, max_failures=1)

        class Event:
            def synchronize(self):
                pass

        engine._loop.flight._pace.event = Event
        a = engine.submit(self.ask(0, num_steps=1))
        b = engine.submit(self.ask(1, num_steps=4))
        engine.turn()
        sampler.execution.take_step = None  # the next step fails
        engine.turn()
        assert a.result().image.isfinite().all()
        with pytest.raises(fd.RequestFailed):
            b.result()


@pytest.mark.gpu
class TestOnAGPU:
    """The same on a real card."""

    @pytest.fixture
    def make(self, tiny_unet):
        def build(**options):
            return fd.Sampler(
                tiny_unet(num_class_embeds=4).cuda(),
                fd.NoiseSchedule.create("squaredcos_cap_v2", 100),
                shape=(1, 8, 8),
                prediction_type="v_prediction",
                conditioning=fd.Conditioning(3, 3),
                device="cuda",
                **{"compile": False, **options},
            )

        return build

    @pytest.mark.parametrize("count", [1, 4, 16])
    def test_graphs_of_many_steps(self, make, monkeypatch, count):
        """Whichever pays: 37 steps are some replays of it and some of one step."""
        monkeypatch.setattr(
            "flashddpm.execution.cuda_graphs.UNROLLED", (1, count) if count > 1 else (1,)
        )
        monkeypatch.setattr(
            "flashddpm.execution.cuda_graphs.WORTH", -1.0
        )  # the last one is always kept
        monkeypatch.setattr("flashddpm.execution.cuda_graphs.GAP_SECONDS", 1.0)
        sampler, plain = make(), make(backend="reference")
        ask = {"num_steps": 37, **RUN}
        for seeds in (range(3), range(3, 6)):
            got, want = sampler.sample(seeds, **ask), plain.sample(seeds, **ask)
            assert (got - want).abs().max() <= 1e-3
        counts = {graph.count for graph in sampler.execution.graphs._kept.values()}
        assert counts == {1, count}
        assert sampler.execution.graphs.bytes > 0

    def test_ten_buckets_are_compiled_and_captured_once_each(self, make):
        sampler, plain = make(compile=True), make(backend="reference")
        for _ in range(2):
            for lanes in range(1, 11):
                got = sampler.sample(range(lanes), 1, num_steps=3, bucket=lanes)
                want = plain.sample(range(lanes), 1, num_steps=3)
                assert (got - want).abs().max() <= 1e-3
        assert sampler.execution.compiled.shapes == {(n, False) for n in range(1, 11)}
        assert {key[2] for key, _ in sampler.execution.graphs._kept} == set(range(1, 11))

    def test_without_memory_for_graphs(self, make):
        sampler, plain = make(graph_memory=0), make(backend="reference")
        got, want = (s.sample(range(3), num_steps=5, **RUN) for s in (sampler, plain))
        assert (got - want).abs().max() <= 1e-3 and sampler.execution.graphs.bytes == 0

    def test_a_step_that_may_not_be_captured_runs_as_it_is(self, make):
        """And leaves the card, and the sampler itself, able to capture others."""
        reads = [True]

        def network(x_t, t, labels):
            return x_t * float(x_t.sum().isfinite()) if reads[0] else x_t * 1.0

        sampler = fd.Sampler(
            network,
            fd.NoiseSchedule.create(),
            shape=(1, 8, 8),
            conditioning=fd.Conditioning(3, 3),
            device="cuda",
            capture=True,
        )
        stream = torch.cuda.current_stream()
        want = sampler.sample(0, 0, num_steps=2)
        assert len(sampler.execution.graphs) == 0
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
        reads[0] = False
        got = sampler.sample(0, 0, num_steps=2, bucket=3)  # another key, the same pools
        assert len(sampler.execution.graphs) >= 1
        assert (got - want).abs().max() <= 1e-5
        assert make().sample(range(2), 0, num_steps=3).isfinite().all()

    def test_dropping_one_graph_leaves_the_scratch_memory_of_others(self):
        """cuBLAS works in memory that torch frees when a graph of the same stream is destroyed."""
        torch.manual_seed(0)
        wide = torch.nn.Linear(4096, 64, dtype=torch.bfloat16).cuda()
        back = torch.nn.Linear(64, 64, dtype=torch.bfloat16).cuda()

        def network(x_t, t):  # few rows and a long inner size: split over the card
            h = wide(x_t.flatten(1).repeat(1, 64))
            return back(h).reshape(x_t.shape)

        sampler = fd.Sampler(
            network,
            fd.NoiseSchedule.create(),
            shape=(1, 8, 8),
            device="cuda",
            dtype="bfloat16",
            capture=True,
        )
        want = [sampler.sample(range(n), num_steps=33) for n in (2, 8)]
        graphs = sampler.execution.graphs
        for key in [key for key, _ in graphs._kept if key[2] == 8]:
            graphs._drop(lambda other, count, key=key: other == key)
        torch.cuda.empty_cache()
        filler = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(64)]
        assert torch.equal(sampler.sample(range(2), num_steps=33), want[0])
        del filler
        assert torch.equal(sampler.sample(range(8), num_steps=33), want[1])

    def test_requests_in_flight(self, make):
        sampler, plain = make(compile=True), make(backend="reference")
        requests = [
            fd.Request(
                seed=i,
                label=i % 3,
                guidance=1.0 + i % 2,
                solver=("ddpm", "ddim", "dpmpp_2m")[i % 3],
                num_steps=3 + i,
            )
            for i in range(12)
        ]
        with fd.Engine(sampler, 4) as engine:
            engine.warm()
            held = len(sampler.execution.graphs)
            results = [future.result() for future in map(engine.submit, requests)]
            assert len(sampler.execution.graphs) == held == 4
            assert engine.metrics()["graph_bytes"] > 0
        for r, result in zip(requests, results, strict=True):
            want = plain.sample(r.seed, r.label, r.guidance, r.solver, r.num_steps)
            assert (result.image - want[0]).abs().max() <= 1e-3

    def test_calls_on_streams_of_their_own_do_not_overlap(self, make):
        sampler = make()
        want = [sampler.sample(range(2), 1, num_steps=20) for _ in range(2)]
        got = []
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream()):
                got.append(sampler.trajectory(range(2), 1, num_steps=20))
        for trajectory in got:
            with torch.cuda.stream(torch.cuda.Stream()):
                x = trajectory.run()
            assert (x - want[0]).abs().max() <= 1e-5


def test_nothing_here_touches_a_gpu_before_it_is_asked_to():
    assert Graphs(None).bytes == 0
