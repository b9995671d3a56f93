"""A term of the bound against distributions of torch in float64 and, at extremes, mpmath.

What the columns of a row must be for a schedule: tests/evaluation/test_bound.py.
"""

import functools
import importlib

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from flashddpm import kernels
from flashddpm.kernels import Purpose, VlbColumn, launch, reference
from flashddpm.kernels.launch import channels_last
from flashddpm.kernels.tables import FLOATS

module = importlib.import_module("flashddpm.kernels.vlb_terms")

# The interpreter computes with NumPy, which warns where a branch that is not taken overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

# Columns: x0, eps, out, x0_out, eps_out, clip, offset, slope, gain, half_bin.
ROWS = [
    [0.0, 1.0, 1.0, -0.75, 1.0, 1.0, 0.0, 0.0, 2.0, 0.0],  # eps, clipped, a fixed variance
    [-0.6, 0.8, 1.0, -0.6, 0.8, 0.0, 0.7, 0.6, 0.9, 0.0],  # v, a learned one
    [1.0, 0.0, 1.0, 1.0, -0.75, 0.8, -0.5, 1.0, 0.2, 0.0],  # x_0
    [0.0, 1.0, 1.0, -0.03, 1.0, 1.0, 0.2, 0.5, 30.0, 0.12],  # the decoder
    [1.0, 0.0, 1.0, 0.02, 0.5, 0.0, -0.3, 0.0, 60.0, 0.7],  # the decoder
    [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.02, 0.0, 0.1, 0.0],  # the prior
]
PRIOR = len(ROWS) - 1
SHAPES = [(1, 1, 1), (1, 1, 2), (3, 1, 1), (1, 1, 17), (3, 17, 17), (1, 31, 33), (4, 8, 8)]


def arguments(shape, dtype=torch.float32, t=(1, 0), seed=0, both=True, **change):
    draws = torch.Generator().manual_seed(seed)
    B, (C, H, W) = len(t), shape
    x0 = torch.rand((B, *shape), generator=draws) * 2.2 - 1.1
    out = torch.randn((B, 2 * C, H, W), generator=draws)
    return {
        "out": channels_last(out[:, : 2 * C if both else C].to(dtype)),
        "x0": channels_last(x0.clamp(-1, 1).to(dtype)),
        "t": torch.tensor(t),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (B,), generator=draws),
        "keys": torch.randint(0, 2**40, (B,), generator=draws),
        "rows": torch.tensor(ROWS),
    } | change


def exact(args):
    """Return the three means in float64 from the arguments as they are stored."""
    B, C, H, W = args["x0"].shape
    c = {k: args["rows"][args["t"], k].double().reshape(B, 1, 1, 1) for k in VlbColumn}
    out, x0 = args["out"].double(), args["x0"].double()
    eps = reference.philox(args["seeds"], args["keys"], (C, H, W), Purpose.TRAINING).double()
    error = c[VlbColumn.OUT] * out[:, :C] - c[VlbColumn.X0] * x0 - c[VlbColumn.EPS] * eps
    x0_hat = x0 + c[VlbColumn.X0_OUT] * error
    clip = c[VlbColumn.CLIP]
    x0_hat = torch.where(clip == 0, x0_hat, x0_hat.clamp(-clip, clip))
    d = c[VlbColumn.OFFSET].expand_as(x0)
    if out.shape[1] == 2 * C:
        d = d + c[VlbColumn.SLOPE] * out[:, C:]
    model = Normal(c[VlbColumn.GAIN] * (x0_hat - x0), (d / 2).exp())
    kl = kl_divergence(Normal(torch.zeros_like(x0), torch.ones_like(x0)), model)
    half = c[VlbColumn.HALF_BIN]
    ends = [(end * half - model.loc) / model.scale for end in (-1, 1)]
    low, high = (torch.where(x0 < -0.999, -torch.inf, ends[0]), ends[1])
    high = torch.where(x0 > 0.999, torch.inf, high)
    flip = low + high > 0  # so that both distribution functions are small
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    nll = -(torch.special.ndtr(high) - torch.special.ndtr(low)).log()
    term = torch.where(half == 0, kl, nll)
    values = (term, (x0_hat - x0) ** 2, (c[VlbColumn.EPS_OUT] * error) ** 2)
    return torch.stack([value.flatten(1).mean(1) for value in values], 1)


