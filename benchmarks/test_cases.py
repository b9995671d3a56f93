"""The sides of the most telling cases, each timed by pytest-benchmark, in a checkout:

    .venv/bin/pytest benchmarks --benchmark-enable --benchmark-json=out.json

pytest-benchmark times one side after the other, so that a drift of the machine falls on one of
them: ``flashddpm bench``, which times them in turn, is what figures are quoted from.
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
def test_sampling(benchmark: Any, setting: sampling.Setting, side: str) -> None:
    """A call of one side, compared with the others of its group; the images are checked first."""
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
