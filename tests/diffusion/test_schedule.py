"""The forward process: S1-S6 in float64 for every schedule, and parity with diffusers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.diffusion.parameterization import noising_rows
from flashddpm.diffusion.schedule import (
    BETA_SCHEDULES,
    MAX_TIMESTEPS,
    TABLES,
    NoiseSchedule,
    rescale_zero_terminal_snr,
)


def cases():
    for name in BETA_SCHEDULES:
        for T in (1, 2, 50, 1000):
            for zero_snr in (False, True) if T > 1 else (False,):
                yield pytest.param(
                    NoiseSchedule.create(name, T, rescale_betas_zero_snr=zero_snr),
                    id=f"{name}-{T}" + "-zero_snr" * zero_snr,
                )
    random = np.random.default_rng(0).uniform(1e-6, 0.9, 37)
    yield pytest.param(NoiseSchedule(random), id="custom")
    yield pytest.param(NoiseSchedule([0.3, 0.1, 1.0]), id="custom-ends-in-1")


every_schedule = pytest.mark.parametrize("schedule", list(cases()))


def close(actual, expected, rtol=1e-12, atol=0.0):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


@every_schedule
def test_s1_tables(schedule):
    assert schedule.betas.dtype == np.float64
    close(schedule.alphas + schedule.betas, 1, rtol=1e-15)
    product = Fraction(1)
    for t in range(min(len(schedule), 60)):
        product *= Fraction(float(schedule.alphas[t]))
        close(schedule.alphas_cumprod[t], float(product), rtol=1e-14)
    close(schedule.alphas_cumprod[1:], schedule.alphas[1:] * schedule.alphas_cumprod[:-1])
    assert schedule.alphas_cumprod_prev[0] == 1
    np.testing.assert_array_equal(schedule.alphas_cumprod_prev[1:], schedule.alphas_cumprod[:-1])
    assert schedule.alphas_cumprod[0] < 1
    assert (np.diff(schedule.alphas_cumprod) < 0).all()


@every_schedule
def test_snr_strictly_decreases(schedule):
    assert (np.diff(schedule.snr) < 0).all()
    close(schedule.snr * (1 - schedule.alphas_cumprod), schedule.alphas_cumprod)


@every_schedule
def test_s2_composed_is_s4(schedule):
    """S3: t + 1 forward steps (S2) from x_0 have the signal and the variance of one jump (S4)."""
    signal, variance = 1.0, 0.0
    steps = zip(np.sqrt(schedule.alphas), np.sqrt(schedule.betas), strict=True)
    for t, (keep, add) in enumerate(steps):
        close(keep**2 + add**2, 1)
        signal, variance = keep * signal, keep**2 * variance + add**2
        close([signal, np.sqrt(variance)], noising_rows(schedule)[t], rtol=1e-11, atol=1e-15)


@every_schedule
def test_s3_two_steps(schedule):
    """q(x_t | x_{t-2}) has the variance 1 - alpha_t alpha_{t-1}."""
    a, b = schedule.alphas, schedule.betas
    close(a[1:] * b[:-1] + b[1:], 1 - a[1:] * a[:-1], rtol=1e-11)


@every_schedule
def test_s5_is_bayes(schedule):
    """The product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), as Gaussians in x_{t-1}."""
    a, b, prev = (
        table[1:] for table in (schedule.alphas, schedule.betas, schedule.alphas_cumprod_prev)
    )
    variance = 1 / (a / b + 1 / (1 - prev))
    close(schedule.posterior_variance[1:], variance, rtol=1e-10)
    close(schedule.posterior_mean_coef_xt[1:], variance * np.sqrt(a) / b, rtol=1e-10)
    close(schedule.posterior_mean_coef_x0[1:], variance * np.sqrt(prev) / (1 - prev), rtol=1e-10)


@every_schedule
def test_last_reverse_step_is_deterministic(schedule):
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_mean_coef_xt[0] == 0
    close(schedule.posterior_mean_coef_x0[0], 1)


@every_schedule
def test_s6_is_s5(schedule):
    """(x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha) is S5's mean at S4's x_0, where alpha > 0."""
    t = schedule.alphas > 0
    a, b = noising_rows(schedule)[t].T
    x0, xt = schedule.posterior_mean_coef_x0[t], schedule.posterior_mean_coef_xt[t]
    root = np.sqrt(schedule.alphas[t])
    close(x0 / a + xt, 1 / root, rtol=1e-10)
    close(-x0 * b / a, -schedule.betas[t] / b / root, rtol=1e-10)


@given(st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=30), st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_s5_of_a_point(betas, x0, eps):
    """At x_t = a x_0 + b eps, S5's mean keeps x_0's part whole, and a share of eps."""
    schedule = NoiseSchedule(betas)
    a, b = noising_rows(schedule).T
    x_t = a * x0 + b * eps
    mean = schedule.posterior_mean_coef_x0 * x0 + schedule.posterior_mean_coef_xt * x_t
    prev = schedule.alphas_cumprod_prev
    expected = np.sqrt(prev) * x0 + np.sqrt(schedule.alphas) * (1 - prev) / b * eps
    close(mean, expected, rtol=1e-9, atol=1e-10)


def test_known_values():
    linear = NoiseSchedule.create()
    assert len(linear) == 1000
    close(linear.betas[[0, 500, 999]], [1e-4, 1e-4 + 0.0199 * 500 / 999, 0.02])
    close(linear.alphas_cumprod[-1], 4.035829765e-05, rtol=1e-8)
    scaled = NoiseSchedule.create("scaled_linear", 5, 0.01, 0.04)
    close(np.sqrt(scaled.betas), [0.1, 0.125, 0.15, 0.175, 0.2])
    cosine = NoiseSchedule.create("squaredcos_cap_v2", 100)
    turn = np.cos(np.pi / 1.008 * np.array([0.508, 0.008]))  # cos^2 x = (1 + cos 2x) / 2
    close(cosine.alphas_cumprod[49], (1 + turn[0]) / (1 + turn[1]))
    assert cosine.betas[-1] == 0.999
    sigmoid = NoiseSchedule.create("sigmoid", 3, 0.1, 0.2)
    close(sigmoid.betas, [0.1 + 0.1 / (1 + np.exp(6)), 0.15, 0.1 + 0.1 / (1 + np.exp(-6))])


@pytest.mark.parametrize("T", [2, 50, 1000])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_diffusers_betas(name, T):
    """diffusers' tables are float32: its betas are ours, rounded."""
    theirs = DDPMScheduler(num_train_timesteps=T, beta_schedule=name, beta_end=0.03)
    ours = NoiseSchedule.create(name, T, beta_end=0.03)
    close(theirs.betas.double().numpy(), ours.betas, rtol=5e-7)
    close(theirs.alphas_cumprod.double().numpy(), ours.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("T", [2, 50, 999, 1000])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_diffusers_tables_bit_for_bit(name, T, zero_snr):
    config = {"num_train_timesteps": T, "beta_schedule": name, "rescale_betas_zero_snr": zero_snr}
    for ends in ({}, {"beta_start": 0.00085, "beta_end": 0.012}):
        theirs = DDPMScheduler(**config | ends).alphas_cumprod.numpy()
        for ours in (
            NoiseSchedule.from_config(config | ends, tables="diffusers"),
            NoiseSchedule.create(name, T, *ends.values(), rescale_betas_zero_snr=zero_snr,
                                 tables="diffusers"),
        ):  # fmt: skip
            np.testing.assert_array_equal(ours.alphas_cumprod.astype(np.float32), theirs)
            close(ours.alphas_cumprod, theirs.astype(np.float64), rtol=1e-12)


def test_diffusers_tables_of_trained_betas():
    betas = np.random.default_rng(0).uniform(1e-4, 0.05, 200).tolist()
    config = {"trained_betas": betas, "num_train_timesteps": 200}
    for zero_snr in (False, True):
        config["rescale_betas_zero_snr"] = zero_snr
        theirs = DDPMScheduler(**config).alphas_cumprod.numpy()
        ours = NoiseSchedule.from_config(config, "diffusers").alphas_cumprod
        np.testing.assert_array_equal(ours.astype(np.float32), theirs)


def test_what_tables_are_about():
    """1 - abar_0 in float32 is off by 1.7e-4 of itself; float64 is the default."""
    exact, theirs = (1 - NoiseSchedule.create(tables=t).alphas_cumprod[0] for t in TABLES)
    assert theirs / exact - 1 == pytest.approx(1.7e-4, rel=0.05)
    np.testing.assert_array_equal(
        NoiseSchedule.create().betas, NoiseSchedule.create(tables="float64").betas
    )


def test_bad_tables():
    for call in (NoiseSchedule.create, lambda **k: NoiseSchedule.from_config({}, **k)):
        with pytest.raises(ValueError, match="tables='float32'.*float64, diffusers"):
            call(tables="float32")
    with pytest.raises(ValueError, match="tables=None"):
        NoiseSchedule.from_config({"trained_betas": [0.1]}, tables=None)
    small = {"trained_betas": [0.1, 1e-9, 0.1]}
    assert len(NoiseSchedule.from_config(small)) == 3
    with pytest.raises(ValueError, match="tables='diffusers': alphas_cumprod must strictly"):
        NoiseSchedule.from_config(small, "diffusers")


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_diffusers_zero_snr(name):
    """Its float32 rescale rounds sqrt(abar) to 6e-8, so betas only agree to about that."""
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
    ours = NoiseSchedule.create(name, rescale_betas_zero_snr=True)
    close(theirs.betas.double().numpy(), ours.betas, rtol=0, atol=5e-6)
    close(theirs.alphas_cumprod.double().numpy(), ours.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_snr_shifts_and_scales_the_root(name):
    plain = NoiseSchedule.create(name, 50)
    zero = NoiseSchedule.create(name, 50, rescale_betas_zero_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    assert zero.betas[-1] == 1
    close(zero.alphas_cumprod[0], plain.alphas_cumprod[0])
    # An affine map of sqrt(abar): ratios of differences stay.
    p, z = np.diff(np.sqrt(plain.alphas_cumprod)), np.diff(np.sqrt(zero.alphas_cumprod))
    close(z / z.sum(), p / p.sum(), rtol=1e-10)
    close(rescale_zero_terminal_snr(zero.betas), zero.betas, rtol=1e-10)


def test_from_config():
    config = {
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 77,
        "beta_start": 0.001,
        "beta_end": 0.013,
        "rescale_betas_zero_snr": True,
    }
    theirs = DDPMScheduler(**config)
    ours = NoiseSchedule.from_config(theirs.config)
    close(theirs.betas.double().numpy(), ours.betas, rtol=0, atol=5e-6)
    np.testing.assert_array_equal(NoiseSchedule.from_config(config).betas, ours.betas)
    np.testing.assert_array_equal(NoiseSchedule.from_config({}).betas, NoiseSchedule.create().betas)


def test_trained_betas():
    betas = [0.1, 0.2, 0.15, 0.4]
    theirs = DDPMScheduler(trained_betas=betas, num_train_timesteps=4)
    ours = NoiseSchedule.from_config(theirs.config)
    np.testing.assert_array_equal(ours.betas, betas)
    close(theirs.betas.double().numpy(), ours.betas, rtol=1e-7)
    zero = NoiseSchedule.from_config({"trained_betas": betas, "rescale_betas_zero_snr": True})
    np.testing.assert_array_equal(zero.betas, rescale_zero_terminal_snr(betas))
    np.testing.assert_array_equal(
        NoiseSchedule(torch.tensor(betas, dtype=torch.float64)).betas, betas
    )


def test_betas_are_copied_and_read_only():
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.5


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, np.nan, 0.2], r"betas\[1\]=nan"),
        ([0.1, np.inf], r"betas\[1\]=inf"),
        ([0.0, 0.1], r"betas\[0\]=0"),
        ([0.1, -0.1], r"betas\[1\]=-0.1"),
        ([0.1, 1.5], r"betas\[1\]=1.5"),
        ([0.1, 1.0, 0.1], r"betas\[1\]=1.0.*last"),
        ([], r"shape \(0,\)"),
        (np.full(MAX_TIMESTEPS + 1, 1e-5), r"shape \(100001,\)"),
        ([[0.1, 0.2]], r"shape \(1, 2\)"),
        (0.1, r"shape \(\)"),
        ([1e-17, 0.1], "strictly decrease"),
        (np.full(1000, 0.999), "strictly decrease"),
        ([True], "list of numbers"),
        (["0.1"], "list of numbers"),
        ([0.1, "x"], "list of numbers"),
        ([0.1j], "list of numbers"),
        ([[0.1], [0.1, 0.2]], "list of numbers"),
        (None, "list of numbers"),
    ],
)
def test_bad_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(betas)
    if betas is not None:
        with pytest.raises(ValueError, match=message):
            NoiseSchedule.from_config({"trained_betas": betas})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_schedule": "cosine"}, "beta_schedule='cosine'.*squaredcos_cap_v2"),
        ({"beta_schedule": None}, "beta_schedule=None"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": 100_001}, "num_train_timesteps=100001.*100000"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps=10.5"),
        ({"beta_start": True}, "beta_start=True"),
        ({"beta_start": np.nan}, "beta_start=nan"),
        ({"beta_start": 0.0}, r"betas\[0\]=0"),
        ({"beta_end": 1.5}, "beta_end=1.5"),
        ({"beta_end": "x"}, "beta_end='x'"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "at least 2 timesteps"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.create(**arguments)
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(arguments)


def test_largest_schedule():
    assert len(NoiseSchedule.create("linear", MAX_TIMESTEPS, 1e-6, 2e-4)) == 100_000


def test_a_config_says_true_or_false():
    for value in ("no", 1, [1]):
        with pytest.raises(ValueError, match="rescale_betas_zero_snr="):
            NoiseSchedule.from_config({"rescale_betas_zero_snr": value})
    assert NoiseSchedule.from_config({"rescale_betas_zero_snr": None}).alphas_cumprod[-1] > 0
    assert NoiseSchedule.from_config({"rescale_betas_zero_snr": True}).alphas_cumprod[-1] == 0