def held(rules, got, args):
    """Hold each of the three to the rule of reductions, next to plain PyTorch."""
    assert got.dtype is torch.float32 and got.shape == (len(args["x0"]), 3)
    rules.relative(got, reference.vlb_terms(**args), exact(args))


@pytest.fixture(scope="module")
def run(device, copy_of):
    """args -> the fast terms on the device, brought to the CPU."""
    return lambda args: kernels.vlb_terms(**copy_of(args, device)).cpu()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [(1, 0, 2), (3, 4, PRIOR)], ids=["divergence", "decoder"])
def test_near_float64(run, rules, shape, dtype, t):
    args = arguments(shape, dtype, t)
    held(rules, run(args), args)


@settings(max_examples=20)
@given(
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    t=st.lists(st.integers(0, PRIOR), min_size=1, max_size=2),
    seed=st.integers(0, 10**6),
    both=st.booleans(),
)
def test_near_float64_anywhere(run, rules, dtypes, shape, t, seed, both):
    """Output and images may differ in dtype; C channels or 2C."""
    args = arguments(shape, torch.float32, t, seed, both)
    args["out"], args["x0"] = args["out"].to(dtypes[0]), args["x0"].to(dtypes[1])
    held(rules, run(args), args)


# The parts of a term --------------------------------------------------------------------------


