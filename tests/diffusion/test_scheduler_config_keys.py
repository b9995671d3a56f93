"""A config keeps the keys of classes that it went through; each class reads its own, as diffusers.

Pictures are those of diffusers' schedulers, in its loop with scaled inputs, for chains of classes.
"""

from __future__ import annotations

import inspect
from itertools import permutations

import diffusers
import pytest
import torch

import flashddpm as fd
from flashddpm.checkpoints.model_folder import load_scheduler_config
from flashddpm.checkpoints.pretrained import read_live_scheduler, scheduler_config
from flashddpm.diffusion.scheduler_config import (
    KEYS,
    ONLY,
    SCHEDULERS,
    SamplingDefaults,
    settings_of,
)

CLOSE = 3e-4
"""Largest difference of a picture in [0, 1], as in test_pipeline; measured: 6e-5."""
UNREAD = {"flow_shift", "time_shift_type"}
"""Of effect only beside settings that are refused."""
ODD = {
    "variance_type": "fixed_large_log",
    "clip_sample": True,
    "clip_sample_range": 0.3,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.5,
    "sample_max_value": 3.0,
    "set_alpha_to_one": False,
    "algorithm_type": "dpmsolver",
    "solver_order": 3,
    "solver_type": "heun",
    "use_karras_sigmas": True,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "use_lu_lambdas": True,
    "use_flow_sigmas": True,
    "use_dynamic_shifting": True,
    "euler_at_final": True,
    "lower_order_final": False,
    "final_sigmas_type": "sigma_min",
    "lambda_min_clipped": -5.1,
    "interpolation_type": "log_linear",
    "timestep_type": "continuous",
    "sigma_min": 0.1,
    "sigma_max": 80.0,
}
"""Of every key that some class lacks, a value that changes pictures or is refused."""
THRESHOLDING = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.8}
LEAVES = {
    "DDPMScheduler": (
        {"variance_type": "fixed_large_log", "clip_sample_range": 0.5},
        {"prediction_type": "v_prediction", "variance_type": "fixed_large", **THRESHOLDING},
    ),
    "DDIMScheduler": (
        {"set_alpha_to_one": False, "clip_sample_range": 0.4},
        {"clip_sample": False, **THRESHOLDING},
    ),
    "DPMSolverMultistepScheduler": (
        {"solver_order": 3, "use_lu_lambdas": True, **THRESHOLDING},
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "EulerDiscreteScheduler": (
        {"timestep_type": "continuous", "sigma_max": 5.0, "interpolation_type": "log_linear"},
        {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
    ),
    "EulerAncestralDiscreteScheduler": (
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "leading", "steps_offset": 1},
    ),
}
"""What a class may leave in a config: settings that we refuse of the class itself, and others."""
T, STEPS = 100, 4


def keywords(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_table_is_the_installed_classes(name):
    theirs = keywords(name)
    assert KEYS[name] == {key: value for key, value in theirs.items() if key not in UNREAD}


def test_every_key_that_a_class_lacks_is_tried():
    everywhere = set.intersection(*(set(keys) for keys in KEYS.values()))
    assert set().union(*KEYS.values()) - everywhere == set(ODD)
    assert set(ONLY) <= set(ODD)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_keys_of_other_classes_are_ignored(tmp_path, name):
    """In live configs, in folders, and whoever wrote them."""
    cls = getattr(diffusers, name)
    lacks = {key: value for key, value in ODD.items() if key not in KEYS[name]}
    scheduler = cls.from_config(lacks)
    assert lacks.items() <= scheduler.config.items()
    scheduler.save_pretrained(tmp_path)
    _, _, _, live = read_live_scheduler(scheduler)
    assert live == SamplingDefaults.from_config(load_scheduler_config(tmp_path))
    assert live == SamplingDefaults.from_config({"_class_name": name})
    for key in set(ODD) & set(KEYS[name]) & set(ONLY):
        with pytest.raises(ValueError, match=f"^{key}="):
            SamplingDefaults.from_config({"_class_name": name, key: ODD[key]})


def test_what_nobody_set_is_the_other_classs_own():
    config = dict(diffusers.EulerDiscreteScheduler(steps_offset=1).config)
    config["_class_name"] = "EulerDiscreteScheduler"
    for name in SCHEDULERS:
        theirs = getattr(diffusers, name).from_config(config).config
        assert settings_of(config, name).items() <= {**theirs, "_class_name": name}.items()
    # A value that was registered later counts for its own class.
    scheduler = diffusers.DDPMScheduler()
    scheduler.register_to_config(timestep_spacing="trailing")
    assert read_live_scheduler(scheduler)[3].spacing == "trailing"


@pytest.mark.parametrize(
    "defaults",
    [
        SamplingDefaults(sigmas="karras"),
        SamplingDefaults("linspace", solver="euler", clip=2.0, threshold=0.9),
        SamplingDefaults("linspace", solver="euler_ancestral", clip=0.0, sigmas="beta"),
    ],
)
def test_a_class_is_not_written_what_it_would_ignore(defaults):
    schedule = fd.NoiseSchedule.create("linear", T)
    with pytest.raises(ValueError, match="Scheduler has no settings for all of them"):
        scheduler_config(schedule, "epsilon", defaults)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return unet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sampler(unet):
    """One whose scheduler is set anew; not to ask whether it should compile is quicker."""
    return fd.Sampler.from_diffusers(unet, diffusers.DDPMScheduler(), compile=False)


def ask():
    return {
        "batch_size": 2,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "pt",
    }


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**ask(), match_diffusers=True).images


def expected(unet, scheduler):
    """diffusers' pipelines do not scale what its Euler schedulers take: their loop written out."""
    generator = ask()["generator"]
    scheduler.set_timesteps(STEPS)
    x = torch.randn(2, 3, 8, 8, generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(out, t, x, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def assert_drawn_alike(pipe, want):
    assert want.isfinite().all() and want.std() > 0.05
    assert (drawn(pipe) - want).abs().max() <= CLOSE


@pytest.mark.parametrize(("first", "second"), [*permutations(SCHEDULERS, 2)])
def test_pictures_by_a_config_that_was_another_classs(unet, sampler, tmp_path, first, second):
    A, B = getattr(diffusers, first), getattr(diffusers, second)
    pipe = fd.DDPMPipeline(sampler)
    for leaves in LEAVES[first]:
        a = A(num_train_timesteps=T, **leaves)
        b = B.from_config(a.config)
        assert leaves.items() <= b.config.items()
        want = expected(unet, b)
        pipe.scheduler = b
        assert_drawn_alike(pipe, want)
        b.save_pretrained(tmp_path)
        saved = SamplingDefaults.from_config(load_scheduler_config(tmp_path))
        assert saved == pipe.sampler.defaults
    pipe.scheduler = a  # the last one, which we have rows for
    pipe.scheduler = B.from_config(pipe.scheduler.config)
    assert_drawn_alike(pipe, want)
    # And back, with what both have left.
    pipe.scheduler = A.from_config(pipe.scheduler.config)
    assert_drawn_alike(pipe, expected(unet, A.from_config(b.config)))


@pytest.mark.parametrize("source", ["live", "folder"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_ddim_pipeline_takes_what_a_ddim_scheduler_does(unet, sampler, tmp_path, source, name):
    """Of a live config it takes only what somebody has set; of a folder all that is written."""
    scheduler = getattr(diffusers, name)(num_train_timesteps=T, **LEAVES[name][1])
    if source == "live":
        theirs = diffusers.DDIMPipeline(unet, scheduler)
        pipe = fd.DDIMPipeline(sampler)
        pipe.scheduler = scheduler
    else:
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
        theirs = diffusers.DDIMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
        pipe = fd.DDIMPipeline.from_pretrained(tmp_path, compile=False)
    theirs.set_progress_bar_config(disable=True)
    assert_drawn_alike(pipe, theirs(**ask()).images)


def test_the_ddim_pipeline_of_what_diffusers_cannot_say(tiny_sampler):
    """A sampler made by hand draws by ddim as it is told; a config may be refused."""
    defaults = SamplingDefaults(variance_type="fixed_large", solver="euler", clip=0.7)
    sampler = tiny_sampler(defaults=defaults)
    pipe = fd.DDIMPipeline(sampler)
    pipe.set_progress_bar_config(disable=True)
    got = pipe(seeds=[1, 2], num_inference_steps=4, output_type="pt").images
    want = sampler.sample([1, 2], None, 1.0, "ddim", 4, clip=0.7)
    assert torch.equal(got, (want / 2 + 0.5).clamp(0, 1))
    euler = diffusers.EulerDiscreteScheduler.from_config({"set_alpha_to_one": False})
    pipe.scheduler = euler  # which ignores it
    with pytest.raises(ValueError, match="set_alpha_to_one=False: only True is supported"):
        pipe(seeds=[1], num_inference_steps=2)
