"""The pipelines against diffusers' own, on folders that diffusers wrote."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)

import flashddpm as fd
from flashddpm.integrations.diffusers_pipelines import DDIMPipeline, DDPMPipeline
from flashddpm.sampling.generator_noise import GeneratorNoise

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
CLOSE = 2e-5
"""Largest difference of a picture in [0, 1]; measured: 7e-6, of float64 tables against float32."""
CLOSE_BY_EPS = 3e-4
"""The same where eps is not clipped as x0 is, so that rounding grows on; measured: 9e-5."""

UNCLIPPED = {
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "prediction_type": "v_prediction",
}


def make_unet(**changes):
    torch.manual_seed(1)
    unet = UNet2DModel(**TINY | changes).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return unet


@pytest.fixture
def folder(tmp_path):
    """A function that writes a model with diffusers and returns its pipeline and the path."""

    def make(scheduler, kind=diffusers.DDPMPipeline, **changes):
        pipe = kind(unet=make_unet(**changes), scheduler=scheduler)
        pipe.save_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        return pipe, tmp_path

    return make


def load(kind, path, **options):
    pipe = kind.from_pretrained(path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same(pipe, theirs, generator, close=CLOSE, ours=None, **ask):
    """Both draw the same pictures, and leave the generators in the same state."""
    want = theirs(generator=generator(), output_type="np", **ask).images
    mine = generator()
    got = pipe(generator=mine, output_type="np", **ask | (ours or {})).images
    assert got.dtype == np.float32 and got.shape == want.shape
    assert 0.05 < want.std() and np.abs(got - want).max() <= close
    other = generator()
    pictures = theirs(generator=other, **ask).images
    copies = pipe(generator=generator(), **ask | (ours or {})).images
    assert [p.mode for p in copies] == [p.mode for p in pictures]
    levels = np.stack(copies).reshape(want.shape)  # of 255, of values that may be off by so much
    low, high = ((want + off).clip(0, 1) * 255 for off in (-close, close))
    assert (low.round() <= levels).all() and (levels <= high.round()).all()
    for a, b in zip(*(g if isinstance(g, list) else [g] for g in (mine, other)), strict=True):
        assert torch.equal(a.get_state(), b.get_state())
    return want


def one():
    return torch.Generator().manual_seed(3)


def three():
    return [torch.Generator().manual_seed(i) for i in (3, 4, 5)]


@pytest.mark.parametrize("generator", [one, three])
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"variance_type": "fixed_large"}, {}),
        ({"variance_type": "fixed_small_log", "prediction_type": "v_prediction"}, {}),
        ({"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}, {}),
        ({"timestep_spacing": "linspace", "prediction_type": "sample"}, {"sample_size": (8, 4)}),
        ({"variance_type": "learned_range"}, {"out_channels": 6}),
        ({"thresholding": True, "sample_max_value": 1.5}, {"in_channels": 1, "out_channels": 1}),
        (
            {"clip_sample_range": 0.7, "steps_offset": 1},
            {"flip_sin_to_cos": False, "freq_shift": 1},
        ),
    ],
    ids=str,
)
def test_ddpm(folder, config, changes, generator):
    theirs, path = folder(DDPMScheduler(**config), **changes)
    pipe = load(DDPMPipeline, path)
    assert_same(pipe, theirs, generator, batch_size=3, num_inference_steps=12)


@pytest.mark.parametrize("generator", [one, three])
@pytest.mark.parametrize("config", [{}, UNCLIPPED])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clipped", [None, True])
def test_ddim(folder, config, eta, clipped, generator):
    theirs, path = folder(DDIMScheduler(**config), diffusers.DDIMPipeline)
    ask = {"batch_size": 3, "num_inference_steps": 10, "eta": eta}
    pipe, clip = load(DDIMPipeline, path), {"use_clipped_model_output": clipped}
    want = assert_same(pipe, theirs, generator, CLOSE_BY_EPS, **ask, **clip)
    raw = theirs(generator=generator(), output_type="np", **ask).images
    assert (np.abs(want - raw).max() > 1e-3) == bool(clipped and not config)


@pytest.mark.parametrize(
    ("name", "scheduler", "ask"),
    [
        ("DDPMPipeline", DDPMScheduler(), {}),
        ("DDPMPipeline", DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
        ("DDIMPipeline", DDIMScheduler(), {}),
        ("DDIMPipeline", DDIMScheduler(), {"eta": 0.6}),
    ],
)
def test_torchs_own_generator(folder, name, scheduler, ask):
    """Given, as torch.manual_seed returns it, or used because none is; from there it goes on."""
    theirs, path = folder(scheduler, getattr(diffusers, name))
    pipe = load(getattr(fd, name), path, compile=False)
    ask = {"batch_size": 3, "num_inference_steps": 5, "output_type": "np", **ask}
    results = []
    for one_of in (theirs, pipe):
        default = torch.manual_seed(0)
        calls = [one_of(**ask, **given).images for given in ({"generator": default}, {})]
        results.append((np.stack(calls), torch.get_rng_state()))
    (want, state), (got, ours) = results
    assert np.abs(got - want).max() <= CLOSE_BY_EPS and torch.equal(ours, state)
    assert np.abs(want[0] - want[1]).max() > 0.1 and np.abs(want[0, 0] - want[0, 1]).max() > 0.1
    torch.manual_seed(0)
    assert np.abs(pipe(**ask).images - want[0]).max() <= CLOSE_BY_EPS


@pytest.mark.parametrize(
    "ask", [{"generator": one()}, {"generator": three()}, {"seeds": [1, 2, 3]}]
)
@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_torchs_own_generator_is_left_alone_otherwise(tiny_sampler, kind, ask):
    pipe = pipeline(tiny_sampler, kind)
    state = torch.get_rng_state()
    pipe(batch_size=3, num_inference_steps=3, **ask)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("given", [True, False])
def test_noise_is_of_the_dtype_and_device_asked_for(given):
    """Whatever the host program's defaults are."""
    generator = torch.manual_seed(0)
    want = torch.randn(2, 1, 3, 3, device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            draws = GeneratorNoise(generator if given else None, (2, 1, 3, 3), torch.device("cpu"))
            got = draws(torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("eta", "ask", "drawn"),
    [
        (0.0, {}, {"initial_noise"}),
        (0.0, {"generator": one()}, {"initial_noise"}),
        (0.5, {}, {"initial_noise", "step_noise"}),
        (0.5, {"seeds": 1}, set()),
    ],
)
def test_steps_that_draw_nothing_are_given_nothing(tiny_sampler, monkeypatch, eta, ask, drawn):
    """Else they would not be captured on a GPU."""
    pipe, seen = pipeline(tiny_sampler, DDIMPipeline), []
    sample = pipe.sampler.sample
    monkeypatch.setattr(
        pipe.sampler, "sample", lambda *args, **noise: seen.append(noise) or sample(*args, **noise)
    )
    pipe(num_inference_steps=2, eta=eta, **ask)
    assert {name for name in seen[0] if name.endswith("noise")} == drawn


@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_with_alpha(folder, channels):
    """The modes and levels that diffusers gives: LA and RGBA."""
    theirs, path = folder(DDPMScheduler(), in_channels=channels, out_channels=channels)
    ask = {"batch_size": 2, "num_inference_steps": 4}
    assert_same(load(DDPMPipeline, path, compile=False), theirs, one, **ask)


def test_what_is_no_picture_is_refused_before_the_first_step(folder):
    theirs, path = folder(DDIMScheduler(), in_channels=5, out_channels=5)
    ask = {"batch_size": 2, "num_inference_steps": 4}
    for kind in (DDPMPipeline, DDIMPipeline):
        pipe, called = load(kind, path, compile=False), []
        pipe.unet.conv_in.register_forward_pre_hook(lambda *_, seen=called: seen.append(True))
        for generator in ({"generator": one()}, {"seeds": [1, 2]}, {}):
            with pytest.raises(ValueError, match="output_type='pil': must be np or pt.*5 channels"):
                pipe(**ask, **generator)
        assert not called
        want = theirs(generator=one(), output_type="np", **ask).images
        got = pipe(generator=one(), output_type="np", **ask).images
        assert np.abs(got - want).max() <= CLOSE_BY_EPS and len(called) == 4


def test_ddim_of_other_schedulers(folder):
    """Both make a DDIM of the model's config; DPM-Solver's says nothing of clipping."""
    for scheduler in (DDPMScheduler(), DPMSolverMultistepScheduler(timestep_spacing="leading")):
        _, path = folder(scheduler)
        theirs = diffusers.DDIMPipeline.from_pretrained(path)
        theirs.set_progress_bar_config(disable=True)
        pipe = load(DDIMPipeline, path)
        assert_same(pipe, theirs, one, CLOSE_BY_EPS, batch_size=2, num_inference_steps=8)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DPMSolverMultistepScheduler(prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(prediction_type="sample", algorithm_type="sde-dpmsolver++"),
    ],
)
def test_ddpm_pipeline_takes_the_models_solver(folder, scheduler):
    theirs, path = folder(scheduler)
    pipe = load(DDPMPipeline, path)
    assert_same(pipe, theirs, one, CLOSE_BY_EPS, batch_size=2, num_inference_steps=8)


