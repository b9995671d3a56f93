"""Plots of serving: the engine's slots over time, and latency and throughput against load.

    python -m flashddpm.benchmarks.reports.serving_plot --slots docs/slots.png
    python -m flashddpm.benchmarks.reports.serving_plot RESULTS.json docs/serving.png

A slot is the place of one image in the engine's batch. Needs matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from flashddpm.benchmarks.cases import serving
from flashddpm.benchmarks.reports.serving_record import Bar, record
from flashddpm.checkpoints.bundled import bundled
from flashddpm.sampling.sampler import Sampler
from flashddpm.serving.engine import Engine

DPI = 110
COLOURS = {"ddim": "Blues", "ddpm": "Greens", "dpmpp_2m": "Oranges"}
LINES = {"in-flight": "#1b6ca8", "static": "#d1495b", "one-at-a-time": "#7a7a7a"}
PANELS = (
    ("p50_seconds", "median latency [s]", True),
    ("p99_seconds", "99th percentile latency [s]", True),
    ("throughput_per_second", "finished [images/s]", False),
)
"""Of each panel: the name of the value drawn, its label, and whether its axis is logarithmic."""

# The recorded run has so few slots and images that each step can be seen.
SLOTS, IMAGES, LOAD, SEED = 8, 32, 0.95, 3


def shade(solver: str, step: int, num_steps: int) -> tuple[float, float, float, float]:
    """Return the colour of a step: a shade of its solver's colour, from light to dark.

    Args:
        solver: the solver's name, a key of COLOURS.
        step: the number of the step, from 0 (the lightest) to num_steps - 1 (the darkest).
        num_steps: the number of steps of the image, at least 2.

    Returns:
        Red, green, blue and alpha, each from 0 to 1.

    Raises:
        KeyError: if the solver has no colour.
        ZeroDivisionError: if ``num_steps`` is 1.
    """
    red, green, blue, alpha = colormaps[COLOURS[solver]](0.25 + 0.6 * step / (num_steps - 1))
    return red, green, blue, alpha


def draw_slots(bars: Sequence[Bar], due: NDArray[np.float64], slots: int) -> Figure:
    """Draw which image was in which slot over time, a rectangle for each step.

    Args:
        bars: the steps of all images in the order in which they ran; not empty.
        due: when each request arrived, float64 [n], in seconds; marked along the top.
        slots: the number of slots (places of images in the batch).

    Raises:
        ValueError: if there are no bars.
        KeyError: if a bar's solver has no colour in COLOURS.
    """
    figure = Figure(figsize=(9, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    patches = [Rectangle((bar.start, bar.slot - 0.4), bar.end - bar.start, 0.8) for bar in bars]
    colours = [shade(bar.solver, bar.step, bar.num_steps) for bar in bars]
    axes.add_collection(
        PatchCollection(patches, facecolors=colours, edgecolors="white", linewidths=0.4)
    )
    ends = {bar.image: bar for bar in bars}
    for first in (bar for bar in bars if bar.step == 0):
        last = ends[first.image]
        guided = first.guidance != 1
        box = Rectangle(
            (first.start, first.slot - 0.4),
            last.end - first.start,
            0.8,
            fill=False,
            edgecolor="black",
            linewidth=1.4 if guided else 0.5,
        )
        axes.add_patch(box)
    axes.plot(due, np.full(len(due), -0.85), "v", color="black", markersize=4, clip_on=False)
    axes.set(xlim=(0, max(bar.end for bar in bars)), ylim=(slots - 0.5, -1.1))
    axes.set(xlabel="time [s]", yticks=range(slots), ylabel="slot")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    names = [name for name in COLOURS if any(bar.solver == name for bar in bars)]
    keys: list[Any] = [Patch(color=shade(name, 1, 2), label=name) for name in names]
    keys += [
        Patch(facecolor="white", edgecolor="black", linewidth=1.4, label="guided: two lanes"),
        axes.plot([], [], "v", color="black", markersize=4, label="a request arrives")[0],
    ]
    figure.legend(
        handles=keys,
        loc="outside upper center",
        ncols=len(keys),
        frameon=False,
        fontsize="small",
        title="one rectangle a step, light at an image's first and dark at its last",
        title_fontsize="small",
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file.

    Args:
        figure: a matplotlib figure.
        path: the file to write.

    Raises:
        OSError: if the file cannot be written.
    """
    figure.savefig(path, pil_kwargs={"optimize": True})


