"""A file of results: written as they come, read, and merged with others of the same machine."""

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
"""Schema 1 had no failures, nothing left out and no readings of the card."""

VOLATILE = (
    "command",
    "gpu.sm_clock_mhz",
    "gpu.memory_clock_mhz",
    "gpu.temperature_c",
    "gpu.throttle_reasons",
)
"""What of the environment may differ between runs that merge."""


@dataclass(frozen=True)
class Failure:
    """A case that gave no figures, and why: a check that failed, or an error."""

    case: str
    reason: str


@dataclass
class Run:
    """What was measured on one machine.

    Attributes:
        environment: what figures depend on (harness.environment).
        results: in the order in which they were measured.
        failures: cases without figures.
        left_out: names of cases that were not begun, or not finished, with the reason.
        cards: after each case on a GPU: its name, and clocks, temperature and throttle reasons.
    """

    environment: dict[str, Any]
    results: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    cards: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write JSON, the whole file or nothing of it: a stop loses no earlier result."""
        content = {"schema": SCHEMA, **asdict(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a file.

        Raises:
            ValueError: it is not a file of results.
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
    """Return what differs between two environments, "name: this, that", readings left aside."""
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


def merged(runs: Sequence[Run]) -> Run:
    """Return the runs as one: a case that was measured again has its latest outcome.

    Raises:
        ValueError: they are of different environments.
    """
    whole = Run(runs[0].environment)
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
