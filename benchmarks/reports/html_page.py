"""The report of benchmark runs as one HTML page with tables and embedded pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from flashddpm.benchmarks.measure.runs import BenchmarkRun
from flashddpm.benchmarks.reports.plots import PLOTS
from flashddpm.benchmarks.reports.table import table
from flashddpm.io import html_pages


def page(runs: Sequence[BenchmarkRun]) -> str:
    """Return the HTML page of benchmark runs, which needs no other file.

    Args:
        runs: the runs; each has its own pictures, table of results, notes and environment. Without
            runs the page has only its title.

    Raises:
        KeyError: if a run's environment lacks an entry that its table names.
    """
    return html_pages.page("flashddpm: measured", "".join(_section(run) for run in runs))


def _section(run: BenchmarkRun) -> str:
    head, _, rows = table(run).partition("\n\n")
    parts = [f"<h2>{html.escape(head)}</h2>"]
    for title, draw in PLOTS.items():
        figure = draw(run)
        if figure is not None:
            image = html_pages.picture(html_pages.png_of(figure), title)
            parts.append(f"<h3>{html.escape(title)}</h3>{image}")
    parts.append(_table(rows))
    parts.append("<h3>What each case does</h3><ul>")
    notes = {result.case: result.note for result in run.results}
    parts += [f"<li>{html.escape(case)}: {html.escape(note)}</li>" for case, note in notes.items()]
    parts.append(f"</ul><pre>{html.escape(json.dumps(run.environment, indent=2))}</pre>")
    return "\n".join(parts)


def _table(markdown: str) -> str:
    """Return a Markdown table, and lines after it, as HTML."""
    lines = markdown.splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    rest = "".join(f"<p>{html.escape(line)}</p>" for line in lines if line and line[0] != "|")
    return html_pages.table([[cell.strip() for cell in row] for row in rows]) + rest
