"""The queue: when it is full, and requests that are cancelled or expire, waiting or running."""

from concurrent.futures import wait as wait_for

import pytest
import torch

import flashddpm as fd


def test_a_full_queue_refuses_at_once(start, ask, ends):
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


def test_cancelling_frees_the_slot_and_changes_no_other(sampler, start, ask, draw):
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


def test_deadlines_hold_in_the_queue_and_in_a_slot(start, clock, ask, ends):
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


def test_a_request_that_is_cancelled_while_its_plan_gets_rows(start, monkeypatch, ask, ends):
    engine = start(2)
    plans = engine._loop.batch.plan_table
    acquire = plans.acquire

    def cancelling(plan):
        row = acquire(plan)
        assert future.cancel()
        return row

    monkeypatch.setattr(plans, "acquire", cancelling)
    future = engine.submit(ask(1))
    assert not engine.turn() and not plans._users
    assert ends(engine)["cancelled"] == 1 and engine.metrics()["steps"] == 0