def picture_of_slots(compiled: bool = False) -> Figure:
    """Serve requests by the bundled model on the CPU, and draw its slots over time.

    32 requests of mixed solvers arrive at random at 8 slots, at 0.95 of the rate that the engine
    was measured to finish.

    Args:
        compiled: whether the network is compiled, which takes minutes.
    """
    sampler = Sampler.from_pretrained(bundled(), "cpu", "float32", compile=compiled)
    requests = serving.make_requests(serving.MIXES["mixed"], IMAGES, SEED)
    engine = Engine(sampler, SLOTS, threaded=False)
    engine.warm()
    for _ in range(2):  # the second tells how many images a second
        seconds = record(engine, requests, np.zeros(IMAGES))[-1].end
    rate = LOAD * IMAGES / seconds
    due = serving.arrivals(rate, IMAGES, SEED)
    due -= due[0]
    bars = record(engine, requests, due)
    engine.shutdown()
    return draw_slots(bars, due, SLOTS)


def curves(content: dict[str, Any], mix: str) -> dict[str, list[dict[str, float]]]:
    """Collect the results of each serving policy for one mix of requests.

    Args:
        content: the content of a file of results; "results" is a list of dictionaries with the
            fields of a `Measurement`, of which "case" and "values" are read.
        mix: the name of the mix, a key of ``serving.MIXES``, or "eager-" and one for results with
            the eager network.

    Returns:
        From a policy's name ("in-flight", "static" or "one-at-a-time") to the values of its
        results, the smallest load first; policies without results are left out.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LINES}
    for result in content["results"]:
        for name in LINES:
            case, values = result["case"], result["values"]
            if case.startswith(f"serving-{mix}-") and case.endswith(name) and "load" in values:
                found[name].append(values)
    return {
        name: sorted(values, key=lambda value: value["load"])
        for name, values in found.items()
        if values
    }


def draw_results(content: dict[str, Any], eager: bool = False) -> Figure:
    """Draw latency and throughput of serving policies against load, a row for each mix.

    The load is the rate of arrivals as a fraction of what full static batches can do.

    Args:
        content: the content of a file of results: "results" is a list of dictionaries with the
            fields of a `Measurement`.
        eager: whether to draw the results with the eager network, not those with the compiled one.

    Raises:
        ValueError: if there are no such results of serving.
    """
    mixes = {mix: curves(content, f"eager-{mix}" if eager else mix) for mix in serving.MIXES}
    mixes = {mix: lines for mix, lines in mixes.items() if lines}
    if not mixes:
        raise ValueError("results: hold no case of serving; must be of --suite serving")
    figure = Figure(figsize=(10, 2.7 * len(mixes) + 0.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(mixes), len(PANELS), squeeze=False, sharex=True, sharey="col")
    for row, (mix, lines) in zip(grid, mixes.items(), strict=True):
        for axes, (figure_name, label, log) in zip(row, PANELS, strict=True):
            _panel(axes, lines, figure_name, log)
            axes.set_ylabel(label)
        row[0].set_title(f"{mix} requests", loc="left", fontweight="bold", fontsize="medium")
    figure.supxlabel("load: arrivals, over what full static batches can do", fontsize="medium")
    grid[0, -1].set_ylim(bottom=0)  # when all is drawn: it fixes the other end too
    handles, labels = grid[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _panel(axes: Axes, lines: dict[str, list[dict[str, float]]], figure: str, log: bool) -> None:
    """Draw the median of one value of each policy against load, its quartiles as a band."""
    if figure == "throughput_per_second":
        values = next(iter(lines.values()))
        loads, offered = ([v[key] for v in values] for key in ("load", "offered_per_second"))
        axes.plot(loads, offered, ":", color="black", linewidth=1, label="offered")
    for name, values in lines.items():
        loads = [v["load"] for v in values]
        low, high = ([v[f"{figure}_{end}"] for v in values] for end in ("low", "high"))
        axes.fill_between(loads, low, high, color=LINES[name], alpha=0.18, linewidth=0)
        middle = [v[figure] for v in values]
        label = name.replace("-", " ") if name != "static" else "full static batches"
        axes.plot(loads, middle, "o-", color=LINES[name], markersize=4, label=label)
    axes.set_xticks(loads)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main(
    results: Annotated[Path | None, typer.Argument(help="A JSON file of --suite serving.")] = None,
    out: Annotated[Path | None, typer.Argument(help="The PNG to draw of it.")] = None,
    slots: Annotated[Path | None, typer.Option(help="Record a run; draw it here.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Record the compiled network (minutes).")
    ] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="Draw the results of --eager, not the compiled.")
    ] = False,
) -> None:
    """Draw plots of serving: slots over time, and latency and throughput against load."""
    if (results is None) != (out is None) or (results is None and slots is None):
        raise typer.BadParameter("give RESULTS.json and a PNG, or --slots and a PNG, or both")
    if results is not None and out is not None:
        save(draw_results(json.loads(results.read_text(encoding="utf-8")), eager), out)
    if slots is not None:
        save(picture_of_slots(compiled), slots)


if __name__ == "__main__":
    typer.run(main)
