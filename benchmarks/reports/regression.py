"""Whether a second run is slower than the first beyond the noise of both.

What is compared is the ratio peer / ours of each case: both sides ran in turn, so that a machine
that was slower that day changes neither. With r the ratio, [l, h] its quartiles and s the A/A
spread of a run, a case is a regression if

    r_new / r_old < 1 - (s_old + s_new)   and   h_new < l_old,

an improvement if the same holds with the runs exchanged, and noise otherwise. Figures without a
peer have no known noise and are not judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flashddpm.benchmarks.measure.runs import Run, differences

Key = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """One case of both runs.

    Attributes:
        case, peer: what it is.
        verdict: "regression", "improvement", "noise", "failed", "gone" or "new".
        old, new: the ratios; None where there is none.
        noise: the sum of the A/A spreads.
    """

    case: str
    peer: str
    verdict: str
    old: float | None = None
    new: float | None = None
    noise: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether something was lost."""
        return self.verdict in ("regression", "failed")

    def line(self) -> str:
        """Return the verdict in words."""
        what = f"{self.verdict:12} {self.case}" + (f" against {self.peer}" if self.peer else "")
        if self.old is None or self.new is None:
            return what
        change = 100 * (self.new / self.old - 1)
        return f"{what}: {self.old:.2f}x -> {self.new:.2f}x ({change:+.1f}%, A/A {self.noise:.3f})"


def compared(old: Run, new: Run) -> Iterator[Verdict]:
    """Yield a verdict on every case that has a ratio in either run, or failed in the new one."""
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


def _ratios(run: Run) -> dict[Key, dict[str, float]]:
    return {(r.case, r.peer): r.values for r in run.results if "ratio" in r.values}


def _judge(key: Key, old: dict[str, float], new: dict[str, float]) -> Verdict:
    noise = old["spread"] + new["spread"]

    def slower(a: dict[str, float], b: dict[str, float]) -> bool:
        """Whether b is slower than a beyond the noise."""
        return b["ratio"] / a["ratio"] < 1 - noise and b["ratio_high"] < a["ratio_low"]

    verdict = "regression" if slower(old, new) else "improvement" if slower(new, old) else "noise"
    return Verdict(*key, verdict, old["ratio"], new["ratio"], noise)


def report(old: Run, new: Run) -> tuple[str, bool]:
    """Return all verdicts as lines, what was lost first, and whether something was."""
    verdicts = sorted(compared(old, new), key=lambda verdict: not verdict.bad)
    lines = [
        f"environments differ: {line}" for line in differences(old.environment, new.environment)
    ]
    lines += [verdict.line() for verdict in verdicts] or ["nothing to compare: no ratio in both"]
    return "\n".join(lines), any(verdict.bad for verdict in verdicts)
