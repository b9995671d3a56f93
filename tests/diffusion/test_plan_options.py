"""How a model is sampled where a command says nothing."""

import pytest
import torch

import flashddpm as fd
from flashddpm.diffusion import plan_options
from flashddpm.diffusion.scheduler_config import SamplingDefaults

ASKED = {"spacing": None, "sigmas": None, "eta": 0.0}


def with_defaults(options: dict, sampler: fd.Sampler) -> dict:
    return plan_options.with_defaults(options, sampler.defaults.solver, len(sampler.schedule))


@pytest.fixture
def make():
    """A sampler of a scheduler of diffusers."""

    def make(name: str, T: int = 1000, **config) -> fd.Sampler:
        config = {"_class_name": name, "num_train_timesteps": T, **config}
        return fd.Sampler(
            torch.nn.Identity(),
            fd.NoiseSchedule.from_config(config),
            shape=(1, 4, 4),
            prediction_type=config.get("prediction_type", "epsilon"),
            defaults=SamplingDefaults.from_config(config),
            device="cpu",
            call=lambda x_t, t, labels: x_t,
        )

    return make


def test_a_model_of_ancestral_sampling_is_sampled_in_twenty_steps(make):
    sampler = make("DDPMScheduler")
    options = with_defaults({"solver": None, "num_steps": None, **ASKED}, sampler)
    wanted = {"solver": "dpmpp_2m_sde", "num_steps": 20, "spacing": "linspace"}
    assert options == {**ASKED, **wanted}
    assert len(sampler.plan(**options).timesteps) == 20


def test_what_was_asked_for_is_kept(make):
    sampler = make("DDPMScheduler")
    asked = {"solver": "ddpm", "num_steps": 7, "spacing": "leading"}
    assert with_defaults(asked, sampler) == asked
    assert with_defaults({"spacing": "trailing"}, sampler)["spacing"] == "trailing"
    assert with_defaults({"solver": "dpmpp_2m"}, sampler)["num_steps"] == 20
    assert with_defaults({"solver": "ddim", "spacing": None}, sampler) == {
        "solver": "ddim",
        "num_steps": 50,
        "spacing": None,
    }


@pytest.mark.parametrize("option", [{"variance_type": "fixed_large"}, {"timesteps": (9, 5, 0)}])
def test_options_of_ancestral_sampling_ask_for_it(make, option):
    options = with_defaults({**option, "solver": None, "spacing": None}, make("DDPMScheduler"))
    assert options["solver"] == "ddpm" and options["spacing"] is None


@pytest.mark.parametrize(
    ("name", "solver", "steps"),
    [
        ("DDIMScheduler", "ddim", 50),
        ("EulerDiscreteScheduler", "euler", 50),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral", 50),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", 20),
    ],
)
def test_another_scheduler_is_the_models_choice(make, name, solver, steps):
    options = with_defaults({"spacing": None}, make(name))
    assert options == {"solver": solver, "num_steps": steps, "spacing": None}


@pytest.mark.parametrize(
    ("T", "solver", "steps"),
    [(20, "ddpm", 20), (21, "dpmpp_2m_sde", 20), (3, "ddpm", 3)],
)
def test_few_training_steps_are_all_taken(make, T, solver, steps):
    sampler = make("DDPMScheduler", T)
    options = with_defaults({}, sampler)
    assert options["solver"] == solver and options["num_steps"] == steps
    assert len(sampler.plan(**options).timesteps) == steps


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
        {"variance_type": "learned_range"},
        {"thresholding": True, "sample_max_value": 2.0},
    ],
)
def test_the_choice_is_possible_for_every_model(make, config):
    sampler = make("DDPMScheduler", **config)
    assert len(sampler.plan(**with_defaults({}, sampler)).timesteps) == 20
