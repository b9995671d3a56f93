"""Running cases: the most telling first, each result written as it ends, within a budget."""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runs import Failure, Run


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        name: unique; its results are named so, or begin so.
        suite: that it belongs to.
        measure: from the device to what was measured. It checks before it times, and raises
            AssertionError where the sides differ.
        needs: packages without which it cannot run.
    """

    name: str
    suite: str
    measure: Callable[[str], Iterator[Measurement]]
    needs: tuple[str, ...] = ()


def installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def able(cases: Sequence[Case], say: Callable[[str], None]) -> tuple[list[Case], list[str]]:
    """Return the cases whose packages are there, and the names of the others: a line a package."""
    missing = {name for case in cases for name in case.needs if not installed(name)}
    for name in sorted(missing):
        count = sum(name in case.needs for case in cases)
        say(f"{name} is not installed: {count} cases are left out")
    left = [case for case in cases if missing & set(case.needs)]
    return [case for case in cases if case not in left], [case.name for case in left]


def run_cases(
    cases: Sequence[Case],
    device: str,
    run: Run,
    out: Path,
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> Run:
    """Measure the cases in order; write ``out`` after each result.

    A case that fails gives no figures after its failure, and the next one follows.

    Args:
        cases: the most telling first.
        device: "cpu" or "cuda".
        run: holds the environment; it is filled.
        out: the file to write.
        budget: seconds after which nothing more is begun: what runs then is finished.
        say: is told each result.
    """
    start = time.perf_counter()
    cases, run.left_out = able(cases, say)
    run.write(out)
    for i, case in enumerate(cases):
        if _spent(start, budget):
            run.left_out += [left.name for left in cases[i:]]
            break
        try:
            with closing(_generator(case, device)) as results:
                for count, result in enumerate(results, 1):
                    run.results.append(result)
                    say(result.line())
                    run.write(out)
                    # A result of the case's own name is its only one.
                    if _spent(start, budget) and case.name != result.case:
                        run.left_out.append(f"{case.name}, after {count} results")
                        break
        except Exception as error:  # whatever one case meets, the others can be measured
            run.failures.append(Failure(case.name, _reason(error)))
            say(f"{case.name}: FAILED, no figures: {_reason(error)}")
        if device == "cuda":
            run.cards.append({"case": case.name, **harness.card_state()})
        _clean()
    run.write(out)
    if run.left_out:
        say("left out: " + "; ".join(run.left_out))
    return run


def _generator(case: Case, device: str) -> Generator[Measurement]:
    yield from case.measure(device)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


def _spent(start: float, budget: float | None) -> bool:
    return budget is not None and time.perf_counter() - start >= budget


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
