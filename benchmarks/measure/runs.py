"""Files of benchmark results: writing, reading, and merging those of the same machine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashddpm.benchmarks.measure.harness import Measurement

SCHEMA = 2
READABLE = (1, 2)
"""The versions of the file format that can be read. Files of version 1 have no failures, no names
of cases that were left out and no readings of the GPU."""

VOLATILE = (
    "command",
    "gpu.sm_clock_mhz",
    "gpu.memory_clock_mhz",
    "gpu.temperature_c",
    "gpu.throttle_reasons",
)
"""The entries of the environment that may differ between runs that are merged, by dotted name."""


@dataclass(frozen=True)
class Failure:
    """A benchmark case that raised an exception, kept with the results so that reports show it.

    Attributes:
        case: the name of the case.
        reason: the text of the check that failed, or the name and text of another error.
    """

    case: str
    reason: str


@dataclass
class BenchmarkRun:
    """The results of benchmark cases on one machine: the content of a file of results.

    Attributes:
        environment: the facts on which timings depend, as `harness.environment` returns them.
        results: the results in the order in which they were measured.
        failures: the cases that failed, with the reason.
        left_out: the names of cases that were not begun, for lack of time or of a package; and
            "NAME, after N results" for a case that ran out of time.
        cards: the state of the GPU after each case: a dictionary with the case's name as "case" and
            the entries of `harness.card_state`; empty on the CPU.
    """

    environment: dict[str, Any]
    results: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    cards: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the run as a JSON file, which replaces an older one at once.

        A stop in the middle leaves the older file whole.

        Args:
            path: the file to write; its folder is made if it is missing. The text is written first
                to a file of the same name with ".part" appended.

        Raises:
            OSError: if the folder or the file cannot be written.
        """
        content = {"schema": SCHEMA, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path) -> BenchmarkRun:
        """Read a file of results.

        Args:
            path: a JSON file that `write` wrote.

        Raises:
            ValueError: if the file cannot be read, is not JSON, or is no file of results in a
                version of READABLE.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            schema = content.pop("schema")
            if schema not in READABLE:
                raise ValueError(f"schema={schema!r}: must be one of {READABLE}")
            results = [Measurement(**result) for result in content.pop("results")]
            failures = [Failure(**failure) for failure in content.pop("failures", [])]
            return cls(results=results, failures=failures, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: is no file of results: {error!r}") from error


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the differences between two environments, one string for each entry that differs.

    Clock rates, temperature, throttle reasons and the command line (VOLATILE) are not compared.

    Args:
        a, b: environments as `harness.environment` returns them.

    Returns:
        Strings such as "versions.torch: '2.8.0', '2.9.0'", sorted by name, with the value of ``a``
        first and None for an entry that is missing; nested names are joined by dots.
    """
    first, second = _flat(a), _flat(b)
    return [
        f"{name}: {first.get(name)!r}, {second.get(name)!r}"
        for name in sorted(first.keys() | second.keys())
        if name not in VOLATILE and first.get(name) != second.get(name)
    ]


def _flat(environment: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in environment.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def merged(runs: Sequence[BenchmarkRun]) -> BenchmarkRun:
    """Merge runs of one machine into a new run, the latest result of each case winning.

    A result replaces an earlier one of the same case and peer. A case that was measured again, or
    failed again, loses its earlier failures; a later failure does not remove earlier results. The
    runs themselves are not changed.

    Args:
        runs: at least one run, the oldest first.

    Returns:
        A new run with the first one's environment and the ``cards`` of all; its ``left_out`` keeps
        the names for which no run has a result or a failure of that very name.

    Raises:
        ValueError: if the environments differ in more than clock rates, temperature, throttle
            reasons and the command line (VOLATILE).
        IndexError: if there are no runs.
    """
    whole = BenchmarkRun(runs[0].environment)
    for run in runs:
        unlike = differences(whole.environment, run.environment)
        if unlike:
            raise ValueError(
                f"environment: must be the same in all files; differs in {'; '.join(unlike)}"
            )
        measured = {(result.case, result.peer) for result in run.results}
        names = {result.case for result in run.results} | {f.case for f in run.failures}
        whole.results = [r for r in whole.results if (r.case, r.peer) not in measured]
        whole.failures = [f for f in whole.failures if f.case not in names]
        whole.results += run.results
        whole.failures += run.failures
        whole.cards += run.cards
    done = {result.case for result in whole.results} | {f.case for f in whole.failures}
    named = dict.fromkeys(name for run in runs for name in run.left_out)
    whole.left_out = [name for name in named if name not in done]
    return whole
