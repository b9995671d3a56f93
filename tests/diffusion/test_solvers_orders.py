"""Whole plans on Gaussian data: the optimal denoiser is affine, so moments propagate exactly."""

from __future__ import annotations

import numpy as np
import pytest

from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.diffusion.timesteps import SPACINGS
from flashddpm.kernels.tables import Column

LINEAR = NoiseSchedule.create()
ZERO_SNR = NoiseSchedule.create(rescale_betas_zero_snr=True)

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def gaussian_output(prediction_type, a, b, m, s):
    """The best network for data N(m, s^2) as slope and offset in x_t; first those of x_0."""
    slope = a * s**2 / (a**2 * s**2 + b**2)
    offset = m - slope * a * m
    if prediction_type == "sample":
        return slope, offset
    eps = np.array([1 - a * slope, -a * offset]) / b
    if prediction_type == "epsilon":
        return tuple(eps)
    return tuple(a * eps - b * np.array([slope, offset]))


def moments(plan, schedule, m, s, mean, variance, count=None, prediction_type="v_prediction"):
    """Propagate mean and variance of x through the first ``count`` rows (unclipped), exactly.

    The state is (x, hist), with a 2 x 2 covariance; the network is the optimal one for N(m, s^2).
    """
    mu, cov = np.array([mean, 0.0]), np.diag([variance, 0.0])
    abars = schedule.alphas_cumprod[plan.timesteps.astype(int)] if plan.abar is None else plan.abar
    for row, abar in zip(plan.rows[:count], abars, strict=False):
        slope, offset = gaussian_output(prediction_type, abar**0.5, (1 - abar) ** 0.5, m, s)
        k = row[Column.X0_XT] + row[Column.X0_OUT] * slope  # x0 = k x + d
        d = row[Column.X0_OUT] * offset
        c_x0, c_out = row[Column.C_X0], row[Column.C_OUT]
        step = np.array(
            [[c_x0 * k + c_out * slope + row[Column.C_XT], row[Column.C_HIST]], [k, 0.0]]
        )
        mu = step @ mu + np.array([c_x0 * d + c_out * offset, d])
        cov = step @ cov @ step.T + np.diag([row[Column.SIGMA] ** 2, 0.0])
    return mu[0], cov[0, 0]


def marginal(schedule, t, m, s):
    """Mean and variance of x_t."""
    abar = schedule.alphas_cumprod[t]
    return abar**0.5 * m, abar * s**2 + 1 - abar


SPREADS = (0.1, 0.25, 0.5, 1.0, 2.0)
SDE = ("ddpm", "dpmpp_2m_sde")
SECOND_ORDER = ("dpmpp_2m", "dpmpp_2m_sde")
SAME_ROWS = {"euler": "ddim", "euler_ancestral": "ddpm"}
FINE = 22_480  # timesteps; the strides below divide what they cover


def order_errors(solver, ends_at=2000, counts=(80, 160, 320, 640)):
    """Errors of solving from t = 22480 down to ``ends_at``, RMS over data of several spreads.

    The jump from the last timestep to x_0 is left out: it is one step of E[x_0 | x_t], whose error
    is the conditional spread at that timestep, whatever the solver.
    """
    schedule = NoiseSchedule.create("linear", FINE + 1, 0.1 / FINE, 20 / FINE)
    means, spreads = [], []
    for n in counts:
        steps = np.linspace(FINE, ends_at, n + 1).round().astype(int)
        assert len(set(np.diff(steps))) == 1
        plan = SOLVERS[solver].rows(schedule, steps, prediction_type="v_prediction", clip=0.0)
        row = []
        for s in SPREADS:
            # From a start that is not the marginal, whose mean any step would keep.
            start, end = marginal(schedule, FINE, 0.7, s), marginal(schedule, ends_at, 0.7, s)
            mean, var = moments(plan, schedule, 0.7, s, start[0] + 1.3, 0.8 * start[1], n)
            if solver in SDE:  # the reverse SDE: E[x_s | x_t], Var[x_s | x_t]
                abar = schedule.alphas_cumprod
                gain = np.sqrt(abar[FINE] / abar[ends_at]) * end[1] / start[1]
                true_var = end[1] - gain**2 * start[1] + gain**2 * 0.8 * start[1]
            else:  # the ODE keeps (x_t - a_t m) / sqrt(Var x_t)
                gain = np.sqrt(end[1] / start[1])
                true_var = gain**2 * 0.8 * start[1]
            row.append((mean - end[0] - 1.3 * gain, np.sqrt(var / true_var) - 1))
        row = np.array(row)
        means.append(np.sqrt(np.mean(row[:, 0] ** 2)))
        spreads.append(np.sqrt(np.mean(row[:, 1] ** 2)))
    return np.array(means), np.array(spreads)


