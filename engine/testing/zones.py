"""Red zones: memory around a tensor, whose content shows whether a function wrote outside of it.

``Guarded`` puts them around a tensor. ``allocations`` puts them around every tensor that a function
allocates uninitialised, and sets what those tensors hold at first, so that a result that depends
on it differs from call to call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Guarded:
    """A tensor in memory with red zones before and behind it, filled with a canary (a number).

    Attributes:
        whole: the memory, of one dimension [zone + elements + zone], in the tensor's dtype.
        view: the tensor, a view of ``whole``.
        zone: the number of elements of each red zone.
    """

    CANARY, ZONE = 12345.678, 64

    def __init__(
        self,
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: str | torch.device,
        elements: int,
        zone: int = ZONE,
        canary: float = CANARY,
    ) -> None:
        """Allocate memory for a tensor of this size and stride, filled with the canary.

        Args:
            size: the shape of the tensor.
            stride: the strides of the tensor, in elements.
            dtype: the dtype of the tensor.
            device: the device of the tensor.
            elements: the number of elements of memory from the tensor's first to its last.
            zone: the number of elements before and behind it; a multiple of 64 keeps its alignment.
            canary: the value of the zones and, at first, of the tensor, as ``fit`` makes it of the
                dtype.
        """
        whole = torch.full((elements + 2 * zone,), fit(canary, dtype), dtype=dtype)
        self.whole, self.zone = whole.to(device), zone
        self.view = self.whole.as_strided(size, stride, zone)
        self._canary = whole[:1]

    @classmethod
    def around(cls, values: Tensor, stride: int, device: str | torch.device) -> Guarded:
        """Return a guarded channels-last copy of images, which lie ``stride`` elements apart.

        Args:
            values: [N, C, H, W], of any dtype.
            stride: the elements from the start of one image to that of the next, at least C x H x
                W (not checked).
            device: the device of the copy.
        """
        count, C, H, W = values.shape
        strides = (stride, 1, W * C, C)
        result = cls(values.shape, strides, values.dtype, device, count * stride)
        result.view.copy_(values)
        return result

    @classmethod
    def like(cls, values: Tensor, zone: int = ZONE, canary: float = CANARY) -> Guarded:
        """Return a guarded copy of a tensor: same device, strides and alignment.

        Args:
            values: a tensor of any shape and dtype; gradients do not reach it.
            zone: the number of elements before and behind the copy; a multiple of 64 keeps its
                alignment (not checked).
            canary: the value that the zones hold, as ``fit`` makes it of the tensor's dtype.
        """
        size, stride = values.shape, values.stride()
        shift = int(values.storage_offset()) % 64
        extent = shift + _extent(size, stride)
        result = cls(size, stride, values.dtype, values.device, extent, zone, canary)
        result.view = result.whole.as_strided(size, stride, zone + shift)
        result.view.copy_(values.detach())
        return result

    def check(self) -> None:
        """Raise AssertionError if something was written outside of the tensor or between elements.

        Raises:
            AssertionError: if a byte of ``whole`` that is no part of ``view`` has changed.
        """
        outside = torch.ones(self.whole.shape, dtype=torch.bool)
        view = self.view
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        # Bytes, since NaN differs from itself.
        found = self.whole.detach().cpu()[outside].reshape(-1, 1).view(torch.uint8)
        wrong = (found != self._canary.reshape(1, 1).view(torch.uint8)).any(1)
        if wrong.any():
            where = outside.nonzero().flatten()[wrong] - view.storage_offset()
            raise AssertionError(
                f"a red zone was written: {len(where)} elements from {where[0]} to {where[-1]}, "
                f"counted from the first of a tensor of shape {tuple(view.shape)}"
            )


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements of memory from a tensor's first element to its last."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def fit(value: float, dtype: torch.dtype) -> float | int | bool:
    """Return a number as one that the dtype holds; for integer dtypes fractions are cut off.

    For integer dtypes NaN becomes the largest integer, and a number out of range the nearest one.
    For bool, 0 is False and all others, NaN too, are True. Floating and complex dtypes: the same
    number.
    """
    if dtype.is_floating_point or dtype.is_complex:
        return value
    if dtype is torch.bool:
        return bool(value)
    limits = torch.iinfo(dtype)
    return limits.max if math.isnan(value) else int(min(max(value, limits.min), limits.max))


ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
"""The functions of torch that return uninitialised memory: (the object they are in, the name)."""


@contextmanager
def allocations(
    fill: float, zone: int = Guarded.ZONE, canary: float = Guarded.CANARY
) -> Iterator[list[Guarded]]:
    """Put every tensor that torch allocates uninitialised into red zones, within a ``with`` block.

    In it ``torch.empty``, ``empty_like``, ``empty_strided``, ``new_empty`` and
    ``new_empty_strided`` return tensors full of ``fill``. Allocations in C++ or in compiled code
    are not seen, nor those by a name that was imported earlier (``from torch import empty``). It
    replaces attributes of torch, and restores them at the end of the block, also if that raises; it
    must not be used by several threads at once.

    Args:
        fill: the value that the tensors hold at first, as ``fit`` makes it of their dtype.
        zone: the number of elements before and behind each tensor; a multiple of 64 keeps its
            alignment (not checked).
        canary: the value that the zones hold, as ``fit`` makes it of their dtype.

    Yields:
        A list, empty at first, to which each allocation appends its ``Guarded``. The zones are not
        checked here: call ``check`` on each.
    """
    made: list[Guarded] = []

    def guarding(empty: Any) -> Any:
        @functools.wraps(empty)
        def guarded(*args: Any, **kwargs: Any) -> Tensor:
            x = empty(*args, **kwargs)
            if kwargs.get("out") is not None or type(x) is not Tensor or not fillable(x):
                return x
            size, stride = x.shape, x.stride()
            extent = _extent(size, stride)
            made.append(Guarded(size, stride, x.dtype, x.device, extent, zone, canary))
            with torch.no_grad():
                made[-1].view.fill_(fit(fill, x.dtype))
            # Not a view, which autograd would treat in another way than a new tensor.
            fresh = torch.tensor([], dtype=x.dtype, device=x.device)
            fresh.set_(made[-1].whole.untyped_storage(), zone, size, stride)
            return fresh.requires_grad_(x.requires_grad)

        return guarded

    originals = [getattr(owner, name) for owner, name in ALLOCATORS]
    try:
        for (owner, name), original in zip(ALLOCATORS, originals, strict=True):
            setattr(owner, name, guarding(original))
        yield made
    finally:
        for (owner, name), original in zip(ALLOCATORS, originals, strict=True):
            setattr(owner, name, original)


def fillable(x: Tensor) -> bool:
    """Return whether a tensor is plain CPU or GPU memory: not traced, quantised or sparse."""
    if torch.compiler.is_compiling() or x.is_quantized or x.layout is not torch.strided:
        return False
    return x.device.type in ("cpu", "cuda")
