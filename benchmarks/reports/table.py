"""Benchmark results as Markdown tables, and the pages of documentation that hold such tables.

    python -m flashddpm.benchmarks.reports.table README.md docs/benchmarks.md

updates the tables of these pages in place. Where a page says ``<!-- results: FILE.json -->``, a
path relative to the page, the table of that file replaces whatever stands between there and
``<!-- end of results -->``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from flashddpm.benchmarks.measure.runs import BenchmarkRun

PLACE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def table(run: BenchmarkRun) -> str:
    """Return the results of a run as a Markdown table, below a sentence about the machine.

    Args:
        run: the run; results, failures and cases that were left out are listed.

    Raises:
        KeyError: if the environment lacks an entry that the sentence names.
    """
    where = run.environment
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    card = f"{where['gpu']['name']}, " if where["gpu"] else ""
    lines = [
        f"{card}{where['cpu']} ({where['capability']}), {where['threads']} threads, "
        f"Python {where['python']}, {versions}, commit {where['commit']}.",
        "",
        "| case | ours | peer | times as fast (quartiles) | A/A spread |",
        "|---|---|---|---|---|",
    ]
    for result in run.results:
        v = result.values
        if "ratio" in v:
            lines.append(
                f"| {result.case} | {_time(v['ours_seconds'])} | {result.peer}: "
                f"{_time(v['peer_seconds'])} | {v['ratio']:.2f} "
                f"({v['ratio_low']:.2f} to {v['ratio_high']:.2f}) | {v['spread']:.2f} |"
            )
        else:
            lines.append(f"| {result.case} | {_figures(v) or result.peer} | | | |")
    for failure in run.failures:
        lines.append(f"| {failure.case} | failed: {failure.reason} | | | |")
    if run.left_out:
        lines += ["", f"Left out: {', '.join(run.left_out)}."]
    return "\n".join(lines)


def _figures(values: dict[str, float]) -> str:
    """Return values that are no comparison as text, each with its quartiles if they are known."""
    parts = []
    for name, value in values.items():
        whole = name.removesuffix("_low").removesuffix("_high")
        if whole != name and whole in values:
            continue
        spread = [values[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in values]
        quartiles = f" ({spread[0]:.3g} to {spread[1]:.3g})" if len(spread) == 2 else ""
        parts.append(f"{name.replace('_', ' ')} {value:.3g}{quartiles}")
    return ", ".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def filled(page: Path) -> str:
    """Return the text of a Markdown page with its tables of results updated; nothing is written.

    Args:
        page: the page, which names files of results relative to its own folder.

    Raises:
        OSError: if the page cannot be read.
        ValueError: if the page is not UTF-8, or a file that it names cannot be read or is no file
            of results.
    """

    def place(found: re.Match[str]) -> str:
        return f"{found[1]}\n{table(BenchmarkRun.read(page.parent / found[2]))}\n\n{found[3]}"

    return PLACE.sub(place, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(filled(Path(name)), encoding="utf-8")
