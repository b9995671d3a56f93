"""The network that a training run starts from: a new one, or that of a model folder."""

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
    """Return the network to train, a `UNet` in float32 on the CPU, whose weights take gradients.

    Args:
        config: the settings of the run. If ``init`` names a model folder, its network is loaded;
            otherwise a new one is built, with random weights from the run's seed.
        data: the images, whose shape (C, H, W) and number of classes K the network must fit: it has
            K + 1 class embeddings, the last for dropped labels, or none without classes.

    Raises:
        ValueError: if the settings make no network for images of this shape.
        CheckpointError: if ``init`` is no model folder, holds another network than a UNet2DModel,
            or if its sizes, channels, class embeddings, prediction type or betas are not those of
            data and settings.
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