@triton.jit
def _each_kernel(nll, divergence, d, shift, pixel, half, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    d, shift = tl.load(d + at), tl.load(shift + at)
    tl.store(nll + at, module._decoder(d, shift, tl.load(pixel + at), tl.load(half + at)))
    tl.store(divergence + at, module._divergence(d, shift))


@pytest.fixture(scope="module")
def each(device):
    """(d, shift, pixel, half) -> the decoder's term and the divergence of each, float64 arrays."""

    def call(*values):
        values = np.broadcast_arrays(*(np.asarray(value, np.float32) for value in values))
        size = values[0].size
        block = triton.next_power_of_2(size)
        inputs = [torch.zeros(block, device=device) for _ in values]
        for place, value in zip(inputs, values, strict=True):
            place[:size] = torch.tensor(value.ravel())
        inputs[3][size:] = 1
        nll, divergence = torch.empty(2, block, device=device)
        _each_kernel[(1,)](nll, divergence, *inputs, block, enable_fp_fusion=False)
        return (x[:size].cpu().double().numpy().reshape(values[0].shape) for x in (nll, divergence))

    return call


def mpmath_nll(d, shift, pixel, half):
    """-ln of the mass of the bin, to 200 digits: the difference as it is written."""
    with mpmath.workdps(200):
        d, shift, half = (mpmath.mpf(float(value)) for value in (d, shift, half))
        scale = mpmath.exp(d / 2)
        low = -mpmath.inf if pixel < -0.999 else (-half - shift) / scale
        high = mpmath.inf if pixel > 0.999 else (half - shift) / scale
        if low + high > 0:
            low, high = -high, -low
        root = mpmath.sqrt(2)
        mass = (mpmath.erfc(-high / root) - mpmath.erfc(-low / root)) / 2
        return float(-mpmath.log(mass))


HALVES = [1e-4, 3e-3, 0.05, 0.29, 0.31, 0.53, 1.0, 3.0, 12.0]
SHIFTS = [0.0, 1e-6, 0.1, 0.5, 1.0, 1.3, 5.0, 12.0, 40.0, 100.0, 300.0, 3000.0]


def test_decoder_at_extremes(each):
    """Up to thousands of deviations, where P is 0 in any float, and for bins of any width.

    Where P is nearly 1, the term is about Q(y), of an end y that is rounded once before it is
    squared, and its square once: 2 u y^2 at most, with y^2 < -2 ln Q(y).
    """
    shifts = [sign * value for value in SHIFTS for sign in (1, -1)]
    grid = np.stack(np.meshgrid(shifts, [-1.0, 0.25, 1.0], HALVES, indexing="ij"))
    shift, pixel, half = grid.astype(np.float32)
    nll, _ = each(0.0, shift, pixel, half)
    expected = np.vectorize(mpmath_nll)(0.0, shift, pixel, half)
    assert expected.max() > 1e6 and expected.min() < 1e-30
    assert np.isfinite(nll).all() and (nll >= 0).all()
    normal = expected > 1e-37
    allowed = 1e-6 + 2 * 2.0**-24 * np.clip(-2 * np.log(expected[normal]), 0, None)
    assert (np.abs(nll[normal] / expected[normal] - 1) <= allowed).all()
    assert (nll[~normal] <= 1e-37).all()


@pytest.mark.parametrize("d", [-9.0, -1.5, 0.7, 6.0, 40.0, 120.0])
def test_decoder_of_any_variance(each, d):
    """The deviation's own rounding, some 8 u, counts twice in the square of a tail."""
    grid = np.stack(np.meshgrid(SHIFTS, [-1.0, 0.25, 1.0], [0.05, 0.53, 3.0], indexing="ij"))
    shift, pixel, half = grid.astype(np.float32)
    nll, _ = each(d, shift, pixel, half)
    expected = np.vectorize(mpmath_nll)(np.float32(d), shift, pixel, half)
    np.testing.assert_allclose(nll, expected, rtol=2e-6, atol=1e-9)


@settings(max_examples=25)
@given(
    mean=st.floats(-1.5, 1.5),
    deviation=st.floats(-3, 1).map(lambda power: 10.0**power),
)
def test_decoder_is_a_distribution_over_pixels(each, mean, deviation):
    """The bins of all 256 levels share out all of the mass."""
    levels = np.arange(256) / 127.5 - 1
    nll, _ = each(0.0, (mean - levels) / deviation, levels, 1 / 255 / deviation)
    assert np.exp(-nll).sum() == pytest.approx(1, abs=2e-5)


def test_plain_decoder_at_extremes():
    """The reference takes logarithms in float64."""
    shift, pixel, half = (
        np.stack(np.meshgrid(SHIFTS, [-1.0, 0.25, 1.0], HALVES, indexing="ij"))
        .astype(np.float32)
        .reshape(3, -1)
    )
    d = np.zeros_like(shift)
    parts = (torch.tensor(value) for value in (d, shift, pixel, half))
    nll = reference.evaluation._decoder(*parts).numpy()
    expected = np.vectorize(mpmath_nll)(d, shift, pixel, half)
    # The narrowest bin is 1e-4 wide at 3000: of what float64 keeps of both, 1e-8 is left.
    np.testing.assert_allclose(nll, expected, rtol=1e-8, atol=1e-300)


def test_divergence_of_nearly_equal_normals(each):
    """d - 1 + e^-d, without what cancels in it."""
    d = np.concatenate([[0.0], np.geomspace(1e-12, 80, 400)]).astype(np.float32)
    for sign in (1, -1):
        _, found = each(sign * d, 0.0, 0.0, 1.0)
        with mpmath.workdps(60):
            expected = [
                float((mpmath.mpf(x) - 1 + mpmath.exp(-mpmath.mpf(x))) / 2)
                for x in (sign * d).tolist()
            ]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-38)
    _, found = each(0.0, [0.0, 3.0, -4.0], 0.0, 1.0)
    np.testing.assert_array_equal(found, [0.0, 4.5, 8.0])


# What a row reads, and what it does not ---------------------------------------------------------


def test_the_prior_reads_no_output(run, rules):
    args = arguments((3, 5, 7), t=(PRIOR, 0))
    before = run(args)
    args["out"][0] = torch.nan
    rules.same(run(args), before)
    rules.same(reference.vlb_terms(**args), reference.vlb_terms(**arguments((3, 5, 7), t=(5, 0))))
    assert before[0, 2] == 0


