"""Interrupts and callbacks at the worst moments of a turn: all futures end, no image is wrong."""

import gc
import weakref

import pytest

import flashddpm as fd


@pytest.mark.parametrize("name", ["follow_weights", "admit", "start"])
def test_an_interrupt_at_admission_fails_those_who_enter(start, on_call, ask, is_as_new, name):
    """Their x_T may not be set."""
    engine = start(1)
    on_call(engine._loop.batch, name, {0}, KeyboardInterrupt)
    first, second = engine.submit(ask(0)), engine.submit(ask(1))
    with pytest.raises(KeyboardInterrupt):
        engine.turn()
    assert isinstance(first.exception(0).__cause__, KeyboardInterrupt)
    engine.drain()
    assert second.result(0)
    is_as_new(engine)


def test_all_who_fail_end_whatever_a_callback_raises(start, on_call, ask, is_as_new):
    engine = start(2)
    on_call(engine._loop.batch.executor, "take_step", {0})
    futures = [engine.submit(ask(i)) for i in range(2)]
    ended = []
    for future in futures:
        future.add_done_callback(ended.append)
        future.add_done_callback(lambda _: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        engine.turn()
    assert ended == futures
    is_as_new(engine)


@pytest.mark.parametrize(
    ("where", "call", "failing"),
    [("acquire", 1, {1}), ("admit", 1, {1}), ("start", 0, {0, 1, 2}), ("step", 0, {0, 1, 2})],
)
def test_a_callback_of_one_that_fails_may_turn_the_engine(
    start, ask, is_as_new, on_call, where, call, failing
):
    """Of those that entered with it nobody is stepped whose x_T or state is not right."""
    engine = start(3)
    batch = engine._loop.batch
    on_call(batch.plan_table if where == "acquire" else batch, where, {call})
    futures = [engine.submit(ask(i, num_steps=1)) for i in range(3)]
    futures[1].add_done_callback(lambda _: (futures[0].cancel(), engine.turn()))
    engine.turn()
    engine.drain()
    for i, future in enumerate(futures):
        if i in failing:
            assert isinstance(future.exception(0), fd.RequestFailed)
        else:
            assert future.cancelled() if i == 0 else future.result(0)
    is_as_new(engine)


def test_nobody_asks_a_future_with_the_lock_of_the_scheduler(start, ask, monkeypatch):
    """A signal's handler may call the engine where the main thread holds the locks of futures."""
    engine = start(1)
    future = engine.submit(ask(0, num_steps=2))
    held = []
    real = future.cancelled

    def cancelled():
        held.append(engine._scheduler._changed._is_owned())
        return real()

    monkeypatch.setattr(future, "cancelled", cancelled)
    engine.drain()
    assert held and not any(held)


def test_a_copy_is_let_go_when_it_is_handed_out(start, ask, monkeypatch):
    """Its flags are pinned memory on a GPU; a future that somebody keeps does not hold them."""
    engine = start(2)
    batch, flags = engine._loop.batch, []
    real = batch.take

    def take(image):
        copy = real(image)
        flags.append(weakref.ref(copy.flags))
        return copy

    monkeypatch.setattr(batch, "take", take)
    gc.collect()
    gc.disable()
    try:
        futures = [engine.submit(ask(i)) for i in range(3)]
        engine.drain()
        assert len(flags) == len(futures) == 3
        assert [flag() for flag in flags] == [None] * 3
    finally:
        gc.enable()
