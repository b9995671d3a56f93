"""Plans: how they begin, from noise or from an image, where they are guided, and bad rows."""

from __future__ import annotations

import numpy as np
import pytest

import flashddpm as fd
from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.kernels.tables import Column

LINEAR = fd.NoiseSchedule.create()
ZERO_SNR = fd.NoiseSchedule.create(rescale_betas_zero_snr=True)

every_solver = pytest.mark.parametrize("solver", SOLVERS)


def plan_of(solver="ddim", num_steps=10, schedule=LINEAR, **options):
    return make_plan(schedule, solver, num_steps, **{"prediction_type": "v_prediction"} | options)


def half(column):
    return np.eye(len(Column))[column] / 2


def sigma_of(plan):
    return np.sqrt((1 - plan.abar) / plan.abar)


@every_solver
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_only_eulers_methods_scale_the_start(solver, spacing):
    """x_T = b z for linspace and trailing spacing, without the signal's share of the variance."""
    plan = plan_of(solver, spacing=spacing)
    scaled = solver.startswith("euler") and spacing != "leading"
    want = np.sqrt(1 - plan.abar[0]) if scaled else 1
    assert plan.initial == (0, want)
    assert not plan.needs_image
    assert (want == 1) != scaled


@every_solver
def test_abar_is_the_schedules(solver):
    plan = plan_of(solver)
    np.testing.assert_array_equal(plan.abar, LINEAR.alphas_cumprod[plan.timesteps.astype(int)])
    with pytest.raises(ValueError, match="read-only"):
        plan.abar[0] = 0


@every_solver
@pytest.mark.parametrize("row", [0, 1, 4, 9])
def test_a_tail_is_the_plan_of_the_rest_of_the_list(solver, row):
    """Rows are those of a plan for the last timesteps alone; its start noises an image (S4)."""
    plan = plan_of(solver, clip=0.7, threshold=0.0)
    part = plan.begin_at(row)
    own = plan_of(solver, timesteps=plan.timesteps[row:], clip=0.7)
    np.testing.assert_allclose(part.rows, own.rows, rtol=1e-12, atol=1e-15)
    assert part.rows[0, Column.C_HIST] == 0
    np.testing.assert_array_equal(part.noise_keys, plan.noise_keys[row:])
    np.testing.assert_array_equal(part.abar, plan.abar[row:])
    abar = LINEAR.alphas_cumprod[int(part.timesteps[0])]
    np.testing.assert_allclose(part.initial, (np.sqrt(abar), np.sqrt(1 - abar)), rtol=1e-15)
    assert part.needs_image
    again = part.begin_at(len(part) - 1)
    np.testing.assert_array_equal(again.rows[0], plan.begin_at(9).rows[0])


@pytest.mark.parametrize(
    ("strength", "count"), [(0.1, 1), (0.19, 1), (0.2, 2), (0.75, 7), (1, 10), (1.0, 10)]
)
def test_strength_is_a_share_of_the_steps(strength, count):
    assert len(plan_of().from_image(strength)) == count


