"""HTML pages that need no other file: their style, tables and embedded pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; }
td, th { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: left; vertical-align: top; }
img { max-width: 100%; }
pre { overflow: auto; font-size: 12px; background: #f6f6f6; padding: 1em; }
"""


def page(title: str, body: str) -> str:
    """Return an HTML page, from doctype to end, with the project's style and a heading.

    Args:
        title: plain text, which is escaped; it is the page's title and heading.
        body: HTML, which is taken as it is.
    """
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )


def picture(png: bytes, title: str) -> str:
    """Return an HTML img element that holds a PNG in its own text (a data URL).

    Args:
        png: the bytes of a PNG file.
        title: plain text, which is escaped: what stands for the picture where it is not shown.
    """
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def png_of(figure: Figure) -> bytes:
    """Return a matplotlib figure as the bytes of a PNG file, in matplotlib's own resolution."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of plain text as an HTML table, whose head is the first row.

    Args:
        rows: the cells' texts, which are escaped, row by row; rows may differ in length.
    """
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(rows, ["th", *["td"] * len(rows)], strict=False)
    ]
    return f"<table>{''.join(lines)}</table>"
