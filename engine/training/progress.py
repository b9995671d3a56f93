"""The progress of a run: its progress bar, metrics.jsonl, and loss.png if matplotlib is there."""

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
    """The progress bar of a run, and its log, metrics.jsonl.

    Args:
        out: folder of the run.
        step: number of steps that the run has taken.
        steps: number of steps at which it ends.
        batch_size: number of images of a step.
        shown: whether there is a progress bar.
    """

    def __init__(self, out: Path, step: int, steps: int, batch_size: int, shown: bool) -> None:
        from tqdm import tqdm

        self.out, self.batch_size = out, batch_size
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=not shown)
        self._step, self._wait, self._start = step, 0.0, time.perf_counter()

    def advance(self) -> None:
        """Move the progress bar on by a step."""
        self._bar.update()

    def log(self, step: int, wait_seconds: float, **values: float) -> None:
        """Append a line to the log, and show it at the progress bar.

        The line holds ``values``, and since the last line the images a second and the share of the
        time that was spent waiting for images.

        Args:
            step: number of steps that the run has taken.
            wait_seconds: time that the run has waited for images, in all.
            values: what else the line holds; must have ``loss``.
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
    """Return the newline that the end of a file lacks, if it does."""
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read() == b"\n" else b"\n"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, sorted by step; of a step taken twice, the later line."""
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
    """Draw OUT/loss.png, the loss over the steps, and return its path.

    Without matplotlib, or with fewer than two lines in the log, nothing is drawn: return None.
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
