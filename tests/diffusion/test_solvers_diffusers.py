"""Rows of a solver against one step of diffusers' scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.solvers import dpmpp_2m
from flashddpm.diffusion.timesteps import SPACINGS, timesteps
from flashddpm.kernels.tables import Column

LINEAR = NoiseSchedule.create()
ZERO_SNR = NoiseSchedule.create(rescale_betas_zero_snr=True)
SHORT = {"num_train_timesteps": 20, "beta_start": 0.001, "beta_end": 0.3}
SHAPE = (1, 2, 3, 3)
DROP_LAST = ("dpmpp_2m", "dpmpp_2m_sde")

every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def peer(cls, config, n, schedule=None):
    """Return a diffusers scheduler, its tables replaced by the float64 ones of ``schedule``."""
    scheduler = cls(**config)
    if schedule is not None:
        one = torch.ones((), dtype=torch.float64)
        scheduler.one = scheduler.final_alpha_cumprod = one
        scheduler.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
    scheduler.set_timesteps(n)
    if schedule is not None and cls is DPMSolverMultistepScheduler:
        abar = schedule.alphas_cumprod[scheduler.timesteps.numpy()]
        scheduler.sigmas = torch.tensor(np.append(np.sqrt((1 - abar) / abar), 0))
    return scheduler


@pytest.fixture
def worst_difference(apply):
    """A function: the largest difference of a step, relative to that step's largest value."""

    def measure(plan, scheduler, step):
        np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps.numpy())
        random, hist, worst = np.random.default_rng(0), None, 0.0
        for i, row in enumerate(plan.rows):
            x, out, z = random.standard_normal((3, *SHAPE))
            z = z if i < len(plan) - 1 else 0 * z
            ours, hist = apply(row, x, out, hist, z)
            theirs = step(scheduler, *map(torch.from_numpy, (out, x, z)), scheduler.timesteps[i])
            worst = max(worst, np.abs(ours - theirs.numpy()).max() / np.abs(ours).max())
        return worst

    return measure


def with_diffusers_tables(config):
    """A schedule of diffusers' float32 abar: float32 is wrong by 1.7e-4 in 1 - abar_0, say."""
    abar = DDPMScheduler(**config).alphas_cumprod.double().numpy()
    return NoiseSchedule(1 - abar / np.append(1, abar[:-1]))


def cases(solver, spacing, prediction_type, clip, **options):
    """Yield a plan, the config and tables of its peer, and the tolerance, for many settings.

    As shipped, diffusers computes in float32; on float64 tables it shows what its formulas are.
    """
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    if solver not in DROP_LAST:
        config |= {"clip_sample": clip > 0, "clip_sample_range": clip or 1.0}
    settings = [({}, n, 1e-5) for n in (1, 2, 10, 50)] + [({}, 25, 1e-10)]
    settings += [({"beta_schedule": "squaredcos_cap_v2"}, n, 1e-10) for n in (1, 5)]
    settings += [({"beta_schedule": "scaled_linear", "steps_offset": 1}, 10, 1e-10)]
    settings += [(SHORT, n, 1e-10) for n in (7, 13, 20)]
    if prediction_type != "epsilon" and solver not in DROP_LAST:
        settings += [({"rescale_betas_zero_snr": True}, n, 1e-7) for n in (1, 5)]
    for changes, n, tolerance in settings:
        changed = config | changes
        T = changed.get("num_train_timesteps", 1000)
        if solver in DROP_LAST and n == T and spacing != "trailing":
            continue  # repeated timesteps: refused
        if solver == "ddim" and spacing == "trailing" and T % n:
            continue  # diffusers takes t - T // n for the next timestep
        stock = tolerance == 1e-5
        schedule = with_diffusers_tables(changed) if stock else NoiseSchedule.from_config(changed)
        plan = make_plan(
            schedule,
            solver,
            n,
            prediction_type=prediction_type,
            spacing=spacing,
            steps_offset=changed.get("steps_offset", 0),
            clip=clip,
            **options,
        )
        yield plan, changed, None if stock else schedule, tolerance