def slopes(errors):
    return np.log2(errors[:-1] / errors[1:])


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
def test_order_of_ode_solvers(solver, order):
    means, spreads = order_errors(solver)
    for errors in (means, spreads):
        np.testing.assert_allclose(slopes(errors), order, atol=0.12)
    assert spreads[-1] < {1: 0.02, 2: 2e-4}[order]


@pytest.mark.parametrize(("solver", "order"), [("ddpm", 1), ("dpmpp_2m_sde", 2)])
def test_order_of_sde_solvers(solver, order):
    """The mean is exact at every step, for S5's mean is linear in x_0, whose own mean stays."""
    means, spreads = order_errors(solver)
    assert means.max() < 1e-11
    np.testing.assert_allclose(slopes(spreads), order, atol=0.12)
    assert spreads[-1] < {1: 0.02, 2: 2e-4}[order]


@every_solver
@every_spacing
def test_whole_plans_converge(solver, spacing):
    """From the marginal of x_T to N(m, s^2), the last jump included.

    That jump returns E[x_0 | x_t] at the last timestep, short of x_0's spread by about its share of
    noise: order 1 in the end for every solver, so here only that errors fall, and how far.
    """
    schedule = NoiseSchedule.create("linear", 10_240, 0.1 / 10_240, 20 / 10_240)
    errors = []
    for n in (10, 20, 40, 80, 160, 320):
        plan = make_plan(
            schedule, solver, n, prediction_type="v_prediction", spacing=spacing, clip=0.0
        )
        first = int(plan.timesteps[0])
        worst = []
        for s in SPREADS:
            mean, var = moments(plan, schedule, -0.4, s, *marginal(schedule, first, -0.4, s))
            assert mean == pytest.approx(-0.4, abs=1e-10)
            worst.append(np.sqrt(var) / s - 1)
        errors.append(np.sqrt(np.mean(np.square(worst))))
    assert (np.diff(errors) < 0).all()
    limits = {
        "ddim": (0.45, 0.026),
        "dpmpp_2m": (0.41, 0.008),
        "dpmpp_2m_sde": (0.41, 0.004),
    }.get(SAME_ROWS.get(solver, solver), (0.5, 0.05))
    assert errors[0] < limits[0] and errors[-1] < limits[1]
    if solver in SECOND_ORDER:
        assert slopes(np.array(errors))[3] > 1.4  # 80 to 160 steps


@every_solver
def test_moments_do_not_depend_on_prediction_type(solver):
    results = [
        moments(
            make_plan(LINEAR, solver, 25, prediction_type=p, clip=0.0),
            LINEAR,
            *(0.3, 0.6, 0.1, 0.9),
            prediction_type=p,
        )
        for p in PREDICTION_TYPES
    ]
    np.testing.assert_allclose(results, [results[0]] * len(results), rtol=1e-9)


