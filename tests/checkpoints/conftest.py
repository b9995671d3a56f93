"""Model folders, ours and diffusers', small networks in them, and changes of their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor

from flashddpm.checkpoints.model_folder import load_unet, save_model
from flashddpm.checkpoints.pretrained import Pretrained, load_pretrained
from flashddpm.checkpoints.weights import LEGACY, PICKLED, WEIGHTS
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.unet import UNet
from flashddpm.networks.unet_config import UNetConfig

CPU = torch.device("cpu")

# Folders of ours.

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


@pytest.fixture(scope="session")
def small_config() -> UNetConfig:
    """The config of the network in ``saved``."""
    return CONFIG


@pytest.fixture(scope="session")
def scheduler_settings() -> dict[str, Any]:
    """The scheduler config in ``saved``."""
    return SCHEDULER


def _random_unet(config: UNetConfig = CONFIG, seed: int = 0) -> UNet:
    unet = UNet(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for p in unet.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return unet


@pytest.fixture(scope="session")
def random_unet() -> Callable[..., UNet]:
    """A function that makes a network of a config whose every weight is random."""
    return _random_unet


@pytest.fixture(scope="session")
def load_network() -> Callable[..., UNet]:
    """A function: the network of a folder on the CPU, in float32 unless told otherwise."""

    def load(folder: Path, dtype: torch.dtype = torch.float32) -> UNet:
        return load_unet(folder, CPU, dtype)

    return load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours; tests that write take ``folder``, a copy of it."""
    root = tmp_path_factory.mktemp("saved") / "model"
    save_model(root, CONFIG, _random_unet().state_dict(), SCHEDULER, Conditioning())
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """A function: two state dicts have the same keys, dtypes and values."""

    def check(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert actual[key].dtype is value.dtype, key
            assert torch.equal(actual[key], value), key

    return check


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """A function that gives a JSON file other values of these keys."""

    def edit(path: Path, **changes: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.fixture(scope="session")
def edit_weights() -> Callable[..., None]:
    """A function that changes the state dict in a folder's weights by a function."""

    def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
        path = folder / "unet" / WEIGHTS
        state = safetensors.torch.load(path.read_bytes())
        change(state)
        path.write_bytes(safetensors.torch.save(state))

    return edit


# Folders of diffusers.

SETTINGS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}


@pytest.fixture(scope="session")
def their_settings() -> dict[str, Any]:
    """The arguments of ``their_unet``."""
    return SETTINGS


def _their_unet(seed: int = 0, **changes: Any) -> diffusers.UNet2DModel:
    unet = diffusers.UNet2DModel(**SETTINGS | changes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return unet


@pytest.fixture(scope="session")
def their_unet() -> Callable[..., diffusers.UNet2DModel]:
    """A function that makes a network of diffusers whose every weight is random."""
    return _their_unet


@pytest.fixture(scope="session")
def load() -> Callable[..., Pretrained]:
    """A function: all that a folder holds, its network on the CPU in float32."""

    def load(source: Any, **options: Any) -> Pretrained:
        return load_pretrained(source, CPU, torch.float32, **options)

    return load


@pytest.fixture(scope="session")
def assert_same_network() -> Callable[..., None]:
    """A function: two networks have the same weights and, nearly, the same outputs."""

    def check(ours: Any, theirs: Any, labels: Tensor | None = None) -> None:
        state = ours.state_dict()
        assert state.keys() == theirs.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
        x, t = torch.randn(2, 3, 8, 8, dtype=theirs.dtype), torch.tensor([3, 998])
        expected = theirs(x, t, class_labels=labels).sample
        tolerance = 1e-5 if theirs.dtype is torch.float32 else 0.1
        torch.testing.assert_close(ours(x, t, labels), expected, rtol=tolerance, atol=tolerance)

    return check


@pytest.fixture(scope="session")
def settings() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function: what a file holds of a scheduler, all but diffusers' note of what nobody set."""

    def stored(scheduler: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in scheduler.items() if key != "_use_default_values"}

    return stored


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A flat repository with the files, keys and names of 2022, as google/ddpm-* are."""
    root = tmp_path / "published"
    root.mkdir()
    state = {}
    for key, value in _their_unet().state_dict().items():
        for old, new in LEGACY.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = value
    assert "mid_block.attentions.0.proj_attn.bias" in state and not any("to_q" in k for k in state)
    torch.save(state, root / PICKLED)
    note = {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}
    (root / "config.json").write_text(json.dumps(note | SETTINGS))
    (root / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "DDPMScheduler",
                "_diffusers_version": "0.1.1",
                "beta_end": 0.02,
                "beta_schedule": "linear",
                "beta_start": 0.0001,
                "clip_sample": True,
                "num_train_timesteps": 1000,
                "trained_betas": None,
                "variance_type": "fixed_large",
            }
        )
    )
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.1.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> Path:
    """What diffusers saves."""
    root = tmp_path / "folder"
    diffusers.DDPMPipeline(_their_unet(), diffusers.DDPMScheduler()).save_pretrained(root)
    return root


@pytest.fixture
def sharded(diffusers_folder: Path) -> Path:
    """What diffusers saves in several files."""
    root = diffusers_folder
    (root / "unet" / WEIGHTS).unlink()
    _their_unet().save_pretrained(root / "unet", max_shard_size="20KB")
    assert len(list((root / "unet").glob("*-of-*.safetensors"))) > 2
    return root
