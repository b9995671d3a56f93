"""What "equal" means: ``same``, ``close`` and ``reduced``. No rule is loosened to pass.

R64 is the result in float64 from the arguments as they are stored, u = 2^-24. Each rule raises
AssertionError. Triton's interpreter truncates float32 to bfloat16 where GPUs round, hence the one
exception in two of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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

Rule = Callable[..., None]
"""(result, the reference's result, the reference's result in float64) -> None, or AssertionError:
how ``check_op`` judges a result. With two arguments, it does without float64."""


def needs_float64(rule: Rule) -> bool:
    """Whether a rule takes the result in float64: a third argument that has no default."""
    parameters = inspect.signature(rule).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) > 2


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
    found_bits, bits = _bits(actual), _bits(expected)
    off = (bits - found_bits).where(~nan, 0)
    if steps:
        off = off.where(off != 1, 0)
    wrong = off != 0
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.numel()} elements differ, by at most "
        f"{_largest_difference(actual[wrong], expected[wrong])}"
    )


def _bits(x: Tensor) -> Tensor:
    """Return the bits of floating-point numbers as integers of 64 bits, integers as they are."""
    return (x.contiguous().view(BITS[x.dtype]) if x.dtype in BITS else x).long()


def _largest_difference(actual: Tensor, expected: Tensor) -> str:
    """Return the largest difference, of floating-point numbers in units in the last place too."""
    value = (actual.double() - expected.double()).abs().max()
    if actual.dtype not in BITS:
        return f"{value:.3g}"
    lowest = torch.iinfo(BITS[actual.dtype]).min
    a, b = (bits.where(bits >= 0, lowest - bits) for bits in map(_bits, (actual, expected)))
    high, low = (a >> 32) - (b >> 32), (a & 0xFFFFFFFF) - (b & 0xFFFFFFFF)  # a - b may overflow
    return f"{value:.3g} ({(high.double() * 2**32 + low.double()).abs().max():.0f} ulp)"


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


def bitwise(actual: Tensor, plain: Tensor, r64: Tensor | None = None) -> None:
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


@dataclass(frozen=True)
class Rounded:
    """The ``Rule`` that ``rounded`` returns.

    Attributes:
        n: roundings on the longest path.
        terms: the arguments, by name, in float64 -> the sum of absolute terms of each element of
            the result; the absolute result, if nothing is said.
    """

    n: int
    terms: Callable[..., Tensor] | None = None

    def __call__(
        self,
        actual: Tensor,
        plain: Tensor,
        r64: Tensor,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise AssertionError if the result is further off; ``terms`` needs the arguments."""
        assert actual.shape == plain.shape, f"shape {actual.shape}, not {plain.shape}"
        assert actual.dtype == plain.dtype, f"{actual.dtype}, not {plain.dtype}"
        actual, r64 = actual.detach().cpu(), r64.detach().cpu().double()
        sizes = r64.abs()
        if self.terms is not None:
            sizes = self.terms(**(arguments or {})).detach().cpu().double().expand_as(r64)
        exact = ~r64.isfinite()
        same(actual[exact].double(), r64[exact])
        close(actual[~exact], r64[~exact], sizes[~exact], self.n)


def rounded(n: int, terms: Callable[..., Tensor] | None = None) -> Rounded:
    """Return the ``Rule`` of n roundings: ``close``.

    Args:
        n: roundings on the longest path.
        terms: of results that are sums, whose terms may cancel: the arguments by name, as for the
            reference and in float64 -> the sum of the absolute terms, to broadcast to the result.
            For a gradient: those that ``check_op`` sends backward are of size 1/8 to 2.
    """
    return Rounded(n, terms)
