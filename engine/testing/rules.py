"""Rules of what "equal" means for a kernel's result: ``same``, ``close``, ``reduced`` and others.

No rule is loosened to make a test pass. Each raises AssertionError where results differ. R64 is the
reference's result in float64 from the arguments as they are stored, u = 2^-24 is the unit roundoff
of float32. Triton's interpreter truncates float32 to bfloat16 where GPUs round, so ``same`` and
``close`` allow one more unit in the last place of bfloat16 there.
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
"""The unit roundoff of float32."""
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
DIGITS = {torch.float16: 11, torch.bfloat16: 8}
LOWEST = {torch.float16: -14, torch.bfloat16: -126}
"""The exponents of the smallest normal numbers."""

Rule = Callable[..., None]
"""A rule of ``check_op``: called with (result, the reference's result, the reference's result in
float64), tensors of equal shape, it raises AssertionError if the result is wrong. A rule of two
arguments does without float64."""


def needs_float64(rule: Rule) -> bool:
    """Return whether a rule compares with the result in float64: it has three arguments or more.

    Args:
        rule: the rule, any callable; its arguments that have a default are not counted.
    """
    parameters = inspect.signature(rule).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) > 2


def same(actual: Tensor, expected: Tensor, truncates: bool = False) -> None:
    """Raise AssertionError unless two tensors are equal bit for bit, signs of zeros included.

    NaN equals NaN, whatever its bits. Both may be on any device.

    Args:
        actual: the result, of any shape; float16, bfloat16, float32, float64, integers or bool.
        expected: what it must equal, in shape and dtype too.
        truncates: whether, in Triton's interpreter, a bfloat16 result may be one step (unit in the
            last place) nearer to zero.

    Raises:
        AssertionError: if shapes, dtypes or values differ.
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
    """Return the bits of floating-point numbers as int64, and integers as they are, in int64."""
    return (x.contiguous().view(BITS[x.dtype]) if x.dtype in BITS else x).long()


def _largest_difference(actual: Tensor, expected: Tensor) -> str:
    """Return the largest difference as text, of floating-point numbers also in ulp."""
    value = (actual.double() - expected.double()).abs().max()
    if actual.dtype not in BITS:
        return f"{value:.3g}"
    lowest = torch.iinfo(BITS[actual.dtype]).min
    a, b = (bits.where(bits >= 0, lowest - bits) for bits in map(_bits, (actual, expected)))
    high, low = (a >> 32) - (b >> 32), (a & 0xFFFFFFFF) - (b & 0xFFFFFFFF)  # a - b may overflow
    return f"{value:.3g} ({(high.double() * 2**32 + low.double()).abs().max():.0f} ulp)"


def close(actual: Tensor, r64: Tensor, terms: Tensor, n: int) -> None:
    """Raise AssertionError unless a result is within the rounding errors of n operations.

    The bound is n u (u = 2^-24) times the sum of absolute terms, and for float16 and bfloat16 half
    a unit in the last place (a whole one for bfloat16 in Triton's interpreter, which truncates).

    Args:
        actual: the result, float32, float16 or bfloat16, of any shape and on any device.
        r64: float64 on the CPU, of the same shape, finite: the reference's result in float64.
        terms: real, on the CPU, of the same shape: the sums of the absolute values of the terms
            added.
        n: the number of roundings on the longest path of the computation.

    Raises:
        AssertionError: if an element is further off, or not finite.
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
    """Raise AssertionError unless a result is about as accurate as PyTorch's in the same dtype.

    The relative error of each element may be twice that of ``plain``, and always 1e-6.

    Args:
        actual: the result, floating-point, of any shape and on any device.
        r64: float64 on the CPU, of the same shape, nowhere 0: the reference's result in float64.
        plain: on the CPU, of the same shape: the reference's result in the dtype of ``actual``.

    Raises:
        AssertionError: if an element is further off.
    """
    error = ((actual.detach().cpu().double() - r64) / r64).abs()
    allowed = (2 * ((plain.double() - r64) / r64).abs()).clamp(min=1e-6)
    assert (error <= allowed).all(), f"relative errors {error} over {allowed}"


def bitwise(actual: Tensor, plain: Tensor, r64: Tensor | None = None) -> None:
    """Raise AssertionError unless the result has the bits of the reference's: the default ``Rule``.

    In Triton's interpreter, which truncates, bfloat16 may be one step nearer to zero.

    Args:
        actual: the result, of any shape; float16, bfloat16, float32, float64, integers or bool.
        plain: the reference's result, of the same shape and dtype.
        r64: not read.

    Raises:
        AssertionError: if shapes, dtypes or values differ.
    """
    same(actual, plain, truncates=True)


def relative(actual: Tensor, plain: Tensor, r64: Tensor) -> None:
    """Raise AssertionError unless the result is about as accurate as the reference's in its dtype.

    This is the ``Rule`` for sums in another order. The relative error of each element from r64 may
    be twice that of ``plain``, and always 1e-6; where r64 is 0, NaN or Inf the result must equal
    it.

    Args:
        actual: the result, floating-point, of any shape.
        plain: the reference's result, of the same shape and dtype.
        r64: the reference's result in float64, of the same shape (not checked).

    Raises:
        AssertionError: if shapes or dtypes differ, or an element is further off.
    """
    assert actual.shape == plain.shape, f"shape {actual.shape}, not {plain.shape}"
    assert actual.dtype == plain.dtype, f"{actual.dtype}, not {plain.dtype}"
    actual, plain, r64 = actual.detach().cpu(), plain.detach().cpu(), r64.detach().cpu()
    exact = ~r64.isfinite() | (r64 == 0)
    same(actual[exact].double() + 0.0, r64[exact].double() + 0.0)
    reduced(actual[~exact], r64[~exact], plain[~exact])


@dataclass(frozen=True)
class Rounded:
    """The ``Rule`` of results that differ from the reference's in float64 by at most n roundings.

    ``rounded`` returns one. Calling it compares a result.

    Attributes:
        n: the number of roundings on the longest path of the computation.
        terms: called with the call's arguments by name, in float64; returns, in a shape that
            broadcasts to the result, the sum of the absolute values of the terms added. None for
            the absolute value of the result itself.
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
        """Raise AssertionError unless a result is ``close`` to that in float64 (r64).

        Where r64 is not finite the result must equal it.

        Args:
            actual: the result, float32, float16 or bfloat16, of any shape.
            plain: the reference's result, of the same shape and dtype.
            r64: the reference's result in float64, of the same shape.
            arguments: the arguments of the call by name, in float64, for ``terms``; else not read.

        Raises:
            AssertionError: if shapes or dtypes differ, or an element is further off.
        """
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
    """Return the ``Rule`` that allows the rounding errors of n operations.

    That is 2^-24 n times the absolute value of the result (or the sum of ``terms``), and for
    float16 and bfloat16 half a unit in the last place besides (``close``).

    Args:
        n: the number of roundings on the longest path of the computation.
        terms: for results that are sums, whose terms may cancel: called with the arguments by name,
            in float64, it returns the sum of the absolute values of the terms, in a shape that
            broadcasts to the result. For a gradient, note that the gradients which ``check_op``
            sends backward have absolute values of 1/8 to 2. None for results that are no sums.
    """
    return Rounded(n, terms)
