"""The network that a run starts from: a new one, or that of a model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from flashddpm.checkpoints.model_folder import load_scheduler_config, load_unet
from flashddpm.data import ImageSource
from flashddpm.errors import CheckpointError
from flashddpm.host import plain_factories
from flashddpm.networks.unet import UNet
from flashddpm.training.config import TrainConfig


def initial_network(config: TrainConfig, data: ImageSource) -> UNet:
    """Return the network to train, float32 on the CPU.

    Args:
        config: settings of the run: its seed draws the weights, unless ``init`` names a model.
        data: images, whose shape and classes the network must fit.

    Raises:
        ValueError: the settings make no network.
        CheckpointError: ``init`` names no model, or one that does not fit data and settings.
    """
    if config.init:
        return _load_network(Path(config.init), config, data)
    with torch.random.fork_rng(devices=[]), plain_factories():
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed reseeds CUDA too
        return UNet(config.unet_config(data.shape, data.num_classes))


def _load_network(folder: Path, config: TrainConfig, data: ImageSource) -> UNet:
    """Return the network of a model folder, checked against the data and the settings."""
    unet = load_unet(folder, torch.device("cpu"), torch.float32)
    if not isinstance(unet, UNet):
        raise CheckpointError(f"{folder}: holds an {type(unet).__name__}; must hold a UNet2DModel")
    wanted = config.unet_config(data.shape, data.num_classes)
    for name in ("sample_size", "in_channels", "out_channels", "num_class_embeds"):
        found, asked = getattr(unet.config, name), getattr(wanted, name)
        if found != asked:
            raise CheckpointError(
                f"{folder}: has {name}={found!r}; the data and settings ask for {asked!r}"
            )
    theirs, ours = load_scheduler_config(folder), config.scheduler_config()
    kept = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    for name in kept:
        found = theirs.get(name, TrainConfig(1).scheduler_config()[name])
        if found != ours[name]:
            raise CheckpointError(f"{folder}: has {name}={found!r}; the settings {ours[name]!r}")
    return unet.requires_grad_(True)
