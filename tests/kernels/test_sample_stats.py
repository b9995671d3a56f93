"""Statistics of whole samples: torch's quantile, diffusers' rescaling, and only where asked."""

import importlib

import numpy as np
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm import kernels
from flashddpm.kernels import Column, reference
from flashddpm.kernels.launch import channels_last
from flashddpm.kernels.step_arguments import StepStatistics, by_tensor
from flashddpm.kernels.tables import FLOATS

# The interpreter computes with NumPy, which warns where Inf - Inf is tried.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

module = importlib.import_module("flashddpm.kernels.sample_stats")
STATS = StepStatistics._fields
SHAPES = [(1, 1, 1), (1, 1, 2), (3, 1, 1), (1, 1, 17), (3, 17, 17), (1, 31, 33), (4, 8, 8)]


def row(**columns):
    return [columns.get(column.name.lower(), 0.0) for column in Column]


def arguments(shape=(3, 5, 7), dtype=torch.float32, rows=None, uncond=(-1, 4, -1, 5), seed=0):
    """Four slots, one for each row after the first, of idle slots."""
    rows = rows or [
        row(x0_xt=1.2, x0_out=-0.7, threshold=0.9, clip=5.0),
        row(x0_xt=1.2, x0_out=-0.7, threshold=0.5, rescale=0.7, clip=5.0),
        row(x0_xt=1.2, x0_out=-0.7, rescale=0.7),
        row(x0_xt=1.2, x0_out=-0.7, rescale=1.0),
    ]
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn((4, *shape), generator=draws) * 2
    out = torch.randn((7, *shape), generator=draws).to(dtype)
    return {
        "dynamic_threshold": torch.full((4,), -7.0),
        "rescale_factor": torch.full((4,), -7.0),
        "x": channels_last(x),
        **dict.fromkeys(("hist", "net_in"), torch.full_like(x, torch.nan)),  # of no concern here
        **dict.fromkeys(("nonfinite", "seeds", "keys"), torch.zeros(4)),
        "out": channels_last(out),
        "idx": torch.arange(1, 5) % (len(rows) + 1),
        "guidance": torch.tensor([1.0, 2.5, 1.0, 7.0]),
        "lane_cond": torch.tensor([2, 0, 3, 1], dtype=torch.int32),
        "lane_uncond": torch.tensor(uncond, dtype=torch.int32),
        "rows": torch.tensor([row(), *rows]),
        "next": torch.tensor([0] * (len(rows) + 1)),
    }


@pytest.fixture(scope="module")
def run(device, copy_of):
    """(args, fast or reference) -> the statistics on the CPU."""

    def run(args, which="fast"):
        args = copy_of(args, device if which == "fast" else "cpu")
        by_tensor((kernels if which == "fast" else reference).sample_stats)(**args)
        return {name: args[name].cpu() for name in STATS}

    return run


both = pytest.mark.parametrize("which", ["fast", "reference"])


def combined(args, slot, dtype=torch.float32):
    """Return the slot's conditional output and its combination, one image."""
    C = args["x"].shape[1]
    out = args["out"][:, :C].to(dtype)
    cond, u = out[args["lane_cond"][slot]], args["lane_uncond"][slot]
    return cond, cond if u < 0 else out[u] + args["guidance"][slot] * (cond - out[u])


def x0_of(args, slot, factor=1.0):
    """Return |x0| of a slot in float32, the operations in the kernel's order."""
    _, o = combined(args, slot)
    c = args["rows"][args["idx"][slot]]
    return (args["x"][slot] * c[Column.X0_XT] + o * factor * c[Column.X0_OUT]).abs()


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bound_is_torchs_quantile(run, shape, dtype, which, rules):
    args = arguments(shape, dtype)
    got = run(args, which)["dynamic_threshold"]
    wanted = torch.quantile(x0_of(args, 0), 0.9).clamp(1.0, 5.0)
    torch.testing.assert_close(got[0], wanted, rtol=2e-7, atol=0)  # torch may fuse its last sum
    assert (got[2:] == -7).all()


