"""Whole runs of Euler's methods and of DPM-Solver++ against diffusers, on equal noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

import flashddpm as fd
from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.timesteps import SIGMA_SPACINGS, SPACINGS
from flashddpm.kernels.tables import Column

SHAPE = (2, 3, 5, 5)

every_spacing = pytest.mark.parametrize("spacing", SPACINGS)
every_type = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])


def network(x, t):
    """A smooth network that reads x and t, for tensors of either precision."""
    return torch.sin(0.9 * x + 0.3 + 0.002 * t)


def noise(i):
    return torch.from_numpy(np.random.default_rng(i).standard_normal(SHAPE))


def run_ours(plan, image=None):
    """Apply a plan's rows as kernels/tables.py says, in float64; noise 99 is the start's."""
    a, b = plan.initial
    x, hist = b * noise(99), None
    if image is not None:
        x = a * image.double() + x
    for i, row in enumerate(plan.rows.tolist()):
        out = network(x, row[Column.TIMESTEP])
        x0 = row[Column.X0_XT] * x + row[Column.X0_OUT] * out
        x = row[Column.C_X0] * x0 + row[Column.C_XT] * x + row[Column.C_OUT] * out
        x = x + row[Column.SIGMA] * noise(i)
        if row[Column.C_HIST]:
            x = x + row[Column.C_HIST] * hist
        hist = x0
    return x


class Doubles:
    """The module torch, float64 under the name of float32: diffusers casts x to float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def run_theirs(monkeypatch, scheduler, image=None, begin=0):
    """Run diffusers' loop from ``begin``, as its pipelines do, in the precision of its sigmas."""
    steps, kind = scheduler.timesteps[begin:], scheduler.sigmas.dtype
    scheduler.set_begin_index(begin)
    if image is None:
        x = noise(99).to(kind) * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(image.to(kind), noise(99).to(kind), steps[:1].repeat(len(image)))
    for i, t in enumerate(steps):
        z = noise(i).to(kind)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor",
            lambda *args, z=z, **options: z,
        )
        out = network(scheduler.scale_model_input(x, t), t.to(kind))
        dpm = isinstance(scheduler, DPMSolverMultistepScheduler)
        x = scheduler.step(out, t, x, **{"variance_noise": z} if dpm else {}).prev_sample
    return x


def pair(cls, num_steps, **config):
    """Return our plan and diffusers' scheduler of one config, with its float32 abar for both."""
    scheduler = cls(**config)
    scheduler.set_timesteps(num_steps)
    abar = DDPMScheduler(beta_schedule=config.get("beta_schedule", "linear")).alphas_cumprod
    abar = abar.double().numpy()
    defaults = fd.SamplingDefaults.from_config({"_class_name": cls.__name__, **config})
    plan = make_plan(
        fd.NoiseSchedule(1 - abar / np.append(1, abar[:-1])),
        defaults.solver,
        num_steps,
        prediction_type=config.get("prediction_type", "epsilon"),
        spacing=defaults.spacing,
        steps_offset=defaults.steps_offset,
        sigmas=defaults.sigmas,
        clip=defaults.clip,
    )
    return plan, scheduler


def sigmas_of(plan):
    return np.append(np.sqrt((1 - plan.abar) / plan.abar), 0)


def assert_equal_runs(monkeypatch, plan, scheduler, image=None, begin=0, whole=None):
    """As shipped, diffusers rounds to float32; given doubles it shows what its formulas are.

    What it rounds is as large as x / a, which Euler's methods hold and x0 is made of: that of the
    first step is 157 z for the linear schedule, 20,000 z for the cosine one. A step much longer
    than the one before carries differences of that far on.
    """
    ours = run_ours(plan, image)
    size = (1 + np.abs(plan.rows[:, Column.C_HIST]).max()) / plan.abar[0] ** 0.5
    stock = run_theirs(monkeypatch, scheduler, image, begin)
    assert stock.dtype == torch.float32
    assert (ours - stock).abs().max() < 1e-4 * size
    with monkeypatch.context() as patch:
        patch.setattr(f"{type(scheduler).__module__}.torch", Doubles())
        scheduler.set_timesteps(scheduler.num_inference_steps)
        scheduler.timesteps = torch.tensor((whole or plan).timesteps)
        scheduler.sigmas = torch.from_numpy(sigmas_of(whole or plan))
        exact = run_theirs(patch, scheduler, image, begin)
    assert exact.dtype == torch.float64
    assert (ours - exact).abs().max() < 1e-12 * size


@every_type
@every_spacing
@pytest.mark.parametrize("sigmas", [None, *SIGMA_SPACINGS])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_euler_is_diffusers(monkeypatch, prediction_type, spacing, sigmas, beta_schedule):
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, "steps_offset": 1}
    config |= {"beta_schedule": beta_schedule}
    if sigmas is not None:
        config[f"use_{sigmas}_sigmas"] = True
    for n in (1, 2, 8, 30):
        plan, scheduler = pair(EulerDiscreteScheduler, n, **config)
        np.testing.assert_allclose(plan.timesteps, scheduler.timesteps, rtol=1e-6, atol=2e-3)
        np.testing.assert_allclose(sigmas_of(plan), scheduler.sigmas, rtol=1e-5)
        assert_equal_runs(monkeypatch, plan, scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@every_spacing
def test_euler_ancestral_is_diffusers(monkeypatch, prediction_type, spacing):
    """Of the two prediction types that diffusers has for it."""
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    for n in (1, 2, 8, 30):
        plan, scheduler = pair(EulerAncestralDiscreteScheduler, n, **config)
        np.testing.assert_allclose(plan.timesteps, scheduler.timesteps, rtol=1e-6)
        np.testing.assert_allclose(sigmas_of(plan), scheduler.sigmas, rtol=1e-5)
        assert_equal_runs(monkeypatch, plan, scheduler)


@every_type
@every_spacing
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("sigmas", [None, *SIGMA_SPACINGS])
def test_dpm_solver_is_diffusers(monkeypatch, prediction_type, spacing, algorithm, sigmas):
    """For exponential and beta sigmas diffusers cuts timesteps down to whole ones: it gets ours."""
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    config["algorithm_type"] = algorithm
    if sigmas is not None:
        config[f"use_{sigmas}_sigmas"] = True
    for n in (1, 2, 8, 30):
        plan, scheduler = pair(DPMSolverMultistepScheduler, n, **config)
        np.testing.assert_allclose(sigmas_of(plan), scheduler.sigmas, rtol=1e-5)
        if sigmas in ("exponential", "beta"):
            rounded_up = plan.timesteps - scheduler.timesteps.numpy()
            assert np.isin(rounded_up, (0, 1)).all()
            scheduler.timesteps = torch.tensor(plan.timesteps).long()
        np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps)
        assert_equal_runs(monkeypatch, plan, scheduler)


@every_spacing
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.99, 1.0])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (EulerDiscreteScheduler, {}),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
        (EulerAncestralDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_start_from_an_image_is_diffusers(monkeypatch, spacing, strength, cls, options):
    """img2img: the last int(strength n) steps, from an image noised to the first of them."""
    n = 20
    plan, scheduler = pair(cls, n, timestep_spacing=spacing, **options)
    image = torch.tanh(noise(50))
    part = plan.from_image(strength)
    count = int(n * strength)
    assert len(part) == count and part.needs_image
    np.testing.assert_array_equal(part.noise_keys, plan.noise_keys[n - count :])
    assert_equal_runs(monkeypatch, part, scheduler, image, n - count, plan)
