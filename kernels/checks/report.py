"""The text of a scorecard of compiled kernels: tables of at most 120 columns, then what fails."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import triton

from flashddpm.kernels.checks import budgets, sass
from flashddpm.kernels.checks.scorecard import REFERENCE, Entry, Scorecard

WIDTH = 120


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(rows: Sequence[Sequence[Any]], left: int = 2) -> list[str]:
    """Align columns: the first ``left`` to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _variants(entries: Iterable[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """Group by kernel and dtype: one entry an architecture in each group."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.kernel, entry.dtype), []).append(entry)
    return groups


def _resources(card: Scorecard) -> list[str]:
    archs = sorted({entry.arch for entry in card.entries})
    rows: list[list[Any]] = [
        ["kernel", "images", "registers", "shared", "spilled", "access"]
        + ["instructions", "slow", "rounding", "gates"]
    ]
    for (kernel, dtype), group in _variants(card.entries).items():
        shared = max(entry.shared for entry in group)
        spilled = max(entry.stack + entry.local for entry in group)
        widths = {w for entry in group for counts in entry.accesses.values() for w in counts}
        wrong = any(entry.faults or (card.gated and entry.over) for entry in group)
        rows.append(
            [kernel, dtype if group[0].images else "-"]
            + [" ".join(f"{entry.registers:2}" for entry in group), shared, spilled]
            + [",".join(map(str, sorted(widths, reverse=True)))]
            + [" ".join(_number(entry.instructions).rjust(5) for entry in group)]
            + [max(entry.slow for entry in group)]
            + [",".join(sorted({mode for entry in group for mode in entry.rounding})) or "-"]
            + ["FAIL" if wrong else "pass"]
        )
    columns = " ".join(f"sm_{arch}" for arch in archs)
    return [
        f"Compiled for {columns} (registers and instructions in this order, else the largest)",
        "",
        *_table(rows),
        "",
        "registers, and bytes spilled to stack and local memory, of a thread; shared bytes of a",
        "program; bytes of each access of global memory; instructions an element, of a row that",
        "uses every term. Apart from them, slow: instructions a thread of the rare paths of roots",
        "and divisions and their calls. No figure where a loop makes it depend on sizes.",
    ]


def _pipes(card: Scorecard) -> list[str]:
    names = [*sass.PIPES, "unknown"]
    entries = [entry for entry in card.entries if entry.arch == REFERENCE and entry.pipes]
    if not entries:
        return []
    names = [name for name in names if any(name in entry.pipes for entry in entries)]
    rates = [str(pipe.rate or "") if (pipe := sass.PIPES.get(n)) else "" for n in names]
    rows = [["kernel", "images", *names], ["", "lanes a clock", *rates]]
    for entry in entries:
        counts = [_number(entry.pipes.get(name, 0.0)) for name in names]
        rows.append([entry.kernel, entry.dtype if entry.images else "-", *counts])
    return [f"Instructions an element by pipe, sm_{REFERENCE}", "", *_table(rows)]


def bounds(card: Scorecard) -> list[str]:
    """Return the lines of the table of time bounds, in picoseconds for each element of an image.

    There is a row for each ``TimeBound``: the times of memory, of issuing instructions and of three
    parts of a multiprocessor ("integer", "multiply" and "access"), the longest of all its times,
    and what takes it.

    Args:
        card: the scorecard; without time bounds the list is empty.
    """
    if not card.bounds:
        return []
    rows = [["kernel", "images", "memory", "issue", "integer", "multiply", "access", "bound", ""]]
    for bound in card.bounds:
        shown = [_number(bound.times.get(name), 2) for name in rows[0][2:-2]]
        slowest = _number(bound.times[bound.by], 2)
        rows.append([bound.kernel, bound.dtype, *shown, slowest, f"by {bound.by}"])
    return [
        "Picoseconds an element on an H100 SXM by these counts (not measured)",
        "",
        *_table(rows),
        "",
        "memory: the bytes of the lightest row that draws noise, at 3.0 TB/s; the others: every "
        "term,",
        "132 multiprocessors at 1.755 GHz",
    ]


def bytes_moved(card: Scorecard) -> list[str]:
    """Return the lines of the table of bytes moved for each element.

    The columns are the case (an operation with certain arguments), the dtype of the images, the
    bytes counted in Triton's interpreter, by the operation's formula, and of plain PyTorch, and how
    many times the counted bytes plain PyTorch moves ("-" where there is no such code).

    Args:
        card: the scorecard; without counted cases the list is empty.
    """
    rows: list[list[str]] = [["case", "images", "counted", "formula", "plain PyTorch", "times"]]
    for case, dtypes in card.bytes.items():
        for dtype, counts in dtypes.items():
            counted, plain = counts["counted"], counts["plain"]
            times = _number(plain / counted if plain and counted else None)
            found = [_number(counts[name], 0) for name in ("counted", "formula", "plain")]
            rows.append([case, dtype, *found, times])
    if len(rows) == 1:
        return []
    return ["Bytes an element", "", *_table(rows), "", "float16 moves what bfloat16 does"]


def _details(entry: Entry) -> list[str]:
    accesses = [
        f"{name} {' '.join(f'{count}x{width}' for width, count in widths.items())}"
        for name, widths in entry.accesses.items()
    ]
    opcodes = [f"{name} {count}" for name, count in entry.opcodes.items()]
    lines = [entry.name]
    for title, parts in (("accesses", accesses), ("opcodes", opcodes)):
        line = f"  {title}: {', '.join(parts)}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="    ")
    return lines


def _grouped(faults: Iterable[str]) -> list[str]:
    """Name each fault once, with the variants that have it."""
    groups: dict[str, list[str]] = {}
    for fault in faults:
        name, _, what = fault.partition(": ")
        groups.setdefault(what, []).append(name)
    lines = []
    for what, names in groups.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        line = f"FAIL {', '.join(names[:3])}{more}: {what}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="     ")
    return lines


def text(card: Scorecard, verbose: bool = False) -> str:
    """Return a scorecard as text: resources, pipes, time bounds, bytes, faults and the verdict.

    A pipe is a part of a multiprocessor, whose instructions are counted; the verdict is how many
    variants were compiled and how many faults were found.

    Args:
        card: the scorecard.
        verbose: whether to add the accesses and opcodes of every variant.
    """
    sections = [_resources(card), _pipes(card), bounds(card), bytes_moved(card)]
    if verbose:
        sections.append([line for entry in card.entries for line in _details(entry)])
    unknown = sorted({f"{name} ({e.name})" for e in card.entries for name in e.unknown})
    if unknown:
        sections.append(["Opcodes of no known pipe, counted at issue only:", *unknown])
    version = f"Triton {triton.__version__}"
    if not card.gated:
        sections.append(
            [f"Over budget ({version} is not the pinned {budgets.PINNED}: reported, not gated)"]
            + (_grouped(card.excess) or ["none"])
        )
    faults = card.faults
    count = len(card.entries)
    verdict = f"{count} variants with {version}: " + (
        f"{len(faults)} fault{'s' * (len(faults) > 1)}" if faults else "every gate passes"
    )
    sections.append([*_grouped(faults), verdict])
    return "\n\n".join("\n".join(section) for section in sections if section)
