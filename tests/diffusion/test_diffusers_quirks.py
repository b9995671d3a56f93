"""match_diffusers=True is diffusers, where False is not; float32 tables on both sides."""

from __future__ import annotations

import inspect
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

import flashddpm as fd
from flashddpm.diffusion.make_plan import make_plan
from flashddpm.kernels.tables import Column

SHAPE = (2, 2, 4, 4)
FINE, WRONG = 2e-5, 3e-5  # of the largest value


def noise(i):
    return torch.from_numpy(np.random.default_rng(i + 1).standard_normal(SHAPE)).float()


def network(x, t):
    """Smooth in x; in t steep enough to show whether it is told 998 or 999."""
    return torch.sin(0.9 * x + 0.3 + 0.02 * t)


def theirs(scheduler, n, **options):
    """Return diffusers' images, by its pipelines' loop."""
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = noise(-1) * scheduler.init_noise_sigma
    takes_noise = "variance_noise" in inspect.signature(scheduler.step).parameters
    for i, t in enumerate(scheduler.timesteps):
        z = noise(i)
        if takes_noise:
            options["variance_noise"] = z
        module = type(scheduler).__module__
        with mock.patch(f"{module}.randn_tensor", lambda *_, z=z, **__: z, create=True):
            out = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, **options).prev_sample
    return x


def ours(scheduler, n, match_diffusers, tables="diffusers", **options):
    """Return our images of the same config, and the plan."""
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    sampler = fd.Sampler(
        lambda x, t: network(x, t.float()[:, None, None, None]),
        fd.NoiseSchedule.from_config(config, tables),
        shape=SHAPE[1:],
        prediction_type=config["prediction_type"],
        defaults=fd.SamplingDefaults.from_config(config),
        device="cpu",
        dtype="float32",
        backend="reference",
    )
    plan = sampler.plan(sampler.defaults.solver, n, match_diffusers=match_diffusers, **options)
    images = sampler.sample(range(len(noise(0))), solver=plan, initial_noise=noise(-1),
                            step_noise=noise)  # fmt: skip
    return images, plan


def assert_matched(scheduler, n, differs=True, **options):
    """Ours are diffusers' images when asked for, and else differ; return the plan for them."""
    want = theirs(scheduler, n, **options)
    got, plan = ours(scheduler, n, True, **options)
    size = max(1.0, want.abs().max().item())
    assert (got - want).abs().max() <= FINE * size
    other, _ = ours(scheduler, n, False, **options)
    assert ((other - want).abs().max() > WRONG * size) == differs
    return plan


def ddpm(**config):
    return diffusers.DDPMScheduler(**config)


