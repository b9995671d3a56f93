"""Red zones: memory around what may be written, whose content shows whether it was.

``Guarded`` puts them around a tensor. ``allocations`` puts them around every tensor that a function
makes uninitialised, and says what those tensors hold at first, so that a result that depends on it
differs from call to call.
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
    """Memory with red zones: canaries around what may be written.

    Attributes:
        whole: [zone + elements + zone], zones included.
        view: the tensor inside it.
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
        """Make room for a tensor of this size and stride that extends over this many elements.

        Args:
            zone: elements before and behind it; a multiple of 64 keeps its alignment.
            canary: what the zones hold, and the tensor too at first.
        """
        whole = torch.full((elements + 2 * zone,), fit(canary, dtype), dtype=dtype)
        self.whole, self.zone = whole.to(device), zone
        self.view = self.whole.as_strided(size, stride, zone)
        self._canary = whole[:1]

    @classmethod
    def around(cls, values: Tensor, stride: int, device: str | torch.device) -> Guarded:
        """Return images, channels-last, with this stride from one to the next."""
        count, C, H, W = values.shape
        strides = (stride, 1, W * C, C)
        result = cls(values.shape, strides, values.dtype, device, count * stride)
        result.view.copy_(values)
        return result

    @classmethod
    def like(cls, values: Tensor, zone: int = ZONE, canary: float = CANARY) -> Guarded:
        """Return a copy on the same device, of the same strides and alignment."""
        size, stride = values.shape, values.stride()
        shift = int(values.storage_offset()) % 64
        extent = shift + _extent(size, stride)
        result = cls(size, stride, values.dtype, values.device, extent, zone, canary)
        result.view = result.whole.as_strided(size, stride, zone + shift)
        result.view.copy_(values.detach())
        return result

    def check(self) -> None:
        """Raise AssertionError if something outside the view was written, or between its rows."""
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
    """Return the elements from a tensor's first to its last."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def fit(value: float, dtype: torch.dtype) -> float | int | bool:
    """Return the value as one of this dtype: NaN as the largest integer, others cut off."""
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
"""Functions that return uninitialised memory, and where they are."""


@contextmanager
def allocations(
    fill: float, zone: int = Guarded.ZONE, canary: float = Guarded.CANARY
) -> Iterator[list[Guarded]]:
    """Within it, ``torch.empty`` and its kin return tensors full of ``fill``, in red zones.

    Yields the list that collects them; call ``check`` on each. Not seen is what is allocated in C++
    or in compiled code, or after ``from torch import empty``. Replaces attributes of torch, so it
    is not for several threads at once.

    Args:
        fill: the content; where the dtype is integral, NaN is its largest number.
        zone: elements before and behind each tensor.
        canary: what the zones hold.
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
    """Whether it is ordinary memory, that can be filled: not traced, quantised or sparse."""
    if torch.compiler.is_compiling() or x.is_quantized or x.layout is not torch.strided:
        return False
    return x.device.type in ("cpu", "cuda")
