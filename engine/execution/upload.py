"""Small numbers on their way to the device, without a wait of the host.

A copy from ordinary memory to a GPU waits for all that was launched before it. From pinned memory
it does not; torch's allocator hands pinned memory out again only after the copy is done.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device; the same tensor where that is the host."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def fill(buffer: Tensor, values: Tensor) -> None:
    """Copy values of the host into a buffer of the same shape, in place."""
    buffer.copy_(values.pin_memory() if buffer.is_cuda else values, non_blocking=True)
