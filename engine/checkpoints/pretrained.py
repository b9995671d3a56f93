"""A trained model and how it is sampled: from a folder, the hub or live diffusers objects.

What Sampler.from_pretrained, Sampler.from_diffusers and Sampler.save_pretrained do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.checkpoints.hub import locate
from flashddpm.checkpoints.model_folder import (
    UNETS,
    find,
    load_conditioning,
    load_scheduler_config,
    load_unet,
    save_model,
)
from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.diffusion.schedule import TABLES, NoiseSchedule
from flashddpm.diffusion.scheduler_config import (
    DEFAULTED,
    KEYS,
    SCHEDULERS,
    SamplingDefaults,
    settings_of,
)
from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.errors import CheckpointError
from flashddpm.host import plain_factories
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.customized import altered, has_hooks
from flashddpm.networks.registry import Network, NetworkConfig
from flashddpm.networks.state_dict import mismatches
from flashddpm.networks.unet import UNet
from flashddpm.networks.unet_config import UNetConfig

log = logging.getLogger("flashddpm")


@dataclass(frozen=True)
class Pretrained:
    """What a sampler is made of.

    Attributes:
        unet: the network: ours, or diffusers' own where it is more than its weights and config.
        scheduler: the config that the rest is read from, with diffusers' keys and ``_class_name``.
        schedule, prediction_type, defaults: what that config says.
        shape: (C, H, W) of an image.
        conditioning: what labels the network takes.
    """

    unet: Network | DiffusersUNet
    scheduler: dict[str, Any]
    schedule: NoiseSchedule
    prediction_type: str
    defaults: SamplingDefaults
    shape: tuple[int, int, int]
    conditioning: Conditioning


class DiffusersUNet(nn.Module):
    """A UNet2DModel of diffusers, called as our networks are."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """[B, C, H, W], [B], int64 [B] or None -> [B, C or 2C, H, W]."""
        return self.unet(x_t, t, class_labels=labels).sample


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
            A U-Net with hooks, or otherwise not as its config builds it, is called itself.
        scheduler: diffusers', needed beside a U-Net; beside a pipeline, in place of its own.
        conditioning: what labels the network takes; by default every embedding is a class.
        tables: of the schedule, as NoiseSchedule.from_config takes it.

    Raises:
        ValueError: objects of other classes, or settings that we have no rows or layers for.
    """
    arguments.one_of("tables", tables, TABLES)
    whole = getattr(model, "unet", model)
    unet = getattr(whole, "_orig_mod", whole)  # torch.compile wraps it
    if scheduler is None:
        scheduler = getattr(model, "scheduler", None)
    if scheduler is None:
        raise ValueError("scheduler=None: must be given beside a U-Net")
    arguments.one_of("model", type(unet).__name__, UNETS)
    config, schedule, prediction_type, defaults = read_live_scheduler(scheduler, tables)
    network: Network | DiffusersUNet
    try:
        settings = UNetConfig.from_dict(_plain(unet.config))
        shape = _shape(settings)
        change = "has hooks" if whole is not unet and has_hooks(whole) else _alteration(unet)
        if change is None:
            network = _copy_unet(settings, unet.state_dict())
        else:
            log.info("the U-Net %s: it is called itself, not made one of ours", change)
            network = DiffusersUNet(whole)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {error}") from error
    labels = conditioning or Conditioning(settings.num_class_embeds)
    return Pretrained(network, config, schedule, prediction_type, defaults, shape, labels)


def _alteration(unet: Any) -> str | None:
    """Return how a UNet2DModel differs from what diffusers builds of its config, if it does."""
    from diffusers import UNet2DModel

    with plain_factories("meta"):
        return altered(unet, UNet2DModel.from_config(_plain(unet.config)))


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
    solver = SOLVERS[defaults.solver]
    name = solver.scheduler_class
    if name is None:
        raise ValueError(f"defaults={defaults}: diffusers has no class for {solver.name}")
    config: dict[str, Any] = {
        "_class_name": name,
        "num_train_timesteps": len(schedule),
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": prediction_type,
        "timestep_spacing": defaults.spacing,
        "steps_offset": defaults.steps_offset,
    }
    if solver.algorithm_type is not None:
        config["algorithm_type"] = solver.algorithm_type
    if defaults.sigmas:
        config[f"use_{defaults.sigmas}_sigmas"] = True
    if defaults.threshold:
        config |= {
            "thresholding": True,
            "dynamic_thresholding_ratio": defaults.threshold,
            "sample_max_value": defaults.clip,
        }
    elif "clip_sample" in KEYS[name]:
        config |= {"clip_sample": defaults.clip > 0, "clip_sample_range": defaults.clip or 1.0}
    if "variance_type" in solver.options:
        config["variance_type"] = defaults.variance_type
    if SamplingDefaults.from_config(config) != defaults:
        raise ValueError(f"defaults={defaults}: {name} has no settings for all of them")
    return config


def _read_scheduler(
    config: Mapping[str, Any], tables: str
) -> tuple[NoiseSchedule, str, SamplingDefaults]:
    settings = settings_of(config)
    return (
        NoiseSchedule.from_config(settings, tables=tables),
        arguments.one_of("prediction_type", settings["prediction_type"], PREDICTION_TYPES),
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
    with plain_factories("meta"):
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
