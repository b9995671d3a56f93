"""Running benchmark cases in order within a limit of time, each result written as it ends."""

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
from flashddpm.benchmarks.measure.runs import BenchmarkRun, Failure


@dataclass(frozen=True)
class BenchmarkCase:
    """A benchmark case: a name, and the function that measures; the unit that a run can leave out.

    Attributes:
        name: a unique name; the names of its results are the same or begin with it.
        suite: the suite (group of cases) that it belongs to: "sampling", "step", "kernels",
            "training", "startup" or "serving".
        measure: called with the device, "cpu" or "cuda"; yields the results. It checks that both
            sides compute the same before it times them, and raises AssertionError if they do not.
        needs: the import names of the packages without which the case cannot run.
    """

    name: str
    suite: str
    measure: Callable[[str], Iterator[Measurement]]
    needs: tuple[str, ...] = ()


def installed(package: str) -> bool:
    """Return whether a package can be found for import, without importing it.

    Args:
        package: the name of a top-level package, as in an import statement.
    """
    return importlib.util.find_spec(package) is not None


def able(
    cases: Sequence[BenchmarkCase], say: Callable[[str], None]
) -> tuple[list[BenchmarkCase], list[str]]:
    """Split cases into those that can run and those that need a package which is not installed.

    Args:
        cases: the cases, in order.
        say: called with one line of text for each missing package.

    Returns:
        The cases that can run, and the names of the others, both in the order given.
    """
    missing = {name for case in cases for name in case.needs if not installed(name)}
    for name in sorted(missing):
        count = sum(name in case.needs for case in cases)
        say(f"{name} is not installed: {count} cases are left out")
    left = [case for case in cases if missing & set(case.needs)]
    return [case for case in cases if case not in left], [case.name for case in left]


def run_cases(
    cases: Sequence[BenchmarkCase],
    device: str,
    run: BenchmarkRun,
    out: Path,
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> BenchmarkRun:
    """Measure cases in order and write all results to a file after each one.

    Whatever Exception a case raises becomes a `Failure` of the run; results that it gave before
    stay, and the next case follows.

    Args:
        cases: the cases, the most telling first.
        device: "cpu" or "cuda".
        run: the run to fill in place; it holds the environment already.
        out: the JSON file to write.
        budget: the seconds from the start after which nothing more is begun: the result under way
            is finished, and the cases not begun, or not finished, are named in ``run.left_out``;
            None for no limit.
        say: called with a line of text for each result, failure and missing package.

    Returns:
        ``run`` itself.

    Raises:
        OSError: if the file cannot be written.
        ImportError: if the device is "cuda" and pynvml is not installed.
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


def _generator(case: BenchmarkCase, device: str) -> Generator[Measurement]:
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
