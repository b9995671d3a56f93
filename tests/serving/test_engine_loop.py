"""The turns of the engine: who enters and leaves, and faults at every stage."""

from concurrent.futures import wait as wait_for

import pytest
import torch

import flashddpm as fd


def test_enters_at_the_next_boundary_and_leaves_at_once(start, ask):
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


class TestFaults:
    """Four requests of three steps in two slots; a fault; who fails, and the others' bits."""

    @pytest.fixture
    def run(self, sampler, ask, draw, Fault, is_as_new):
        """A function: take the four requests through the engine; those that fail, and the stage."""

        def check(engine, failing, stage):
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
            is_as_new(engine)

        return check

    def test_plan(self, start, on_call, Fault, ask, is_as_new):
        engine = start()
        on_call(engine, "_cached_plan", {0})
        with pytest.raises(Fault):
            engine.submit(ask())
        assert engine.metrics()["submitted"] == 0
        is_as_new(engine)

    @pytest.mark.parametrize(
        ("where", "name", "call", "stage", "failing"),
        [
            ("plan_table", "acquire", 1, "admission", {1}),
            ("plan_table", "_place", 0, "admission", {0}),
            ("slots", "load_plan", 0, "admission", {0}),
            ("batch", "start", 0, "admission", {0, 1}),
            ("slot_table", "admit", 2, "admission", {2}),
            ("slot_table", "upload", 0, "admission", {0, 1}),
            ("slot_table", "fill_lanes", 0, "admission", {0, 1}),
            ("executor", "take_step", 4, "step", {2, 3}),
            ("slot_table", "advance", 1, "step", {0, 1}),
            ("batch", "take", 1, "harvest", {1}),
        ],
    )
    def test_a_stage(self, start, where, name, call, stage, failing, on_call, run):
        engine = start()
        batch = engine._loop.batch
        owner = batch if where == "batch" else getattr(batch, where)
        on_call(owner, name, {call})
        run(engine, failing, stage)

    def test_an_upload_after_an_image_has_left(self, start, on_call, Fault, ask, is_as_new):
        """Nobody enters, so that it belongs to the step, which fails for whoever is left."""
        engine = start()
        short, long = engine.submit(ask(1, num_steps=1)), engine.submit(ask(2, num_steps=3))
        on_call(engine._loop.batch.slot_table, "upload", {1})
        engine.drain()
        assert short.exception() is None
        assert isinstance(long.exception().__cause__, Fault)
        assert str(long.exception()).startswith("step")
        is_as_new(engine)

    @pytest.mark.parametrize("name", ["evaluate", "update"])
    def test_network_and_update(
        self, sampler, start, monkeypatch, name, on_call, ask, draw, is_as_new
    ):
        from flashddpm.execution import step

        on_call(step, name, {1})
        engine = start()
        with monkeypatch.context():
            requests = [ask(i) for i in range(4)]
            futures = [engine.submit(request) for request in requests]
            engine.drain()
        assert [type(f.exception()) for f in futures] == [fd.RequestFailed] * 2 + [type(None)] * 2
        monkeypatch.undo()
        for request, future in zip(requests[2:], futures[2:], strict=True):
            assert torch.equal(future.result().image, draw(sampler, request))
        is_as_new(engine)

    def test_preview(self, sampler, start, Fault, draw, ask, is_as_new):
        engine = start()

        def broken(x0):
            raise Fault

        futures = [engine.submit(ask(0), on_step=broken), engine.submit(ask(1))]
        engine.turn()
        assert futures[0].done() and not futures[1].done()
        engine.drain()
        assert isinstance(futures[0].exception().__cause__, Fault)
        assert torch.equal(futures[1].result().image, draw(sampler, ask(1)))
        is_as_new(engine)

    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_an_image_that_is_not_finite_fails_alone(
        self, start, guidance, make_sampler, ask, draw, arithmetic
    ):
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

    def test_closes_after_failures_in_a_row(self, start, sampler, on_call, Fault, ask):
        engine = start(1, max_failures=3)
        on_call(sampler.executor, "take_step", {0, 1, 4, 5, 6})
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
    def test_whatever_kills_the_thread_resolves_everything(self, sampler, caplog, on_call, ask):
        on_call(sampler.executor, "take_step", {5}, SystemExit)
        resolved = []
        with fd.Engine(sampler, 2) as engine:
            with engine._scheduler._changed:  # nothing starts before all are queued
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

    def test_a_callback_that_exits_keeps_nobody_waiting(self, sampler, ask):
        def leave(future):
            raise SystemExit

        with fd.Engine(sampler, 2) as engine:
            with engine._scheduler._changed:
                futures = [engine.submit(ask(i, num_steps=1 + i)) for i in range(6)]
                for future in futures:
                    future.add_done_callback(leave)
            assert not wait_for(futures, 30).not_done