@both
@settings(max_examples=10)
@given(
    q=st.floats(0, 1, width=32).filter(lambda q: q > 0),
    n=st.integers(1, 40),
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    data=st.data(),
)
def test_quantile_of_any_values(run, which, q, n, values, data):
    """Ties, zeros and subnormals included: the two order statistics are exact."""
    picks = data.draw(
        st.lists(st.sampled_from([0.0, -0.0, 1e-40, *values]), min_size=n, max_size=n)
    )
    args = arguments((1, 1, n), rows=[row(x0_xt=1.0, threshold=q, clip=3e38)] * 4)
    args["x"] = channels_last(torch.tensor(picks).reshape(1, 1, 1, n).repeat(4, 1, 1, 1))
    got = run(args, which)["dynamic_threshold"]
    assert (got == got[0]).all()
    ordered = np.sort(np.abs(np.array(picks, np.float32)))
    k = int(q * (n - 1))
    low, high = ordered[k], ordered[min(k + 1, n - 1)]
    assert min(max(low, 1), 3e38) <= got[0] <= max(high, 1)
    exact = torch.quantile(torch.tensor(ordered).double(), torch.tensor(q).double())
    torch.testing.assert_close(got[0], exact.clamp(1.0, 3e38).float(), rtol=3e-7, atol=0)


@both
def test_bound_stays_within_one_and_the_clip(run, which):
    rows = [row(x0_xt=scale, threshold=0.9, clip=1.5) for scale in (0.1, 1.0, 100.0)]
    args = arguments(rows=[*rows, row(x0_xt=100.0, threshold=0.9, clip=0.5)])
    bounds = run(args, which)["dynamic_threshold"]
    assert bounds[0] == 1 and bounds[2] == 1.5 and bounds[3] == 1


@both
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_factor_is_that_of_rescale_noise_cfg(run, shape, dtype, which):
    args = arguments(shape, dtype)
    got = run(args, which)["rescale_factor"]
    assert got[0] == -7 and got[2] == -7  # does not ask; is not guided
    for slot, phi in ((1, 0.7), (3, 1.0)):
        cond, o = (value[None] for value in combined(args, slot, torch.float64))
        wanted = rescale_noise_cfg(o, cond, phi)
        torch.testing.assert_close(got[slot].double() * o, wanted, rtol=1e-6, atol=1e-7)


@both
def test_factor_comes_before_the_threshold(run, which):
    args = arguments()
    got = run(args, which)
    wanted = torch.quantile(x0_of(args, 1, got["rescale_factor"][1]), 0.5).clamp(1.0, 5.0)
    torch.testing.assert_close(got["dynamic_threshold"][1], wanted, rtol=3e-7, atol=0)
    without = torch.quantile(x0_of(args, 1), 0.5).clamp(1.0, 5.0)
    assert abs(got["dynamic_threshold"][1] - without) > 1e-3


@pytest.mark.parametrize("block", [16, 64])
def test_independent_of_block_size(run, rules, monkeypatch, block):
    args = arguments((3, 5, 7))
    expected = run(args)
    monkeypatch.setattr(module, "BLOCK", block)
    results = run(args)
    factors, wanted = results["rescale_factor"], expected["rescale_factor"]
    torch.testing.assert_close(factors, wanted, rtol=3e-7, atol=0)
    rules.same(results["dynamic_threshold"][0], expected["dynamic_threshold"][0])


@both
def test_rows_without_guidance(run, which):
    """No factor, and the bound of the conditional output."""
    ask = {"x0_xt": 1.2, "x0_out": -0.7, "threshold": 0.9, "clip": 5.0, "rescale": 0.7}
    args = arguments(rows=[row(**ask, unguided=1.0)] * 4)
    got = run(args, which)
    assert (got["rescale_factor"] == -7).all()
    alone = run(args | {"lane_uncond": torch.full_like(args["lane_uncond"], -1)}, which)
    assert torch.equal(got["dynamic_threshold"], alone["dynamic_threshold"])


@both
def test_only_slots_that_ask_are_written(run, which):
    args = arguments(rows=[row(x0_xt=1.0, c_x0=1.0, clip=1.0)] * 4)
    results = run(args, which)
    args["idx"].zero_()
    args["rows"][0] = torch.tensor(row(x0_xt=1.0, threshold=0.9, rescale=1.0, clip=2.0))
    for name, value in (results | run(args, which)).items():
        assert (value == -7).all(), name


