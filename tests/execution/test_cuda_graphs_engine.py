"""What an engine gives by captured steps, and when it captures: on a pretended card."""

import gc

import pytest
import torch

import flashddpm as fd


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

        batch = engine._loop.batch
        batch._limiter.event = Event
        real = batch.step
        batch.step = lambda: (log.append("step"), real())[1]
        a = engine.submit(self.ask(0, num_steps=2))
        b = engine.submit(self.ask(1, num_steps=4))
        for _ in range(2):
            engine.turn()
        assert not a.done() and len(batch) == 1 and engine.metrics()["active"] == 2
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
        sampler.executor.graphs.sweep()
        assert len(sampler.executor.graphs) == 0

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

        engine._loop.batch._limiter.event = Event
        a = engine.submit(self.ask(0, num_steps=1))
        b = engine.submit(self.ask(1, num_steps=4))
        engine.turn()
        sampler.executor.take_step = None  # the next step fails
        engine.turn()
        assert a.result().image.isfinite().all()
        with pytest.raises(fd.RequestFailed):
            b.result()
