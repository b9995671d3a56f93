"""`prepare`: a network made ready to run, on its device, in its memory format, time hoisted."""

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
    """A network on its device, ready to be called by a step.

    Attributes:
        network: the network as it was given, on the device.
        dtype: the dtype of the network's input.
        hoisted: flashddpm's U-Net with its time embeddings computed outside of the loop, if it runs
            so; else None.
        predict: the function that a step calls (`flashddpm.execution.step.Network`).
        modules: the modules that run, as far as can be told: ``network``, if it is a module; and
            where the user gave a function to call in its place, the module that this function is,
            or is a method of.
        flops: called without arguments, returns the floating-point operations of one evaluation of
            one image; None for a network that is not flashddpm's own.
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
    """Move a network to its device, and return it with the function that a step calls.

    A module is moved in place. For the fused path flashddpm's own networks become channels-last,
    and its U-Net has its time embeddings hoisted (computed outside of the loop), unless hooks or
    changed modules would then be skipped.

    Args:
        network: one of flashddpm's networks, or any module or function that predicts from (x_t, t[,
            labels]).
        call: how to call a network of another signature: (x_t [L, C, H, W], t [L], labels int64 [L]
            or None[, index int64 [L]]) -> output, [L, C or 2C, H, W]; or None.
        shape: (C, H, W) of an image, in pixels.
        device: the device.
        dtype: the dtype of the network's input: float32, bfloat16 or float16, or its name; None for
            that of the network's first floating-point parameter, float32 if there is none.
        fused: whether the network is to run by the fused path.

    Raises:
        ValueError: if the dtype is not allowed, or is not that of the weights of one of flashddpm's
            own networks without ``call``.
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
