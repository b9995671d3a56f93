"""What hangs on a network counts: hooks, forwards of an instance's own, subclasses, modes."""

import functools
import logging
import threading
import types

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

import flashddpm as fd
from flashddpm.checkpoints.pretrained import DiffusersUNet
from flashddpm.execution.follower import Follower
from flashddpm.execution.modes import evaluating
from flashddpm.networks.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def theirs(tiny_config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**tiny_config).eval()


def half(module, arguments, out):
    return out * 0.5


class _Subclass(UNet2DModel):
    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        out = super().forward(sample, timestep, class_labels)
        out.sample = out.sample * 0.5
        return out


_Subclass.__name__ = "UNet2DModel"


class Halving(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 0.5


def set_processor(unet, processor):
    for module in unet.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(processor)


def hook_on_the_whole(unet):
    def hook(module, arguments, out):
        out.sample = out.sample * 0.5
        return out

    unet.register_forward_hook(hook)


def forward_of_the_instance(unet):
    plain = unet.forward

    def forward(self, *args, **kwargs):
        out = plain(*args, **kwargs)
        out.sample = out.sample * 0.5
        return out

    unet.forward = types.MethodType(forward, unet)


def forward_of_a_part(unet):
    part = unet.conv_out
    part.forward = lambda x: nn.Conv2d.forward(part, x) * 0.5


def pre_hook(unet):
    unet.conv_out.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 0.5,))


def method_of_the_instance(unet):
    plain = unet.time_proj.forward
    unet.time_proj.forward = lambda t: plain(t) * 0.5


def other_activation(unet):
    unet.conv_act = nn.GELU()


def other_setting(unet):
    unet.conv_norm_out.eps = 0.5


def attention_processor(unet):
    set_processor(unet, Halving())


def wrapped_norm(unet):
    class Norm(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) * 0.5

    norm = Norm(4, 8, unet.conv_norm_out.eps)
    norm.load_state_dict(unet.conv_norm_out.state_dict())
    unet.conv_norm_out = norm


def subclass(unet):
    unet.__class__ = _Subclass


ALTERATIONS = [
    lambda unet: unet.conv_out.register_forward_hook(half),
    lambda unet: unet.mid_block.register_forward_hook(half),
    lambda unet: unet.time_embedding.linear_1.register_forward_hook(half),
    *(hook_on_the_whole, forward_of_the_instance, forward_of_a_part, pre_hook),
    *(method_of_the_instance, other_activation, other_setting, attention_processor),
    *(wrapped_norm, subclass),
]


@torch.no_grad()
def drawn_by_diffusers(unet, x):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


