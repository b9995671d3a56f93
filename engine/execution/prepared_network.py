"""A network made ready to run on a device: moved there, laid out, its time half hoisted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.execution.calls import by_call, positional
from flashddpm.execution.modes import module_of
from flashddpm.execution.step import Call, Network
from flashddpm.networks import registry
from flashddpm.networks.hoisted_unet import HoistedUNet, flops_per_image, unhoistable
from flashddpm.networks.unet import UNet


@dataclass(frozen=True)
class PreparedNetwork:
    """A network on its device.

    Attributes:
        network: as it was given, on the device.
        dtype: of its input.
        hoisted: our U-Net with its time half apart, where that is how it runs; else None.
        predict: what a step calls.
        modules: those that run, as far as can be told.
        flops: returns the floating-point operations of one evaluation of one image; None for a
            network that is not ours.
    """

    network: nn.Module | Callable[..., Tensor]
    dtype: torch.dtype
    hoisted: HoistedUNet | None
    predict: Network
    modules: list[nn.Module]
    flops: Callable[[], float] | None


def prepare(
    network: nn.Module | Callable[..., Tensor],
    call: Call | None,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: str | torch.dtype | None,
    fused: bool,
) -> PreparedNetwork:
    """Return the network as it runs; arguments are those of ``Sampler``.

    Raises:
        ValueError: a dtype that is not allowed, or is not that of a network of ours.
    """
    ours = network if isinstance(network, registry.Network) else None
    own = ours if call is None else None
    there = network.to(device) if isinstance(network, nn.Module) else network
    stored = _dtype_of(network)
    kind = arguments.resolve_dtype(dtype, stored)
    if own is not None and kind is not stored:
        raise ValueError(f"dtype={kind}: the network's is {stored}; convert it first")
    if fused and own is not None:
        own.to(memory_format=torch.channels_last)
    hoisted = None
    if fused and isinstance(own, UNet) and unhoistable(own) is None:
        hoisted = HoistedUNet(own)
    return PreparedNetwork(
        network=there,
        dtype=kind,
        hoisted=hoisted,
        predict=hoisted or (by_call(call) if call else positional(network)),
        modules=[m for m in map(module_of, (network, call)) if m is not None],
        flops=partial(flops_per_image, ours.config, shape) if ours is not None else None,
    )


def _dtype_of(network: Any) -> torch.dtype:
    if isinstance(network, nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32
