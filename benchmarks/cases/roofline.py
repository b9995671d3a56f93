r"""The least that a step can take: its operations at the speed of a product, its bytes at a copy's.

    floor = max(flops / matmul speed, bytes / copy speed)

Operations are counted by torch's FlopCounterMode. Bytes: every weight once a step; for each image,
what convolutions, linear layers and attentions read and write, once each, as if all between them
(norms, activations, sums) were done on the way; and x_t of the update, float32, read and written.
Both speeds are measured on the same machine, in the network's dtype.
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
"""Functions whose arguments and results are moved, and how many arguments are images."""

MATMUL = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 2**25, "cuda": 2**28}  # float32 elements, beyond the caches
ROUNDS = 5


class Traffic(TorchFunctionMode):
    """Counts the elements that the calls of INPUTS read and write, weights left out."""

    def __init__(self) -> None:
        self.elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and count."""
        out = func(*args, **(kwargs or {}))
        if func in INPUTS:
            self.elements += out.numel() + sum(x.numel() for x in args[: INPUTS[func]])
        return out


@dataclass(frozen=True)
class Work:
    """What a step of a batch must do: operations, and bytes to and from memory."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Speed:
    """What the machine can do: operations and bytes a second."""

    flops: float
    bytes: float

    def floor(self, work: Work) -> float:
        """Return the least seconds that the work can take."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def counted(unet: UNet, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return the operations of one evaluation of one image, and the elements that it moves.

    Of the convolutional half: the time embedding is not part of a step. Weights are left out.
    """
    with torch.device("meta"), torch.no_grad():
        twin = UNet(unet.config)
        projections = torch.zeros(1, sum(b.time_emb_proj.out_features for b in twin.resnets()))
        with FlopCounterMode(display=False) as flops, Traffic() as traffic:
            twin.body(torch.zeros(1, *shape), projections)
    return flops.get_total_flops(), traffic.elements


def work_of(of: Model, dtype: torch.dtype, batch: int) -> Work:
    """Return the work of one step of so many images."""
    size = torch.empty((), dtype=dtype).element_size()
    flops, elements = counted(of.unet, of.shape)
    weights = size * sum(parameter.numel() for parameter in of.unet.parameters())
    image = size * elements + 2 * 4 * math.prod(of.shape)
    return Work(batch * flops, weights + batch * image)


@cache
def speed(device: str, dtype: torch.dtype) -> Speed:
    """Measure a large product in this dtype, and a large copy."""
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
    """Return the least seconds of a call, of some that each follow ROUNDS others."""
    found = []
    for _ in range(ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            function()
        synchronize()
        found.append((time.perf_counter() - start) / ROUNDS)
    return min(found)
