"""Values derived from a network's weights, recomputed when the weights' bits have changed.

A tensor's version does not show every write: ``AdamW(fused=True).step()`` and ``p.data.copy_()``
leave it as it was (torch 2.14). So a checksum of the weights' bits is kept beside what was computed
from them, and compared once a call, never once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from flashddpm.networks.customized import parameters

CHUNK = 1 << 16
"""The number of words in one sum of a checksum: their products fit in a processor's cache."""

GLIMPSED = 64
"""The number of words that a `Glimpse` takes of each parameter, from its middle."""


class Words:
    """Views of tensors' bits as integers, by which changes of the tensors are seen.

    They are kept from one `read` to the next, and made again only if a tensor has moved in memory.

    Args:
        tensors: called without arguments, returns the tensors as they are now: of any dtype, all on
            one device. Those that are not dense in memory are copied at each `read`.
        most: the most words of each tensor, taken from its middle; None for all.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], most: int | None = None) -> None:
        self._tensors, self._most = tensors, most
        self._addresses: list[int] = []
        self._words: list[Tensor] = []

    def read(self) -> list[Tensor]:
        """Return the bits of each tensor that is not empty, as integers of 1, 2 or 4 bytes.

        Returns:
            For each tensor int32 [number of words] in the order of memory; int8 or int16 where a
            dtype of 1 or 2 bytes does not fill whole, aligned int32 words. They are views: later
            writes show.
        """
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
    """Compute a checksum of tensors' bits, by which a later change of the tensors is seen.

    Each chunk of 65536 words has one sum, modulo 2^64, of its words times fixed odd numbers. A
    change of one word always shows; so does any other, such as a permutation or new signs, unless
    its products happen to cancel. Words are multiplied in 64 bits, since a sign is the highest bit
    of 32, which the sum of an even number of odd products would lose.

    Args:
        words: integers, each [number of words], on one device, as `Words.read` returns them.

    Returns:
        int64 [number of sums], on that device.

    Raises:
        RuntimeError: if there are no words at all.
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
    """A sample of 64 words of each parameter of some modules, by which to see changes of weights.

    It shows whatever changes a parameter as a whole, such as a load, an optimizer's step, an
    average or a merge, and is cheap enough to be taken whenever an image enters or leaves a batch.

    Args:
        modules: the modules, whose parameters are all on one device; those of a subclass of
            nn.Parameter, such as quantised ones, are not looked at.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        roots = list(modules)
        # Subclasses of Tensor, such as quantised ones, need not have words.
        self._words = Words(
            lambda: (p for root in roots for p in parameters(root) if type(p) is nn.Parameter),
            GLIMPSED,
        )

    def take(self) -> Tensor | None:
        """Copy the sampled words of every parameter, without waiting for the device.

        Returns:
            Integers of 1 to 4 bytes, [number of words], on the parameters' device; None if there
            are no parameters to look at.
        """
        words = self._words.read()
        return torch.cat(words) if words else None


class Derived:
    """Keeps a value that is computed from tensors, and computes it again when their bits changed.

    Args:
        sources: called without arguments, yields the tensors as they are now, all on one device.
        derive: called without arguments, computes the value from them, in place.

    Attributes:
        version: how many times the value was computed; 0 before the first `renew`.
    """

    def __init__(self, sources: Callable[[], Iterator[Tensor]], derive: Callable[[], None]) -> None:
        self._words, self._derive = Words(sources), derive
        self._of: Tensor | None = None
        self.version = 0

    def renew(self) -> int:
        """Compute the value again if the tensors' bits differ from those at the last call.

        Returns:
            How many times it was computed. Whatever else was derived from the tensors is out of
            date when this number changes.
        """
        now = checksum(self._words.read())  # first: what changes meanwhile shows the next time
        if self._of is None or not torch.equal(now, self._of):
            self._derive()
            self._of = now
            self.version += 1
        return self.version
