"""Reports of the solver study: a Markdown table, and a plot of distance against number of steps.

A study is the dictionary that `solver_study` writes as JSON:

* "format": FORMAT;
* "settings": what the results depend on, by name;
* "results": a list of dictionaries with "solver", "grid" (a key of GRIDS), "steps" (the number of
  steps), "frechet" (the Frechet distance to real images) and "seconds_to_draw";
* "left_out": a list of dictionaries with "solver", "grid", "steps" and "reason";
* "environment": versions, device and dtype; and "training": the Frechet distance of as many
  training images, or None. A new study lacks both until it is first run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.diffusion.timesteps import SIGMA_SPACINGS, SPACINGS
from flashddpm.io.files import read_json
from flashddpm.io.html_pages import png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
MARKS = "osD^vP"
GRIDS: dict[str, dict[str, str]] = {
    **{name: {"spacing": name} for name in SPACINGS},
    **{name: {"spacing": "linspace", "sigmas": name} for name in SIGMA_SPACINGS},
}
"""Ways to space the steps: from the name in tables to the arguments of `Sampler.plan`."""

PLACE = re.compile(r"(<!-- solver study: (\S+) -->\n).*?(<!-- end of solver study -->)", re.DOTALL)


def read_study(path: Path) -> dict[str, Any]:
    """Read a solver study from a JSON file.

    Args:
        path: a file that `solver_study` wrote.

    Returns:
        The study, a dictionary with the keys that the module lists.

    Raises:
        ValueError: if the file is missing, is not a JSON object of at most 1 MiB, or is no solver
            study in this format.
    """
    study = read_json(path)
    parts = [study.get("settings"), study.get("results"), study.get("left_out")]
    if study.get("format") != FORMAT or [*map(type, parts)] != [dict, list, list]:
        raise ValueError(f"{path}: is no solver study in format {FORMAT}")
    return study


def key_of(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return the tuple that identifies a result: (solver, grid, steps).

    Args:
        result: a dictionary with the keys "solver" (a name), "grid" (the name of the spacing of the
            steps) and "steps" (their number): a result, or a case that was left out.

    Raises:
        KeyError: if one of these keys is missing.
    """
    return result["solver"], result["grid"], result["steps"]


def table(study: dict[str, Any]) -> str:
    """Return a study as a Markdown table of Frechet distances.

    It has a row for each solver and spacing and a column for each number of steps, whose best
    distance is bold. A sentence about the settings stands above, the cases left out below.

    Args:
        study: a study that was run (the module lists the keys), with "environment" and "training".

    Raises:
        KeyError: if a key of the study is missing.
    """
    values = {key_of(result): result["frechet"] for result in study["results"]}
    steps = sorted({n for _, _, n in values})
    best = {n: min(v for (_, _, m), v in values.items() if m == n) for n in steps}
    settings, where = study["settings"], study["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"{settings['images']:,} images a point, guidance 1, {where['device']}, "
        f"{where['dtype']}, {versions}; model {settings['model'][:19]}; features: "
        f"{settings['features_name']}. Training images, as many: "
        + ("not measured." if study["training"] is None else f"{study['training']:.2f}."),
        "",
        "| solver | spacing | " + " | ".join(f"{n} steps" for n in steps) + " |",
        "|---|---|" + "---|" * len(steps),
    ]
    for solver, grid in dict.fromkeys((s, g) for s, g in _pairs(values)):
        cells = [_cell(values.get((solver, grid, n)), best[n]) for n in steps]
        lines.append(f"| {solver} | {grid} | {' | '.join(cells)} |")
    for case in study["left_out"]:
        lines += ["", f"Left out: {case['solver']}, {case['grid']}, {case['steps']} steps: "]
        lines[-1] += case["reason"]
    return "\n".join(lines)