@both
def test_lanes_of_the_variance_are_not_read(run, which, rules):
    """With 2C channels, the first C say the same as C channels would."""
    args = arguments()
    expected = run(args, which)
    args["out"] = channels_last(torch.cat([args["out"], torch.full_like(args["out"], 1e9)], 1))
    for name, value in run(args, which).items():
        rules.same(value, expected[name])


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_values_stay_in_their_sample(run, which, rules, bad):
    """A NaN anywhere makes the bound NaN, as torch's quantile; Inf is the largest number."""
    args = arguments()
    clean = run(args, which)
    args["x"][0, 1, 2, 3] = bad
    results = run(args, which)
    assert results["dynamic_threshold"][0].isnan() == (bad != bad)
    rules.same(results["dynamic_threshold"][1:], clean["dynamic_threshold"][1:])
    rules.same(results["rescale_factor"], clean["rescale_factor"])


@both
def test_lane_0_may_be_the_unconditional_one(run, which):
    args = arguments(uncond=(-1, 0, -1, 0))
    args["lane_cond"][:] = torch.tensor([2, 4, 3, 1])
    got = run(args, which)["rescale_factor"]
    cond, o = (value[None] for value in combined(args, 3, torch.float64))
    wanted = rescale_noise_cfg(o, cond, 1.0)
    torch.testing.assert_close(got[3].double() * o, wanted, rtol=1e-6, atol=1e-7)


@both
def test_padded_rows_of_the_state(run, which, rules, Guarded):
    """Images of x may stand apart; what lies between is not read."""
    args = arguments()
    expected = run(args, which)
    zone = Guarded.around(args["x"], 160, "cpu")
    padded = torch.full_like(zone.whole, torch.nan)
    view = padded.as_strided(zone.view.shape, zone.view.stride(), zone.ZONE)
    args["x"] = view.copy_(args["x"])
    for name, value in run(args, which).items():
        rules.same(value, expected[name])


@both
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_factor_of_small_and_large_outputs(run, which, scale):
    args = arguments()
    plain = run(args, which)["rescale_factor"]
    args["out"] *= scale
    torch.testing.assert_close(run(args, which)["rescale_factor"], plain, rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_outputs_without_deviation_keep_their_scale(run, which, value):
    """Such as those of a network whose last layer starts at 0."""
    args = arguments()
    args["out"][:] = value
    got = run(args, which)["rescale_factor"]
    torch.testing.assert_close(got[[1, 3]], torch.ones(2), rtol=1e-6, atol=0)


def test_permuted_slots_give_permuted_results(run, rules):
    args = arguments()
    order = [2, 0, 3, 1]
    permuted = dict(args)
    for name in ("x", "idx", "guidance", "lane_cond", "lane_uncond"):
        permuted[name] = args[name][order]
    expected = run(args)
    for name, value in run(permuted).items():
        rules.same(value, expected[name][order])


def test_equals_the_steps_x0(run, device, copy_of):
    """What the step clips to the bound is what the bound was taken of: a share 1 - q is clipped."""
    args = arguments((3, 17, 17), rows=[row(x0_xt=1.2, x0_out=-0.7, threshold=0.9, clip=50.0)] * 4)
    bounds = run(args)["dynamic_threshold"]
    assert (bounds > 1).all()
    for slot in range(4):
        clipped = (x0_of(args, slot) >= bounds[slot]).float().mean()
        assert abs(clipped - 0.1) < 0.01


@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 4, 4)])
def test_zero_elements(device, copy_of, shape):
    args = copy_of(arguments(shape), device)
    if 0 not in shape:
        for name in (*STATS, "x", "idx", "guidance", "lane_cond", "lane_uncond"):
            args[name] = args[name][:0]
    by_tensor(kernels.sample_stats)(**args)
    assert (args["dynamic_threshold"] == -7).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dynamic_threshold", lambda x: x[:3]),
        ("dynamic_threshold", lambda x: x.double()),
        ("rescale_factor", lambda x: x[:, None]),
        ("x", lambda x: x.contiguous()),
        ("x", lambda x: x.half()),
        ("x", lambda x: x[0]),
        ("out", lambda x: x.double()),
        ("out", lambda x: x[:, :2]),
        ("out", lambda x: x[..., :3]),
        ("idx", lambda x: x.int()),
        ("guidance", lambda x: x.double()),
        ("lane_cond", lambda x: x.long()),
        ("lane_uncond", lambda x: x[:1]),
        ("rows", lambda x: x[:, :9].contiguous()),
        ("next", lambda x: x[1:]),
    ],
)
def test_bad_arguments(name, change):
    args = arguments()
    with pytest.raises(ValueError, match=f"^{name}"):
        by_tensor(kernels.sample_stats)(**(args | {name: change(args[name])}))
