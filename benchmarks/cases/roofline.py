"""The lower bound (roofline) of the time of one sampling step, from measured speeds of the machine.

    floor = max(flops / matmul speed, bytes / copy speed)

Floating-point operations are counted by torch's FlopCounterMode. Bytes are: every weight once a
step; for each image, what convolutions, linear layers and attentions read and write, once each, as
if everything between them (norms, activations, sums) were fused into them; and x_t of the update,
float32, read and written. The speeds are those of a large matrix product in the network's dtype and
of a large copy, both measured on the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from flashddpm.benchmarks.measure.harness import synchronize
from flashddpm.benchmarks.peers.models import Model
from flashddpm.networks.unet import UNet

INPUTS = {torch.conv2d: 1, F.conv2d: 1, F.linear: 1, F.scaled_dot_product_attention: 3}
"""A function whose memory traffic is counted -> how many of its first arguments are activations."""

MATMUL = {"cpu": 1024, "cuda": 8192}  # rows and columns of the square matrices
COPIED = {"cpu": 2**25, "cuda": 2**28}  # float32 elements of the copy, more than caches hold
ROUNDS = 5


class Traffic(TorchFunctionMode):
    """A torch function mode that counts the elements that the network's larger calls move.

    It is a context manager. Counted are conv2d, linear and scaled_dot_product_attention (INPUTS):
    the activations that they read and the results that they write; weights and biases are left out.

    Attributes:
        elements: the number of elements read and written so far, 0 at first.
    """

    def __init__(self) -> None:
        self.elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and, if it is one of INPUTS, count the elements that it moves."""
        out = func(*args, **(kwargs or {}))
        if func in INPUTS:
            self.elements += out.numel() + sum(x.numel() for x in args[: INPUTS[func]])
        return out


@dataclass(frozen=True)
class StepWork:
    """The work of one sampling step of a batch.

    Attributes:
        flops: floating-point operations; a multiplication with its addition counts as two.
        bytes: bytes that are read from and written to memory.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Speed:
    """The measured speeds of a machine.

    Attributes:
        flops: floating-point operations a second of a large matrix product.
        bytes: bytes a second of a large copy, those read and those written together.
    """

    flops: float
    bytes: float

    def floor(self, work: StepWork) -> float:
        """Return the lower bound of the time of the work of a step, in seconds.

        It is the time of its operations or that of its bytes, whichever is longer.
        """
        return max(work.flops / self.flops, work.bytes / self.bytes)


def counted(unet: UNet, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Count the operations of one network evaluation of one image, and the elements that it moves.

    Only the convolutional part of the network is counted: the time embedding is not part of a step,
    and weights are not among the elements. It runs on the meta device, so that nothing is computed.

    Args:
        unet: the network, whose config alone is used.
        shape: (C, H, W) of an image.

    Returns:
        The number of floating-point operations, and the number of elements of activations that
        convolutions, linear layers and attentions read and write.
    """
    with torch.device("meta"), torch.no_grad():
        twin = UNet(unet.config)
        projections = torch.zeros(1, sum(b.time_emb_proj.out_features for b in twin.resnets()))
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            twin.body(torch.zeros(1, *shape), projections)
    return flops.get_total_flops(), traffic.elements


def work_of(of: Model, dtype: torch.dtype, batch: int) -> StepWork:
    """Return the work of one sampling step of a batch.

    Args:
        of: the model, whose network and shape of images are used.
        dtype: the dtype of the network's weights and activations.
        batch: the number of images.
    """
    size = torch.empty((), dtype=dtype).element_size()
    flops, elements = counted(of.unet, of.shape)
    weights = size * sum(parameter.numel() for parameter in of.unet.parameters())
    image = size * elements + 2 * 4 * math.prod(of.shape)
    return StepWork(batch * flops, weights + batch * image)


@cache
def speed(device: str, dtype: torch.dtype) -> Speed:
    """Measure the speed of a large matrix product in this dtype, and of a large copy in float32.

    The result is kept for the process, so that each device and dtype is measured once.

    Args:
        device: "cpu" or "cuda".
        dtype: the floating-point dtype of the product's matrices, which are 1024x1024 on the CPU
            and 8192x8192 on CUDA.

    Raises:
        KeyError: if the device is neither "cpu" nor "cuda".
    """
    n = MATMUL[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    flops = 2 * n**3 / _least(partial(torch.mm, a, b))
    if device == "cuda":
        from flashddpm.benchmarks.measure.kernel_time import copy_bandwidth

        return Speed(flops, copy_bandwidth())
    source = torch.rand(COPIED[device])
    target = torch.empty_like(source)
    return Speed(flops, 2 * source.nbytes / _least(partial(target.copy_, source)))


def _least(function: Callable[[], Tensor]) -> float:
    """Return the least mean time of a call in seconds, over ROUNDS runs of ROUNDS calls each."""
    found = []
    for _ in range(ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            function()
        synchronize()
        found.append((time.perf_counter() - start) / ROUNDS)
    return min(found)
