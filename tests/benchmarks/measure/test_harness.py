import json
import sys
import time
import types

import pytest
import torch

from flashddpm.benchmarks.measure import harness, runs


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
    result = harness.Measurement.of("case", "peer", "note", comparison)
    assert "case against peer" in result.line()
    runs.BenchmarkRun(harness.environment("cpu"), [result]).write(tmp_path / "new" / "r.json")
    content = json.loads((tmp_path / "new" / "r.json").read_text())
    assert content["schema"] == runs.SCHEMA
    assert content["environment"]["versions"]["torch"]
    assert content["environment"]["gpu"] is None
    assert content["results"][0]["values"]["pairs"] == 2


class NVMLError(Exception):
    """NVML's own."""


def nvml(reading, calls):
    """Return a stand-in for NVML that reads a clock, in MHz, or raises."""

    def read(card, kind):
        assert (card, kind) == ("card GPU-u", "sm")
        if isinstance(reading, Exception):
            raise reading
        return reading

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM="sm",
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetHandleByUUID=lambda uuid: f"card {uuid}",
        nvmlDeviceGetClockInfo=read,
    )


@pytest.mark.parametrize(
    ("reading", "expected"), [(1980, 1.98e9), (0, None), (NVMLError("not supported"), None)]
)
def test_the_clock_that_nvml_reads(monkeypatch, reading, expected):
    calls = []
    monkeypatch.setitem(sys.modules, "pynvml", nvml(reading, calls))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = types.SimpleNamespace(uuid="u")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert harness.sm_clock() == expected
    assert calls == ["init", "shutdown"]


def test_without_nvml_no_clock_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    assert harness.sm_clock() is None
