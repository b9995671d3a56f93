from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flashddpm.checkpoints import model_folder
from flashddpm.checkpoints.model_folder import (
    WEIGHTS,
    load_conditioning,
    load_scheduler_config,
    load_unet,
    save_model,
    write_atomic,
)
from flashddpm.errors import CheckpointError
from flashddpm.io.files import MAX_HEADER
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.unet import UNet
from flashddpm.networks.unet_config import UNetConfig

CPU = torch.device("cpu")
CONFIG = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=4,
)
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
    "timestep_spacing": "trailing",
}


def random_unet(config: UNetConfig = CONFIG, seed: int = 0) -> UNet:
    unet = UNet(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for p in unet.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return unet


def load(folder: Path, dtype: torch.dtype = torch.float32) -> UNet:
    return load_unet(folder, CPU, dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours; tests that write take ``folder``, a copy of it."""
    root = tmp_path_factory.mktemp("saved") / "model"
    save_model(root, CONFIG, random_unet().state_dict(), SCHEDULER, Conditioning())
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype is value.dtype, key
        assert torch.equal(actual[key], value), key


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "unet" / WEIGHTS
    state = safetensors.torch.load(path.read_bytes())
    edit(state)
    path.write_bytes(safetensors.torch.save(state))


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_class_embeds", [None, 11])
def test_what_is_saved_is_loaded_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, num_class_embeds: int | None
) -> None:
    config = dataclasses.replace(CONFIG, num_class_embeds=num_class_embeds)
    unet = random_unet(config).to(dtype)
    save_model(tmp_path / "a" / "b", config, unet.state_dict(), SCHEDULER, Conditioning())
    loaded = load(tmp_path / "a" / "b", dtype)
    assert loaded.config == config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_same(loaded.state_dict(), unet.state_dict())
    assert load_scheduler_config(tmp_path / "a" / "b") == SCHEDULER
    with safetensors.safe_open(tmp_path / "a" / "b" / "unet" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # readers of other projects ask for it


def test_casts_to_the_dtype_asked_for(saved: Path) -> None:
    assert_same(load(saved, torch.float16).state_dict(), random_unet().half().state_dict())
    unet = load_unet(saved, "cpu", "bfloat16")
    assert unet.conv_in.weight.dtype is torch.bfloat16


def test_labels_come_back(folder: Path) -> None:
    config = dataclasses.replace(CONFIG, num_class_embeds=4)
    conditioning = Conditioning(3, 3, ("cat", "dog", "eel"))
    save_model(folder, config, random_unet(config).state_dict(), SCHEDULER, conditioning)
    assert load_conditioning(folder, config) == conditioning
    (folder / "flashddpm.json").unlink()
    assert load_conditioning(folder, config) == Conditioning(4)
    assert load_conditioning(folder, CONFIG) == Conditioning(None)


def test_flat_folders_load(folder: Path) -> None:
    for name in ("unet", "scheduler"):
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    assert_same(load(folder).state_dict(), random_unet().state_dict())
    assert load_scheduler_config(folder) == SCHEDULER


def test_a_unets_own_folder_loads(saved: Path) -> None:
    assert_same(load(saved / "unet").state_dict(), random_unet().state_dict())


# diffusers


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    from diffusers.utils import logging

    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_diffusers_loads_what_we_save(saved: Path, complaints: pytest.LogCaptureFixture) -> None:
    import diffusers

    theirs, info = diffusers.UNet2DModel.from_pretrained(
        saved / "unet", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values()), info
    pipeline = diffusers.DDPMPipeline.from_pretrained(saved, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler) is diffusers.DDPMScheduler
    assert SCHEDULER.items() <= {**pipeline.scheduler.config}.items()
    for unet in (theirs, pipeline.unet):
        assert_same(unet.state_dict(), random_unet().state_dict())
    images = pipeline(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 1)
    assert [r.getMessage() for r in complaints.records] == []


def test_diffusers_loads_a_class_conditional_float16_unet(
    tmp_path: Path, complaints: pytest.LogCaptureFixture
) -> None:
    import diffusers

    config = dataclasses.replace(CONFIG, num_class_embeds=3)
    unet = random_unet(config).half()
    save_model(tmp_path, config, unet.state_dict(), SCHEDULER, Conditioning(2, 2))
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
def test_we_load_what_diffusers_saves(tmp_path: Path, scheduler: str) -> None:
    import diffusers

    config = CONFIG.to_dict()
    del config["_class_name"]
    theirs = diffusers.UNet2DModel(**config)
    theirs.load_state_dict(random_unet().state_dict())
    # DPMSolver's config holds -Infinity, which JSON has not and Python writes.
    pipeline = diffusers.DDPMPipeline(theirs, getattr(diffusers, scheduler)(beta_end=0.03))
    pipeline.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config == CONFIG
    assert_same(ours.state_dict(), random_unet().state_dict())
    stored = load_scheduler_config(tmp_path)
    assert (stored["_class_name"], stored["beta_end"]) == (scheduler, 0.03)
    assert load_conditioning(tmp_path, ours.config) == Conditioning()


# Failures


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def header(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


WIDE = b'{"conv_in.bias": {"dtype": "F32", "shape": [%d, 0], "data_offsets": [0, 0]}}' % (2**64 - 1)

BROKEN_WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "is missing": lambda path: path.unlink(),
    "cannot be read as safetensors: Error while": lambda path: truncate(path, 0.9),
    "cannot be read as safetensors: Err": lambda path: truncate(path, 0),
    "cannot be read as safetensors: .*header": lambda path: path.write_bytes(b"\7" * 1000),
    "cannot be read as safetensors: its header claims": lambda path: path.write_bytes(
        header(b" " * (MAX_HEADER + 1))
    ),
    "cannot be read as safetensors: reshape": lambda path: path.write_bytes(header(WIDE)),
    "does not match config.json: .*is missing": lambda path: path.write_bytes(header(b"{}")),
}


@pytest.mark.parametrize("message", BROKEN_WEIGHTS)
def test_broken_weights_are_refused(folder: Path, message: str) -> None:
    path = folder / "unet" / WEIGHTS
    BROKEN_WEIGHTS[message](path)
    with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
        load(folder)


def test_every_mismatch_is_listed(folder: Path) -> None:
    def edit(state: dict[str, Tensor]) -> None:
        del state["conv_in.bias"]
        state["extra.weight"] = torch.zeros(2)
        state["conv_out.weight"] = torch.zeros(1, 4, 3, 1)
        state["conv_out.bias"] = torch.zeros(1, dtype=torch.int64)
        state["conv_norm_out.bias"] = torch.zeros(4, dtype=torch.float8_e4m3fn)
        state["time_embedding.linear_1.bias"] = torch.full((16,), 1.0, dtype=torch.complex64)
        state["time_embedding.linear_1.weight"][3, 1] = torch.nan
        state["conv_norm_out.weight"][0] = torch.inf

    edit_weights(folder, edit)
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    message = str(raised.value)
    assert message.startswith(f"{folder / 'unet' / WEIGHTS}: does not match config.json: ")
    assert sorted(message.split(": ", 2)[2].split("; ")) == [
        "conv_in.bias is missing",
        "conv_norm_out.bias holds torch.float8_e4m3fn, must hold floating-point numbers",
        "conv_norm_out.weight holds numbers that are not finite in torch.float32",
        "conv_out.bias holds torch.int64, must hold floating-point numbers",
        "conv_out.weight has shape (1, 4, 3, 1), must be (1, 4, 3, 3)",
        "extra.weight is not expected",
        "time_embedding.linear_1.bias holds torch.complex64, must hold floating-point numbers",
        "time_embedding.linear_1.weight holds numbers that are not finite in torch.float32",
    ]


def test_weights_that_overflow_in_the_dtype_asked_for_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda state: state["conv_in.bias"].fill_(1e5))
    assert load(folder).conv_in.bias[0] == 1e5
    with pytest.raises(CheckpointError, match=r"conv_in\.bias holds .* in torch.float16"):
        load(folder, torch.float16)


def test_missing_folders_and_configs(folder: Path) -> None:
    for path in (folder / "nowhere", folder / "model_index.json"):
        with pytest.raises(CheckpointError, match=f"^{path}: no such folder"):
            load(path)
    for sub, name, read in (
        ("unet", "config.json", load),
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
def test_broken_json_is_refused(folder: Path, message: str) -> None:
    for path, read in (
        (folder / "unet" / "config.json", load),
        (folder / "scheduler" / "scheduler_config.json", load_scheduler_config),
        (folder / "flashddpm.json", lambda root: load_conditioning(root, CONFIG)),
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
def test_configs_that_cannot_be_built_are_refused(folder: Path, key: str, value: Any) -> None:
    path = folder / "unet" / "config.json"
    edit_json(path, **{key: value})
    with pytest.raises(CheckpointError, match=f"^{path}: {key}="):
        load(folder)


@pytest.mark.parametrize("channels", [[65536, 65536], [32768, 65536], [4096, 8192]])
def test_configs_of_more_parameters_than_the_budget_are_refused(
    folder: Path, channels: list[int]
) -> None:
    path = folder / "unet" / "config.json"
    edit_json(path, block_out_channels=channels)
    with pytest.raises(CheckpointError, match=rf"^{path}: it asks for \d+ parameters; at most 4"):
        load(folder)


def test_a_pipeline_of_other_classes_is_refused(folder: Path) -> None:
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
    assert load_scheduler_config(folder) == SCHEDULER


def test_the_pipeline_says_which_scheduler_it_is(folder: Path) -> None:
    path = folder / "model_index.json"
    edit_json(path, scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert load_scheduler_config(folder) == {**SCHEDULER, "_class_name": "EulerDiscreteScheduler"}
    edit_json(path, _class_name="DDIMPipeline")
    assert load_scheduler_config(folder)["_class_name"] == "DDIMScheduler"
    edit_json(path, _class_name="DDPMPipeline", scheduler=[None, None])
    assert load_scheduler_config(folder) == SCHEDULER


def test_unknown_schedulers_are_refused(folder: Path) -> None:
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
    folder: Path, message: str, value: dict[str, Any]
) -> None:
    path = folder / "flashddpm.json"
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
        load_conditioning(folder, dataclasses.replace(CONFIG, num_class_embeds=4))


def test_labels_of_an_unconditional_network_are_refused(folder: Path) -> None:
    path = folder / "flashddpm.json"
    path.write_text('{"num_classes": 1}')
    with pytest.raises(CheckpointError, match=f"^{path}: num_classes=1"):
        load_conditioning(folder, CONFIG)


# Writing


def test_saving_over_the_loaded_folder(folder: Path) -> None:
    loaded = load(folder)
    before = copy.deepcopy(loaded.state_dict())
    save_model(folder, CONFIG, loaded.state_dict(), SCHEDULER, Conditioning())
    assert_same(loaded.state_dict(), before)
    assert_same(load(folder).state_dict(), before)
    save_model(folder, CONFIG, random_unet(seed=1).state_dict(), SCHEDULER, Conditioning())
    assert_same(loaded.state_dict(), before)
    assert_same(load(folder).state_dict(), random_unet(seed=1).state_dict())


def test_loaded_weights_are_not_the_file(folder: Path) -> None:
    loaded = load(folder)
    before = copy.deepcopy(loaded.state_dict())
    path = folder / "unet" / WEIGHTS
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert_same(loaded.state_dict(), before)


def test_saving_leaves_the_given_state_alone(tmp_path: Path) -> None:
    unet = random_unet().to(memory_format=torch.channels_last)
    save_model(tmp_path, CONFIG, unet.state_dict(), SCHEDULER, Conditioning())
    assert_same(unet.state_dict(), random_unet().state_dict())
    assert_same(load(tmp_path).state_dict(), random_unet().state_dict())
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, b"new")
    assert files(tmp_path) == {"file": b"old"}
    write_atomic(path, b"new")
    assert files(tmp_path) == {"file": b"new"}


def test_a_write_is_on_the_disk_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        done.append(kind)
        if kind == "file":
            assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"content"]
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        done.append("rename")
        assert source.parent == target.parent
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomic(tmp_path / "file", b"content")
    assert done == ["file", "rename", "folder"]


def test_a_save_killed_at_any_write_leaves_a_folder_that_loads(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
                save_model(root, CONFIG, new.state_dict(), SCHEDULER, Conditioning())
        # The fourth file holds the weights; the fifth is the config, the same as before.
        expected = new if kill == 4 else random_unet()
        assert_same(load(root).state_dict(), expected.state_dict())
        assert files(root).keys() == files(saved).keys()
    save_model(root, CONFIG, new.state_dict(), SCHEDULER, Conditioning())
    assert_same(load(root).state_dict(), new.state_dict())
