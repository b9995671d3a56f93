"""Configs, indices and labels of a folder that are missing, broken or of something else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flashddpm.checkpoints.model_folder import (
    load_conditioning,
    load_scheduler_config,
)
from flashddpm.errors import CheckpointError


def test_missing_folders_and_configs(folder: Path, load_network: Any) -> None:
    for path in (folder / "nowhere", folder / "model_index.json"):
        with pytest.raises(CheckpointError, match=f"^{path}: no such folder"):
            load_network(path)
    for sub, name, read in (
        ("unet", "config.json", load_network),
        ("scheduler", "scheduler_config.json", load_scheduler_config),
    ):
        (folder / sub / name).unlink()
        with pytest.raises(CheckpointError, match=f"^{folder / sub / name}: is missing"):
            read(folder)
        (folder / sub / name).mkdir()
        with pytest.raises(CheckpointError, match=f"^{folder / sub / name}: cannot be read"):
            read(folder)


BROKEN_JSON = {
    "must hold a JSON object": b"[1, 2]",
    "cannot be read as JSON: Exp": b"{'a': 1}",
    "cannot be read as JSON: 'utf-8'": b'{"a": "\xff"}',
    "cannot be read as JSON: Expecting value": b"",
    "cannot be read as JSON: maximum recursion": b'{"a": ' + b"[" * 200_000,
    "cannot be read as JSON: Exceeds": b'{"a": ' + b"9" * 5000 + b"}",
    "cannot be read as JSON: a key stands twice": b'{"in_channels": 1, "in_channels": 2}',
    "is larger than 1048576 bytes": b" " * (1 << 20) + b"{}",
}


@pytest.mark.parametrize("message", BROKEN_JSON)
def test_broken_json_is_refused(
    folder: Path, message: str, load_network: Any, small_config: Any
) -> None:
    for path, read in (
        (folder / "unet" / "config.json", load_network),
        (folder / "scheduler" / "scheduler_config.json", load_scheduler_config),
        (folder / "flashddpm.json", lambda root: load_conditioning(root, small_config)),
    ):
        path.write_bytes(BROKEN_JSON[message])
        with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
            read(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cross_attention_dim", 8),
        ("block_out_channels", None),
        ("block_out_channels", {"a": 1}),
        ("freq_shift", "1"),
        ("down_block_types", [["DownBlock2D"], "DownBlock2D"]),
        ("attention_head_dim", 3),
        ("norm_eps", "small"),
        ("norm_eps", -1e-5),
        ("_class_name", "UNet2DConditionModel"),
        ("act_fn", []),
    ],
)
def test_configs_that_cannot_be_built_are_refused(
    folder: Path, key: str, value: Any, edit_json: Any, load_network: Any
) -> None:
    path = folder / "unet" / "config.json"
    edit_json(path, **{key: value})
    with pytest.raises(CheckpointError, match=f"^{path}: {key}="):
        load_network(folder)


@pytest.mark.parametrize("channels", [[65536, 65536], [32768, 65536], [4096, 8192]])
def test_configs_of_more_parameters_than_the_budget_are_refused(
    folder: Path, channels: list[int], edit_json: Any, load_network: Any
) -> None:
    path = folder / "unet" / "config.json"
    edit_json(path, block_out_channels=channels)
    with pytest.raises(CheckpointError, match=rf"^{path}: it asks for \d+ parameters; at most 4"):
        load_network(folder)


def test_a_pipeline_of_other_classes_is_refused(
    folder: Path, scheduler_settings: Any, edit_json: Any
) -> None:
    path = folder / "model_index.json"
    for key, value in (
        ("_class_name", "StableDiffusionPipeline"),
        ("unet", ["diffusers", "UNet2DConditionModel"]),
        ("unet", ["my_module", "UNet2DModel"]),
        ("unet", "UNet2DModelOfMine"),
        ("scheduler", ["diffusers", "PNDMScheduler"]),
        ("scheduler", {"os": "system"}),
    ):
        before = path.read_text()
        edit_json(path, **{key: value})
        with pytest.raises(CheckpointError, match=f"^{path}: {key}="):
            load_scheduler_config(folder)
        path.write_text(before)
    path.write_text("{}")
    assert load_scheduler_config(folder) == scheduler_settings


def test_the_pipeline_says_which_scheduler_it_is(
    folder: Path, edit_json: Any, scheduler_settings: Any
) -> None:
    path = folder / "model_index.json"
    edit_json(path, scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert load_scheduler_config(folder) == {
        **scheduler_settings,
        "_class_name": "EulerDiscreteScheduler",
    }
    edit_json(path, _class_name="DDIMPipeline")
    assert load_scheduler_config(folder)["_class_name"] == "DDIMScheduler"
    edit_json(path, _class_name="DDPMPipeline", scheduler=[None, None])
    assert load_scheduler_config(folder) == scheduler_settings


def test_unknown_schedulers_are_refused(folder: Path, edit_json: Any) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    for name in ("PNDMScheduler", None, ["DDPMScheduler"]):
        edit_json(path, _class_name=name)
        with pytest.raises(CheckpointError, match=f"^{path}: _class_name=.*must be one of DDPM"):
            load_scheduler_config(folder)


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ("num_classes=5: must be in 1..4", {"num_classes": 5}),
        ("num_classes='3'", {"num_classes": "3"}),
        ("null_label=4: must be in 0..3", {"num_classes": 3, "null_label": 4}),
        ("null_label=True", {"null_label": True}),
        ("class_names=", {"num_classes": 3, "class_names": ["a", "b"]}),
        ("class_names='abc'", {"num_classes": 3, "class_names": "abc"}),
        ("class_names=", {"class_names": ["a"]}),
    ],
)
def test_labels_that_the_network_has_not_are_refused(
    folder: Path, message: str, value: dict[str, Any], small_config: Any
) -> None:
    path = folder / "flashddpm.json"
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
        load_conditioning(folder, dataclasses.replace(small_config, num_class_embeds=4))


def test_labels_of_an_unconditional_network_are_refused(folder: Path, small_config: Any) -> None:
    path = folder / "flashddpm.json"
    path.write_text('{"num_classes": 1}')
    with pytest.raises(CheckpointError, match=f"^{path}: num_classes=1"):
        load_conditioning(folder, small_config)
