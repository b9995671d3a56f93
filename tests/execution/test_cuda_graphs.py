"""Which steps are captured, when, and how many in a graph, on a card that only pretends."""

import logging
from contextlib import contextmanager

import pytest
import torch

from flashddpm.execution.cuda_graphs import CapturedSteps, Graphs


def idling():
    @contextmanager
    def idle():
        yield lambda: torch.zeros(3)

    return idle


class TestGraphs:
    def test_a_step_is_warmed_captured_and_kept(self, Card):
        card = Card()
        graphs = Graphs(card)
        assert graphs.bytes == 0
        first = graphs.get("key", idling())
        assert graphs.get("key", idling()) is first and graphs.get("other", idling()) is not first
        assert card.log == [("warm", 3), ("capture", 3, 1)] * 2
        assert len(graphs) == 2 and graphs.bytes == 100

    def test_the_limit_declines_with_one_line(self, caplog, Card):
        for limit, free, needs in (
            (99, 1000, 100),
            (None, 200, 101),
        ):  # given; half of what is free
            card = Card(free=free, needs=needs)
            graphs = Graphs(card, limit)
            caplog.clear()
            with caplog.at_level(logging.WARNING, "flashddpm"):
                assert graphs.get("key", idling()) is None
                assert graphs.get("key", idling()) is None
                assert graphs.best("key", idling()) is None
            assert len(caplog.records) == 1
            assert f"{needs} bytes, of {limit or free // 2}" in caplog.text
            assert len(graphs) == 0 and ("capture", 3, 1) not in card.log

    def test_what_the_graphs_hold_counts_too(self, Card):
        card = Card()
        graphs = Graphs(card, 150)
        assert graphs.get("a", idling()) is not None
        card.held = 151
        assert graphs.get("b", idling()) is None
        assert graphs.get("a", idling()) is not None

    def test_out_of_memory_while_capturing_declines_and_others_go_on(self, Card):
        card = Card()
        graphs = Graphs(card)
        assert graphs.get("a", idling()) is not None
        card.full = True
        assert graphs.get("b", idling()) is None
        assert card.log[-1] == "release"
        card.full = False
        assert graphs.get("b", idling()) is None  # not tried again at every step
        graphs.forget("b")
        assert graphs.get("b", idling()) is not None

    def test_any_failure_of_a_capture_declines_it_and_says_why(self, caplog, Card):
        card = Card()
        graphs = Graphs(card)
        card.full = RuntimeError("operation not permitted when stream is capturing")
        with caplog.at_level(logging.WARNING, "flashddpm"):
            assert graphs.get("a", idling()) is None
        assert "RuntimeError: operation not permitted" in caplog.text

    def test_what_is_forgotten_is_dropped_by_whoever_comes_next(self, Card):
        """A finalizer may run while something is captured: it only leaves a note."""
        card = Card()
        graphs = Graphs(card)
        kept = graphs.get("ab", idling())
        graphs.get("xy", idling())
        graphs.get("xz", idling(), 4)
        before = list(card.log)
        graphs.forget("x")
        assert card.log == before and len(graphs) == 3
        assert graphs.get("ab", idling()) is kept
        assert len(graphs) == 1 and card.log == [*before, "release", "release"]
        assert graphs.get("xy", idling()) is not None
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
    def test_as_many_steps_as_pay(self, seconds, best, Card):
        card = Card(seconds=seconds)
        graphs = Graphs(card)
        assert graphs.best("key", idling()).count == best
        tried = len(card.log)
        assert graphs.best("key", idling()).count == best and len(card.log) == tried
        assert graphs.get("key", idling()).count == 1
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


def test_nothing_here_touches_a_gpu_before_it_is_asked_to():
    assert Graphs(None).bytes == 0
