"""What a run tells on its way: its line, its log and its picture."""

import json

import numpy as np
import pytest
from PIL import Image

from flashddpm.training import progress
from flashddpm.training.progress import METRICS, Progress, plot_loss, read_metrics


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_a_line_is_of_the_steps_since_the_last(tmp_path, clock):
    line = Progress(tmp_path / "run", 10, 40, 8, shown=False)
    clock[0] += 4
    line.log(20, 1.0, loss=0.5, learning_rate=1e-3)
    clock[0] += 2
    line.log(30, 1.5, loss=0.25, learning_rate=2e-3)
    line.close()
    rows = [json.loads(row) for row in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert rows == [
        {"step": 20, "loss": 0.5, "learning_rate": 1e-3, "images_per_second": 20.0,
         "loader_wait": 0.25},
        {"step": 30, "loss": 0.25, "learning_rate": 2e-3, "images_per_second": 40.0,
         "loader_wait": 0.25},
    ]  # fmt: skip


def test_the_shown_line_has_loss_rate_wait_and_time_left(tmp_path, capsys):
    line = Progress(tmp_path, 10, 40, 8, shown=True)
    for _ in range(15):
        line.advance()
    line.log(25, 0.0, loss=0.51239)
    line.advance()
    line.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "26/40" in shown and "loss 0.5124" in shown
    assert "images/s" in shown and "loader wait 0%" in shown
    assert "<" in shown and "step/s" in shown  # [elapsed<left, ...]
    Progress(tmp_path, 0, 4, 8, shown=False).advance()
    assert capsys.readouterr().err == ""


def test_lines_that_a_kill_cut_off_cost_themselves_only(tmp_path):
    path = tmp_path / METRICS
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    line = Progress(tmp_path, 1, 4, 8, shown=False)
    line.log(2, 0.0, loss=2.5)
    line.log(3, 0.0, loss=2.0)
    line.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (1, 3.0), (2, 2.5), (3, 2.0),
    ]  # fmt: skip
    assert path.read_bytes().count(b"\n") == 4


def test_of_a_step_that_was_taken_again_the_last_counts(tmp_path):
    assert read_metrics(tmp_path) == []
    rows = ['{"step": 4, "loss": 1}', '{"step": 2, "loss": 2}', "[3]", "\udc80", "{}",
            '{"step": null}', '{"step": 4, "loss": 3}', "null"]  # fmt: skip
    text = "\n".join(rows).encode("utf-8", "surrogateescape")
    (tmp_path / METRICS).write_bytes(text)
    assert read_metrics(tmp_path) == [{"step": 2, "loss": 2}, {"step": 4, "loss": 3}]


def test_the_loss_is_drawn(tmp_path, monkeypatch):
    assert plot_loss(tmp_path) is None
    line = Progress(tmp_path, 0, 400, 8, shown=False)
    line.log(1, 0.0, loss=1.0)
    assert plot_loss(tmp_path) is None  # a point is no line
    for step in range(2, 40):
        line.log(10 * step, 0.0, loss=1 / step)
    path = plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape == (420, 720) and pixels.std() > 5
    path.unlink()
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert plot_loss(tmp_path) is None and not path.exists()
