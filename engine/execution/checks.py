"""What a network and a plan must be for one another, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flashddpm.diffusion.plan import Plan
from flashddpm.networks import registry
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.registry import Network
from flashddpm.networks.state_dict import mismatches


def check_network(
    network: Network, shape: tuple[int, int, int], conditioning: Conditioning
) -> None:
    """Refuse a network of ours that does not take these images or labels.

    Args:
        network: the network, of which the config is read.
        shape: (C, H, W) of an image.
        conditioning: the labels that it is to take.

    Raises:
        ValueError: other channels, sides that it cannot halve, or too few class embeddings.
    """
    config, (C, H, W) = network.config, shape
    multiple = config.multiple
    channels = config.in_channels == C and config.out_channels in (C, 2 * C)
    if not channels or H % multiple or W % multiple:
        raise ValueError(
            f"shape={shape}: must have {config.in_channels} channels, as many as come out "
            f"({config.out_channels}) or half, and sides that are multiples of {multiple}"
        )
    embeds, classes = config.num_class_embeds, conditioning.num_classes
    needed = 0 if classes is None else max(classes, (conditioning.null_label or 0) + 1)
    if (embeds is None) != (classes is None) or needed > (embeds or 0):
        raise ValueError(f"conditioning={conditioning}: the network has {embeds} class embeddings")


def check_variance(plan: Plan, channels: int, image_channels: int) -> None:
    """Refuse a plan that learns its variance for a network without channels for it.

    Args:
        plan: the rows.
        channels: how many channels the network returns.
        image_channels: how many channels an image has.

    Raises:
        ValueError: the plan needs twice as many channels as come out.
    """
    if plan.learns_variance and channels != 2 * image_channels:
        raise ValueError(
            f"variance_type: must be fixed_small or fixed_large for a network that returns "
            f"{channels} channels; a learned variance takes {2 * image_channels}"
        )


def check_state(network: Any, state: Mapping[str, Tensor]) -> Network:
    """Return the network, once a state dict has been found to be one of its own.

    Args:
        network: of a sampler.
        state: with diffusers' keys.

    Raises:
        ValueError: the network is not one of ours, or keys, shapes or numbers are not its own.
    """
    if not isinstance(network, registry.Network):
        raise ValueError("update_weights: the network is not flashddpm's own")
    wrong = mismatches(network, state)
    if wrong:
        raise ValueError("state: does not match the network: " + "; ".join(wrong))
    return network
