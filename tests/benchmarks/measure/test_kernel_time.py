"""Timing on a GPU: how many calls, on how many sets of arguments; the times themselves if there."""

from functools import partial

import pytest
import torch

from flashddpm.benchmarks.measure import harness, kernel_time


@pytest.mark.parametrize("size", [0, 1, 4_000, 12_288, 10**6, 10**8, 10**9])
def test_sets_exceed_the_cache(size):
    cache = 50_000_000
    sets = kernel_time.sets_beyond(cache, size)
    assert 1 <= sets <= kernel_time.MAX_SETS
    assert sets == kernel_time.MAX_SETS or sets * size >= kernel_time.FLUSH * cache
    assert sets == 1 or (sets - 1) * size < kernel_time.FLUSH * cache


def test_calls_are_enough_and_not_too_many():
    assert kernel_time.calls_for(0) == kernel_time.calls_for(1000) == kernel_time.MOST
    assert kernel_time.calls_for(2**28) == 32
    assert kernel_time.calls_for(2**40) == kernel_time.FEWEST


def test_the_clock_is_read_while_the_card_is_busy(monkeypatch):
    """Enough is queued to outlast the reading, and is waited for after it."""
    did = []
    replay = kernel_time.Replay(None, [], 8)
    monkeypatch.setattr(kernel_time.Replay, "__call__", lambda self: did.append("replay"))
    monkeypatch.setattr(kernel_time, "seconds_a_call", lambda replay: kernel_time.BUSY / 8 / 4)
    monkeypatch.setattr(harness, "sm_clock", lambda: did.append("read") or 1.5e9)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("wait"))
    assert kernel_time.sm_clock(replay) == 1.5e9
    assert did == ["replay"] * 4 + ["read", "wait"]


@pytest.mark.gpu
def test_captured_calls_take_their_arguments_in_turn():
    counters = []

    def make():
        counters.append(torch.zeros((), device="cuda"))
        return partial(counters[-1].add_, 1)

    replay = kernel_time.capture(make, 3, 8)
    assert replay.calls == 9
    warm = [counter.item() for counter in counters]
    assert kernel_time.seconds_a_call(replay) > 0
    assert [c.item() - w for c, w in zip(counters, warm, strict=True)] == [3, 3, 3]


@pytest.mark.gpu
def test_a_copy_and_an_empty_kernel_are_timed():
    assert 1e10 < kernel_time.copy_bandwidth() < 1e14
    assert 1e-8 < kernel_time.empty_seconds() < 1e-3


@pytest.mark.gpu
def test_a_clock_is_read():
    x = torch.zeros(2**20, device="cuda")
    clock = kernel_time.sm_clock(kernel_time.capture(lambda: partial(x.add_, 1), 1))
    assert clock is None or 1e8 < clock < 1e10
