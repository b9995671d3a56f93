"""The networks that a model folder may hold, by the _class_name of unet/config.json."""

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
"""Each class, and the library that model_index.json says it is of."""


def read_config(value: Mapping[str, Any]) -> NetworkConfig:
    """Return the settings in a config.json; without a class they are UNet2DModel's.

    Raises:
        ValueError: an unknown class, or settings that are not allowed.
    """
    name = value.get("_class_name", "UNet2DModel")
    if arguments.one_of("_class_name", name, LIBRARIES) == "RMSUNet":
        return RMSUNetConfig.from_dict(value)
    return UNetConfig.from_dict(value)


def on_meta(config: NetworkConfig) -> Network:
    """Return the network without memory for its weights.

    Raises:
        ValueError: it cannot be built.
    """
    with plain_factories("meta"):
        return RMSUNet(config) if isinstance(config, RMSUNetConfig) else UNet(config)
