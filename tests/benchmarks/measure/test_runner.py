"""Cases are run in order, within a budget; what fails or is left out is said; runs merge."""

import json
import types

import pytest

from flashddpm.benchmarks.measure import harness, runner, runs
from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runner import BenchmarkCase, run_cases
from flashddpm.benchmarks.measure.runs import BenchmarkRun, Failure


def result(case, peer="peer", **values):
    return Measurement(case, peer, "note", values or {"seconds": 1.0})


def case(name, *results, error=None, needs=(), suite="step"):
    def measure(device):
        assert device == "cpu"
        yield from results
        if error:
            raise error

    return BenchmarkCase(name, suite, measure, needs)


class Clock:
    """A clock that work moves on."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        fake = types.SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(runner, "time", fake)

    def taking(self, name, *seconds):
        def measure(device):
            for i, each in enumerate(seconds):
                self.now += each
                yield result(name if len(seconds) == 1 else f"{name}-{i}")

        return BenchmarkCase(name, "step", measure)


def go(cases, tmp_path, **options):
    said = []
    run = run_cases(cases, "cpu", BenchmarkRun({}), tmp_path / "r.json", say=said.append, **options)
    assert BenchmarkRun.read(tmp_path / "r.json") == run
    return run, said


def test_each_result_is_written_before_the_next_is_measured(tmp_path):
    seen = []

    def measure(device):
        for i in range(3):
            content = json.loads((tmp_path / "r.json").read_text())
            seen.append([r["case"] for r in content["results"]])
            yield result(f"a-{i}")

    run, said = go([BenchmarkCase("a", "step", measure)], tmp_path)
    assert seen == [[], ["a-0"], ["a-0", "a-1"]]
    assert said == [r.line() for r in run.results]
    assert [r.case for r in run.results] == ["a-0", "a-1", "a-2"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(AssertionError("off by 2,\nnot timed"), "off by 2, not timed"), (OSError("x"), "OSError: x")],
)
def test_a_failed_case_gives_no_figures_and_the_next_one_follows(tmp_path, error, reason):
    run, said = go([case("bad", error=error), case("good", result("good"))], tmp_path)
    assert run.failures == [Failure("bad", reason)]
    assert [r.case for r in run.results] == ["good"]
    assert said[0] == f"bad: FAILED, no figures: {reason}"


def test_an_interrupt_ends_the_run_with_everything_written(tmp_path):
    cases = [case("a", result("a"), error=KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        run_cases(cases, "cpu", BenchmarkRun({}), tmp_path / "r.json", say=lambda line: None)
    assert [r.case for r in BenchmarkRun.read(tmp_path / "r.json").results] == ["a"]


def test_a_budget_finishes_what_runs_and_lists_the_rest(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    cases = [clock.taking(name, 4.0) for name in "abcd"]
    run, said = go(cases, tmp_path, budget=7)
    assert [r.case for r in run.results] == ["a", "b"]
    assert run.left_out == ["c", "d"] and said[-1] == "left out: c; d"
    assert go(cases, tmp_path, budget=17)[0].left_out == []
    assert go(cases, tmp_path)[0].left_out == []


def test_a_budget_ends_a_case_of_many_results(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    run, _ = go([clock.taking("a", 4.0, 4.0, 4.0), clock.taking("b", 1.0)], tmp_path, budget=7)
    assert [r.case for r in run.results] == ["a-0", "a-1"]
    assert run.left_out == ["a, after 2 results", "b"]


def test_what_is_not_installed_is_one_line(tmp_path):
    cases = [case(name, error=OSError(), needs=("no_such_peer",)) for name in "ab"]
    run, said = go([*cases, case("c", result("c"))], tmp_path)
    assert said[0] == "no_such_peer is not installed: 2 cases are left out"
    assert run.left_out == ["a", "b"] and not run.failures and len(run.results) == 1


def test_the_card_is_read_after_each_case_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "card_state", lambda: {"temperature_c": 40})

    def measure(device):
        yield result("a")

    run = run_cases(
        [BenchmarkCase("a", "step", measure)],
        "cuda",
        BenchmarkRun({}),
        tmp_path / "r.json",
        say=lambda line: None,
    )
    assert run.cards == [{"case": "a", "temperature_c": 40}]


HERE = {"command": "a", "threads": 2, "versions": {"torch": "1"}, "gpu": {"temperature_c": 1}}
THERE = HERE | {"command": "b", "gpu": {"temperature_c": 2}}


def test_runs_merge_and_the_latest_outcome_counts():
    first = BenchmarkRun(
        HERE, [result("a"), result("b"), result("b", "other")], [Failure("c", "x")]
    )
    first.left_out = ["d", "e"]
    second = BenchmarkRun(THERE, [result("b", seconds=2.0), result("c")], left_out=["e", "f"])
    whole = runs.merged([first, second])
    assert [(r.case, r.peer) for r in whole.results] == [
        ("a", "peer"), ("b", "other"), ("b", "peer"), ("c", "peer")
    ]  # fmt: skip
    assert whole.results[2].values == {"seconds": 2.0}
    assert whole.failures == [] and whole.left_out == ["d", "e", "f"]
    assert (
        runs.merged([first, BenchmarkRun(HERE, failures=[Failure("c", "y")])]).failures[0].reason
        == "y"
    )


def test_other_machines_do_not_merge():
    other = HERE | {"threads": 4, "versions": {"torch": "2"}}
    with pytest.raises(ValueError, match=r"threads: 2, 4; versions.torch: '1', '2'$"):
        runs.merged([BenchmarkRun(HERE), BenchmarkRun(other)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 3, "environment": {}, "results": []}',
        '{"schema": 1}',
        '{"schema": 2, "results": [{}]}',
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.json: is no file of results"):
        BenchmarkRun.read(path)


def test_files_of_the_first_schema_are_read(tmp_path):
    path = tmp_path / "r.json"
    values = {"case": "a", "peer": "", "note": "", "values": {}}
    path.write_text(json.dumps({"schema": 1, "environment": {}, "results": [values]}))
    assert BenchmarkRun.read(path) == BenchmarkRun({}, [Measurement("a", "", "", {})])
