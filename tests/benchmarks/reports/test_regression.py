"""A regression is told from noise by the quartiles and the A/A spread of both runs."""

import pytest

from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runs import BenchmarkRun, Failure
from flashddpm.benchmarks.reports import regression


def run(*ratios, failures=(), **environment):
    """Return a run of cases a, b, ...: (ratio, half of the quartiles' range, spread) each."""
    results = []
    for name, each in zip("abc", ratios, strict=False):
        if each:
            ratio, half, spread = each
            values = {"ratio": ratio, "ratio_low": ratio - half, "ratio_high": ratio + half}
            results.append(Measurement(name, "peer", "", values | {"spread": spread}))
    return BenchmarkRun(environment, results, [Failure(name, "x") for name in failures])


def verdicts(old, new):
    return {v.case: v.verdict for v in regression.compared(old, new)}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((2.0, 0.05, 0.02), (1.5, 0.05, 0.02), "regression"),
        ((1.5, 0.05, 0.02), (2.0, 0.05, 0.02), "improvement"),
        ((2.0, 0.05, 0.02), (1.95, 0.01, 0.02), "noise"),  # within the A/A spreads
        ((2.0, 0.05, 0.13), (1.5, 0.05, 0.13), "noise"),  # a quarter less, as A differs from A
        ((2.0, 0.3, 0.02), (1.5, 0.3, 0.02), "noise"),  # the quartiles overlap
        ((2.0, 0.01, 0.0), (1.98, 0.001, 0.0), "regression"),
    ],
)
def test_slower_beyond_the_noise(old, new, verdict):
    assert verdicts(run(old), run(new)) == {"a": verdict}
    text, lost = regression.report(run(old), run(new))
    assert lost == (verdict == "regression") and text.startswith(verdict)


def test_new_gone_and_failed_cases():
    one = (1.0, 0.1, 0.1)
    old, new = run(one, one, failures=("z",)), run(None, None, one, failures=("b", "z"))
    assert verdicts(old, new) == {"b": "failed", "a": "gone", "c": "new"}
    text, lost = regression.report(old, new)
    assert lost and text.splitlines()[0].split() == ["failed", "b"]
    assert not regression.report(old, run(one, failures=("z",)))[1]


def test_figures_without_a_peer_are_not_judged():
    old, new = (BenchmarkRun({}, [Measurement("a", "", "", {"seconds": s})]) for s in (1.0, 9.0))
    assert regression.report(old, new) == ("nothing to compare: no ratio in both", False)


def test_other_environments_are_named():
    text, _ = regression.report(run(threads=1, command="a"), run(threads=2, command="b"))
    assert text.splitlines()[0] == "environments differ: threads: 1, 2"
