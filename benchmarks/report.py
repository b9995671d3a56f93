"""Runs as one HTML page that needs no other file: the tables, and pictures within the page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence

from matplotlib.figure import Figure

from flashddpm.benchmarks.plots import PLOTS
from flashddpm.benchmarks.runs import Run
from flashddpm.benchmarks.table import table

STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; }
td, th { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: left; vertical-align: top; }
img { max-width: 100%; }
pre { overflow: auto; font-size: 12px; background: #f6f6f6; padding: 1em; }
"""


def page(runs: Sequence[Run]) -> str:
    """Return the page of some runs, each with its own tables and pictures."""
    body = "".join(_section(run) for run in runs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>flashddpm: measured</title><style>{STYLE}</style></head>"
        f"<body><h1>flashddpm: measured</h1>{body}</body></html>\n"
    )


def _section(run: Run) -> str:
    head, _, rows = table(run).partition("\n\n")
    parts = [f"<h2>{html.escape(head)}</h2>"]
    for title, draw in PLOTS.items():
        figure = draw(run)
        if figure is not None:
            parts.append(f"<h3>{html.escape(title)}</h3>{picture(figure, title)}")
    parts.append(_table(rows))
    parts.append("<h3>What each case does</h3><ul>")
    notes = {result.case: result.note for result in run.results}
    parts += [f"<li>{html.escape(case)}: {html.escape(note)}</li>" for case, note in notes.items()]
    parts.append(f"</ul><pre>{html.escape(json.dumps(run.environment, indent=2))}</pre>")
    return "\n".join(parts)


def picture(figure: Figure, title: str) -> str:
    """Return a figure as an img that holds its own PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _table(markdown: str) -> str:
    """Return a Markdown table, and lines after it, as HTML."""
    lines = markdown.splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    cells = [
        "<tr>" + "".join(f"<{tag}>{html.escape(c.strip())}</{tag}>" for c in row) + "</tr>"
        for row, tag in zip(rows, ["th", *["td"] * len(rows)], strict=False)
    ]
    rest = "".join(f"<p>{html.escape(line)}</p>" for line in lines if line and line[0] != "|")
    return f"<table>{''.join(cells)}</table>{rest}"
