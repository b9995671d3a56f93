"""Logarithm and exponential of exact operations: known answers, accuracy, equal bits."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.kernels import exact_math, reference
from flashddpm.kernels.launch import INTERPRETED, OPTIONS

# The interpreter computes with NumPy, which warns where numbers overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

# Float32 bits of x and of e^x, here everywhere the float32 nearest to float64's.
KNOWN_EXP = {
    "00000000": "3f800000",
    "80000000": "3f800000",
    "3f800000": "402df854",
    "bf800000": "3ebc5ab2",
    "3f317218": "40000000",
    "c1200000": "383e6bce",
    "42b00000": "7ef882b7",
    "c2ac0000": "01739362",
}


@triton.jit
def _apply_kernel(out, x, n, WHICH: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < n, other=1.0)
    if WHICH == 0:
        value = exact_math.exp(value)
    else:
        value = exact_math.ln(value, SCALE)
    tl.store(out + offsets, value, mask=offsets < n)


@pytest.fixture(scope="module")
def apply(device):
    """(name, values) -> the jit function's results."""

    def apply(which, x, scale=0):
        x = x.to(device)
        out = torch.empty_like(x)
        block = 16384 if INTERPRETED else 1024
        grid = (triton.cdiv(len(x), block),)
        _apply_kernel[grid](out, x, len(x), int(which == "ln"), scale, block, **OPTIONS)
        return out.cpu()

    return apply


def bits(words):
    return torch.tensor(np.array([int(w, 16) for w in words], np.uint32).view(np.float32))


def exp_in_numpy(x: np.ndarray) -> np.ndarray:
    """The formula once more, in NumPy and by other means for the integer part."""
    f = np.float32
    n = np.rint(f(1.44269504) * x).astype(f)
    r = x - n * f(0.693359375)
    r = r - n * f(-2.12194440e-4)
    y = f(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + f(c)
    y = y * (r * r) + r + f(1)
    return np.ldexp(y, n.astype(np.int32))


def test_known_answers_of_exp(apply, rules):
    x, expected = bits(KNOWN_EXP.keys()), bits(KNOWN_EXP.values())
    rules.same(reference.exact.exp(x), expected)
    rules.same(apply("exp", x), expected)


def test_exp_everywhere(apply, rules):
    """The kernel's bits are the reference's and NumPy's; 1.5e-7 from float64."""
    x = torch.cat([torch.linspace(-86, 88, 60_001), torch.linspace(-1, 1, 60_001)])
    got = reference.exact.exp(x)
    rules.same(apply("exp", x), got)
    rules.same(torch.tensor(exp_in_numpy(x.numpy())), got)
    exact64 = x.double().exp()
    assert ((got.double() - exact64) / exact64).abs().max() < 1.5e-7


def test_exp_beyond_its_range(apply, rules):
    x = torch.tensor([-86.00001, -1e30, -torch.inf, 88.00001, 1e30, torch.inf, torch.nan])
    expected = torch.tensor([0.0, 0.0, 0.0, torch.inf, torch.inf, torch.inf, torch.nan])
    rules.same(reference.exact.exp(x), expected)
    rules.same(apply("exp", x), expected)


@settings(max_examples=25)
@given(x=st.lists(st.floats(width=32), min_size=1, max_size=16))
def test_exp_of_anything(apply, rules, x):
    values = torch.tensor(x)
    rules.same(apply("exp", values), reference.exact.exp(values))


def test_ln_is_near_float64(apply):
    """Within 2 units of the last place, or 1e-7 where the result is near 0."""
    x = torch.cat([torch.logspace(-37, 37, 20_001, dtype=torch.float64).float(), torch.ones(1)])
    got, exact64 = apply("ln", x).double(), x.double().log()
    assert ((got - exact64).abs() <= 2e-7 * exact64.abs() + 1e-7).all()
    assert got[-1] == 0


@pytest.mark.parametrize("scale", [1, 32])
def test_ln_of_a_scaled_number_has_the_same_bits(apply, rules, scale):
    """ln(v 2^-scale) from v, for every exponent that noise has."""
    draws = torch.Generator().manual_seed(0)
    u = torch.rand(4_000, generator=draws) * 2.0 ** -torch.arange(32).repeat(125) + 2.0**-33
    rules.same(apply("ln", u * 2.0**scale, scale), apply("ln", u))
