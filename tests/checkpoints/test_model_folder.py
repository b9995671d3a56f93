"""Model folders: what is saved is loaded, by us and by diffusers, whenever a save is stopped."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from flashddpm.checkpoints import model_folder
from flashddpm.checkpoints.model_folder import (
    WEIGHTS,
    load_conditioning,
    load_scheduler_config,
    load_unet,
    save_model,
)
from flashddpm.networks.conditioning import Conditioning


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_class_embeds", [None, 11])
def test_what_is_saved_is_loaded_bit_for_bit(
    tmp_path: Path,
    dtype: torch.dtype,
    num_class_embeds: int | None,
    small_config: Any,
    scheduler_settings: Any,
    load_network: Any,
    assert_same: Any,
    random_unet: Any,
) -> None:
    config = dataclasses.replace(small_config, num_class_embeds=num_class_embeds)
    unet = random_unet(config).to(dtype)
    save_model(tmp_path / "a" / "b", config, unet.state_dict(), scheduler_settings, Conditioning())
    loaded = load_network(tmp_path / "a" / "b", dtype)
    assert loaded.config == config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_same(loaded.state_dict(), unet.state_dict())
    assert load_scheduler_config(tmp_path / "a" / "b") == scheduler_settings
    with safetensors.safe_open(tmp_path / "a" / "b" / "unet" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # readers of other projects ask for it


def test_casts_to_the_dtype_asked_for(
    saved: Path, assert_same: Any, load_network: Any, random_unet: Any
) -> None:
    assert_same(load_network(saved, torch.float16).state_dict(), random_unet().half().state_dict())
    unet = load_unet(saved, "cpu", "bfloat16")
    assert unet.conv_in.weight.dtype is torch.bfloat16


def test_labels_come_back(
    folder: Path, small_config: Any, scheduler_settings: Any, random_unet: Any
) -> None:
    config = dataclasses.replace(small_config, num_class_embeds=4)
    conditioning = Conditioning(3, 3, ("cat", "dog", "eel"))
    save_model(folder, config, random_unet(config).state_dict(), scheduler_settings, conditioning)
    assert load_conditioning(folder, config) == conditioning
    (folder / "flashddpm.json").unlink()
    assert load_conditioning(folder, config) == Conditioning(4)
    assert load_conditioning(folder, small_config) == Conditioning(None)


def test_flat_folders_load(
    folder: Path, assert_same: Any, scheduler_settings: Any, load_network: Any, random_unet: Any
) -> None:
    for name in ("unet", "scheduler"):
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    assert_same(load_network(folder).state_dict(), random_unet().state_dict())
    assert load_scheduler_config(folder) == scheduler_settings


def test_a_unets_own_folder_loads(
    saved: Path, assert_same: Any, load_network: Any, random_unet: Any
) -> None:
    assert_same(load_network(saved / "unet").state_dict(), random_unet().state_dict())


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    from diffusers.utils import logging

    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_diffusers_loads_what_we_save(
    saved: Path,
    complaints: pytest.LogCaptureFixture,
    assert_same: Any,
    scheduler_settings: Any,
    random_unet: Any,
) -> None:
    import diffusers

    theirs, info = diffusers.UNet2DModel.from_pretrained(
        saved / "unet", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values()), info
    pipeline = diffusers.DDPMPipeline.from_pretrained(saved, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler) is diffusers.DDPMScheduler
    assert scheduler_settings.items() <= {**pipeline.scheduler.config}.items()
    for unet in (theirs, pipeline.unet):
        assert_same(unet.state_dict(), random_unet().state_dict())
    images = pipeline(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 1)
    assert [r.getMessage() for r in complaints.records] == []


def test_diffusers_loads_a_class_conditional_float16_unet(
    tmp_path: Path,
    complaints: pytest.LogCaptureFixture,
    small_config: Any,
    scheduler_settings: Any,
    assert_same: Any,
    random_unet: Any,
) -> None:
    import diffusers

    config = dataclasses.replace(small_config, num_class_embeds=3)
    unet = random_unet(config).half()
    save_model(tmp_path, config, unet.state_dict(), scheduler_settings, Conditioning(2, 2))
    theirs, info = diffusers.UNet2DModel.from_pretrained(
        tmp_path / "unet",
        torch_dtype=torch.float16,
        output_loading_info=True,
        low_cpu_mem_usage=False,
    )
    assert not any(info.values()), info
    assert_same(theirs.state_dict(), unet.state_dict())
    assert [r.getMessage() for r in complaints.records] == []


@pytest.mark.parametrize("scheduler", model_folder.SCHEDULERS)
def test_we_load_what_diffusers_saves(
    tmp_path: Path,
    scheduler: str,
    load_network: Any,
    small_config: Any,
    assert_same: Any,
    random_unet: Any,
) -> None:
    import diffusers

    config = small_config.to_dict()
    del config["_class_name"]
    theirs = diffusers.UNet2DModel(**config)
    theirs.load_state_dict(random_unet().state_dict())
    # DPMSolver's config holds -Infinity, which JSON has not and Python writes.
    pipeline = diffusers.DDPMPipeline(theirs, getattr(diffusers, scheduler)(beta_end=0.03))
    pipeline.save_pretrained(tmp_path)
    ours = load_network(tmp_path)
    assert ours.config == small_config
    assert_same(ours.state_dict(), random_unet().state_dict())
    stored = load_scheduler_config(tmp_path)
    assert (stored["_class_name"], stored["beta_end"]) == (scheduler, 0.03)
    assert load_conditioning(tmp_path, ours.config) == Conditioning()


def test_saving_over_the_loaded_folder(
    folder: Path,
    load_network: Any,
    small_config: Any,
    scheduler_settings: Any,
    assert_same: Any,
    random_unet: Any,
) -> None:
    loaded = load_network(folder)
    before = copy.deepcopy(loaded.state_dict())
    save_model(folder, small_config, loaded.state_dict(), scheduler_settings, Conditioning())
    assert_same(loaded.state_dict(), before)
    assert_same(load_network(folder).state_dict(), before)
    save_model(
        folder, small_config, random_unet(seed=1).state_dict(), scheduler_settings, Conditioning()
    )
    assert_same(loaded.state_dict(), before)
    assert_same(load_network(folder).state_dict(), random_unet(seed=1).state_dict())


def test_loaded_weights_are_not_the_file(folder: Path, load_network: Any, assert_same: Any) -> None:
    loaded = load_network(folder)
    before = copy.deepcopy(loaded.state_dict())
    path = folder / "unet" / WEIGHTS
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert_same(loaded.state_dict(), before)


def test_saving_leaves_the_given_state_alone(
    tmp_path: Path,
    small_config: Any,
    scheduler_settings: Any,
    assert_same: Any,
    random_unet: Any,
    load_network: Any,
) -> None:
    unet = random_unet().to(memory_format=torch.channels_last)
    save_model(tmp_path, small_config, unet.state_dict(), scheduler_settings, Conditioning())
    assert_same(unet.state_dict(), random_unet().state_dict())
    assert_same(load_network(tmp_path).state_dict(), random_unet().state_dict())
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_save_killed_at_any_write_leaves_a_folder_that_loads(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_unet: Any,
    small_config: Any,
    scheduler_settings: Any,
    assert_same: Any,
    load_network: Any,
) -> None:
    new = random_unet(seed=1)
    replace = os.replace
    for kill in range(5):
        root = Path(shutil.copytree(saved, tmp_path / str(kill)))
        left = kill

        def die(source: Path, target: Path) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                save_model(root, small_config, new.state_dict(), scheduler_settings, Conditioning())
        # The fourth file holds the weights; the fifth is the config, the same as before.
        expected = new if kill == 4 else random_unet()
        assert_same(load_network(root).state_dict(), expected.state_dict())
        assert files(root).keys() == files(saved).keys()
    save_model(root, small_config, new.state_dict(), scheduler_settings, Conditioning())
    assert_same(load_network(root).state_dict(), new.state_dict())
