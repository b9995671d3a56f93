"""The progress of a training run: its progress bar, its log metrics.jsonl, and the plot loss.png.

The plot is drawn only where matplotlib is installed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import time
from pathlib import Path
from typing import Any

from flashddpm.io.files import write_atomic

METRICS = "metrics.jsonl"


class Progress:
    """The progress bar of a training run, and its log, the file OUT/metrics.jsonl.

    Args:
        out: the folder of the run, OUT.
        step: the number of steps that the run has taken so far, those before a resume included.
        steps: the number of steps at which it ends.
        batch_size: the number of images in a step, over all processes.
        shown: whether a progress bar is shown; the log is written in either case.

    Attributes:
        out, batch_size: the arguments.
    """

    def __init__(self, out: Path, step: int, steps: int, batch_size: int, shown: bool) -> None:
        from tqdm import tqdm

        self.out, self.batch_size = out, batch_size
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=not shown)
        self._step, self._wait, self._start = step, 0.0, time.perf_counter()

    def advance(self) -> None:
        """Move the progress bar on by one step."""
        self._bar.update()

    def log(self, step: int, wait_seconds: float, **values: float) -> None:
        """Append a line, a JSON object, to metrics.jsonl, and show it beside the progress bar.

        The keys are "step", those of ``values``, "images_per_second" and "loader_wait", the
        fraction (0..1) of the time spent waiting for images; the last two are of the time since the
        last line.

        Args:
            step: the number of steps that the run has taken.
            wait_seconds: the total time that the run has waited for images, in seconds.
            values: further numbers of the line by key; "loss" is required.

        Raises:
            KeyError: if ``values`` has no "loss".
            OSError: if the file cannot be written.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = (step - self._step) * self.batch_size / seconds
        wait = (wait_seconds - self._wait) / seconds
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {rate:.0f} images/s, loader wait {100 * wait:.0f}%"
        )
        self.out.mkdir(parents=True, exist_ok=True)
        line = {"step": step, **values, "images_per_second": rate, "loader_wait": wait}
        with open(self.out / METRICS, "ab") as file:
            # A kill may have cut off the last line, which must not spoil this one too.
            file.write(_missing_newline(self.out / METRICS) + json.dumps(line).encode() + b"\n")
        self._step, self._wait, self._start = step, wait_seconds, time.perf_counter()

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()


def _missing_newline(path: Path) -> bytes:
    """Return a newline, as bytes, if a file is not empty and does not end with one, else none."""
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read() == b"\n" else b"\n"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, sorted by step; [] if there is no such file.

    Of a step that was logged twice the later line is returned; lines that are cut off are left out.

    Args:
        out: the folder of the run.

    Returns:
        The JSON object of each line: "step", "loss", "learning_rate", "images_per_second" and
        "loader_wait" (a fraction, 0..1), as `Progress.log` and `Trainer.run` wrote them.
    """
    path = out / METRICS
    if not path.exists():
        return []
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
            lines[int(line["step"])] = line
        except (KeyError, TypeError, ValueError):
            continue  # a line that a kill cut off
    return [lines[step] for step in sorted(lines)]


def plot_loss(out: Path) -> Path | None:
    """Draw the loss of a run over its steps, on a logarithmic axis, as the picture OUT/loss.png.

    Args:
        out: the folder of the run, OUT, whose metrics.jsonl is read.

    Returns:
        The path of the picture; None, and nothing is drawn, without matplotlib or with fewer than
        two lines in the log.

    Raises:
        OSError: if the picture cannot be written.
    """
    lines = read_metrics(out)
    if len(lines) < 2 or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss since the last point")
    axes.set_yscale("log")
    axes.grid(True, alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    path = out / "loss.png"
    write_atomic(path, content.getvalue())
    return path
