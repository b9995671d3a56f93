"""What an engine counts."""

import pytest


def test_metrics(start, clock, ask):
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
