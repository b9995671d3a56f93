"""``flashddpm bench``: what it measures, its other uses, and its exit codes."""

import json
from itertools import product

import pytest
import typer
from typer.testing import CliRunner

from flashddpm.benchmarks.cases import suites
from flashddpm.benchmarks.command import bench
from flashddpm.benchmarks.measure import runner
from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runner import BenchmarkCase
from flashddpm.benchmarks.measure.runs import BenchmarkRun, Failure

APP = typer.Typer()
APP.command()(bench)
MACHINE = {
    "gpu": None,
    "cpu": "a CPU",
    "capability": "AVX2",
    "threads": 1,
    "python": "3",
    "versions": {"torch": "1"},
    "commit": "c",
}


def call(*arguments):
    return CliRunner().invoke(APP, [*map(str, arguments)])


def comparison(case, ratio):
    values = {"ours_seconds": 1.0, "peer_seconds": ratio, "ratio": ratio, "pairs": 2.0}
    values |= {"ratio_low": ratio, "ratio_high": ratio, "spread": 0.01}
    return Measurement(case, "peer", "a note", values)


@pytest.fixture
def files(tmp_path):
    """Three files of one machine: a baseline, one of a slower case, and another's."""
    runs = {
        "old": BenchmarkRun(MACHINE, [comparison("a", 2.0)]),
        "new": BenchmarkRun(MACHINE, [comparison("a", 1.0)], left_out=["b"]),
        "other": BenchmarkRun(
            MACHINE | {"threads": 2}, [comparison("b", 1.0)], [Failure("c", "why")]
        ),
    }
    for name, run in runs.items():
        run.write(tmp_path / f"{name}.json")
    return {name: tmp_path / f"{name}.json" for name in runs}


def test_a_regression_is_exit_code_1(files):
    slower = call("--compare", files["old"], files["new"])
    assert slower.exit_code == 1 and "regression" in slower.stdout
    assert call("--compare", files["old"], files["old"]).exit_code == 0
    assert call("--compare", files["new"], files["old"]).exit_code == 0


def test_files_are_merged(files, tmp_path):
    out = tmp_path / "all.json"
    assert call("--merge", files["old"], files["new"], "--out", out).exit_code == 0
    assert [r.values["ratio"] for r in BenchmarkRun.read(out).results] == [1.0]
    other = call("--merge", files["old"], files["other"], "--out", out)
    assert isinstance(other.exception, ValueError) and "threads: 1, 2" in str(other.exception)


def test_the_report_is_a_table_and_a_page(files, tmp_path):
    page = tmp_path / "page.html"
    made = call("--report", files["new"], files["other"], "--html", page)
    assert made.exit_code == 0
    assert "| a | 1.00 s | peer: 1.00 s | 1.00 (1.00 to 1.00) | 0.01 |" in made.stdout
    assert "| c | failed: why | | | |" in made.stdout and "Left out: b." in made.stdout
    assert "<td>peer: 1.00 s</td>" in page.read_text() and "a note" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--compare", "a.json"], "must be two"),
        (["--merge", "a.json", "b.json"], "--out"),
        (["--report"], "one file"),
        (["a.json"], "must be given with"),
        (["--compare", "--merge", "a.json", "b.json"], "one at a time"),
        (["--html", "a.html"], "with --report only"),
        (["--suite", "fast"], "suite='fast': must be one of all, sampling"),
        (["--report", "missing.json"], "missing.json: is no file of results"),
    ],
)
def test_bad_use_is_refused_by_name(arguments, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert isinstance(result.exception, ValueError) and problem in str(result.exception)


def test_a_budget_is_not_negative():
    assert call("--budget", -1).exit_code == 2


@pytest.mark.parametrize("fails", [False, True])
def test_cases_are_measured_and_a_failure_is_exit_code_1(fails, tmp_path, monkeypatch):
    asked = []

    def measure(device):
        yield comparison("a", 2.0)
        if fails:
            raise AssertionError("they differ")

    def cases(device, eager):
        asked.append((device, eager))
        return [BenchmarkCase("a", "step", measure), BenchmarkCase("b", "training", measure)]

    monkeypatch.setattr(suites, "cases", cases)
    monkeypatch.setattr(runner, "_clean", lambda: None)
    out = tmp_path / "r.json"
    result = call("--suite", "step", "--device", "cpu", "--eager", "--out", out)
    assert result.exit_code == fails and asked == [("cpu", True)]
    content = json.loads(out.read_text())
    assert [r["case"] for r in content["results"]] == ["a"]
    assert [f["reason"] for f in content["failures"]] == ["they differ"] * fails
    assert "a against peer: 2.00x" in result.stdout


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_headline_comes_first_and_names_are_unique(device):
    cases = suites.cases(device)
    batches = (1, 16, 256) if device == "cuda" else (1, 16)
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    peers = ("graphs", "best") if device == "cuda" else ("best",)  # the quick to compile first
    expected = [
        f"cifar10-{dtype}-{solver}-batch-{batch}-{peer}"
        for peer in peers
        for solver, dtype in product(("ddim", "ddpm"), dtypes)
        for batch in batches
    ]
    assert [case.name for case in cases[: len(expected)]] == expected
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {case.suite for case in cases} == set(suites.SUITES)
    for suite in suites.SUITES:
        chosen = suites.chosen(device, suite)
        assert chosen and {case.suite for case in chosen} == {suite}


def test_a_cpu_is_compared_with_diffusers_eager_and_compiled_throughout():
    names = {case.name for case in suites.chosen("cpu", "sampling")}
    for case in product(
        ("bundled", "cifar10"),
        ("float32", "bfloat16"),
        ("ddim", "ddpm"),
        (1, 16),
        ("best", "eager"),
    ):
        assert "{}-{}-{}-batch-{}-{}".format(*case) in names


def test_the_module_is_the_command(monkeypatch):
    from flashddpm.benchmarks import __main__ as module

    assert module.bench is bench


def test_cases_are_chosen_by_a_pattern(tmp_path, monkeypatch):
    ran = []

    def case(name):
        def measure(device):
            ran.append(name)
            yield Measurement(name, "peer", "a note", {"figure": 1.0})

        return BenchmarkCase(name, "sampling", measure)

    monkeypatch.setattr(suites, "cases", lambda *_: [case("a-1"), case("b-1"), case("a-2")])
    out = tmp_path / "r.json"
    assert call("--device", "cpu", "--cases", "a-*", "--out", out).exit_code == 0
    assert ran == ["a-1", "a-2"]
    ran.clear()
    assert call("--device", "cpu", "--cases", "a-2, b-*", "--out", out).exit_code == 0
    assert ran == ["b-1", "a-2"], "in the order of the suites, whatever that of the patterns"
    refused = call("--device", "cpu", "--cases", "c", "--out", tmp_path / "none.json")
    assert "cases='c': no name of a case in suite 'all' fits" in str(refused.exception)
    assert not (tmp_path / "none.json").exists()
