"""Copies of small tensors from the host to a device, for which the host does not wait.

A copy from ordinary memory to a GPU waits for all that was launched before it. From pinned memory
it does not; torch's allocator hands pinned memory out again only after the copy is done.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a host tensor on a device, without waiting; on the CPU the tensor itself.

    Args:
        values: a tensor on the CPU, of any shape and dtype.
        device: the device.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def fill(buffer: Tensor, values: Tensor) -> None:
    """Copy a host tensor into a buffer in place, without waiting for the device.

    Args:
        buffer: the tensor to write, on any device.
        values: a tensor on the CPU, of the same shape; it is cast to the buffer's dtype.
    """
    buffer.copy_(values.pin_memory() if buffer.is_cuda else values, non_blocking=True)
