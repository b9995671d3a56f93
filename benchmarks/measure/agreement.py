"""Whether two sides draw the same images, in the precision that they run in.

float32: the last x differ by at most TOLERANCE. bfloat16, over a short chain: with ref32 the chain
in float32 on the weights as stored in bfloat16, and plain the chain of uncompiled PyTorch,

    max abs(fast - ref32) <= 2 max abs(plain - ref32) + 2 max abs((ref32 + .3) - .3 - ref32)
    rmse(fast, ref32)     <= 3 rmse(plain, ref32)

with the sum in bfloat16: nobody may be much further off than plain PyTorch in the same precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3
MAX_FACTOR, RMSE_FACTOR = 2, 3
CHAIN = 10
"""The most steps that the rule of bfloat16 is for."""


def check(ours: Tensor, theirs: Tensor, what: str, peer: str = "diffusers") -> None:
    """Refuse to time two sides whose float32 images differ.

    Raises:
        AssertionError: they do.
    """
    error = (ours - theirs).abs().max().item()
    if not error <= TOLERANCE:
        raise AssertionError(f"{what}: differs from {peer} by {error:.3g}, not timed")


def check_low(fast: Tensor, plain: Tensor, ref32: Tensor, what: str) -> None:
    """Refuse to time a bfloat16 side that is further off than plain PyTorch allows.

    Args:
        fast: the images to judge, float32 [B, C, H, W].
        plain: those of plain PyTorch in bfloat16.
        ref32: those in float32.
        what: they are.

    Raises:
        AssertionError: it is.
    """
    slack = ((ref32.bfloat16() + 0.3) - 0.3 - ref32.bfloat16()).float().abs().max().item()
    rounding = (ref32.bfloat16().float() - ref32).abs().max().item()
    furthest, allowed = _furthest(fast, ref32), MAX_FACTOR * (_furthest(plain, ref32) + slack)
    if not furthest <= allowed:
        raise AssertionError(
            f"{what}: off by {furthest:.3g} at most, allowed {allowed:.3g}, not timed"
        )
    mean, allowed = _rmse(fast, ref32), RMSE_FACTOR * max(_rmse(plain, ref32), rounding / 4)
    if not mean <= allowed:
        raise AssertionError(f"{what}: off by {mean:.3g} (rms), allowed {allowed:.3g}, not timed")


def _furthest(x: Tensor, reference: Tensor) -> float:
    return (x - reference).abs().max().item()


def _rmse(x: Tensor, reference: Tensor) -> float:
    return torch.sqrt((x - reference).double().square().mean()).item()
