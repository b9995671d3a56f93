"""Loading and saving a trained model with its sampling settings, as a `Pretrained`.

A model comes from a folder, the Hugging Face Hub or live diffusers objects. This is what
Sampler.from_pretrained, Sampler.from_diffusers and Sampler.save_pretrained do.
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
    """A model that was read: its network, and the settings that a sampler is made of.

    Attributes:
        unet: the network: flashddpm's `UNet` or `RMSUNet`, or a `DiffusersUNet` that calls
            diffusers' own, where that was changed beyond its weights and config.
        scheduler: the scheduler config, with diffusers' keys and ``_class_name``, from which
            schedule, prediction_type and defaults are read.
        schedule: the noise schedule of the forward process.
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".
        defaults: how the model is sampled by default: solver, spacing, clipping, variance.
        shape: (C, H, W) of an image, ints in pixels.
        conditioning: the class labels that the network takes: their number, the null label that
            stands for "no label", and names.
    """

    unet: Network | DiffusersUNet
    scheduler: dict[str, Any]
    schedule: NoiseSchedule
    prediction_type: str
    defaults: SamplingDefaults
    shape: tuple[int, int, int]
    conditioning: Conditioning


class DiffusersUNet(nn.Module):
    """A UNet2DModel of diffusers, called as flashddpm's networks are: (x_t, t, labels) -> output.

    It is used where the UNet2DModel has hooks or was changed otherwise, which a copy of its weights
    into flashddpm's own `UNet` would not repeat.

    Args:
        unet: the UNet2DModel, or what torch.compile made of one; used, not copied.

    Attributes:
        unet: the argument, an nn.Module.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the network's output, [B, C, H, W], or [B, 2C, H, W] if it learns the variance.

        Args:
            x_t: the noisy images, [B, C, H, W], in the dtype of the weights, as is the output.
            t: the timestep of each image, [B], integers or floats.
            labels: the class of each image, int64 [B]; None for an unconditional network.
        """
        return self.unet(x_t, t, class_labels=labels).sample


def load_pretrained(
    source: str | PathLike[str],
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool = False,
    revision: str | None = None,
    tables: str = "float64",
) -> Pretrained:
    """Load a model in diffusers' layout, with its sampling settings.

    Args:
        source: a folder, of a pipeline or flat (all files in one place); or OWNER/NAME on the
            Hugging Face Hub.
        device: the device of the network's weights.
        dtype: the dtype of the network's weights: float32, bfloat16 or float16.
        allow_pickle: whether .bin weights are read where there are no safetensors.
        revision: a branch, tag or commit on the hub; None for the default branch.
        tables: how the schedule's betas are computed: "float64", or "diffusers" for its own values
            in float32.

    Raises:
        CheckpointError: if there is no such model, files are missing or broken, or it has settings
            that cannot be sampled here.
        ValueError: if ``allow_pickle`` is no bool, ``tables`` or the dtype is another value, the
            device cannot be used, or ``source`` is no path.
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
        model: the pipeline or the U-Net; its weights are copied, on their device, in their dtype. A
            U-Net with hooks, or otherwise not as its config builds it, is not copied but called
            itself.
        scheduler: a scheduler of diffusers; it must be given beside a U-Net, and replaces a
            pipeline's own. None for the pipeline's own.
        conditioning: the class labels that the network takes; None if every embedding is a class.
        tables: how the schedule's betas are computed: "float64", or "diffusers" for its own values
            in float32.

    Raises:
        ValueError: if model or scheduler is of another class or missing, has settings that are not
            supported, or if the weights do not match the config, or are of several dtypes or
            devices.
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
    """Return, in words, how a UNet2DModel differs from what its config builds, or None."""
    from diffusers import UNet2DModel

    with plain_factories("meta"):
        return altered(unet, UNet2DModel.from_config(_plain(unet.config)))


def read_live_scheduler(
    scheduler: Any, tables: str = "float64"
) -> tuple[dict[str, Any], NoiseSchedule, str, SamplingDefaults]:
    """Read the sampling settings of a live scheduler of diffusers.

    Args:
        scheduler: an object of a class in `SCHEDULERS`.
        tables: how the schedule's betas are computed: "float64", or "diffusers" for its own values
            in float32.

    Returns:
        Four parts, the fields of a `Pretrained`: the config as a dict with ``_class_name``, the
        noise schedule, what the network predicts ("epsilon", "sample" or "v_prediction"), and the
        `SamplingDefaults` (solver, spacing, clipping, variance).

    Raises:
        ValueError: if the object is of another class, has settings that are not supported, or
            ``tables`` is another value.
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
    """Write a model folder that diffusers and `load_pretrained` load; it may replace an older one.

    Args:
        folder: the folder, which is made if it does not exist.
        network: flashddpm's own network, a `UNet` or `RMSUNet`; its weights are stored in their
            dtype.
        scheduler: the scheduler config with diffusers' keys: ``Pretrained.scheduler``, or what
            `scheduler_config` returns.
        labels: the class labels that the network takes.

    Raises:
        ValueError: if the network is of another class, or the folder is a file.
        OSError: if a file cannot be written.
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
    """Return the scheduler config, with diffusers' keys, of a model that was not loaded from one.

    Args:
        schedule: the noise schedule, whose betas are listed one by one (``trained_betas``).
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction"; not
            checked.
        defaults: how the model is sampled by default; their solver decides the class.

    Raises:
        ValueError: if diffusers has no class for the solver, or that class has no setting for one
            of the defaults.
        KeyError: if the defaults' solver is unknown.
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
    """Return (C, H, W) of an image; the network returns C channels, or 2C to learn a variance."""
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
