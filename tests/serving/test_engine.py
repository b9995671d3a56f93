"""The engine: the bits of its images, its arguments, and how it is shut down."""

import threading

import pytest
import torch

import flashddpm as fd
from flashddpm.serving import engine as engine_module


class TestImages:
    def test_any_mixture_equals_sample(self, sampler, ask, draw, many):
        requests = [ask(i, i % 3, **many[i % 8]) for i in range(24)]
        with fd.Engine(sampler, max_batch=4) as engine:
            futures = [engine.submit(request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            result = future.result()
            assert result.request is request
            assert result.image.shape == sampler.shape and result.image.dtype is torch.float32
            assert result.image.is_contiguous()
            assert torch.equal(result.image, draw(sampler, request))
            assert 0 <= result.timings.queued <= result.timings.total
        assert len({tuple(f.result().image.flatten().tolist()) for f in futures}) == 24

    def test_bits_are_the_same_alone_in_a_crowd_early_and_late(self, start, options, many, ask):
        request = ask(7, 2, **options)
        engine = start(5)
        alone = engine.submit(request)
        engine.drain()
        images = []
        for before in range(6):
            futures = [engine.submit(ask(9 + i, i % 3, **many[i % 8])) for i in range(before)]
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

    def test_a_held_image_never_changes(self, start, ask):
        engine = start(1)
        image, copies = engine.submit(ask(1)), []
        engine.drain()
        copies.append(image.result().image.clone())
        engine.submit(ask(2))
        engine.drain()
        assert torch.equal(image.result().image, copies[0])

    def test_a_held_request_never_changes(self, sampler, start, ask, draw):
        mine = torch.full(sampler.shape, 0.5)
        engine = start()
        request = ask(1, image=mine, strength=0.7, num_steps=6)
        future = engine.submit(request)
        wanted = draw(sampler, request)
        mine.zero_()
        engine.drain()
        assert torch.equal(future.result().image, wanted)

    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_previews_are_those_of_sample(self, sampler, start, guidance, many, ask):
        for options in many:
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


class TestAdmission:
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

    def test_plans_are_made_once_and_the_cache_is_bounded(self, sampler, start, monkeypatch, ask):
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


class TestEnds:
    def test_shutdown_finishes_or_cancels(self, start, ask):
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
    def test_leaving_the_block(self, sampler, error, ask):
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
        forgotten, graphs = [], sampler.executor.graphs
        monkeypatch.setattr(graphs, "forget", forgotten.append)
        monkeypatch.setattr(graphs, "sweep", lambda: forgotten.append("swept"))
        engine = start()
        engine.shutdown()
        assert forgotten == [engine._loop.batch.slots.token, "swept"]


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
