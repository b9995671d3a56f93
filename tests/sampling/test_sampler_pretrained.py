"""The sampler's ways in and out: live objects of diffusers, folders, and back."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

import flashddpm as fd

CONFIG = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DModel(**CONFIG).eval()


@torch.no_grad()
def theirs(unet, scheduler, x, num_steps):
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


def test_a_live_pipeline_draws_the_same(unet):
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    for given in ((DDIMPipeline(unet, scheduler),), (unet, scheduler)):
        sampler = fd.Sampler.from_diffusers(*given, compile=False)
        assert sampler.executor.choice.compile is False
        x_T = sampler.initial_noise(range(3)).contiguous()
        want = theirs(unet, scheduler, x_T, 10)
        assert (sampler.sample(range(3), num_steps=10) - want).abs().max() <= 1e-4
    unet.conv_out.bias.data += 1  # the weights were copied
    assert (sampler.sample(range(3), num_steps=10) - want).abs().max() <= 1e-4


def test_what_is_saved_is_loaded_by_both(unet, tmp_path):
    scheduler = DDPMScheduler(variance_type="fixed_large", prediction_type="v_prediction")
    sampler = fd.Sampler.from_diffusers(DDPMPipeline(unet, scheduler))
    sampler.save_pretrained(tmp_path / "model")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "model")
    assert loaded.scheduler.config.variance_type == "fixed_large"
    again = fd.Sampler.from_pretrained(tmp_path / "model", "cpu")
    want = sampler.sample(range(2), solver="ddpm", num_steps=5)
    assert torch.equal(again.sample(range(2), solver="ddpm", num_steps=5), want)
    again.save_pretrained(tmp_path / "model")  # over what it was loaded from
    third = fd.Sampler.from_pretrained(tmp_path / "model", "cpu", backend="reference")
    assert third.backend == "reference"
    assert (third.sample(range(2), solver="ddpm", num_steps=5) - want).abs().max() <= 1e-4


def test_a_sampler_made_by_hand_is_saved(tiny_sampler, tmp_path):
    sampler = tiny_sampler()
    sampler.save_pretrained(tmp_path / "m")
    again = fd.Sampler.from_pretrained(tmp_path / "m", "cpu")
    assert again.conditioning == sampler.conditioning
    want = sampler.sample(range(2), 1, 2.0, num_steps=5)
    assert (again.sample(range(2), 1, 2.0, num_steps=5) - want).abs().max() <= 1e-5


def test_refusals(unet, tmp_path):
    with pytest.raises(ValueError, match="scheduler=None"):
        fd.Sampler.from_diffusers(unet)
    with pytest.raises(ValueError, match="backend='fast'"):
        fd.Sampler.from_diffusers(unet, DDPMScheduler(), backend="fast")
    own = fd.Sampler(torch.nn.Identity(), fd.NoiseSchedule.create(), shape=(1, 8, 8))
    with pytest.raises(ValueError, match="network=Identity"):
        own.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(fd.CheckpointError, match="no such folder"):
        fd.Sampler.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="allow_pickle="):
        fd.Sampler.from_pretrained(fd.bundled(), allow_pickle="yes")


def test_tables_of_diffusers(unet, tmp_path):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    own = fd.Sampler.from_diffusers(unet, scheduler)
    theirs = fd.Sampler.from_diffusers(unet, scheduler, tables="diffusers")
    want = scheduler.alphas_cumprod.numpy()
    assert (theirs.schedule.alphas_cumprod.astype("float32") == want).all()
    assert (own.schedule.alphas_cumprod.astype("float32") != want).any()
    own.save_pretrained(tmp_path / "m")
    loaded = fd.Sampler.from_pretrained(tmp_path / "m", "cpu", tables="diffusers")
    assert (loaded.schedule.betas == theirs.schedule.betas).all()
    with pytest.raises(ValueError, match="tables='float32'"):
        fd.Sampler.from_pretrained(tmp_path / "m", tables="float32")
