"""Sampling benchmarks for pytest-benchmark: ours and diffusers', each timed by itself.

    .venv/bin/pytest benchmarks --benchmark-enable --benchmark-json=out.json

runs them in a checkout. pytest-benchmark times one side after the other, so that a drift of the
machine falls on one of them: published figures are those of ``flashddpm bench``, which times both
sides in turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashddpm.benchmarks.cases import sampling
from flashddpm.benchmarks.measure.harness import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
SETTINGS = [
    setting
    for name in ("cifar10", "bundled")
    for setting in sampling.settings(DEVICE, name, DTYPE, "ddim")
]


@pytest.mark.parametrize("side", ["ours", "best", "eager"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_sampling(benchmark: Any, setting: sampling.SamplingSetting, side: str) -> None:
    """Time one call that draws a batch by one side: ours, diffusers at its best or diffusers eager.

    The sides of one setting form a group of the report. A peer (a side of diffusers) is checked
    first to draw the same images as ours, and is skipped where diffusers is not installed.

    Args:
        benchmark: the fixture of pytest-benchmark.
        setting: what is drawn: model, dtype, solver, batch size and number of steps.
        side: "ours", "best" or "eager".

    Raises:
        AssertionError: if the peer's images differ from ours.
    """
    if side == "ours":
        made: Any = sampling.ours(setting, DEVICE)
    else:
        pytest.importorskip("diffusers")
        sampling.agree(setting, side, DEVICE)
        made = sampling.theirs(setting, side, DEVICE)
    benchmark.group = setting.name
    benchmark.extra_info["note"] = setting.note

    def call() -> None:
        made.timed()
        synchronize()

    benchmark.pedantic(call, rounds=setting.rounds, warmup_rounds=1)
