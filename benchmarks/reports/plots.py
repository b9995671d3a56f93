"""Plots of benchmark results: speed-up by batch size, roofline, parts of a step, and serving.

Needs matplotlib. Each plot of PLOTS takes a `BenchmarkRun` and returns a figure, or None if the run
has no results for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashddpm.benchmarks.measure.harness import Measurement
from flashddpm.benchmarks.measure.runs import BenchmarkRun

DPI = 110
SPEED_UP = re.compile(r"(?P<line>(?!energy).*)-batch-(?P<batch>\d+)(?P<peer>-\w+)?$")
STEP = re.compile(r"step-(?P<line>.*)-batch-(?P<batch>\d+)$")

# Pairs of a batch size and the values of a `Measurement`.
Points = list[tuple[int, dict[str, float]]]


def lines_of(run: BenchmarkRun, pattern: re.Pattern[str], key: str) -> dict[str, Points]:
    """Collect the results that make up the lines of a plot over the batch size.

    Args:
        run: the run whose results are searched.
        pattern: what the names of cases must match from their start; with the groups "line" and
            "batch" (a number), and perhaps "peer".
        key: a name that a result's values must have.

    Returns:
        A dictionary from the name of a line (the groups "line" and "peer" joined) to its points, a
        list of pairs (batch size, the result's values), the smallest batch first.
    """
    found: defaultdict[str, Points] = defaultdict(list)
    for result in run.results:
        match = pattern.match(result.case)
        if match and key in result.values:
            groups = match.groupdict()
            found[groups["line"] + (groups.get("peer") or "")].append(
                (int(groups["batch"]), result.values)
            )
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def crossover(points: Points) -> int | None:
    """Return the batch size from which on ours is no longer faster than the peer beyond the noise.

    Args:
        points: pairs of batch size and values with "ratio" and "spread", the smallest batch first.

    Returns:
        The first batch size from which on every ratio is at most 1 + its spread; None if the last
        ratio is above.
    """
    below = [v["ratio"] <= 1 + v["spread"] for _, v in points]
    for i, (batch, _) in enumerate(points):
        if all(below[i:]):
            return batch
    return None


def speed_up(run: BenchmarkRun) -> Figure | None:
    """Draw how many times as fast as each peer ours is, over the batch size, with quartiles.

    For cases named "graph-..." (CUDA graphs against single launches), a vertical line marks the
    batch size from which on the graph gains nothing (`crossover`).

    Args:
        run: the run to draw.

    Returns:
        A figure; None if no result is a comparison whose case is named by its batch size.
    """
    lines = lines_of(run, SPEED_UP, "ratio")
    if not lines:
        return None
    figure = Figure(figsize=(9, 1.8 + 0.24 * len(lines) + 2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        batches = [batch for batch, _ in points]
        ratios = [v["ratio"] for _, v in points]
        low = [max(0.0, v["ratio"] - v["ratio_low"]) for _, v in points]
        high = [max(0.0, v["ratio_high"] - v["ratio"]) for _, v in points]
        axes.errorbar(batches, ratios, (low, high), fmt="o-", markersize=4, capsize=2, label=name)
        end = crossover(points) if name.startswith("graph-") else None
        if end is not None:
            axes.axvline(end, color="#999999", linestyle=":", linewidth=1)
            axes.annotate(
                "the graph stops paying",
                (end, 1),
                (4, -16),
                textcoords="offset points",
                fontsize="small",
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="images a call", ylabel="times as fast as the peer", ylim=(0, None))
    figure.legend(loc="outside right upper", frameon=False, fontsize="x-small")
    return figure


def roofline(run: BenchmarkRun) -> Figure | None:
    """Draw a roofline plot of whole sampling steps, and each kernel's share of its own bound.

    Steps are marked by operations per byte and TFLOP/s under the measured peak and bandwidth;
    kernels by the time of a call in microseconds and the fraction of what their bytes and
    instructions allow.

    Args:
        run: the run to draw.

    Returns:
        A figure with a panel for steps, one for kernels, or both; None if the run has neither.
    """
    steps = [r for r in run.results if "of_flop_floor" in r.values]
    kernels = [r for r in run.results if "of_bound" in r.values]
    panels = [draw for draw, found in ((_steps, steps), (_kernels, kernels)) if found]
    if not panels:
        return None
    figure = Figure(figsize=(10, 4.5), dpi=DPI, layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, steps if draw is _steps else kernels)
    return figure


def _steps(axes: Axes, results: Sequence[Measurement]) -> None:
    """Mark each step by operations per byte and TFLOP/s, and draw the roof of its dtype."""
    for result in results:
        v = result.values
        speed, intensity = v["gflop"] / v["ms_a_step"], 1e3 * v["gflop"] / v["mbytes"]
        axes.plot(intensity, speed, "s", markersize=5)
        axes.annotate(result.case.removeprefix("step-"), (intensity, speed), fontsize="xx-small")
    for flops, moved in {
        (r.values["tflop_a_second_peak"], r.values["gbyte_a_second_peak"]) for r in results
    }:
        ends = [1.0, flops * 1e3 / moved, 1e4]
        axes.plot(ends, [min(flops, x * moved / 1e3) for x in ends], "-", color="#888888")
    axes.set(xscale="log", yscale="log", title="whole steps")
    axes.set(xlabel="operations a byte", ylabel="TFLOP/s")


def _kernels(axes: Axes, results: Sequence[Measurement]) -> None:
    """Mark each kernel by its time and its share of the bound of its bytes and instructions."""
    for name in dict.fromkeys(r.case.split("-")[0] for r in results):
        mine = [r.values for r in results if r.case.split("-")[0] == name]
        axes.plot([v["us"] for v in mine], [v["of_bound"] for v in mine], ".", label=name)
    axes.axhline(1, color="#888888")
    axes.set(xscale="log", ylim=(0, None), title="kernels")
    axes.set(xlabel="time of a call [us]", ylabel="share of the bound")
    axes.legend(frameon=False, fontsize="x-small")


def split(run: BenchmarkRun) -> Figure | None:
    """Draw each measured sampling step as a bar of three fractions of its time.

    They are the least time of the network (its floor), what the network takes above it, and the
    loop (`shares`).

    Args:
        run: the run to draw.

    Returns:
        A figure with a bar for each model, dtype and batch size; None if no step was measured.
    """
    lines = lines_of(run, STEP, "loop_ms")
    bars = [(f"{name}, {batch}", v) for name, points in lines.items() for batch, v in points]
    if not bars:
        return None
    figure = Figure(figsize=(9, 1 + 0.3 * len(bars)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    names = [name for name, _ in bars]
    parts: dict[str, list[float]] = {"floor": [], "network above its floor": [], "loop": []}
    for _, v in bars:
        for part, share in shares(v).items():
            parts[part].append(share)
    left = [0.0] * len(bars)
    for part, colour in zip(parts, ("#1b6ca8", "#9cc3df", "#d1495b"), strict=True):
        axes.barh(names, parts[part], left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, parts[part], strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="share of a step", xlim=(0, 1))
    axes.tick_params(axis="y", labelsize="x-small")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def shares(v: dict[str, float]) -> dict[str, float]:
    """Return the parts of a sampling step's time as fractions, which add up to 1.

    Args:
        v: the values of a step: "ms_a_step" and "loop_ms", the milliseconds of a step and of the
            loop within it; "of_flop_floor" and "of_byte_floor", the fractions of the step that the
            network's operations at peak speed and its bytes at full bandwidth would take.

    Returns:
        "floor", the larger of these two fractions; "loop"; and "network above its floor", the rest.

    Raises:
        KeyError: if a value is missing.
    """
    loop = min(v["loop_ms"] / v["ms_a_step"], 1.0)
    floor = min(max(v["of_flop_floor"], v["of_byte_floor"]), 1.0 - loop)
    return {"floor": floor, "network above its floor": 1.0 - loop - floor, "loop": loop}


def serving(run: BenchmarkRun) -> Figure | None:
    """Draw latency and throughput of the serving policies against the load.

    Args:
        run: the run to draw.

    Returns:
        A figure of the results with a compiled network, or, where there are none, of those with
        the eager network; None if the run has no results of serving.
    """
    from flashddpm.benchmarks.reports.serving_plot import draw_results

    content = {"results": [asdict(result) for result in run.results]}
    for eager in (False, True):
        try:
            return draw_results(content, eager)
        except ValueError:
            continue
    return None


# The plots of a report: from the title to the function that draws it.
PLOTS: dict[str, Callable[[BenchmarkRun], Figure | None]] = {
    "Speed-up by batch": speed_up,
    "Roofline: whole steps, and kernels": roofline,
    "What a step is made of": split,
    "Serving under load": serving,
}