@every_solver
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_reaches_the_data(solver, prediction_type):
    """x_T is exactly N(0, 1), and carries nothing of x_0."""
    errors = []
    for n in (25, 50, 100, 200):
        plan = make_plan(
            ZERO_SNR, solver, n, prediction_type=prediction_type, spacing="trailing", clip=0.0
        )
        mean, var = moments(plan, ZERO_SNR, 0.5, 0.6, 0.0, 1.0, None, prediction_type)
        assert mean == pytest.approx(0.5, abs=1e-9)
        errors.append(abs(np.sqrt(var) - 0.6))
    assert errors[-1] < {"dpmpp_2m": 2e-3, "dpmpp_2m_sde": 4e-3}.get(solver, 0.03)
    assert errors[-1] < errors[0] / 3


@pytest.mark.parametrize("s", [0.0, 0.3, 1.0])
@every_type
def test_full_ddpm_is_the_ancestral_process(prediction_type, s):
    """All T rows equal S6 with z sqrt(beta~) (Ho et al., algorithm 2), iterated as it stands."""
    plan = make_plan(LINEAR, "ddpm", 1000, prediction_type=prediction_type, clip=0.0)
    mean, var = 0.2, 1.1
    for t in range(999, -1, -1):
        a, b = LINEAR.alphas_cumprod[t] ** 0.5, (1 - LINEAR.alphas_cumprod[t]) ** 0.5
        slope, offset = gaussian_output("epsilon", a, b, 0.7, s)
        beta, root = LINEAR.betas[t], np.sqrt(LINEAR.alphas[t])
        mean = (mean - beta / b * (slope * mean + offset)) / root
        var = ((1 - beta / b * slope) / root) ** 2 * var + LINEAR.posterior_variance[t]
        if t in (900, 500, 1):
            ours = moments(plan, LINEAR, 0.7, s, 0.2, 1.1, 1000 - t, prediction_type)
            np.testing.assert_allclose(ours, (mean, var), rtol=1e-8)
    ours = moments(plan, LINEAR, 0.7, s, 0.2, 1.1, None, prediction_type)
    np.testing.assert_allclose(ours, (mean, var), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("n", [1000, 50, 7])
def test_fixed_small_is_exact_for_a_point_and_fixed_large_for_noise(n):
    """Ho et al., section 3.2: beta~ is optimal for x_0 a point, beta for x_0 ~ N(0, I)."""
    small = make_plan(LINEAR, "ddpm", n, prediction_type="v_prediction", clip=0.0)
    large = make_plan(
        LINEAR, "ddpm", n, prediction_type="v_prediction", clip=0.0, variance_type="fixed_large"
    )
    steps = small.timesteps.astype(int)
    for count in (1, n // 2, n - 1):
        point = moments(small, LINEAR, 0.7, 0.0, *marginal(LINEAR, steps[0], 0.7, 0), count)
        np.testing.assert_allclose(point, marginal(LINEAR, steps[count], 0.7, 0), rtol=1e-9)
        noise = moments(large, LINEAR, 0.0, 1.0, 0.0, 1.0, count)
        np.testing.assert_allclose(noise, (0, 1), atol=1e-10)
    end = moments(small, LINEAR, 0.7, 0.0, *marginal(LINEAR, steps[0], 0.7, 0))
    np.testing.assert_allclose(end, (0.7, 0), atol=1e-9)


def test_lost_variance_of_ddpm():
    """Law of total variance: beta~ leaves out c_x0^2 Var[x_0 | x_t] at every step, and no more."""
    s = 0.4
    plan = make_plan(LINEAR, "ddpm", 1000, prediction_type="v_prediction", clip=0.0)
    for i in (0, 300, 998):
        t = 999 - i
        abar = LINEAR.alphas_cumprod[t]
        start, end = marginal(LINEAR, t, 0.7, s), marginal(LINEAR, t - 1, 0.7, s)
        one = Plan(plan.rows[i : i + 1], plan.noise_keys[i : i + 1])
        mean, var = moments(one, LINEAR, 0.7, s, *start)
        conditional = s**2 * (1 - abar) / (abar * s**2 + 1 - abar)
        assert mean == pytest.approx(end[0], rel=1e-9)
        lost = plan.rows[i, Column.C_X0] ** 2 * conditional
        assert end[1] - var == pytest.approx(lost, rel=1e-6)
