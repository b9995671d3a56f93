"""Dynamic thresholding and guidance rescale, against diffusers on equal noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.guiders.guider_utils import rescale_noise_cfg

import flashddpm as fd
from flashddpm import kernels
from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.kernels import reference
from flashddpm.kernels.launch import INTERPRETED
from flashddpm.kernels.tables import Column

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
SHAPE, STEPS, SEEDS = (2, 5, 7), 12, [3, 2**63, -4]
THRESHOLD = {"threshold": 0.9, "clip": 1.6}

every_solver = pytest.mark.parametrize("solver", SCHEDULERS)
every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def loud(x, t, labels=None):
    """A smooth network whose x0 leaves [-1, 1] by more in some images than in others."""
    size = torch.linspace(0.5, 3, len(x)).reshape(-1, 1, 1, 1).to(x)
    return size * torch.sin(1.7 * x + 0.3)


def run_diffusers(monkeypatch, scheduler, predict, sampler, eta=0.0):
    """Return the final x and each step's x0, with the noise that the sampler names."""
    x, previews = sampler.initial_noise(SEEDS).contiguous(), []
    for t in scheduler.timesteps:
        z = sampler.step_noise(SEEDS, int(t))
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, z=z, **k: z
        )
        options = {"eta": eta, "variance_noise": z} if isinstance(scheduler, DDIMScheduler) else {}
        step = scheduler.step(predict(x, t), t, x, **options)
        x = step.prev_sample
        previews.append(step.get("pred_original_sample"))
    return x, previews


@every_solver
@every_type
@pytest.mark.parametrize("ratio", [0.9, 0.995, 1.0])
def test_thresholding_is_diffusers(monkeypatch, solver, prediction_type, ratio):
    """Whole runs in float32 on both sides, and each preview.

    diffusers has float32 tables, so x differs by about 1e-5 (seen: 2.4e-5 at the end); the x0 of an
    early epsilon is that times 1 / a, up to 100 (seen: 6e-4).
    """
    config = {"prediction_type": prediction_type, "thresholding": True, "sample_max_value": 1.6}
    config |= {"dynamic_thresholding_ratio": ratio, "timestep_spacing": "leading"}
    scheduler = SCHEDULERS[solver](**config)
    scheduler.set_timesteps(STEPS)
    eta = 0.5 if solver == "ddim" else 0.0
    name = SCHEDULERS[solver].__name__
    sampler = fd.Sampler(
        loud,
        NoiseSchedule.create(),
        shape=SHAPE,
        prediction_type=prediction_type,
        defaults=fd.SamplingDefaults.from_config(config | {"_class_name": name}),
        device="cpu",
    )
    want, previews = run_diffusers(monkeypatch, scheduler, loud, sampler, eta)
    seen = []
    options = {"solver": solver, "num_steps": STEPS, "eta": eta}
    got = sampler.sample(SEEDS, **options, on_step=lambda i, x0: seen.append(x0.clone()))
    assert (got - want).abs().max() <= 1e-4
    for ours, theirs in zip(seen, previews, strict=True):
        assert ours.abs().max() <= 1
        assert theirs is None or (ours - theirs).abs().max() <= 2e-3
    clipped = sampler.sample(SEEDS, **options, threshold=0, clip=1.0)
    assert (clipped - want).abs().max() > 0.02
    asked = sampler.sample(SEEDS, **options, threshold=ratio, clip=1.6)
    assert torch.equal(asked, got)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("thresholds", [{}, THRESHOLD])