def _pairs(values: dict[tuple[Any, ...], float]) -> list[tuple[str, str]]:
    """Return the pairs of solver and spacing with values, in the order of SOLVERS and GRIDS."""
    order = [(solver, grid) for solver in SOLVERS for grid in GRIDS]
    known = {(solver, grid) for solver, grid, _ in values}
    return [pair for pair in order if pair in known]


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return ""
    return f"**{value:.2f}**" if value == best else f"{value:.2f}"


def find_places(page: Path) -> str:
    """Return the text of a Markdown page, after checking that it has a place for a study's table.

    The place begins with ``<!-- solver study: FILE.json -->`` and ends with
    ``<!-- end of solver study -->``.

    Args:
        page: the page.

    Raises:
        ValueError: if the page cannot be read or has no such place.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"page={str(page)!r}: cannot be read: {error}") from None
    if not PLACE.search(text):
        raise ValueError(
            f"page={str(page)!r}: must say <!-- solver study: FILE.json --> and, below it, "
            "<!-- end of solver study -->"
        )
    return text


def filled(page: Path) -> str:
    """Return the text of a Markdown page with its tables of studies updated; nothing is written.

    Args:
        page: the page, which names files of studies relative to its own folder.

    Raises:
        ValueError: if the page cannot be read, names no file, or names one that is no study.
        KeyError: if a study lacks a key that its table needs.
    """

    def place(found: re.Match[str]) -> str:
        return f"{found[1]}\n{table(read_study(page.parent / found[2]))}\n\n{found[3]}"

    return PLACE.sub(place, find_places(page))


def plot(study: dict[str, Any]) -> bytes:
    """Draw Frechet distance against number of steps: a panel for each spacing, a line per solver.

    A dotted line is the distance of training images, where it is known.

    Args:
        study: a study (the module lists the keys) with at least one result, and with "training".

    Returns:
        The bytes of a PNG file.

    Raises:
        ImportError: if matplotlib is not installed.
        KeyError: if a key of the study is missing.
        ValueError: if the study has no results.
    """
    from matplotlib.figure import Figure

    values = {key_of(result): result["frechet"] for result in study["results"]}
    grids = [grid for grid in GRIDS if any(g == grid for _, g, _ in values)]
    rows, columns = -(-len(grids) // 3), min(len(grids), 3)
    figure = Figure(figsize=(11, 1 + 3.2 * rows), dpi=110, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, grid in zip(panels, grids, strict=False):
        _panel(axes, grid, values)
        if study["training"] is not None:
            axes.axhline(study["training"], color="#888888", linestyle=":")
    for axes in panels[len(grids) :]:
        axes.set_axis_off()
    figure.legend(*_legend(panels), loc="outside lower center", ncols=len(SOLVERS), frameon=False)
    return png_of(figure)


def _panel(axes: Axes, grid: str, values: dict[tuple[Any, ...], float]) -> None:
    """Draw the lines of one spacing.

    A solver has the same colour and mark in all panels; marks differ in size, so that equal lines
    remain visible.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    for i, solver in enumerate(SOLVERS):
        points = sorted((n, v) for (s, g, n), v in values.items() if (s, g) == (solver, grid))
        if points:
            (line,) = axes.plot(*zip(*points, strict=True), color=f"C{i}", label=solver, alpha=0.8)
            line.set(marker=MARKS[i % len(MARKS)], markersize=8 - i)
    ticks = sorted({n for _, _, n in values})
    axes.set(title=grid, xscale="log", yscale="log", xlabel="steps", ylabel="Frechet distance")
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.label_outer()


def _legend(panels: list[Axes]) -> tuple[list[Any], list[str]]:
    """Return one line of each solver that was drawn, and the solvers' names."""
    found: dict[str, Any] = {}
    for axes in panels:
        for line in axes.get_lines():
            if line.get_label() in SOLVERS:
                found.setdefault(str(line.get_label()), line)
    names = [name for name in SOLVERS if name in found]
    return [found[name] for name in names], names
