import json
import time

import pytest

from flashddpm.benchmarks import harness


def test_calls_are_interleaved_and_the_ratio_is_peer_over_ours(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def take(name, seconds):
        calls.append(name)
        clock[0] += seconds

    result = harness.compare(lambda: take("A", 2.0), lambda: take("B", 3.0), rounds=2, warm_ups=1)
    assert "".join(calls) == "AB" + "ABBA" * 2
    assert (result.ours_seconds, result.peer_seconds, result.ratio) == (2.0, 3.0, 1.5)
    assert (result.spread, result.pairs) == (0.0, 4)


def test_spread_is_that_of_ours_against_itself(monkeypatch):
    clock, times = [0.0], iter([1, 4, 4, 2, 1, 4, 4, 1])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def take():
        clock[0] += next(times)

    result = harness.compare(take, take, rounds=2, warm_ups=0)
    assert result.ratio == 4.0 and result.ratio_low == pytest.approx(3.5)
    assert result.spread == pytest.approx(0.5)  # ratios 2 and 1: quartiles 1.25 and 1.75


def test_results_are_written_in_the_schema(tmp_path):
    comparison = harness.compare(lambda: None, lambda: None, rounds=1)
    result = harness.Result.of("case", "peer", "note", comparison)
    assert "case against peer" in result.line()
    harness.write(tmp_path / "new" / "r.json", harness.environment("cpu"), [result])
    content = json.loads((tmp_path / "new" / "r.json").read_text())
    assert content["schema"] == harness.SCHEMA
    assert content["environment"]["versions"]["torch"]
    assert content["environment"]["gpu"] is None
    assert content["results"][0]["values"]["pairs"] == 2