def test_guidance_rescale_is_diffusers(monkeypatch, tiny_sampler, backend, thresholds):
    """Guided by 12 and brought back by 0.7, with and without a threshold.

    float32 tables, and sums in another order, through a U-Net 12 times: 1e-4 of numbers up to 1.
    """
    sampler = tiny_sampler(backend=backend)
    config = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
    config |= {"prediction_type": "v_prediction", "clip_sample": not thresholds}
    if thresholds:
        config |= {"thresholding": True, "dynamic_thresholding_ratio": thresholds["threshold"]}
        config |= {"sample_max_value": thresholds["clip"]}
    scheduler = DDPMScheduler(**config)
    scheduler.set_timesteps(STEPS)
    labels, w = torch.tensor([0, 2, 1]), 12.0

    def predict(x, t):
        cond, uncond = (sampler.network(x, t, c) for c in (labels, torch.full_like(labels, 3)))
        return rescale_noise_cfg(uncond + w * (cond - uncond), cond, 0.7)

    want, previews = run_diffusers(monkeypatch, scheduler, predict, sampler)
    seen = []
    run = {"solver": "ddpm", "num_steps": STEPS, **thresholds}
    got = sampler.sample(
        SEEDS, labels, w, **run, guidance_rescale=0.7, on_step=lambda i, x0: seen.append(x0.clone())
    )
    assert (got - want).abs().max() <= 1e-4
    for ours, theirs in zip(seen, previews, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
    assert (sampler.sample(SEEDS, labels, w, **run) - want).abs().max() > 0.02


BOTH = {**THRESHOLD, "guidance_rescale": 0.7}
GUIDANCE = [1.0, 3.0, 1.0, 0.0, 1.5]


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_depends_on_itself_only(tiny_sampler, solver):
    """Guided and unguided images side by side, on each backend, in chunks and alone."""
    sampler, plain = tiny_sampler(), tiny_sampler(backend="reference")
    labels, run = [0, 1, 2, 0, 1], {"solver": solver, "num_steps": 6, **BOTH}
    together = sampler.sample(range(5), labels, GUIDANCE, **run)
    chunked = sampler.sample(range(5), labels, GUIDANCE, batch_size=2, **run)
    assert (together - chunked).abs().max() <= 1e-5
    assert (together - plain.sample(range(5), labels, GUIDANCE, **run)).abs().max() <= 1e-5
    for i in range(5):
        alone = sampler.sample(i, labels[i], GUIDANCE[i], **run)
        assert (together[i] - alone[0]).abs().max() <= 1e-5
    # Where nothing is guided there is nothing to rescale.
    unguided = sampler.sample(0, 0, 1.0, **run)
    assert torch.equal(unguided, sampler.sample(0, 0, 1.0, **{**run, "guidance_rescale": 0.0}))


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors then run the reference itself")
def test_triton_kernels_in_the_loop_equal_the_reference(tiny_sampler, monkeypatch):
    """Under the interpreter, the very kernels of the CUDA path measure and step the same."""
    sampler = tiny_sampler(backend="reference")
    arguments = {"seeds": range(2), "labels": 0, "guidance": [1.0, 3.0], "num_steps": 3, **BOTH}
    want = sampler.sample(**arguments, solver="ddpm")
    calls = []
    real = kernels.sample_stats
    monkeypatch.setattr(kernels, "sample_stats", lambda *a: (calls.append(1), real(*a)))
    sampler.executor.ops = kernels
    got = sampler.sample(**arguments, solver="ddpm")
    assert len(calls) == 3
    # Deviations are sums in another order; all else is equal bit for bit.
    assert (got - want).abs().max() <= 1e-5
    del arguments["guidance_rescale"]
    got = sampler.sample(**arguments)
    sampler.executor.ops = reference
    assert torch.equal(got, sampler.sample(**arguments))


def test_only_a_plan_that_asks_is_measured(tiny_sampler, monkeypatch):
    """Once a step; a plan that asks for nothing does no more than it did."""
    calls = []
    real = reference.sample_stats
    monkeypatch.setattr(reference, "sample_stats", lambda *a: (calls.append(1), real(*a)))
    for backend in ("fused", "reference"):
        sampler = tiny_sampler(backend=backend)
        plain = sampler.sample(range(2), 0, 2.0, num_steps=4)
        assert not calls
        for options in (THRESHOLD, {"guidance_rescale": 0.7}):
            other = sampler.sample(range(2), 0, 2.0, num_steps=4, **options)
            assert len(calls) == 4
            assert (other - plain).abs().max() > 1e-3
            calls.clear()
        assert torch.equal(sampler.sample(range(2), 0, 2.0, num_steps=4), plain)
        assert not calls


@pytest.mark.gpu
def test_one_graph_serves_every_plan_on_a_gpu(tiny_unet):
    def make(**arguments):
        return fd.Sampler(
            tiny_unet(num_class_embeds=4).cuda(),
            NoiseSchedule.create("squaredcos_cap_v2", 100),
            shape=(1, 8, 8),
            prediction_type="v_prediction",
            conditioning=fd.Conditioning(3, 3),
            device="cuda",
            **arguments,
        )

    captured, plain = make(compile=False), make(backend="reference")
    for options in ({}, THRESHOLD, {"guidance_rescale": 0.7}, BOTH, {}):
        arguments = {"seeds": range(5), "labels": 1, "guidance": GUIDANCE, "num_steps": 6}
        got = captured.sample(**arguments, **options)
        assert (got - plain.sample(**arguments, **options)).abs().max() <= 1e-3
    assert len(captured.executor.graphs) <= 2  # of one step, and of as many as pay


def test_previews_show_the_thresholded_x0(tiny_sampler):
    sampler = tiny_sampler()
    seen = []
    run = {"num_steps": 5, "labels": 1, "guidance": [1.0, 3.0], **BOTH}
    x = sampler.sample(range(2), **run, on_step=lambda i, x0: seen.append(x0.clone()))
    assert torch.equal(seen[-1], x)  # the last row of ddim is x0 itself
    assert all(x0.abs().max() <= 1 for x0 in seen)
    assert torch.equal(sampler.sample(range(2), **run), x)


def test_a_non_finite_output_is_still_named(tiny_sampler):
    def network(x_t, t, labels):
        out = torch.zeros_like(x_t)
        out[1, 0, 3, 3] = torch.nan if int(t[0]) == 40 else 0
        return out

    sampler = fd.Sampler(
        network, NoiseSchedule.create("linear", 100), shape=(1, 8, 8), call=network, device="cpu"
    )
    with pytest.raises(fd.NonFiniteError, match="seed 11 is not finite at step 5 of 10"):
        sampler.sample([10, 11, 12], num_steps=10, **THRESHOLD)


# Arguments and configs ------------------------------------------------------------------------


@every_solver
def test_the_columns_of_a_plan(solver):
    schedule = NoiseSchedule.create()
    plain, asked = (
        make_plan(schedule, solver, 8, prediction_type="sample", clip=2.0, **options)
        for options in ({}, {"threshold": 0.995, "guidance_rescale": 0.7})
    )
    assert not plain.needs_stats and asked.needs_stats
    assert (asked.rows[:, Column.THRESHOLD] == 0.995).all()
    assert (asked.rows[:, Column.RESCALE] == 0.7).all()
    others = [c for c in Column if c not in (Column.THRESHOLD, Column.RESCALE)]
    np.testing.assert_array_equal(asked.rows[:, others], plain.rows[:, others])
    assert (plain.rows[:, [Column.THRESHOLD, Column.RESCALE]] == 0).all()
    np.testing.assert_array_equal(asked.noise_keys, plain.noise_keys)


def test_what_a_scheduler_config_says():
    read = fd.SamplingDefaults.from_config
    defaults = read({"thresholding": True, "clip_sample": True, "clip_sample_range": 3.0})
    assert (defaults.threshold, defaults.clip) == (0.995, 1.0)
    config = {"thresholding": True, "sample_max_value": 2.5, "dynamic_thresholding_ratio": 0.9}
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        defaults = read(config | {"_class_name": name})
        assert (defaults.threshold, defaults.clip) == (0.9, 2.5)
    defaults = read(config | {"thresholding": False})
    assert (defaults.threshold, defaults.clip) == (0.0, 1.0)
    for change, message in (
        ({"sample_max_value": 0.5}, "sample_max_value=0.5"),
        ({"sample_max_value": None}, "sample_max_value=None"),
        ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio=1.5"),
        ({"dynamic_thresholding_ratio": 0}, "dynamic_thresholding_ratio=0"),
        ({"thresholding": 1}, "thresholding=1"),
    ):
        with pytest.raises(ValueError, match=message):
            read(config | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.995}, "threshold=0.995: needs clip.*own clip=1"),
        ({"threshold": 0.995, "clip": 0.0}, "clip=0.0: must be at least 1"),
        ({"threshold": 0.995, "clip": 0.9}, "clip=0.9: must be at least 1"),
        ({"threshold": 1.5, "clip": 2.0}, r"threshold=1.5.*\[0, 1\]"),
        ({"threshold": -0.5, "clip": 2.0}, "threshold=-0.5"),
        ({"threshold": float("nan"), "clip": 2.0}, "threshold=nan"),
        ({"threshold": "high", "clip": 2.0}, "threshold='high'"),
        ({"threshold": True, "clip": 2.0}, "threshold=True"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale=1.5.*\[0, 1\]"),
        ({"guidance_rescale": -0.1}, "guidance_rescale=-0.1"),
        ({"guidance_rescale": "x"}, "guidance_rescale='x'"),
    ],
)
def test_bad_arguments_are_refused_by_name(tiny_sampler, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_sampler().sample(0, 0, num_steps=3, **options)


def test_beside_a_plan_nothing_is_given(tiny_sampler):
    sampler = tiny_sampler()
    plan = sampler.plan(num_steps=4, **BOTH)
    for name, value in (("threshold", 0.9), ("guidance_rescale", 0.5)):
        with pytest.raises(ValueError, match=f"{name}={value}: must not be given beside a Plan"):
            sampler.sample(0, 0, solver=plan, **{name: value})
    by_plan = sampler.sample(0, 0, 3.0, solver=plan)
    assert torch.equal(by_plan, sampler.sample(0, 0, 3.0, num_steps=4, **BOTH))