@pytest.mark.parametrize(
    ("scheduler", "n"),
    [
        (DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing"), 10),
        (DDIMScheduler(timestep_spacing="linspace"), 10),
        (DDIMScheduler(timestep_spacing="trailing"), 7),
    ],
)
def test_quirks_are_matched_only_where_asked_for(folder, scheduler, n):
    ddim = isinstance(scheduler, DDIMScheduler)
    theirs, path = folder(scheduler, diffusers.DDIMPipeline if ddim else diffusers.DDPMPipeline)
    pipe = load(DDIMPipeline if ddim else DDPMPipeline, path)
    ask = {"batch_size": 2, "num_inference_steps": n}
    want = assert_same(pipe, theirs, one, CLOSE_BY_EPS, {"match_diffusers": True}, **ask)
    mine, other = one(), one()
    unasked = pipe(generator=mine, output_type="np", **ask).images
    assert np.abs(unasked - want).max() > 1e-2
    theirs(generator=other, **ask)
    assert torch.equal(mine.get_state(), other.get_state())  # its draws are those of diffusers


def test_of_live_objects_and_saved_again(folder, tmp_path):
    theirs, _ = folder(DDPMScheduler(variance_type="fixed_large"))
    pipe = DDPMPipeline(unet=theirs.unet, scheduler=theirs.scheduler)
    pipe.set_progress_bar_config(disable=True)
    ask = {"batch_size": 2, "num_inference_steps": 8}
    assert_same(pipe, theirs, one, **ask)
    pipe.to(torch.float16).to(torch.float32)  # which rounds the weights
    pipe.save_pretrained(tmp_path / "again")
    again = load(DDPMPipeline, tmp_path / "again")
    config = json.loads((tmp_path / "again/scheduler/scheduler_config.json").read_text())
    assert config["beta_schedule"] == "linear" and config["variance_type"] == "fixed_large"
    want = pipe(generator=one(), output_type="pt", **ask).images
    assert torch.equal(again(generator=one(), output_type="pt", **ask).images, want)
    with pytest.raises(ValueError, match="sampler: must not be given beside unet"):
        DDPMPipeline(pipe.sampler, unet=theirs.unet)


def test_class_labels(folder):
    """diffusers' pipeline gives no labels to its U-Net: its loop written out."""
    theirs, path = folder(DDPMScheduler(), num_class_embeds=4)
    generator, labels = one(), torch.tensor([0, 3, 2])
    x = torch.randn(3, 3, 8, 8, generator=generator)
    theirs.scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in theirs.scheduler.timesteps:
            out = theirs.unet(x, t, class_labels=labels).sample
            x = theirs.scheduler.step(out, t, x, generator=generator).prev_sample
    want = (x / 2 + 0.5).clamp(0, 1)
    pipe = load(DDPMPipeline, path)
    ask = {"batch_size": 3, "num_inference_steps": 10, "output_type": "pt"}
    got = pipe(generator=one(), class_labels=labels, **ask).images
    assert (got - want).abs().max() <= CLOSE
    assert (pipe(generator=one(), class_labels=1, **ask).images - want).abs().max() > 1e-3
    with pytest.raises(ValueError, match="labels=None"):
        pipe(**ask)


def test_half_precision_draws_in_it(folder, monkeypatch):
    scheduler = DDIMScheduler(prediction_type="sample", timestep_spacing="trailing")
    theirs, path = folder(scheduler, diffusers.DDIMPipeline)
    pipe = load(DDIMPipeline, path).to(torch.bfloat16)
    assert pipe.dtype is torch.bfloat16 and pipe.unet.conv_in.weight.dtype is torch.bfloat16
    theirs.to(torch.bfloat16)
    sample, seen = pipe.sampler.sample, []

    def spy(*args, initial_noise, step_noise, **options):
        seen.extend([initial_noise, step_noise(0)])
        return sample(*args, initial_noise=initial_noise, step_noise=step_noise, **options)

    monkeypatch.setattr(pipe.sampler, "sample", spy)
    ask = {"num_inference_steps": 1, "batch_size": 4, "output_type": "pt"}
    want = theirs(generator=one(), **ask).images.float()
    assert (pipe(generator=one(), eta=1.0, **ask).images - want).abs().max() < 0.02
    generator = one()
    for noise in seen:
        drawn = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.bfloat16)
        assert noise.dtype is torch.bfloat16 and torch.equal(noise, drawn)