def test_keys_of_a_tail_are_those_of_the_whole():
    """Also where floors repeat: row 3 of a plan draws the same noise wherever it begins."""
    plan = plan_of("euler_ancestral", sigmas="karras", num_steps=100, spacing="linspace")
    assert (plan.noise_keys[95:] >= 2**32).any()
    np.testing.assert_array_equal(plan.begin_at(95).noise_keys, plan.noise_keys[95:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.from_image(0), "strength=0.0: must be at least 0.1"),
        (lambda p: p.from_image(0.09), "strength=0.09: must be at least 0.1"),
        (lambda p: p.from_image(1.1), r"strength=1.1.*\[0, 1\]"),
        (lambda p: p.from_image(float("nan")), "strength=nan"),
        (lambda p: p.from_image(True), "strength=True"),
        (lambda p: p.begin_at(10), r"row=10: must be in 0..9"),
        (lambda p: p.begin_at(-1), r"row=-1"),
        (lambda p: fd.Plan(p.rows, p.noise_keys).from_image(0.5), "abar=None"),
        (lambda p: fd.Plan(p.rows, p.noise_keys, (0, -1)), "initial=-1"),
        (lambda p: fd.Plan(p.rows, p.noise_keys, (0, np.inf)), "initial=inf"),
        (lambda p: fd.Plan(p.rows, p.noise_keys, (0, 1, 2)), r"initial=\(0, 1, 2\)"),
        (lambda p: fd.Plan(p.rows, p.noise_keys, abar=p.abar[1:]), r"abar: must be 10 numbers"),
        (lambda p: fd.Plan(p.rows, p.noise_keys, abar=p.abar + 1), r"abar: .*\[0, 1\)"),
        (lambda p: fd.Plan(p.rows, p.noise_keys, abar=p.abar * np.nan), "abar"),
        (lambda p: fd.Plan(p.rows + half(Column.UNGUIDED), p.noise_keys), "must be 0 or 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(plan_of(clip=0))


# Guidance interval ----------------------------------------------------------------------------


@every_solver
def test_guidance_interval_is_of_sigma(solver):
    """Kynkaanniemi et al.: guided where low < sigma <= high, by each row's own sigma."""
    plain = plan_of(solver, num_steps=20)
    sigma = sigma_of(plain)
    low, high = sigma[14], sigma[6]  # rows 6..13: 14 is at low, 6 at high
    plan = plan_of(solver, num_steps=20, guidance_interval=(low, high), guidance_rescale=0.7)
    unguided = plan.rows[:, Column.UNGUIDED]
    np.testing.assert_array_equal(np.flatnonzero(unguided == 0), np.arange(6, 14))
    np.testing.assert_array_equal(unguided[unguided != 0], 1)
    np.testing.assert_array_equal(plan.rows[:, Column.RESCALE], np.where(unguided, 0, 0.7))
    others = [c for c in Column if c not in (Column.UNGUIDED, Column.RESCALE)]
    np.testing.assert_array_equal(plan.rows[:, others], plain.rows[:, others])
    np.testing.assert_array_equal(plan.noise_keys, plain.noise_keys)
    assert plan.initial == plain.initial
    np.testing.assert_array_equal(plan.begin_at(10).rows[:4, Column.UNGUIDED], 0)
    assert not plain.rows[:, Column.UNGUIDED].any()


def test_guidance_interval_without_end():
    for interval in ((0, np.inf), (0, 1e9)):
        assert not plan_of(guidance_interval=interval).rows[:, Column.UNGUIDED].any()
    options = {"schedule": ZERO_SNR, "spacing": "trailing"}  # sigma is infinite at the first step
    assert not plan_of(guidance_interval=(0, np.inf), **options).rows[:, Column.UNGUIDED].any()
    unguided = plan_of(guidance_interval=(0, 1e9), **options).rows[:, Column.UNGUIDED]
    np.testing.assert_array_equal(unguided, [1] + [0] * 9)


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ((2, 1), r"guidance_interval=\(2, 1\): low must be below high"),
        ((1, 1), "low must be below high"),
        ((-1, 1), "guidance_interval=-1"),
        ((np.inf, np.inf), "guidance_interval=inf"),
        ((0, np.nan), "guidance_interval=nan"),
        ((0, True), "guidance_interval=True"),
        ((0, "1"), "guidance_interval='1'"),
        ((1, 2, 3), "two sigmas"),
        (0.5, "guidance_interval=0.5: must be two sigmas"),
    ],
)
def test_bad_guidance_intervals(interval, message):
    with pytest.raises(ValueError, match=message):
        plan_of(guidance_interval=interval)


def test_plan_is_frozen_and_read_only():
    rows, keys = make_rows()
    plan = Plan(rows, keys)
    rows[0, 0] = 5
    keys[0] = 5
    assert plan.rows[0, 0] == 0 and plan.noise_keys[0] == 30
    for array in (plan.rows, plan.noise_keys, plan.timesteps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        plan.rows = rows


def make_rows(*changes):
    rows = np.zeros((3, len(Column)))
    rows[:, Column.C_X0] = 1
    for i, column, value in changes:
        rows[i, column] = value
    return rows, np.array([30, 20, 10])


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        (np.zeros((3, 8)), [1, 2, 3], r"rows of shape \(3, 8\)"),
        (np.zeros(9), [1], r"rows of shape \(9,\)"),
        (np.zeros((0, 9)), [], r"rows of shape \(0, 9\)"),
        (make_rows((1, Column.C_XT, np.nan))[0], [1, 2, 3], r"rows\[1, C_XT\]=nan"),
        (make_rows((2, Column.SIGMA, np.inf))[0], [1, 2, 3], r"rows\[2, SIGMA\]=inf"),
        (make_rows((0, Column.X0_XT, 1e39))[0], [1, 2, 3], r"rows\[0, X0_XT\]=1e\+39.*float32"),
        (make_rows((1, Column.SIGMA, -0.1))[0], [1, 2, 3], "sigma and clip"),
        (make_rows((1, Column.CLIP, -1))[0], [1, 2, 3], "sigma and clip"),
        (make_rows((1, Column.LOG_SIGMA, np.inf))[0], [1, 2, 3], r"rows\[1, LOG_SIGMA\]=inf"),
        (make_rows((1, Column.THRESHOLD, -0.1))[0], [1, 2, 3], r"threshold .* in \[0, 1\]"),
        (make_rows((1, Column.RESCALE, 1.1))[0], [1, 2, 3], r"rescale must be in \[0, 1\]"),
        (make_rows((1, Column.THRESHOLD, 0.5))[0], [1, 2, 3], "clip must be at least 1"),
        (make_rows((0, Column.C_HIST, 0.5))[0], [1, 2, 3], "no previous x0"),
        (make_rows()[0], [1, 2], r"noise_keys of shape \(2,\)"),
        (make_rows()[0], [1.0, 2.0, 3.0], "3 integers"),
        (make_rows()[0], [1, 2, 1], "differ"),
        (make_rows()[0], [1, 2, -1], "2.63-1"),
        (make_rows()[0], np.array([1, 2, 2**63], np.uint64), "2.63-1"),
    ],
)
def test_bad_plans(rows, keys, message):
    with pytest.raises(ValueError, match=message):
        Plan(rows, keys)
