"""Comparison of two benchmark runs: which cases are slower, or faster, beyond the noise of both.

Compared is the ratio of the peer's time to ours in each case: both sides ran in turn, so that a
machine that is slower on one day changes no ratio. With r the ratio of a run, [l, h] its quartiles
and s the A/A spread (of our own times against each other), a case is a regression if

    r_new / r_old < 1 - (s_old + s_new)   and   h_new < l_old,

an improvement if the same holds with the runs exchanged, and noise otherwise. Figures without a
peer have no known noise and are not judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashddpm.benchmarks.measure.runs import BenchmarkRun, differences

Key = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one case of two runs: whether it became slower, faster or neither, or failed.

    Attributes:
        case: the name of the case.
        peer: what it is compared with in both runs; "" for a case that failed.
        verdict: "regression", "improvement" or "noise" (no difference beyond it) where both runs
            have a ratio; "failed" if the case failed in the new run only; "gone" if only the old
            run has a ratio; "new" if only the new one has.
        old, new: the ratio of the peer's time to ours in each run; None unless both are known.
        noise: the sum of the two runs' A/A spreads, a difference of ratios; 0 unless both are
            known.
    """

    case: str
    peer: str
    verdict: str
    old: float | None = None
    new: float | None = None
    noise: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether the case failed or is slower beyond the noise, a bool."""
        return self.verdict in ("regression", "failed")

    def line(self) -> str:
        """Return the verdict as one line of text.

        It ends with both ratios, their change in percent and the noise, where both are known.
        """
        what = f"{self.verdict:12} {self.case}" + (f" against {self.peer}" if self.peer else "")
        if self.old is None or self.new is None:
            return what
        change = 100 * (self.new / self.old - 1)
        return f"{what}: {self.old:.2f}x -> {self.new:.2f}x ({change:+.1f}%, A/A {self.noise:.3f})"


def compared(old: BenchmarkRun, new: BenchmarkRun) -> Iterator[Verdict]:
    """Yield a verdict on every case that has a ratio in either run, or failed in the new one.

    Failures come first. A case that failed in both runs has no verdict.

    Args:
        old: the run to compare with.
        new: the run that is judged.
    """
    before, after = _ratios(old), _ratios(new)
    failed = {failure.case for failure in new.failures}
    had = {failure.case for failure in old.failures}
    for case in sorted(failed - had):
        yield Verdict(case, "", "failed")
    for key in dict.fromkeys([*before, *after]):
        if key not in after:
            if key[0] not in failed:
                yield Verdict(*key, "gone")
        elif key not in before:
            yield Verdict(*key, "new")
        else:
            yield _judge(key, before[key], after[key])


def _ratios(run: BenchmarkRun) -> dict[Key, dict[str, float]]:
    return {(r.case, r.peer): r.values for r in run.results if "ratio" in r.values}


def _judge(key: Key, old: dict[str, float], new: dict[str, float]) -> Verdict:
    noise = old["spread"] + new["spread"]

    def slower(a: dict[str, float], b: dict[str, float]) -> bool:
        """Whether b is slower than a beyond the noise."""
        return b["ratio"] / a["ratio"] < 1 - noise and b["ratio_high"] < a["ratio_low"]

    verdict = "regression" if slower(old, new) else "improvement" if slower(new, old) else "noise"
    return Verdict(*key, verdict, old["ratio"], new["ratio"], noise)


def report(old: BenchmarkRun, new: BenchmarkRun) -> tuple[str, bool]:
    """Return the comparison of two runs as text, and whether something became worse.

    Args:
        old: the run to compare with.
        new: the run that is judged.

    Returns:
        Lines of text: the differences of the environments, then the verdicts, failures and
        regressions first; and True if there is a failure or regression among them.
    """
    verdicts = sorted(compared(old, new), key=lambda verdict: not verdict.bad)
    lines = [
        f"environments differ: {line}" for line in differences(old.environment, new.environment)
    ]
    lines += [verdict.line() for verdict in verdicts] or ["nothing to compare: no ratio in both"]
    return "\n".join(lines), any(verdict.bad for verdict in verdicts)