# What is ours ---------------------------------------------------------------------------------


def pipeline(make, kind=DDPMPipeline, **arguments):
    pipe = kind(make(**arguments))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_seeds_are_the_samplers(tiny_sampler):
    pipe = pipeline(tiny_sampler)
    ask = {"class_labels": [0, 1, 2], "guidance_scale": [1.0, 2.0, 1.0], "num_inference_steps": 5}
    got = pipe(seeds=[7, 8, 9], output_type="pt", **ask).images
    want = pipe.sampler.sample([7, 8, 9], [0, 1, 2], [1.0, 2.0, 1.0], "ddpm", 5)
    assert torch.equal(got, (want / 2 + 0.5).clamp(0, 1))
    alone = pipe(1, seeds=8, output_type="pt", class_labels=1, guidance_scale=2.0,
                 num_inference_steps=5)  # fmt: skip
    assert (alone.images[0] - got[1]).abs().max() <= 1e-5
    noisy = pipeline(tiny_sampler, DDIMPipeline)(
        seeds=[7, 8, 9], eta=0.5, use_clipped_model_output=True, output_type="pt",
        num_inference_steps=5,
    )  # fmt: skip
    options = {"eta": 0.5, "use_clipped_model_output": True}
    want = pipe.sampler.sample([7, 8, 9], None, 1.0, "ddim", 5, **options)
    assert torch.equal(noisy.images, (want / 2 + 0.5).clamp(0, 1))