@every_type
@every_spacing
@pytest.mark.parametrize("clip", [0.0, 1.7])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_is_diffusers(
    monkeypatch, prediction_type, spacing, clip, variance_type, worst_difference
):
    """All but the noise that diffusers leaves in where the last timestep is not 0 (below)."""

    def step(scheduler, out, x, z, t):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **options: z
        )
        return scheduler.step(out, t, x).prev_sample

    options = {"variance_type": variance_type}
    for plan, config, schedule, tolerance in cases(
        "ddpm", spacing, prediction_type, clip, **options
    ):
        scheduler = peer(DDPMScheduler, config | options, len(plan), schedule)
        assert worst_difference(plan, scheduler, step) < tolerance, (config, len(plan))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_last_step_adds_no_noise(monkeypatch, variance_type):
    """diffusers gates noise on t > 0, so fixed_large with trailing spacing ends noisy; ours not."""
    z = torch.ones(SHAPE, dtype=torch.float64)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: z)
    options = {"variance_type": variance_type}
    scheduler = peer(DDPMScheduler, options | {"timestep_spacing": "trailing"}, 10, LINEAR)
    theirs = scheduler.step(0 * z, scheduler.timesteps[-1], 0 * z).prev_sample
    expected = np.sqrt(1 - LINEAR.alphas_cumprod[99]) if variance_type == "fixed_large" else 0
    np.testing.assert_allclose(theirs.numpy(), np.full(SHAPE, expected), atol=2e-10)
    plan = make_plan(LINEAR, "ddpm", 10, prediction_type="epsilon", spacing="trailing", **options)
    assert plan.rows[-1, Column.SIGMA] == 0
    assert (plan.rows[:-1, Column.SIGMA] > 0).all()


@every_type
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [0.0, 1.7])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers(prediction_type, spacing, clip, eta, worst_difference):
    """Where diffusers is right: it takes t - T // n for the next entry of the list (see below)."""

    def step(scheduler, out, x, z, t):
        return scheduler.step(out, t, x, eta=eta, variance_noise=z).prev_sample

    for plan, config, schedule, tolerance in cases("ddim", spacing, prediction_type, clip, eta=eta):
        scheduler = peer(DDIMScheduler, config, len(plan), schedule)
        assert worst_difference(plan, scheduler, step) < tolerance, (config, len(plan))


@pytest.mark.parametrize(("spacing", "n"), [("linspace", 10), ("trailing", 7)])
def test_ddim_where_diffusers_is_wrong(spacing, n, assert_same_map, worst_difference):
    """Its arithmetic previous t misses the list: 999 - 100 is not 888, nor 999 - 142 856.

    Ours is right by the list: a_s is that of the next entry, and eta = 1 is ddpm, whose parity with
    diffusers holds for these spacings.
    """

    def step(scheduler, out, x, z, t):
        return scheduler.step(out, t, x).prev_sample

    options = {"prediction_type": "epsilon", "spacing": spacing, "clip": 0.0}
    plan = make_plan(LINEAR, "ddim", n, **options)
    config = {"timestep_spacing": spacing, "clip_sample": False}
    assert worst_difference(plan, peer(DDIMScheduler, config, n, LINEAR), step) > 1e-3
    abar_s = np.append(LINEAR.alphas_cumprod[timesteps(n, 1000, spacing)[1:]], 1)
    np.testing.assert_array_equal(plan.rows[:, Column.C_X0], np.sqrt(abar_s))
    noisy = make_plan(LINEAR, "ddim", n, eta=1.0, **options)
    assert_same_map(noisy, make_plan(LINEAR, "ddpm", n, **options), rtol=1e-9)


@every_type
@every_spacing
@pytest.mark.parametrize(
    ("solver", "algorithm"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")]
)
def test_dpmpp_2m_is_diffusers(solver, algorithm, prediction_type, spacing, worst_difference):
    """diffusers casts x to float32 whatever its tables are, whence 1e-6."""

    def step(scheduler, out, x, z, t):
        return scheduler.step(out, t, x, variance_noise=z).prev_sample

    for plan, config, schedule, tolerance in cases(solver, spacing, prediction_type, 0.0):
        config["algorithm_type"] = algorithm
        scheduler = peer(DPMSolverMultistepScheduler, config, len(plan), schedule)
        worst = worst_difference(plan, scheduler, step)
        assert worst < max(tolerance, 1e-6), (config, len(plan))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_dpmpp_2m_zero_snr_is_diffusers(prediction_type, worst_difference):
    """diffusers puts 2^-24 for abar = 0: on a schedule that has it, ours agrees."""

    def step(scheduler, out, x, z, t):
        return scheduler.step(out, t, x).prev_sample

    steps = timesteps(10, 1000, "trailing")
    abar = ZERO_SNR.alphas_cumprod[steps[::-1]]
    abar[-1] = 2**-24  # above abar[998]: only the timesteps in use make a schedule
    short = NoiseSchedule(1 - abar / np.append(1, abar[:-1]))
    rows = dpmpp_2m(short, np.arange(9, -1, -1), prediction_type=prediction_type).rows.copy()
    rows[:, Column.TIMESTEP] = steps
    config = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = peer(DPMSolverMultistepScheduler, config | {"prediction_type": prediction_type}, 10)
    assert worst_difference(Plan(rows, steps), scheduler, step) < 1e-5
