"""Checks that two implementations draw the same images, in float32 or in bfloat16.

float32: the final images differ by at most TOLERANCE in any element. bfloat16, over a chain of at
most CHAIN steps: ``ref32`` are the images drawn in float32 with the weights as stored in bfloat16,
``plain`` those of uncompiled PyTorch in bfloat16, and ``fast`` those to judge. With r the images
``ref32`` rounded to bfloat16,

    max abs(fast - ref32) <= 2 (max abs(plain - ref32) + max abs((r + .3) - .3 - r))
    rmse(fast, ref32)     <= 3 max(rmse(plain, ref32), max abs(r - ref32) / 4)

where (r + .3) - .3 is computed in bfloat16: no side may be much further off than plain PyTorch is
in the same precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3
MAX_FACTOR, RMSE_FACTOR = 2, 3
CHAIN = 10
"""The largest number of steps of a chain that the rule of bfloat16 is meant for."""


def check(ours: Tensor, theirs: Tensor, what: str, peer: str = "diffusers") -> None:
    """Check that two sides draw the same float32 images, before either is timed.

    Args:
        ours: our images, float32 [B, C, H, W], values of about -1 to 1.
        theirs: the peer's (other implementation's) images, of the same shape and device.
        what: the name of the case, for the error's text.
        peer: the name of the peer, for the error's text.

    Raises:
        AssertionError: if some elements differ by more than TOLERANCE (1e-3), or one is NaN.
    """
    error = (ours - theirs).abs().max().item()
    if not error <= TOLERANCE:
        raise AssertionError(f"{what}: differs from {peer} by {error:.3g}, not timed")


def check_low(fast: Tensor, plain: Tensor, ref32: Tensor, what: str) -> None:
    """Check that images drawn in bfloat16 are not much further from float32 than plain PyTorch's.

    Both must hold: the largest absolute difference of ``fast`` from ``ref32`` is at most 2 times
    (that of ``plain`` from ``ref32``, plus the largest change by adding and subtracting 0.3, in
    bfloat16, from ``ref32`` rounded to bfloat16); and the root mean square difference is at most 3
    times that of ``plain``, or 3/4 of the largest error of rounding ``ref32`` to bfloat16 if that
    is more.

    Args:
        fast: the images to judge, drawn in bfloat16 and given as float32 [B, C, H, W], values of
            about -1 to 1.
        plain: the images that uncompiled PyTorch draws in bfloat16, float32 of the same shape.
        ref32: the images drawn in float32 with the weights rounded to bfloat16, float32 of the same
            shape.
        what: the name of the images to judge, for the error's text.

    Raises:
        AssertionError: if ``fast`` exceeds either bound, or an image has a NaN.
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
