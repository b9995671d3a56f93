"""Whatever the files of a model's folder hold, it is a valid model or a CheckpointError.

The named cases run twice: here and in test_hostile_files_pickles.py, for what the error says, and
in a child process (conftest.py), for what they cost (1 GB, 5 s of the processor) and do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from flashddpm.checkpoints.weights import INDEX, PICKLED, WEIGHTS
from flashddpm.io.files import MAX_HEADER, MAX_JSON


def config(**changes: Any) -> Callable[[Path], None]:
    return edit("unet/config.json", **changes)


def scheduler(**changes: Any) -> Callable[[Path], None]:
    return edit("scheduler/scheduler_config.json", **changes)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def content(name: str, value: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).write_bytes(value)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink()
        os.mkfifo(root / name)

    return change


def shard(name: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "unet" / INDEX
        index = json.loads(path.read_text())
        index["weight_map"]["conv_in.bias"] = name
        path.write_text(json.dumps(index))

    return change


def linked_shard(root: Path) -> None:
    path = root / "unet" / "part-0.safetensors"
    outside = root.parent / "outside.safetensors"
    shutil.move(path, outside)
    path.symlink_to(outside)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "unet" / WEIGHTS
        state = safetensors.torch.load(path.read_bytes())
        change(state)
        path.write_bytes(safetensors.torch.save(state))

    return apply


def header(text: bytes, body: bytes = b"") -> Callable[[Path], None]:
    return content(f"unet/{WEIGHTS}", len(text).to_bytes(8, "little") + text + body)


def append(root: Path) -> None:
    path = root / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes() + b"more")


WIDE = b'{"conv_in.bias": {"dtype": "F32", "shape": [%d, 0], "data_offsets": [0, 0]}}' % (2**64 - 1)
NAMES = b",".join(
    b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(70_000)
)
assert 0.8 * MAX_HEADER < len(NAMES) < MAX_HEADER

CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "json larger than its cap": (
        "single",
        content("unet/config.json", b" " * MAX_JSON + b"{}"),
        "larger",
    ),
    "json that is wide": (
        "single",
        content("unet/config.json", b'{"a":[' + b"[]," * (MAX_JSON // 3 - 10) + b"[]]}"),
        "a=.*unknown key",
    ),
    "json that is deep": (
        "single",
        content("unet/config.json", b'{"a":' + b"[" * 20 + b"]" * 20 + b"}"),
        "deep",
    ),
    "json deeper than the stack": (
        "single",
        content("unet/config.json", b"[" * 10**6),
        "recursion",
    ),
    "json of long numbers": (
        "single",
        content("unet/config.json", b'{"a":' + b"9" * 10**6 + b"}"),
        "JSON",
    ),
    "json with a key twice": (
        "single",
        content("scheduler/scheduler_config.json", b'{"a":1,"a":1}'),
        "twice",
    ),
    "json with NaN": ("single", config(norm_eps=float("nan")), "norm_eps=nan: must be finite"),
    "json with Infinity": ("single", scheduler(beta_end=float("inf")), "beta_end=inf"),
    "json with -Infinity elsewhere": (
        "single",
        scheduler(sigma_min=float("-inf")),
        "sigma_min=-inf",
    ),
    "json with a float that overflows": (
        "single",
        content("unet/config.json", b'{"dropout": [1e999]}'),
        "dropout=inf",
    ),
    "a pipe for a config": ("single", pipe("unet/config.json"), "no plain file"),
    "a pipe for the index": ("single", pipe("model_index.json"), "no plain file"),
    "a pipe for weights": ("single", pipe(f"unet/{WEIGHTS}"), "no plain file"),
    "a pipe for a pickle": ("pickled", pipe(f"unet/{PICKLED}"), "no plain file"),
    "a pipe for a shard": ("sharded", pipe("unet/part-0.safetensors"), "no plain file"),
    "a network that is too large": (
        "single",
        config(
            block_out_channels=[65536] * 10,
            down_block_types=["AttnDownBlock2D"] * 10,
            up_block_types=["AttnUpBlock2D"] * 10,
            layers_per_block=16,
            num_class_embeds=10**6,
        ),
        "parameters",
    ),
    "a network of ours that is too large": (
        "ours",
        config(
            dims=[65536] * 11,
            full_attention=[True] * 10,
            attention_heads=[65536] * 10,
            attention_head_dim=[65536] * 10,
            num_mem_kv=65536,
        ),
        "parameters",
    ),
    "sizes that no int64 holds": ("single", config(block_out_channels=[2**70, 2**80]), "block_out"),
    "a size that is absurd": ("single", config(sample_size=10**9), "sample_size"),
    "an unknown network": ("single", config(_class_name="os.system"), "_class_name='os.system'"),
    "an unknown scheduler": (
        "single",
        scheduler(_class_name="__import__"),
        "_class_name='__import__'",
    ),
    "an unknown pipeline": (
        "single",
        edit("model_index.json", _class_name="Mine"),
        "_class_name='Mine'",
    ),
    "a scheduler of a module": (
        "single",
        edit("model_index.json", scheduler=["subprocess", "Popen"]),
        "scheduler=.*subprocess",
    ),
    "too many timesteps": ("single", scheduler(num_train_timesteps=10**12), "num_train_timesteps"),
    "no timesteps": ("single", scheduler(num_train_timesteps=0), "num_train_timesteps"),
    "true timesteps": ("single", scheduler(num_train_timesteps=True), "num_train_timesteps"),
    "betas above one": ("single", scheduler(trained_betas=[0.5, 1.5]), r"betas\[1\]"),
    "many betas": ("single", scheduler(trained_betas=[0.5] * 100_001), "betas of shape"),
    "betas that are lists": ("single", scheduler(trained_betas=[[0.5], [0.5, 1]]), "betas"),
    "more labels than the network has": (
        "single",
        edit("flashddpm.json", num_classes=10**9),
        "num_classes",
    ),
    "a header larger than its cap": (
        "single",
        header(b" " * (MAX_HEADER + 1)),
        "its header claims",
    ),
    "a header of more than there is": (
        "single",
        content(f"unet/{WEIGHTS}", (1 << 20).to_bytes(8, "little") + b"{}"),
        "safetensors",
    ),
    "a header of many tensors": ("single", header(b"{" + NAMES + b"}"), "069999 is not expected"),
    "a header of impossible shapes": ("single", header(WIDE), "safetensors"),
    "bytes after the tensors": ("single", append, "safetensors"),
    "weights that are NaN": (
        "single",
        weights(lambda state: state["conv_in.bias"][3:].fill_(torch.nan)),
        "conv_in.bias holds numbers that are not finite",
    ),
    "a wrong shape": (
        "single",
        weights(lambda state: state.update({"conv_in.bias": torch.zeros(5)})),
        r"conv_in.bias has shape \(5,\)",
    ),
    "a shard above": ("sharded", shard("../part-0.safetensors"), "plain name"),
    "a shard at the root": ("sharded", shard("/etc/passwd"), "plain name"),
    "a shard below": ("sharded", shard("a/part-0.safetensors"), "plain name"),
    "a shard of windows": ("sharded", shard("..\\part-0.safetensors"), "plain name"),
    "a shard with a null": ("sharded", shard("part-0\0.safetensors"), "plain name"),
    "a shard that is a pickle": ("sharded", shard("part.bin"), "plain name"),
    "a shard that is a number": ("sharded", shard(7), "plain name"),
    "a shard that is a list": ("sharded", shard(["part-0.safetensors"]), "plain name"),
    "a shard that is missing": ("sharded", shard("part-9.safetensors"), "is missing"),
    "a shard that is a link out": ("sharded", linked_shard, "link out of the folder"),
    "an index without a map": ("sharded", content(f"unet/{INDEX}", b"{}"), "weight_map"),
    "an index of many shards": (
        "sharded",
        content(
            f"unet/{INDEX}",
            json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(2000)}}).encode(),
        ),
        "names 2000 files",
    ),
}


def test_the_folders_that_are_broken_here_are_valid(
    models: dict[str, Path], form: str, judge: Any
) -> None:
    assert judge(models[form]) is not None


@pytest.mark.timeout(60)  # to open a pipe would take forever
@pytest.mark.parametrize("case", CASES)
def test_named_cases(assert_refused: Any, case: str) -> None:
    assert_refused(*CASES[case])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_named_cases_cost_little_and_do_nothing(
    tmp_path: Path, named_cases: dict[str, Any]
) -> None:
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("conftest.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report.keys() == named_cases.keys()
    assert {name: row[0] for name, row in report.items() if row[0] != "CheckpointError"} == {}
    assert {name: row[1] for name, row in report.items() if row[1]} == {}
