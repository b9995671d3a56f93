"""The models of the benchmarks: networks with their schedulers, also as diffusers' U-Net.

The model "bundled" is the trained one that comes with the package. "cifar10" and "pixels256" have
the published configurations (Ho et al. 2020, as google/ddpm-cifar10-32 and google/ddpm-celebahq-256
have them) and random weights of a fixed seed, since the time of a step does not depend on the
weights' values. The outputs of random networks are scaled down: at the first steps
x0 = (x_t - sigma eps) / a with a near 0, so that the rounding errors of a large eps, which no
training has tied to x_t, would dominate the images.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashddpm.checkpoints.bundled import bundled
from flashddpm.checkpoints.model_folder import load_unet
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.unet import UNet
from flashddpm.networks.unet_config import UNetConfig
from flashddpm.sampling.sampler import Sampler

SEED = 0
OUTPUT = 0.02  # factor of a random network's last weights, about its output's deviation
COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}
CIFAR10 = COMMON | {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
PIXELS_256 = COMMON | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
PUBLISHED = {"cifar10": (CIFAR10, "fixed_large"), "pixels256": (PIXELS_256, "fixed_small")}
MODELS = ("bundled", *PUBLISHED)


@dataclass(frozen=True)
class Model:
    """A benchmark model: a network, and the diffusion process that it is for.

    Attributes:
        name: its name: "bundled", "cifar10" or "pixels256" (MODELS).
        unet: the U-Net, float32 on the CPU in evaluation mode; never run, only copied.
        scheduler: the config of diffusers' scheduler, a dictionary of scheduler_config.json's keys.
        conditioning: the class labels that the network takes.
    """

    name: str
    unet: UNet
    scheduler: dict[str, Any]
    conditioning: Conditioning

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image: channels, and the height and width in pixels."""
        config = self.unet.config
        assert isinstance(config.sample_size, int)
        return config.in_channels, config.sample_size, config.sample_size

    def labels(self, batch: int) -> list[int] | None:
        """Return the class labels 0, 1, 2, ... in turn for a batch of images.

        Args:
            batch: the number of images.

        Returns:
            A list of ``batch`` labels in 0..num_classes-1; None if the model has no classes.
        """
        classes = self.conditioning.num_classes
        return None if classes is None else [i % classes for i in range(batch)]

    def network(self, device: str, dtype: torch.dtype) -> UNet:
        """Return a copy of our U-Net.

        Args:
            device: the device of the copy, "cpu" or "cuda".
            dtype: the floating dtype of its weights.
        """
        return copy.deepcopy(self.unet).to(device, dtype)

    def sampler(self, device: str, dtype: torch.dtype, **options: Any) -> Sampler:
        """Return a sampler of a copy of our U-Net.

        Args:
            device: the device of the copy, "cpu" or "cuda".
            dtype: the floating dtype of its weights and input.
            options: further keyword arguments of `Sampler`, such as compile or backend.

        Raises:
            ValueError: if the sampler refuses an option.
        """
        return self.around(self.network(device, dtype), device, **options)

    def around(self, network: Any, device: str, **options: Any) -> Sampler:
        """Return a sampler of a given network, with this model's process, shape and labels.

        Args:
            network: a U-Net of ours, or another callable that a `Sampler` takes.
            device: the sampler's device, "cpu" or "cuda".
            options: further keyword arguments of `Sampler`, such as call, compile or capture.

        Raises:
            ValueError: if the sampler refuses an option.
        """
        return Sampler(
            network,
            NoiseSchedule.from_config(self.scheduler),
            shape=self.shape,
            prediction_type=self.scheduler.get("prediction_type", "epsilon"),
            conditioning=self.conditioning,
            defaults=SamplingDefaults.from_config(self.scheduler),
            device=device,
            **options,
        )

    def diffusers_unet(self, device: str, dtype: torch.dtype) -> nn.Module:
        """Return diffusers' UNet2DModel with the same weights, in evaluation mode.

        Args:
            device: its device, "cpu" or "cuda".
            dtype: the floating dtype of its weights.

        Raises:
            ImportError: if diffusers is not installed.
        """
        from diffusers import UNet2DModel

        unet = UNet2DModel.from_config(self.unet.config.to_dict())
        unet.load_state_dict(self.unet.state_dict())
        return unet.to(device, dtype).eval()


@cache
def model(name: str) -> Model:
    """Return the benchmark model of a name; the same object at each call.

    Args:
        name: "bundled", "cifar10" (3x32x32 images) or "pixels256" (3x256x256 images).

    Raises:
        KeyError: if there is no such model.
    """
    if name == "bundled":
        folder = Path(bundled())
        text = (folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8")
        loaded = Sampler.from_pretrained(folder, "cpu", "float32", compile=False)
        unet = load_unet(folder, "cpu", "float32")
        assert isinstance(unet, UNet)
        return Model(name, unet, json.loads(text), loaded.conditioning)
    config, variance_type = PUBLISHED[name]
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": variance_type}
    return Model(name, random_unet(config), scheduler, Conditioning())


def random_unet(config: dict[str, Any]) -> UNet:
    """Return a U-Net with random weights of a fixed seed, none of whose weight tensors is zero.

    The weights, biases apart, that a fresh U-Net initialises to zero are random too, and those of
    the last convolution are multiplied by OUTPUT (0.02). Torch's global random state is left as it
    was.

    Args:
        config: the settings of a `UNetConfig`, a dictionary of diffusers' config.json keys.

    Returns:
        The U-Net, float32 on the CPU in evaluation mode.

    Raises:
        ValueError: if the config is not allowed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        unet = UNet(UNetConfig.from_dict(config))
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        unet.conv_out.weight.data *= OUTPUT
    return unet.eval()