def test_outputs(tiny_sampler):
    pipe = pipeline(tiny_sampler)
    ask = {"seeds": [1, 2], "num_inference_steps": 3}
    tensors = pipe(output_type="pt", **ask).images
    assert tensors.shape == (2, 1, 8, 8) and tensors.device == pipe.device
    arrays = pipe(output_type="np", **ask)["images"]
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    pictures = pipe(**ask)[0]
    np.testing.assert_array_equal(
        np.stack(pictures), (arrays[..., 0] * 255).round().astype(np.uint8)
    )
    result = pipe(return_dict=False, **ask)
    assert isinstance(result, tuple) and len(result) == 1 and len(result[0]) == 2
    assert len(pipe(num_inference_steps=2).images) == 1


def test_to_leaves_the_sampler_as_it_was(tiny_sampler):
    pipe = pipeline(tiny_sampler, backend="reference")
    sampler = pipe.sampler
    assert pipe.to("cpu") is pipe and pipe.sampler is sampler
    pipe.to("cpu", torch.bfloat16)
    assert pipe.sampler is not sampler and pipe.sampler.backend == "reference"
    assert pipe.dtype is torch.bfloat16 and sampler.dtype is torch.float32
    assert sampler.network.conv_in.weight.dtype is torch.float32
    ask = {"seeds": [1], "num_inference_steps": 3, "output_type": "pt", "class_labels": 1}
    assert (pipe(**ask).images - DDPMPipeline(sampler)(**ask).images).abs().max() < 0.1
    foreign = fd.Sampler(lambda x, t: x, sampler.schedule, shape=(1, 8, 8), device="cpu")
    with pytest.raises(ValueError, match="only flashddpm's UNet is moved"):
        DDPMPipeline(foreign).to(torch.float16)


