"""A trained model and how it is sampled: from a folder, the hub or live diffusers objects.

What Sampler.from_pretrained, Sampler.from_diffusers and Sampler.save_pretrained do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.checkpoint import (
    UNETS,
    Conditioning,
    find,
    load_conditioning,
    load_scheduler_config,
    load_unet,
    save_model,
)
from flashddpm.defaults import MULTISTEP, SCHEDULERS, SamplingDefaults
from flashddpm.errors import CheckpointError
from flashddpm.hub import locate
from flashddpm.networks import Network, NetworkConfig
from flashddpm.parameterization import PREDICTION_TYPES
from flashddpm.schedule import TABLES, NoiseSchedule
from flashddpm.unet import UNet
from flashddpm.unet_config import UNetConfig
from flashddpm.weights import mismatches

DEFAULTED = "_use_default_values"
"""In a live config of diffusers, the keys that nobody has set: another class takes its own."""


@dataclass(frozen=True)
class Pretrained:
    """What a sampler is made of.

    Attributes:
        unet: the network, in evaluation mode.
        scheduler: the config that the rest is read from, with diffusers' keys and ``_class_name``.
        schedule, prediction_type, defaults: what that config says.
        shape: (C, H, W) of an image.
        conditioning: what labels the network takes.
    """

    unet: Network
    scheduler: dict[str, Any]
    schedule: NoiseSchedule
    prediction_type: str
    defaults: SamplingDefaults
    shape: tuple[int, int, int]
    conditioning: Conditioning


def load_pretrained(
    source: str | PathLike[str],
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    revision: str | None = None,
    tables: str = "float64",
) -> Pretrained:
    """Load a model in diffusers' layout.

    Args:
        source: a folder, of a pipeline or flat; or OWNER/NAME on the Hugging Face Hub.
        device, dtype: of the network.
        allow_pickle: read .bin weights where there are no safetensors.
        revision: on the hub, a branch, tag or commit.
        tables: of the schedule, as NoiseSchedule.from_config takes it.

    Raises:
        CheckpointError: no such model, files missing or broken, or one that we cannot sample.
        ValueError: an argument that is not allowed.
    """
    arguments.boolean("allow_pickle", allow_pickle)
    arguments.one_of("tables", tables, TABLES)
    folder = locate(source, allow_pickle, revision)
    unet = load_unet(folder, device, dtype, allow_pickle)
    config = load_scheduler_config(folder)
    conditioning = load_conditioning(folder, unet.config)
    path = find(folder, "unet", "config.json")
    try:
        shape = _shape(unet.config)
        path = find(folder, "scheduler", "scheduler_config.json")
        schedule, prediction_type, defaults = _read_scheduler(config, tables)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Pretrained(unet, config, schedule, prediction_type, defaults, shape, conditioning)


def load_diffusers(
    model: Any,
    scheduler: Any = None,
    conditioning: Conditioning | None = None,
    tables: str = "float64",
) -> Pretrained:
    """Take over a live DDPMPipeline or DDIMPipeline of diffusers, or a UNet2DModel.

    Args:
        model: the pipeline or the U-Net; its weights are copied, on their device, in their dtype.
        scheduler: diffusers', needed beside a U-Net; beside a pipeline, in place of its own.
        conditioning: what labels the network takes; by default every embedding is a class.
        tables: of the schedule, as NoiseSchedule.from_config takes it.

    Raises:
        ValueError: objects of other classes, subclasses with code of their own among them, or
            settings that we have no rows or layers for.
    """
    arguments.one_of("tables", tables, TABLES)
    unet = getattr(model, "unet", model)
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps it
    if scheduler is None:
        scheduler = getattr(model, "scheduler", None)
    if scheduler is None:
        raise ValueError("scheduler=None: must be given beside a U-Net")
    arguments.one_of("model", type(unet).__name__, UNETS)
    config, schedule, prediction_type, defaults = read_live_scheduler(scheduler, tables)
    try:
        twin = _copy_unet(UNetConfig.from_dict(_plain(unet.config)), unet.state_dict())
        shape = _shape(twin.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {error}") from error
    labels = conditioning or Conditioning(twin.config.num_class_embeds)
    return Pretrained(twin, config, schedule, prediction_type, defaults, shape, labels)


def read_live_scheduler(
    scheduler: Any, tables: str = "float64"
) -> tuple[dict[str, Any], NoiseSchedule, str, SamplingDefaults]:
    """Return scheduler, schedule, prediction_type and defaults of Pretrained.

    Args:
        scheduler: a live one of diffusers.
        tables: of the schedule, as NoiseSchedule.from_config takes it.

    Raises:
        ValueError: an object of another class, or settings that we have no rows for.
    """
    name = arguments.one_of("scheduler", type(scheduler).__name__, SCHEDULERS)
    config = {**_plain(scheduler.config), "_class_name": name}
    config[DEFAULTED] = [*scheduler.config.get(DEFAULTED, ())]
    try:
        return config, *_read_scheduler(config, tables)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"scheduler: {error}") from error


def save_pretrained(
    folder: str | PathLike[str], network: Any, scheduler: Mapping[str, Any], labels: Conditioning
) -> None:
    """Write a folder that diffusers loads, and load_pretrained too; over an old one, if need be.

    Args:
        folder: made if it does not exist.
        network: our UNet; its weights are stored in their dtype.
        scheduler: of Pretrained, or scheduler_config's.
        labels: what labels the network takes.

    Raises:
        ValueError: the network is not our UNet, or the folder is a file.
    """
    if not isinstance(network, Network):
        kind = type(network).__name__
        raise ValueError(f"network={kind}: only flashddpm's UNet has a folder's layout")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"folder={str(folder)!r}: is a file; must be a folder, or nothing yet")
    stored = {key: value for key, value in scheduler.items() if key != DEFAULTED}
    save_model(folder, network.config, network.state_dict(), stored, labels)


def scheduler_config(
    schedule: NoiseSchedule, prediction_type: str, defaults: SamplingDefaults
) -> dict[str, Any]:
    """Return the scheduler config of a sampler that was not loaded: its betas, one by one.

    Raises:
        ValueError: defaults that diffusers' class for this solver has no setting for.
    """
    solver = defaults.solver
    multistep = {algorithm: key for key, algorithm in MULTISTEP.items()}
    kind = "dpmpp_2m" if solver in multistep else solver
    name = {value: key for key, value in SCHEDULERS.items()}[kind]
    config: dict[str, Any] = {
        "_class_name": name,
        "num_train_timesteps": len(schedule),
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": prediction_type,
        "timestep_spacing": defaults.spacing,
        "steps_offset": defaults.steps_offset,
    }
    if solver in multistep:
        config["algorithm_type"] = multistep[solver]
    if defaults.sigmas:
        config[f"use_{defaults.sigmas}_sigmas"] = True
    if defaults.threshold:
        config |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": defaults.threshold,
            "sample_max_value": defaults.clip,
        }
    elif name in ("DDPMScheduler", "DDIMScheduler"):
        config |= {"clip_sample": defaults.clip > 0, "clip_sample_range": defaults.clip or 1.0}
    if name == "DDPMScheduler":
        config["variance_type"] = defaults.variance_type
    if SamplingDefaults.from_config(config) != defaults:
        raise ValueError(f"defaults={defaults}: {name} has no settings for all of them")
    return config


def _read_scheduler(
    config: Mapping[str, Any], tables: str
) -> tuple[NoiseSchedule, str, SamplingDefaults]:
    kind = config.get("prediction_type", "epsilon")
    return (
        NoiseSchedule.from_config(config, tables=tables),
        arguments.one_of("prediction_type", kind, PREDICTION_TYPES),
        SamplingDefaults.from_config(config),
    )


def _shape(config: NetworkConfig) -> tuple[int, int, int]:
    """Return (C, H, W) of an image; there are C channels out, or 2C with learned variance."""
    C, size = config.in_channels, config.sample_size
    if size is None:
        raise ValueError("sample_size=None: must name the size of an image")
    if config.out_channels not in (C, 2 * C):
        raise ValueError(
            f"out_channels={config.out_channels}: must be in_channels={C}, or twice as many"
        )
    H, W = (size, size) if isinstance(size, int) else size
    return C, H, W


def _plain(config: Any) -> dict[str, Any]:
    """Return a live object's config as a file would hold it."""
    if not isinstance(config, Mapping):
        raise ValueError(f"config={type(config).__name__}: must be a mapping")
    return {
        key: value.tolist() if hasattr(value, "tolist") else value
        for key, value in config.items()
        if not key.startswith("_")
    }


def _copy_unet(config: UNetConfig, state: Mapping[str, Tensor]) -> UNet:
    """Return our U-Net with copies of these weights."""
    with torch.device("meta"):
        unet = UNet(config)
    kinds = {(value.device, value.dtype) for value in state.values()}
    if len(kinds) != 1:
        raise ValueError("its weights must be on one device, in one dtype")
    ((device, dtype),) = kinds
    arguments.resolve_device(device)
    arguments.resolve_dtype(dtype, dtype)
    wrong = mismatches(unet, state, dtype)
    if wrong:
        raise ValueError("its weights do not match its config: " + "; ".join(wrong))
    copies = {key: value.detach().clone() for key, value in state.items()}
    unet.load_state_dict(copies, assign=True)
    return unet.eval().requires_grad_(False)
