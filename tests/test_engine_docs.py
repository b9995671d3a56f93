"""The examples of docs/engine.md run, block after block in one namespace."""

import inspect
import re
from pathlib import Path

import torch

import flashddpm as fd

PAGE = Path(__file__).parent.parent / "docs" / "engine.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 3
    space: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), space)

    wanted = space["sampler"].sample([7], 3, 2.0, num_steps=4)
    assert len(blocks[0].strip().splitlines()) <= 10
    assert (space["images"][0] - wanted[0]).abs().max() < 1e-4
    assert (space["images"][0] - space["images"][1]).abs().max() > 0.1

    assert len(space["previews"]) == 3 and all(x.shape == (1, 28, 28) for x in space["previews"])
    assert all(isinstance(result, fd.Result) for result in space["results"])
    assert (space["metrics"]["completed"], space["metrics"]["cancelled"]) == (6, 2)

    assert space["drawn"].shape == (6, 3, 16, 16) and space["drawn"].isfinite().all()
    alone = torch.cat([space["own"].sample(i, num_steps=2 + i) for i in range(6)])
    assert (space["drawn"] - alone).abs().max() < 1e-4


def test_the_table_of_metrics_is_complete():
    sampler = fd.Sampler(lambda x, t: x, fd.NoiseSchedule.create(), shape=(1, 2, 2), device="cpu")
    keys = fd.Engine(sampler, threaded=False).metrics()
    table = TEXT.split("`metrics()` is a plain dict:")[1].split("Rates, occupancy")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(keys)


def test_defaults_and_errors_are_those_of_the_code():
    from flashddpm.serving import launch_limiter, metrics, running_batch

    assert f"at least {running_batch.PLAN_ROWS} rows" in TEXT
    assert f"latest {metrics.WINDOW} steps" in TEXT
    assert launch_limiter.STEPS_AHEAD == 2 and "at most two steps ahead" in TEXT
    for name in (
        "DeadlineExceeded",
        "EngineClosed",
        "NonFiniteError",
        "QueueFull",
        "RequestFailed",
    ):
        assert issubclass(getattr(fd, name), Exception) and f"`{name}`" in TEXT
    assert {"queue_size", "max_failures", "exact"} <= set(inspect.signature(fd.Engine).parameters)