def test_a_fixed_variance_reads_no_variance(run, rules):
    """2C channels are the first C of them, whatever the others hold."""
    args = arguments((3, 5, 7), t=(0, 4))
    both = run(args)
    rules.same(run(arguments((3, 5, 7), t=(0, 4), both=False)), both)
    args["out"][:, 3:] = torch.nan
    rules.same(run(args), both)


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_images_are_not_read_where_nothing_needs_them(run, which):
    """Of an unclipped prediction of eps all is known from its error."""
    args = arguments((3, 5, 7), t=(0,))
    args["rows"][0, VlbColumn.CLIP] = 0
    args["x0"][:] = torch.nan
    found = run(args) if which == "fast" else reference.vlb_terms(**args)
    assert found.isfinite().all()


@pytest.fixture(scope="module")
def finite(run):
    """t -> the terms of three images that are finite."""
    return functools.cache(lambda t: run(arguments((3, 5, 7), t=(t,) * 3)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [1, 4])
@pytest.mark.parametrize("t", [0, 1, 3])
def test_nonfinite_values_stay_in_their_image(run, finite, rules, bad, channel, t):
    args = arguments((3, 5, 7), t=(t,) * 3)
    before = finite(t)
    args["out"][1, channel, 3, 4] = bad
    after, plain = run(args), reference.vlb_terms(**args)
    read = channel == 1 or ROWS[t][VlbColumn.SLOPE] != 0
    if bad != bad and read:
        assert after[1, 0].isnan()
    if channel == 1:
        assert not after[1, 2].isfinite()
    assert torch.equal(after[1].isnan(), plain[1].isnan())
    assert torch.equal(after[1].isinf(), plain[1].isinf())
    after[1] = before[1]
    rules.same(after, before)


def test_images_are_independent(run, rules):
    args = arguments((3, 5, 7), t=(0, 3, 1, PRIOR))
    order = torch.tensor([2, 0, 3, 1])
    permuted = args | {name: args[name][order] for name in ("out", "x0", "t", "seeds", "keys")}
    rules.same(run(permuted), run(args)[order])


@pytest.mark.parametrize("block", [64, 128])
def test_several_blocks(run, monkeypatch, block):
    args = arguments((1, 10, 20), t=(1,))
    whole = run(args)
    monkeypatch.setattr(launch, "block_size", lambda n: block)
    torch.testing.assert_close(run(args), whole, rtol=1e-6, atol=0)


def test_noise_is_that_of_add_noise(run):
    """A network that says what add_noise added has no error."""
    args = arguments((3, 5, 7), t=(0,), both=False)
    zeros = torch.zeros_like(args["x0"])
    table = torch.tensor([[0.0, 1.0]])
    args["out"] = reference.add_noise(zeros, args["t"], args["seeds"], args["keys"], table)
    assert (run(args) == 0).all()
    args["keys"] += 1
    assert (run(args) > 0).all()


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 0, 4)])
def test_zero_elements(run, rules, shape):
    batch = 0 if 0 not in shape else 2
    args = arguments(shape, t=(0,) * batch)
    args["t"] = args["t"].long()
    rules.same(run(args), torch.full((batch, 3), torch.nan))
    rules.same(reference.vlb_terms(**args), torch.full((batch, 3), torch.nan))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out", {"out": torch.zeros(2, 3, 4, 4)}),
        ("out", {"out": torch.zeros(1, 2, 4, 4)}),
        ("out", {"out": torch.zeros(2, 2, 4, 4, dtype=torch.float64)}),
        ("x0", {"x0": torch.zeros(2, 4, 4)}),
        ("x0", {"x0": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}),
        ("t", {"t": torch.zeros(2)}),
        ("seeds", {"seeds": torch.zeros(3, dtype=torch.int64)}),
        ("keys", {"keys": torch.arange(4)[::2]}),
        ("rows", {"rows": torch.zeros(5, 9)}),
    ],
)
def test_bad_arguments(name, change):
    with pytest.raises(ValueError, match=f"^{name}"):
        kernels.vlb_terms(**(arguments((1, 4, 4)) | change))
