"""Every side draws the same images of the same weights and noise, or is not timed."""

import dataclasses

import pytest
import torch

import flashddpm as fd
from flashddpm.benchmarks.cases import sampling
from flashddpm.benchmarks.cases.sampling import SamplingSetting
from flashddpm.benchmarks.measure import agreement, harness
from flashddpm.benchmarks.peers import models, pipelines
from flashddpm.benchmarks.peers.models import Model

CONFIG = models.COMMON | {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture
def tiny(monkeypatch):
    """A tiny model in place of all others, and nothing compiled."""
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
    made = Model("cifar10", models.random_unet(CONFIG), scheduler, fd.Conditioning())
    for module in (pipelines, sampling):
        monkeypatch.setattr(module, "model", lambda name: made)
    caches = (pipelines.sampler, pipelines.diffusers_unet)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    yield made
    for cached in caches:
        cached.cache_clear()


def setting(dtype="float32", solver="ddim", batch=2, steps=5):
    return SamplingSetting("cifar10", dtype, solver, batch, steps, 1)


def test_the_configurations_are_the_published_ones():
    count = {
        name: fd.UNetConfig.from_dict(config) for name, (config, _) in models.PUBLISHED.items()
    }
    with torch.device("meta"):
        sizes = {n: sum(p.numel() for p in fd.UNet(c).parameters()) for n, c in count.items()}
    assert sizes == {"cifar10": 35_746_307, "pixels256": 113_673_219}


def test_the_bundled_model_is_sampled_as_its_files_say():
    of = models.model("bundled")
    mine, loaded = of.sampler("cpu", torch.float32), fd.Sampler.from_pretrained(fd.bundled(), "cpu")
    for name in ("prediction_type", "defaults", "conditioning", "shape"):
        assert getattr(mine, name) == getattr(loaded, name)
    assert mine.schedule.betas.tolist() == loaded.schedule.betas.tolist()
    assert mine.prediction_type == "v_prediction" and of.labels(12)[-2:] == [0, 1]


def test_random_weights_are_of_the_seed_and_none_is_left_at_zero():
    a, b = (models.random_unet(CONFIG).state_dict() for _ in range(2))
    for name, value in a.items():
        assert torch.equal(value, b[name])
        assert value.ndim == 1 or value.any(), name


def test_diffusers_has_the_same_weights(tiny):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    theirs = tiny.diffusers_unet("cpu", torch.float32)
    with torch.no_grad():
        ours = tiny.unet(x, t)
        torch.testing.assert_close(ours, theirs(x, t).sample)
        pipelines.fuse_projections(theirs)
        torch.testing.assert_close(ours, theirs(x, t).sample)
    assert any("to_qkv" in name for name, _ in theirs.named_modules())


@pytest.mark.parametrize("peer", ["best", "eager", "unet", "reference"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_sides_agree_on_given_noise(tiny, dtype, solver, peer):
    sampling.agree(setting(dtype, solver), peer, "cpu")


@pytest.mark.parametrize("peer", ["best", "unet"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_weights_are_not_timed(tiny, dtype, peer, monkeypatch):
    good = pipelines.diffusers_unet

    def off(name, dtype, device, how="best"):
        unet = good(name, dtype, device, how)
        if how != "eager":
            with torch.no_grad():
                unet.conv_out.bias += 1
        return unet

    monkeypatch.setattr(pipelines, "diffusers_unet", off)
    case = sampling.versus(setting(dtype), peer)
    with pytest.raises(AssertionError, match="not timed"):
        list(case.measure("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_loop_is_not_timed(tiny, dtype, monkeypatch):
    """Were the peer's scheduler another, plain PyTorch would be as far off: both are compared."""

    def wrong(self, *arguments, **options):
        init(self, *arguments, **options)
        self.scheduler.register_to_config(prediction_type="v_prediction")

    init = pipelines.Diffusers.__init__
    monkeypatch.setattr(pipelines.Diffusers, "__init__", wrong)
    with pytest.raises(AssertionError, match="differs from diffusers eager.*not timed"):
        sampling.agree(setting(dtype), "eager", "cpu")


def test_a_case_is_timed_both_ways_in_the_setting(tiny, monkeypatch):
    timed = []

    def compare(ours, peer, rounds):
        timed.append((ours().shape, peer().shape, rounds))
        return harness.Comparison(1, 2, 2, 2, 2, 0, 2)

    monkeypatch.setattr(sampling, "compare", compare)
    made = dataclasses.replace(setting(batch=3), rounds=7)
    (result,) = sampling.versus(made, "eager").measure("cpu")
    assert timed == [((3, 3, 8, 8), (3, 3, 8, 8), 7)]
    assert result.case == "cifar10-float32-ddim-batch-3-eager" and result.values["ratio"] == 2
    assert "5 steps of ddim" in result.note and result.peer == "diffusers eager"


def test_nothing_is_timed_before_the_check(tiny, monkeypatch):
    monkeypatch.setattr(sampling, "compare", lambda *a, **k: pytest.fail("timed"))
    monkeypatch.setattr(sampling, "agree", lambda *a: (_ for _ in ()).throw(AssertionError("no")))
    with pytest.raises(AssertionError, match="no"):
        list(sampling.versus(setting(), "eager").measure("cpu"))


def test_float32_may_differ_by_the_tolerance_only():
    x = torch.zeros(1, 3, 2, 2)
    agreement.check(x, x + 0.9e-3, "x")
    for bad in (x + 1.1e-3, x * torch.nan):
        with pytest.raises(AssertionError, match="x: differs from diffusers by"):
            agreement.check(x, bad, "x")


def test_bfloat16_may_be_twice_as_far_off_as_plain_pytorch():
    ref = torch.zeros(1, 1, 64, 64)
    plain = ref + 0.1
    agreement.check_low(ref + 0.19, plain, ref, "x")
    one = ref.clone()
    one[..., 0, 0] = 0.21  # a single pixel
    for bad in (one, ref + torch.nan):
        with pytest.raises(AssertionError, match="at most"):
            agreement.check_low(bad, plain, ref, "x")
    plain = ref.clone()
    plain[..., 0, 0] = 0.1
    with pytest.raises(AssertionError, match="rms"):
        agreement.check_low(ref + 0.1, plain, ref, "x")