@pytest.mark.parametrize("n", [7, 10, 30])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("where", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
def test_ddpm_ends_noisy(n, kind, where):
    config = {"prediction_type": kind, **where}
    plan = assert_matched(ddpm(variance_type="fixed_large", **config), n)
    assert plan.rows[-1, Column.SIGMA] ** 2 == pytest.approx(1 - plan.abar[-1])
    plan = assert_matched(ddpm(**config), n, differs=False)
    assert plan.rows[-1, Column.SIGMA] == 1e-10


def test_ddpm_ends_noisy_by_learned_range():
    schedule, v = fd.NoiseSchedule.create(), np.linspace(-1, 1, 9)
    options = {"variance_type": "learned_range", "spacing": "trailing", "match_diffusers": True}
    row = make_plan(schedule, "ddpm", 10, prediction_type="epsilon", **options).rows[-1]
    scheduler = ddpm(variance_type="learned_range", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    want = [
        torch.exp(0.5 * scheduler._get_variance(scheduler.timesteps[-1], torch.tensor(x))).item()
        for x in v
    ]
    np.testing.assert_allclose(row[Column.SIGMA] * np.exp(row[Column.LOG_SIGMA] * v), want, 1e-5)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_is_the_same_where_timestep_0_is_last(spacing, variance_type):
    """Bit for bit: no quirk, no difference."""
    plans = [
        make_plan(
            fd.NoiseSchedule.create(),
            "ddpm",
            10,
            prediction_type="epsilon",
            spacing=spacing,
            variance_type=variance_type,
            match_diffusers=match_diffusers,
        )
        for match_diffusers in (False, True)
    ]
    np.testing.assert_array_equal(plans[0].rows, plans[1].rows)


@pytest.mark.parametrize(("spacing", "n"), [("linspace", 7), ("linspace", 30), ("trailing", 7)])
@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
@pytest.mark.parametrize(
    "options", [{}, {"eta": 0.6}, {"eta": 0.6, "use_clipped_model_output": True}], ids=str
)
def test_ddim_steps_by_arithmetic(spacing, n, kind, options):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, prediction_type=kind)
    assert_matched(scheduler, n, **options)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_is_the_same_where_the_stride_is_whole(spacing):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    assert_matched(scheduler, 10, differs=False, eta=0.5, use_clipped_model_output=True)


def test_clipped_model_output_changes_something_where_x0_is_clipped():
    for clip, differs in ((True, True), (False, False)):
        scheduler = diffusers.DDIMScheduler(clip_sample=clip)
        raw, _ = ours(scheduler, 10, False)
        derived, _ = ours(scheduler, 10, False, use_clipped_model_output=True)
        assert ((raw - derived).abs().max() > 1e-2) == differs


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("sigmas", ["exponential", "beta"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("n", [5, 8, 31])
def test_dpm_solver_cuts_timesteps(algorithm, sigmas, beta_schedule, n):
    config = {"algorithm_type": algorithm, "beta_schedule": beta_schedule}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="v_prediction", **config, **{f"use_{sigmas}_sigmas": True}
    )
    _, rounded = ours(scheduler, n, False)
    want = theirs(scheduler, n)
    got, plan = ours(scheduler, n, True)
    assert (got - want).abs().max() <= FINE * want.abs().max()
    np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(plan.abar, rounded.abar)
    lost = rounded.timesteps - plan.timesteps
    assert np.isin(lost, (0, 1)).all() and (lost.any() or n == 5)


@pytest.mark.parametrize(
    ("cls", "config", "kind"),
    [
        (cls, config, kind)
        for cls, config in (
            ("DPMSolverMultistepScheduler", {}),
            ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
            ("EulerDiscreteScheduler", {}),
            ("EulerAncestralDiscreteScheduler", {}),
        )
        for kind in ("epsilon", "v_prediction", "sample")
        if (cls, kind) != ("EulerAncestralDiscreteScheduler", "sample")  # diffusers has none
    ],
)
def test_2_to_the_minus_24_for_abar_0(cls, config, kind):
    scheduler = getattr(diffusers, cls)(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=kind, **config
    )
    want = theirs(scheduler, 10)
    got, plan = ours(scheduler, 10, True)
    assert plan.abar[0] == 2**-24
    assert (got - want).abs().max() <= FINE * max(1.0, want.abs().max().item())
    if kind == "epsilon":
        with pytest.raises(ValueError, match="alphas_cumprod = 0"):
            ours(scheduler, 10, False)
    else:
        assert (ours(scheduler, 10, False)[0] - want).abs().max() > WRONG


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("ddpm", {"variance_type": "learned"}, "for learned variance"),
        ("ddim", {"timesteps": [500, 100]}, "beside timesteps"),
        ("ddpm", {"spacing": "trailing", "num_steps": 61}, "for num_steps=61 of 1000.*timestep -1"),
        ("euler", {"spacing": "trailing", "num_steps": 61}, "for num_steps=61 of 1000"),
    ],
)
def test_what_cannot_be_had_is_refused(solver, options, message):
    given = {"num_steps": 10, "prediction_type": "epsilon", **options}
    schedule = fd.NoiseSchedule.create()
    assert len(make_plan(schedule, solver, **given))
    with pytest.raises(ValueError, match=f"match_diffusers=True: must be false {message}"):
        make_plan(schedule, solver, match_diffusers=True, **given)


def test_bad_arguments():
    schedule = fd.NoiseSchedule.create()
    ask = {"prediction_type": "epsilon"}
    for bad in ("theirs", None, 1):
        with pytest.raises(ValueError, match=f"match_diffusers={bad!r}: must be true or false"):
            make_plan(schedule, "ddim", 10, match_diffusers=bad, **ask)
    with pytest.raises(ValueError, match="use_clipped_model_output=True.*ddpm has no such option"):
        make_plan(schedule, "ddpm", 10, use_clipped_model_output=True, **ask)
    with pytest.raises(ValueError, match="use_clipped_model_output=1: must be true or false"):
        make_plan(schedule, "ddim", 10, use_clipped_model_output=1, **ask)


def test_a_list_that_does_not_end_at_0():
    steps, scheduler = [900, 600, 333, 100, 40], ddpm(variance_type="fixed_large")
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda n: set_timesteps(timesteps=steps)
    want = theirs(scheduler, len(steps))
    got, plan = ours(scheduler, len(steps), True, timesteps=steps)
    np.testing.assert_array_equal(plan.timesteps, steps)
    assert (got - want).abs().max() <= FINE
    assert (ours(scheduler, len(steps), False, timesteps=steps)[0] - want).abs().max() > 1e-2
