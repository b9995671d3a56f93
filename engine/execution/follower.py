"""What the program does to a network while a sampler has it: seen, followed or refused."""

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
    """Makes what was derived from a network follow it.

    Args:
        network: of a sampler, on its device.
        modules: those that run, as far as can be told.
        hoisted: the network as it runs, if that is how.
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
        """The version of what was derived, as the latest `renew` returned it."""
        return self._derived.version if self._derived else 0

    def renew(self, captured: bool = False) -> int:
        """Derive anew what is not of the network's weights any more; to be called once a call.

        Args:
            captured: whether steps are captured, with the addresses of weights and without hooks.

        Returns:
            The version of what was derived: embeddings that slots hold are old at another one.

        Raises:
            RuntimeError: the network was changed in a way that cannot be followed: moved; under
                graphs, given other parameters or hooks; or given hooks where they would not run.
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
        """Return a function that raises RuntimeError if weights have changed between the calls."""
        glimpse = Glimpse(self.modules)
        before = glimpse.take()

        def check() -> None:
            after = glimpse.take()
            if before is not None and after is not None and not torch.equal(before, after):
                raise RuntimeError(CHANGED)

        return check

    def _check_addresses(self, network: nn.Module) -> None:
        """Refuse to go on with graphs of weights that are not there any more."""
        addresses = tuple(parameter.data_ptr() for parameter in network.parameters())
        self._addresses = self._addresses or addresses
        if addresses != self._addresses:
            raise RuntimeError(
                "the network's parameters were moved or replaced under its graphs: use "
                "update_weights, or make a new Sampler"
            )


def _stored(network: Any) -> str:
    """Return where a network's first parameter is, and its dtype, in words."""
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return "none" if first is None else f"{first.dtype} on {first.device}"