@pytest.mark.parametrize("alter", ALTERATIONS)
def test_an_altered_unet_of_diffusers_is_called_itself(theirs, alter, caplog):
    x = fd.Sampler.from_diffusers(theirs, DDIMScheduler()).initial_noise([1, 2]).contiguous()
    before = drawn_by_diffusers(theirs, x)
    alter(theirs)
    want = drawn_by_diffusers(theirs, x)
    assert (want - before).abs().max() > 1e-3
    with caplog.at_level(logging.INFO, "flashddpm"):
        sampler = fd.Sampler.from_diffusers(DDPMPipeline(theirs, DDPMScheduler()))
    assert "it is called itself" in caplog.text
    assert isinstance(sampler.network, DiffusersUNet)
    got = sampler.sample([1, 2], num_steps=4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_plain_unet_is_made_one_of_ours(theirs, tiny_config):
    """Training flags, activation checkpoints and torch's compiler change no output."""
    theirs.enable_gradient_checkpointing()
    theirs.train()
    for unet in (theirs, torch.compile(theirs)):
        assert isinstance(fd.Sampler.from_diffusers(unet, DDIMScheduler()).network, UNet)
    size, channels = (tiny_config.pop(key) for key in ("sample_size", "in_channels"))
    positional = UNet2DModel(size, channels, **tiny_config)
    assert isinstance(fd.Sampler.from_diffusers(positional, DDIMScheduler()).network, UNet)
    assert theirs.training


def test_hooks_on_a_compiled_wrapper_count(theirs):
    compiled = torch.compile(theirs, backend="eager")
    hook_on_the_whole(compiled)
    sampler = fd.Sampler.from_diffusers(compiled, DDIMScheduler())
    assert sampler.network.unet is compiled


def test_another_processor_of_the_same_sums_is_called_too(theirs):
    set_processor(theirs, AttnProcessor())
    sampler = fd.Sampler.from_diffusers(theirs, DDIMScheduler())
    x = sampler.initial_noise([1, 2]).contiguous()
    want = drawn_by_diffusers(theirs, x)
    torch.testing.assert_close(sampler.sample([1, 2], num_steps=4), want, rtol=0, atol=1e-5)


@pytest.fixture
def unet(tiny_unet):
    return tiny_unet()


def of(unet, **options):
    options = {"compile": False} | options
    return fd.Sampler(unet, fd.NoiseSchedule.create(), shape=(1, 8, 8), device="cpu", **options)


class Halved(fd.UNet):
    def forward(self, x_t, t, labels=None):
        return super().forward(x_t, t, labels) * 0.5


def on_our_whole(unet):
    unet.register_forward_hook(half)


def on_a_projection(unet):
    next(unet.resnets()).time_emb_proj.register_forward_hook(half)


def on_the_time_embedding(unet):
    unet.time_embedding.register_forward_hook(half)


def on_part_of_the_time_embedding(unet):
    unet.time_embedding.linear_1.register_forward_hook(half)


def on_a_convolution(unet):
    unet.conv_out.register_forward_hook(half)


def ours_of_the_instance(unet):
    plain = unet.forward
    unet.forward = lambda *args: plain(*args) * 0.5


def ours_of_a_subclass(unet):
    unet.__class__ = Halved


class LowRank(nn.Linear):
    """A projection with a LoRA beside it, as its libraries put in the place of a layer."""

    def forward(self, x):
        return super().forward(x) * 0.5


def replaced_projection(unet):
    next(unet.resnets()).time_emb_proj.__class__ = LowRank


OURS = [
    *(on_our_whole, on_a_projection, on_the_time_embedding, on_part_of_the_time_embedding),
    *(on_a_convolution, ours_of_the_instance, ours_of_a_subclass, replaced_projection),
]


@pytest.mark.parametrize("alter", OURS)
def test_what_hangs_on_our_own_unet_counts(unet, alter):
    x_t, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 7
    plain, before = of(unet).sample([1, 2], num_steps=3), unet(x_t, t)
    later = of(unet)
    alter(unet)
    assert (unet(x_t, t) - before).abs().max() > 1e-4  # in training too
    want = fd.Sampler(
        unet, fd.NoiseSchedule.create(), shape=(1, 8, 8), call=lambda x, t, y: unet(x, t)
    ).sample([1, 2], num_steps=3)
    assert (want - plain).abs().max() > 1e-4
    for backend in ("fused", "reference"):
        got = of(unet, backend=backend).sample([1, 2], num_steps=3)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    try:  # a sampler that was there before draws the same, or says that it cannot
        got = later.sample([1, 2], num_steps=3)
    except RuntimeError as error:
        assert "make a new Sampler" in str(error)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alter", [on_a_convolution, forward_of_a_part])
def test_hooks_count_in_a_compiled_network_too(unet, alter, monkeypatch):
    """Set before or after it was compiled, and by whichever sampler of the network it was."""
    # What is traced, and when again, is the same with any backend.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    sampler = of(unet, compile=True)
    before = sampler.sample(1, num_steps=2)
    alter(unet)
    want = of(unet).sample(1, num_steps=2)
    assert (want - before).abs().max() > 1e-4
    for used in (of(unet, compile=True), sampler):
        torch.testing.assert_close(used.sample(1, num_steps=2), want, rtol=0, atol=1e-5)


def test_hooks_that_a_graph_would_skip_are_refused(unet):
    follower = Follower(unet, [unet], None)
    follower.renew(captured=True)
    handle = unet.conv_out.register_forward_hook(half)
    with pytest.raises(RuntimeError, match="other hooks.* make a new Sampler"):
        follower.renew(captured=True)
    handle.remove()
    follower.renew(captured=True)
    unet.conv_out.weight.data = unet.conv_out.weight.clone()
    with pytest.raises(RuntimeError, match="moved or replaced under its graphs"):
        follower.renew(captured=True)


def test_a_network_with_hooks_is_compiled_when_asked_only(unet):
    on_a_convolution(unet)
    assert of(unet, compile="auto").executor.choice.compile is False
    assert of(unet, compile=True).executor.choice.compile is True


class TestModes:
    def test_the_owners_modes_stay(self, tiny_unet):
        unet = tiny_unet(dropout=0.5).train()
        unet.mid_block.eval()
        modes = {name: module.training for name, module in unet.named_modules()}
        sampler = of(unet)
        seen = []
        unet.conv_out.register_forward_hook(lambda m, a, out: seen.append(unet.training))
        sampler = of(unet)
        assert unet.training
        images = [sampler.sample([1, 2], num_steps=3) for _ in range(2)]
        assert torch.equal(*images) and seen and not any(seen)
        assert {name: module.training for name, module in unet.named_modules()} == modes

    @pytest.mark.parametrize("backend", ["fused", "reference"])
    def test_dropout_makes_no_two_images_of_a_seed(self, tiny_unet, backend):
        unet = tiny_unet(dropout=0.5)
        want = of(unet, backend=backend).sample(1, num_steps=3)
        unet.train()
        sampler = of(unet, backend=backend)
        x = sampler.initial_noise([1])
        for _ in range(2):
            assert torch.equal(sampler.sample(1, num_steps=3), want)
            assert torch.equal(sampler.trajectory(1, num_steps=3).run(), want)
            unet.mid_block.train()
        predicted = [sampler.predict(x, torch.tensor([5])) for _ in range(2)]
        assert torch.equal(*predicted)
        with fd.Engine(sampler, 2) as engine:
            image = engine.submit(fd.Request(seed=1, num_steps=3)).result(60).image
        torch.testing.assert_close(image, want[0], rtol=0, atol=1e-6)
        assert unet.training

    def test_networks_of_ones_own(self):
        network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5)).train()
        sampler = fd.Sampler(
            network,
            fd.NoiseSchedule.create(),
            shape=(1, 8, 8),
            call=lambda x, t, y: network(x),
        )
        assert torch.equal(sampler.sample(1, num_steps=3), sampler.sample(1, num_steps=3))
        assert network.training and network[1].training

    def test_methods_and_calls_that_are_modules(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.dropout = nn.Dropout(0.5)

            def forward(self, x_t, t, labels=None):
                return self.dropout(x_t)

        own = Own().train()
        schedule = fd.NoiseSchedule.create()
        for network, call in ((own.forward, None), (lambda x, t: x, own), (own, own.forward)):
            sampler = fd.Sampler(network, schedule, shape=(1, 8, 8), call=call)
            assert torch.equal(sampler.sample(1, num_steps=3), sampler.sample(1, num_steps=3))
            assert own.training and own.dropout.training

    def test_an_error_leaves_the_mode_too(self, unet):
        unet.train()

        def stop(i, x0):
            raise KeyError

        with pytest.raises(KeyError):
            of(unet).sample(1, num_steps=2, on_step=stop)
        assert unet.training

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_the_last_of_several_callers_puts_modes_back(self, wrapped):
        network, inside, leave = nn.Dropout(0.5).train(), threading.Event(), threading.Event()

        def other():
            with evaluating([nn.Sequential(network) if wrapped else network]):
                inside.set()
                assert leave.wait(60)

        thread = threading.Thread(target=other)
        with evaluating([network]):
            thread.start()
            assert inside.wait(60)
        assert not network.training
        leave.set()
        thread.join()
        assert network.training


class TestIndex:
    """``call`` may ask which image it is called for."""

    @staticmethod
    def sampler(call, **options):
        options = {"conditioning": fd.Conditioning(3, 3)} | options
        return fd.Sampler(
            lambda x, t, y: x,
            fd.NoiseSchedule.create("linear", 50),
            shape=(1, 4, 4),
            call=call,
            device="cpu",
            **options,
        )

    def test_conditions_outside_are_right_in_every_chunk_and_lane(self):
        wanted = torch.linspace(-1, 1, 5)

        def call(x_t, t, labels, index):
            assert index.dtype is torch.int64 and index.shape == t.shape
            return x_t * 0 + wanted[index].reshape(-1, 1, 1, 1)

        sampler = self.sampler(call, prediction_type="sample")
        for batch_size in (1, 2, 3, 64):
            for guidance in (1.0, [1.0, 2.0, 1.0, 3.0, 1.0]):
                x = sampler.sample(
                    range(5), 1, guidance, num_steps=3, batch_size=batch_size, bucket=None
                )
                assert torch.allclose(x[:, 0, 0, 0], wanted, atol=1e-6)
        path = sampler.trajectory(range(5), 1, num_steps=3)
        path.step()
        assert torch.allclose(path.run()[:, 0, 0, 0], wanted, atol=1e-6)
        x_t, t = torch.zeros(5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)
        assert torch.equal(sampler.predict(x_t, t, t)[:, 0, 0, 0], wanted)

    def test_after_a_resume(self, tmp_path):
        def call(x_t, t, labels, *, index):
            return x_t * 0 + index.reshape(-1, 1, 1, 1) / 8

        sampler = self.sampler(call, prediction_type="sample")
        path = sampler.trajectory(range(5), 1, num_steps=3)
        path.step()
        path.save(tmp_path / "state.safetensors")
        x = sampler.resume(tmp_path / "state.safetensors").run()
        assert torch.allclose(x[:, 0, 0, 0], torch.arange(5) / 8, atol=1e-6)

    def test_in_an_engine_it_is_the_requests(self):
        wanted = torch.linspace(-1, 1, 10)

        def call(x_t, t, labels, index=None):
            return x_t * 0 + wanted[index].reshape(-1, 1, 1, 1)

        sampler = self.sampler(call, prediction_type="sample")
        with fd.Engine(sampler, 3) as engine:
            futures = [
                engine.submit(
                    fd.Request(
                        seed=1, label=1, index=9 - i, num_steps=2 + i % 3, guidance=1 + i % 2
                    )
                )
                for i in range(10)
            ]
            images = torch.stack([future.result(60).image for future in futures])
        assert torch.allclose(images[:, 0, 0, 0], wanted.flip(0), atol=1e-6)
        with fd.Engine(sampler) as engine:
            for wrong in (-1, 1.5, True, "0", None):
                with pytest.raises(ValueError, match="index="):
                    engine.submit(fd.Request(seed=1, label=1, index=wrong))

    def test_calls_of_three_arguments_work_as_before(self):
        seen = []

        def plain(x_t, t, labels):
            seen.append(labels)
            return x_t

        class Method:
            def call(self, x_t, t, labels):
                return plain(x_t, t, labels)

        def indexed_by_position(x_t, t, index, /):
            return plain(x_t, t, index)

        def indexed(x_t, t, labels, index):
            assert index == "own"
            return plain(x_t, t, labels)

        @functools.wraps(indexed)
        def wrapper(x_t, t, labels):
            return plain(x_t, t, labels)

        calls = (plain, Method().call, lambda *a: plain(*a), indexed_by_position, wrapper)
        for call in (*calls, functools.partial(indexed, index="own")):
            self.sampler(call).sample([1, 2], 1, num_steps=2)
        assert len(seen) == 12

    def test_wrapped_calls_and_modules_may_ask_too(self):
        seen = []

        class Call(nn.Module):
            def forward(self, x_t, t, labels, index):
                seen.append(index.tolist())
                return x_t

        @torch.no_grad()
        def decorated(x_t, t, labels, *, index):
            return Call()(x_t, t, labels, index)

        for call in (Call(), decorated, functools.partial(decorated)):
            self.sampler(call).sample([1, 2], 1, num_steps=2)
        assert seen == [[0, 1]] * 6
