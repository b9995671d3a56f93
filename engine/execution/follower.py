"""`Follower`: how a sampler reacts when the program changes its network: follow, or raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flashddpm.execution.derived import Derived, Glimpse
from flashddpm.networks.customized import hanging
from flashddpm.networks.hoisted_unet import HoistedUNet, unhoistable

CHANGED = (
    "the network's weights were changed while the image was under way; use update_weights of "
    "this sampler or its engine, which lets such images end first"
)


class Follower:
    """Sees changes of a sampler's network, and recomputes what was derived from its weights.

    Args:
        network: the network of a sampler, a module on its device, or any other callable, whose
            changes cannot be seen.
        modules: the modules that run, as far as can be told: the network, or the module that it is
            a method of, and likewise for the user's ``call`` of the network.
        hoisted: the network as a U-Net that is hoisted (its time embeddings are computed once for
            all steps), if it runs so; else None.

    Attributes:
        modules: as above.
    """

    def __init__(
        self, network: Any, modules: Sequence[nn.Module], hoisted: HoistedUNet | None
    ) -> None:
        self.modules, self._network, self._hoisted = modules, network, hoisted
        self._derived = Derived(hoisted.sources, hoisted.refresh) if hoisted else None
        self._stored = _stored(network)
        self._hanging = hanging(network)
        self._addresses: tuple[int, ...] | None = None

    @property
    def version(self) -> int:
        """How many times time embeddings were derived from the weights, an int; 0 if none are."""
        return self._derived.version if self._derived else 0

    def renew(self, captured: bool = False) -> int:
        """Derive values again if the weights have changed; run once in each call of the sampler.

        Args:
            captured: whether steps are captured as CUDA graphs, which hold the addresses of weights
                and no hooks.

        Returns:
            The version, how many times values were derived: time embeddings from an earlier version
            are out of date. 0 if nothing is derived.

        Raises:
            RuntimeError: if the network cannot be followed: its first parameter has another device
                or dtype; under graphs, parameters have moved or hooks or a forward were set or
                removed; or a module that is not called when embeddings are hoisted has a hook or a
                forward set.
        """
        if not isinstance(self._network, nn.Module):
            return 0
        now = _stored(self._network)
        if now != self._stored:
            raise RuntimeError(
                f"network: its parameters were {self._stored} and are {now}; make a new Sampler"
            )
        skipped = unhoistable(self._hoisted.unet) if self._hoisted else None
        if captured:
            self._check_addresses(self._network)
            if hanging(self._network) != self._hanging:
                skipped = "it has other hooks, or another forward, than when it was captured"
        if skipped:
            raise RuntimeError(f"network: {skipped}; make a new Sampler, which heeds that")
        return self._derived.renew() if self._derived else 0

    def unchanged(self) -> Callable[[], None]:
        """Take a sample of the weights now, and return a function that checks it later.

        Returns:
            A function without arguments that raises RuntimeError if the sampled words of the
            modules' parameters (`Glimpse`) differ from what they were.
        """
        glimpse = Glimpse(self.modules)
        before = glimpse.take()

        def check() -> None:
            after = glimpse.take()
            if before is not None and after is not None and not torch.equal(before, after):
                raise RuntimeError(CHANGED)

        return check

    def _check_addresses(self, network: nn.Module) -> None:
        """Raise RuntimeError if parameters are no longer where the captured graphs read them."""
        addresses = tuple(parameter.data_ptr() for parameter in network.parameters())
        self._addresses = self._addresses or addresses
        if addresses != self._addresses:
            raise RuntimeError(
                "the network's parameters were moved or replaced under its graphs: use "
                "update_weights, or make a new Sampler"
            )


def _stored(network: Any) -> str:
    """Return the dtype and device of a network's first parameter in words, or "none"."""
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return "none" if first is None else f"{first.dtype} on {first.device}"
