"""The network classes that a model folder may hold, by the _class_name of unet/config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashddpm import arguments
from flashddpm.host import plain_factories
from flashddpm.networks.rms_unet import RMSUNet, RMSUNetConfig
from flashddpm.networks.unet import UNet
from flashddpm.networks.unet_config import UNetConfig

Network = UNet | RMSUNet
NetworkConfig = UNetConfig | RMSUNetConfig

CLASSES: tuple[type[Network], ...] = (UNet, RMSUNet)

LIBRARIES = {"UNet2DModel": "diffusers", "RMSUNet": "flashddpm"}
"""The names of the classes, and the library that model_index.json names for each."""


def read_config(value: Mapping[str, Any]) -> NetworkConfig:
    """Return the settings that a unet/config.json holds, as the config class of its network.

    Args:
        value: the JSON object; without "_class_name" it is UNet2DModel's.

    Returns:
        A `UNetConfig` for UNet2DModel, an `RMSUNetConfig` for RMSUNet.

    Raises:
        ValueError: if the class is unknown, or a key or value is not allowed.
    """
    name = value.get("_class_name", "UNet2DModel")
    if arguments.one_of("_class_name", name, LIBRARIES) == "RMSUNet":
        return RMSUNetConfig.from_dict(value)
    return UNetConfig.from_dict(value)


def on_meta(config: NetworkConfig) -> Network:
    """Return the network of a config on the meta device: float32, without memory for its weights.

    Args:
        config: a `UNetConfig`, for a `UNet`, or an `RMSUNetConfig`, for an `RMSUNet`.

    Raises:
        ValueError: if it cannot be built.
    """
    with plain_factories("meta"):
        return RMSUNet(config) if isinstance(config, RMSUNetConfig) else UNet(config)
