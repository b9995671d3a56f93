"""Checks, before any work, that a network fits the images, the labels, a plan or a state dict."""

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
    """Raise unless one of flashddpm's own networks takes images of this shape and these labels.

    Args:
        network: the network, of which only the config is read.
        shape: (C, H, W) of an image, in pixels.
        conditioning: the labels that the network is to take.

    Raises:
        ValueError: if the network does not take C channels or does not return C or 2C, if H or W is
            no multiple of the factor by which the network shrinks images, if only one of the
            network and the conditioning has classes, or if the network has too few class
            embeddings.
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
    """Raise if a plan needs a learned variance that the network does not predict.

    Args:
        plan: the plan (a table of coefficients, one row a step).
        channels: the number of channels that the network returns.
        image_channels: the number of channels C of an image.

    Raises:
        ValueError: if the plan's variance is a learned one and the network does not return 2C
            channels.
    """
    if plan.learns_variance and channels != 2 * image_channels:
        raise ValueError(
            f"variance_type: must be fixed_small or fixed_large for a network that returns "
            f"{channels} channels; a learned variance takes {2 * image_channels}"
        )


def check_state(network: Any, state: Mapping[str, Tensor]) -> Network:
    """Check that a state dict fits a network of flashddpm's own, and return that network.

    Args:
        network: the network of a sampler, of any kind.
        state: the weights by diffusers' keys.

    Raises:
        ValueError: if the network is none of flashddpm's own; or if keys are missing or unknown,
            shapes are wrong, or weights are not floating-point numbers or not finite in the
            network's dtype.
    """
    if not isinstance(network, registry.Network):
        raise ValueError("update_weights: the network is not flashddpm's own")
    wrong = mismatches(network, state)
    if wrong:
        raise ValueError("state: does not match the network: " + "; ".join(wrong))
    return network