@pytest.mark.parametrize("source", ["live", "folder", "folder of few settings"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (DDIMScheduler, {"beta_end": 0.015, "prediction_type": "sample"}),
        (DDPMScheduler, {"variance_type": "fixed_large"}),
        (DPMSolverMultistepScheduler, {}),
    ],
)
def test_a_scheduler_is_set_as_in_diffusers(folder, tmp_path, source, kind, changes):
    """What nobody has set is the new class's default: there the two spacings differ."""
    theirs, path = folder(DDPMScheduler(prediction_type="v_prediction", clip_sample_range=0.9))
    if source == "live":
        pipe = DDPMPipeline(unet=theirs.unet, scheduler=theirs.scheduler)
        pipe.set_progress_bar_config(disable=True)
    else:
        if source == "folder of few settings":
            file = path / "scheduler/scheduler_config.json"
            few = {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}
            file.write_text(json.dumps(few))
        theirs = diffusers.DDPMPipeline.from_pretrained(path)
        theirs.set_progress_bar_config(disable=True)
        pipe = load(DDPMPipeline, path)
    before = pipe.sampler
    for one_of in (theirs, pipe):
        one_of.scheduler = kind.from_config(one_of.scheduler.config, **changes)
    assert pipe.scheduler.config["_class_name"] == kind.__name__
    assert pipe.sampler.network is before.network and before.defaults.solver == "ddpm"
    ask = {"batch_size": 2, "num_inference_steps": 8}
    assert_same(pipe, theirs, one, CLOSE_BY_EPS, **ask)
    pipe.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/scheduler/scheduler_config.json").read_text())
    assert "_use_default_values" not in saved and saved["beta_schedule"] == "linear"
    assert_same(load(DDPMPipeline, tmp_path / "saved"), theirs, one, CLOSE_BY_EPS, **ask)


def test_a_scheduler_that_cannot_be_set_changes_nothing(tiny_sampler):
    pipe = pipeline(tiny_sampler)
    before = pipe.sampler
    for wrong, message in (
        (3, "scheduler='int'.*DDPMScheduler"),
        (pipe.scheduler, "scheduler='SchedulerSettings'.*DDPMScheduler"),
        (DPMSolverMultistepScheduler(solver_order=3), "scheduler: .*solver_order"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.scheduler = wrong
    assert pipe.sampler is before


def test_components_make_another_pipeline(tiny_sampler):
    pipe = pipeline(tiny_sampler)
    assert DDIMPipeline(**pipe.components).sampler is pipe.sampler


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"output_type": "latent"}, "output_type='latent'.*pil, np, pt"),
        ({"return_dict": 1}, "return_dict=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 3, "seeds": [1, 2]}, "batch_size=3: must be 2"),
        ({"seeds": [1], "generator": torch.Generator()}, "seeds: must not be given beside"),
        ({"generator": 3}, "generator=3: must be a torch.Generator"),
        ({"generator": [torch.Generator()] * 2, "batch_size": 3}, "generator: 2 for 3 images"),
        ({"num_inference_steps": 101}, "num_steps=101"),
        ({"match_diffusers": "all"}, "match_diffusers='all'.*true or false"),
    ],
)
@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_bad_arguments(tiny_sampler, kind, ask, message):
    with pytest.raises(ValueError, match=message):
        pipeline(tiny_sampler, kind)(**{"num_inference_steps": 3} | ask)


def test_bad_samplers_and_generators(tiny_sampler):
    with pytest.raises(ValueError, match="sampler=int: must be a flashddpm.Sampler"):
        DDPMPipeline(3)
    with pytest.raises(ValueError, match="eta=2"):
        pipeline(tiny_sampler, DDIMPipeline)(eta=2.0)
    with pytest.raises(ValueError, match="use_clipped_model_output=1: must be true or false"):
        pipeline(tiny_sampler, DDIMPipeline)(use_clipped_model_output=1)

    class OfAGPU(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator: of cuda; must all be of cpu or cpu"):
        GeneratorNoise(OfAGPU(), (1, 1, 2, 2), torch.device("cpu"))
