"""State computed from weights, which follows them whatever changes them.

Tensors do not say that they were written to: ``AdamW(fused=True).step()`` and ``p.data.copy_()``
leave a tensor's version as it was (torch 2.14). So a checksum of the weights' bits is kept beside
what was computed from them, and compared once a call, never once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from flashddpm.networks.customized import parameters

CHUNK = 1 << 16
"""Words of one sum: few enough that its products stay in a processor's cache."""

GLIMPSED = 64
"""Words of a parameter that are looked at, from its middle."""


class Words:
    """The bits of tensors as integers, in place: found again only where some tensor has moved.

    Args:
        tensors: yields the tensors, as they are now: dense, of any dtype, all on one device.
        most: words of each, from its middle; by default all.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], most: int | None = None) -> None:
        self._tensors, self._most = tensors, most
        self._addresses: list[int] = []
        self._words: list[Tensor] = []

    def read(self) -> list[Tensor]:
        """Return the words of each tensor that has any, [number of words]."""
        tensors = [tensor for tensor in self._tensors() if tensor.numel()]
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses:
            whole = [_words(tensor.data) for tensor in tensors]
            copied = any(w.data_ptr() != a for w, a in zip(whole, addresses, strict=True))
            self._addresses = [] if copied else addresses  # copies would stay as they are
            self._words = [words[self._part(len(words))] for words in whole]
        return self._words

    def _part(self, count: int) -> slice:
        most = count if self._most is None else min(self._most, count)
        start = (count - most) // 2
        return slice(start, start + most)


def _words(x: Tensor) -> Tensor:
    """Return the bits of a tensor in the order of memory, as integers, [number of words]."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda i: -strides[i])
    flat = x.permute(order).reshape(-1)
    size = flat.element_size()
    whole = flat.numel() * size % 4 == 0 and flat.storage_offset() * size % 4 == 0
    if size > 4 or (size < 4 and whole):
        return flat.view(torch.int32)
    return flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[size])


def checksum(words: Iterable[Tensor]) -> Tensor:
    """Return the checksum of the words of some tensors, int64 [number of sums], on their device.

    Each sum is that of a chunk's words, every one times an odd number of its own, modulo 2^64: a
    change of one word always shows, and any other, a permutation or new signs among them, unless
    its products happen to cancel. Words are multiplied in 64 bits since a sign is the highest bit
    of 32, which an even number of odd factors would lose.
    """
    large: list[Tensor] = []
    small: list[Tensor] = []  # a call takes longer than their products
    for part in words:
        (large if len(part) >= CHUNK else small).append(part)
    sums = [one for part in large for one in _sums(part)]
    return torch.stack(sums + (_sums(torch.cat(small)) if small else []))


def _sums(words: Tensor) -> list[Tensor]:
    factors = _factors(words.device)
    return [(part * factors[: len(part)]).sum() for part in words.split(CHUNK)]


@cache
def _factors(device: torch.device) -> Tensor:
    """Return odd 64-bit numbers, int64 [CHUNK], without a pattern: those of splitmix64."""
    values = torch.arange(1, CHUNK + 1, dtype=torch.int64, device="cpu") * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        values = (values ^ (values >> shift)) * factor
    return (values | 1).to(device)


class Glimpse:
    """A few words of each parameter of some modules, by which to see that somebody wrote to them.

    Whatever changes a parameter as a whole shows: a load, an optimizer's step, an average, a merge.
    It is cheap enough to be taken whenever an image enters or leaves a batch.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        roots = list(modules)
        # Subclasses of Tensor, such as quantised ones, need not have words.
        self._words = Words(
            lambda: (p for root in roots for p in parameters(root) if type(p) is nn.Parameter),
            GLIMPSED,
        )

    def take(self) -> Tensor | None:
        """Return words of every parameter, integers [n] on their device; waits for nothing.

        None where there is no parameter to be seen.
        """
        words = self._words.read()
        return torch.cat(words) if words else None


class Derived:
    """What is computed from tensors, and computed again when their bits have changed.

    Args:
        sources: yields the tensors, as they are now.
        derive: computes it from them, in place.

    Attributes:
        version: how often it was computed.
    """

    def __init__(self, sources: Callable[[], Iterator[Tensor]], derive: Callable[[], None]) -> None:
        self._words, self._derive = Words(sources), derive
        self._of: Tensor | None = None
        self.version = 0

    def renew(self) -> int:
        """Compute it again if the tensors are others than the last time.

        Returns:
            How often it was computed: what somebody else derived is old at another number.
        """
        now = checksum(self._words.read())  # first: what changes meanwhile shows the next time
        if self._of is None or not torch.equal(now, self._of):
            self._derive()
            self._of = now
            self.version += 1
        return self.version
