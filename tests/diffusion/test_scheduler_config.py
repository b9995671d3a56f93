"""What a scheduler config says of sampling, as diffusers writes it."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

import flashddpm as fd
from flashddpm.checkpoints.model_folder import load_scheduler_config
from flashddpm.diffusion.scheduler_config import KEYS

SCHEDULERS = (
    (DDPMScheduler, {}, "ddpm"),
    (DDIMScheduler, {}, "ddim"),
    (DPMSolverMultistepScheduler, {}, "dpmpp_2m"),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
    (EulerDiscreteScheduler, {}, "euler"),
    (EulerAncestralDiscreteScheduler, {}, "euler_ancestral"),
)
SIGMA_CLASSES = ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler")


def read(name="DDPMScheduler", **config):
    return fd.SamplingDefaults.from_config({"_class_name": name, **config})


@pytest.mark.parametrize(("cls", "options", "solver"), SCHEDULERS)
def test_every_scheduler_as_saved(tmp_path, cls, options, solver):
    """A file of the class itself, every default written out."""
    cls(**options).save_pretrained(tmp_path)
    defaults = fd.SamplingDefaults.from_config(load_scheduler_config(tmp_path))
    own = solver in ("ddpm", "ddim")
    assert defaults == fd.SamplingDefaults(
        spacing="leading" if own else "linspace",
        clip=1.0 if own else 0.0,
        solver=solver,
    )
    assert read(cls.__name__, **options) == defaults
    config = {"timestep_spacing": "trailing", "steps_offset": 1}
    cls(**options, **config).save_pretrained(tmp_path)
    defaults = fd.SamplingDefaults.from_config(load_scheduler_config(tmp_path))
    assert (defaults.spacing, defaults.steps_offset) == ("trailing", 1)


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_sigmas(tmp_path, cls, kind):
    cls(**{f"use_{kind}_sigmas": True}).save_pretrained(tmp_path)
    assert fd.SamplingDefaults.from_config(load_scheduler_config(tmp_path)).sigmas == kind
    assert read(cls.__name__, **{f"use_{kind}_sigmas": None}).sigmas is None


@pytest.mark.parametrize(
    "config",
    [
        {"algorithm_type": "dpmsolver"},
        {"algorithm_type": "sde-dpmsolver"},
        {"algorithm_type": "deis"},
        {"algorithm_type": None},
        {"solver_order": 3},
        {"solver_type": "heun"},
        {"use_lu_lambdas": True},
        {"use_flow_sigmas": True},
        {"use_dynamic_shifting": True},
        {"final_sigmas_type": "sigma_min"},
        {"lambda_min_clipped": -5.1},
        {"interpolation_type": "log_linear"},
        {"timestep_type": "continuous"},
        {"sigma_min": 0.1},
        {"sigma_max": 80.0},
        {"use_karras_sigmas": "yes"},
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        {"timestep_spacing": "even"},
        {"_class_name": "PNDMScheduler"},
        {"_class_name": 3},
    ],
)
def test_what_we_have_no_rows_for_is_refused_by_name(config):
    """By each class that has the setting; test_scheduler_config_keys.py has the others."""
    key = next(iter(config))
    names = [name for name in SIGMA_CLASSES if key in KEYS[name] or key == "_class_name"]
    assert names
    for name in names:
        with pytest.raises(ValueError, match=key):
            fd.SamplingDefaults.from_config({"_class_name": name} | config)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_every_variance_type_is_read(kind):
    assert fd.SamplingDefaults.from_config({"variance_type": kind}).variance_type == kind


def test_variance_types_by_logarithm():
    """One is another name; of the other diffusers' samples are NaN."""
    assert read(variance_type="fixed_small_log").variance_type == "fixed_small"
    with pytest.raises(ValueError, match="variance_type='fixed_large_log'.*NaN.*fixed_large"):
        read(variance_type="fixed_large_log")
    multistep = read("DPMSolverMultistepScheduler", variance_type="fixed_large_log")
    assert multistep.variance_type == "fixed_small"  # that class draws by neither
    scheduler = DDPMScheduler(variance_type="fixed_large_log")
    scheduler.set_timesteps(10)
    x = torch.zeros(1, 1, 2, 2)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.isnan().all()
    with pytest.raises(ValueError, match="variance_type='small'.*fixed_small, fixed_large"):
        read(variance_type="small")


def test_learned_schedulers_and_bad_settings_of_a_folder_are_refused():
    for config in (
        {"variance_type": "fixed_medium"},
        {"thresholding": "true"},
        {"solver_order": 3, "_class_name": "DPMSolverMultistepScheduler"},
        {"use_lu_lambdas": True, "_class_name": "DPMSolverMultistepScheduler"},
        {"clip_sample": "false"},
        {"timestep_spacing": "foo"},
    ):
        with pytest.raises(ValueError, match=next(iter(config))):
            fd.SamplingDefaults.from_config(config)
    multistep = fd.SamplingDefaults.from_config({"_class_name": "DPMSolverMultistepScheduler"})
    assert (multistep.clip, multistep.spacing) == (0.0, "linspace")
    assert fd.SamplingDefaults.from_config({}) == fd.SamplingDefaults()
