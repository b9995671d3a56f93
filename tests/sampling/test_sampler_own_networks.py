"""Networks of ours beside the UNet run as it does: compiled, counted, updated, checked."""

import dataclasses

import pytest
import torch

import flashddpm as fd
from flashddpm.networks.rms_unet import RMSUNet, RMSUNetConfig

CONFIG = RMSUNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    dim=8,
    dims=(8, 8, 16),
    full_attention=(False, True),
    attention_heads=(2, 2),
    attention_head_dim=(4, 4),
)


@pytest.fixture
def make():
    def build(config=CONFIG, **options):
        torch.manual_seed(0)
        network = RMSUNet(config).requires_grad_(False)
        schedule = fd.NoiseSchedule.create("squaredcos_cap_v2", 100)
        options = {"device": "cpu", "shape": (1, 8, 8), **options}
        return fd.Sampler(network, schedule, **options)

    return build


def test_compiled_and_fused_are_near_the_reference(make):
    """Of one level with linear attention; that of the middle is quadratic."""
    level = {"dims": (8, 8), "full_attention": (False,), "attention_heads": (2,)}
    config = dataclasses.replace(CONFIG, **level, attention_head_dim=(4,))
    want = make(config, backend="reference").sample(range(3), num_steps=5)
    assert (make(config).sample(range(3), num_steps=5) - want).abs().max() <= 1e-4
    compiled = make(config, compile=True)
    assert (compiled.sample(range(3), num_steps=5) - want).abs().max() <= 1e-4
    assert compiled.executor.choice.compiled.shapes == {(4, False)}


def test_auto_counts_its_work(make):
    executor = make().executor
    assert executor.choice.compile == "auto"
    assert executor.choice.auto(1)[0] is False and executor.choice.auto(10**12)[0] is True


def test_weights_that_others_change_are_followed(make):
    sampler = make(compile=False)
    before = sampler.sample([1, 2], num_steps=3)
    for parameter in sampler.network.parameters():
        parameter.data.mul_(0.5)
    want = sampler.replace(backend="reference").sample([1, 2], num_steps=3)
    assert (want - before).abs().max() > 1e-3
    torch.testing.assert_close(sampler.sample([1, 2], num_steps=3), want, rtol=0, atol=1e-5)


def test_new_weights(make):
    sampler = make()
    before = sampler.sample(range(2), num_steps=3)
    torch.manual_seed(1)
    state = RMSUNet(CONFIG).state_dict()
    sampler.update_weights(state)
    after = sampler.sample(range(2), num_steps=3)
    other = make()
    other.network.load_state_dict(state)
    assert torch.equal(after, other.sample(range(2), num_steps=3))
    assert (after - before).abs().max() > 0.01
    with pytest.raises(ValueError, match="does not match the network"):
        sampler.update_weights({})


@pytest.mark.parametrize(
    "wrong", [{"shape": (3, 8, 8)}, {"shape": (1, 7, 8)}, {"conditioning": fd.Conditioning(3)}]
)
def test_what_it_does_not_take_is_refused(make, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)


def test_saved_and_loaded(make, tmp_path):
    sampler = make()
    sampler.save_pretrained(tmp_path / "m")
    again = fd.Sampler.from_pretrained(tmp_path / "m", "cpu")
    assert isinstance(again.network, RMSUNet)
    want = sampler.sample(range(2), num_steps=3)
    assert torch.equal(again.sample(range(2), num_steps=3), want)


def test_a_respacing_string_is_its_timesteps(make):
    sampler = make()
    plan = sampler.plan("ddim", timesteps="ddim25")
    assert plan.timesteps.tolist() == list(range(96, -1, -4))
    want = sampler.sample(range(2), timesteps=list(range(96, -1, -4)))
    assert torch.equal(sampler.sample(range(2), timesteps="ddim25"), want)
    with pytest.raises(ValueError, match="timestep_respacing='ddim'"):
        sampler.sample(0, timesteps="ddim")
