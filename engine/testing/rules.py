"""What "equal" means: ``same``, ``close`` and ``reduced``. No rule is loosened to pass.

R64 is the result in float64 from the arguments as they are stored, u = 2^-24. Each rule raises
AssertionError. Triton's interpreter truncates float32 to bfloat16 where GPUs round, hence the one
exception in two of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

try:
    from flashddpm.kernels.launch import INTERPRETED
except ImportError:  # without Triton
    INTERPRETED = False

U = 2.0**-24
"""Unit roundoff of float32."""
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
DIGITS = {torch.float16: 11, torch.bfloat16: 8}
LOWEST = {torch.float16: -14, torch.bfloat16: -126}
"""Exponents of the smallest normal numbers."""

Rule = Callable[[Tensor, Tensor, Tensor], None]
"""(result, the reference's result, the reference's result in float64) -> None, or AssertionError:
how ``check_op`` judges a result."""


def same(actual: Tensor, expected: Tensor, truncates: bool = False) -> None:
    """Equal bit for bit, signs of zeros too; NaN equals NaN.

    With ``truncates``, bfloat16 under the interpreter may be one step nearer to zero.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}, not {expected.dtype}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    nan = expected.isnan() if expected.is_floating_point() else torch.zeros_like(expected) > 0
    found = actual.isnan() if actual.is_floating_point() else nan
    assert torch.equal(found, nan), f"NaN in {(found != nan).sum()} other places"
    steps = truncates and INTERPRETED and expected.dtype is torch.bfloat16
    if expected.dtype in BITS:
        actual = actual.contiguous().view(BITS[actual.dtype])
        expected = expected.contiguous().view(BITS[expected.dtype])
    off = expected.long() - actual.long()
    off = off.where(~nan, 0)
    if steps:
        off = off.where(off != 1, 0)
    assert not off.count_nonzero(), f"{off.count_nonzero()} of {off.numel()} elements differ"


def close(actual: Tensor, r64: Tensor, terms: Tensor, n: int) -> None:
    """Within n u times the terms' sum of the float64 result, and half a unit of the dtype.

    Args:
        actual: the result, float32, float16 or bfloat16.
        r64: the result in float64.
        terms: the sum of the absolute values of the terms that were added.
        n: roundings on the longest path.
    """
    bound = n * U * terms.double()
    if actual.dtype is not torch.float32:
        exponent = r64.abs().log2().floor().clamp(min=LOWEST[actual.dtype])
        unit = 2.0 ** (exponent - DIGITS[actual.dtype] + 1)
        truncated = INTERPRETED and actual.dtype is torch.bfloat16
        bound = bound + unit * (1.0 if truncated else 0.5)
    excess = (actual.detach().cpu().double() - r64).abs() - bound
    assert not excess.isnan().any() and (excess <= 0).all(), f"over by {excess.max():.3g}"


def reduced(actual: Tensor, r64: Tensor, plain: Tensor) -> None:
    """Relative error at most twice that of plain PyTorch in the same dtype, or 1e-6."""
    error = ((actual.detach().cpu().double() - r64) / r64).abs()
    allowed = (2 * ((plain.double() - r64) / r64).abs()).clamp(min=1e-6)
    assert (error <= allowed).all(), f"relative errors {error} over {allowed}"


def bitwise(actual: Tensor, plain: Tensor, r64: Tensor) -> None:
    """A ``Rule``: the ``same`` as the reference."""
    same(actual, plain, truncates=True)


def relative(actual: Tensor, plain: Tensor, r64: Tensor) -> None:
    """A ``Rule`` of sums in another order: ``reduced``, or equal where R64 is 0, NaN or Inf."""
    assert actual.shape == plain.shape, f"shape {actual.shape}, not {plain.shape}"
    assert actual.dtype == plain.dtype, f"{actual.dtype}, not {plain.dtype}"
    actual, plain, r64 = actual.detach().cpu(), plain.detach().cpu(), r64.detach().cpu()
    exact = ~r64.isfinite() | (r64 == 0)
    same(actual[exact].double() + 0.0, r64[exact].double() + 0.0)
    reduced(actual[~exact], r64[~exact], plain[~exact])


def rounded(n: int) -> Rule:
    """Return the ``Rule`` of results that are no sum: ``close``, after n roundings."""

    def rule(actual: Tensor, plain: Tensor, r64: Tensor) -> None:
        assert actual.shape == plain.shape, f"shape {actual.shape}, not {plain.shape}"
        assert actual.dtype == plain.dtype, f"{actual.dtype}, not {plain.dtype}"
        actual, r64 = actual.detach().cpu(), r64.detach().cpu().double()
        exact = ~r64.isfinite()
        same(actual[exact].double(), r64[exact])
        close(actual[~exact], r64[~exact], r64[~exact].abs(), n)

    return rule
