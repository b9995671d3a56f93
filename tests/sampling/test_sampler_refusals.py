"""What a sampler refuses, by name: arguments, settings, networks, labels and weights."""

import pytest
import torch

import flashddpm as fd


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1.5]}, "seeds"),
        ({"seeds": [2**64]}, "seeds"),
        ({"seeds": [-(2**63) - 1]}, "seeds"),
        ({"seeds": [True]}, "seeds"),
        ({"seeds": "12"}, "seeds"),
        ({"seeds": torch.tensor([0.5])}, "seeds"),
        ({"labels": 3}, r"labels=3: must be in 0\.\.2"),
        ({"labels": -1}, "labels=-1"),
        ({"labels": [0]}, "1 labels for 2 seeds"),
        ({"labels": 0.5}, "labels=0.5"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": [1.0]}, "guidance: 1 values for 2 seeds"),
        ({"labels": None, "guidance": 2.0}, "guidance=2.0: must be 1 where no labels"),
        ({"solver": "heun"}, "solver='heun'.*ddim"),
        ({"num_steps": 0}, r"num_steps=0: must be in 1\.\.100"),
        ({"num_steps": 101}, "num_steps=101"),
        ({"num_steps": 2.0}, "num_steps=2.0"),
        ({"spacing": "even"}, "spacing='even'.*leading"),
        ({"eta": -1.0}, "eta=-1"),
        (
            {"solver": "ddpm", "variance_type": "learned"},
            "fixed_small or fixed_large .* 1 channels",
        ),
        ({"solver": "ddpm", "variance_type": "learned_range"}, "a learned variance takes 2"),
        ({"clip": -1.0}, "clip=-1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_are_refused_by_name(tiny_sampler, arguments, message):
    sampler = tiny_sampler()
    good = {"seeds": [0, 1], "labels": [0, 1], "num_steps": 3}
    with pytest.raises(ValueError, match=message):
        sampler.sample(**{**good, **arguments})
    assert sampler.sample(**good).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "fast"}, "backend='fast'.*fused"),
        ({"compile": "yes"}, "compile='yes'"),
        ({"backend": "reference", "compile": True}, "reference"),
        ({"capture": True}, "capture=True: needs a CUDA device"),
        ({"dtype": "int8"}, "dtype='int8'.*bfloat16"),
    ],
)
def test_bad_settings_are_refused_by_name(tiny_sampler, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_sampler(**arguments)


def test_devices_and_labels_that_are_not_there(tiny_unet):
    schedule = fd.NoiseSchedule.create("linear", 10)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda': no CUDA device is available"):
            fd.Sampler(tiny_unet(), schedule, shape=(1, 8, 8), device="cuda")
    with pytest.raises(ValueError, match="device='tpu'"):
        fd.Sampler(tiny_unet(), schedule, shape=(1, 8, 8), device="tpu")
    plain = fd.Sampler(tiny_unet(), schedule, shape=(1, 8, 8), device="cpu")
    with pytest.raises(ValueError, match="unconditional"):
        plain.sample(0, labels=0, num_steps=2)
    with pytest.raises(ValueError, match="guidance=2.0.*null class"):
        plain.sample(0, guidance=2.0, num_steps=2)
    classes = fd.Sampler(
        tiny_unet(num_class_embeds=3),
        schedule,
        shape=(1, 8, 8),
        conditioning=fd.Conditioning(3),
        device="cpu",
    )
    with pytest.raises(ValueError, match="labels=None"):
        classes.sample(0, num_steps=2)


def test_zero_terminal_snr_needs_another_prediction_type(tiny_unet):
    schedule = fd.NoiseSchedule.create("linear", 50, rescale_betas_zero_snr=True)
    sampler = fd.Sampler(tiny_unet(), schedule, shape=(1, 8, 8), device="cpu")
    with pytest.raises(ValueError, match="v_prediction or sample"):
        sampler.sample(0, num_steps=5, spacing="trailing")


def test_a_network_and_its_labels_must_fit(tiny_unet):
    schedule = fd.NoiseSchedule.create("linear", 10)

    def make(unet, conditioning=None, shape=(1, 8, 8)):
        return fd.Sampler(unet, schedule, shape=shape, conditioning=conditioning, device="cpu")

    with pytest.raises(ValueError, match="the network has 4 class embeddings"):
        make(tiny_unet(num_class_embeds=4))
    with pytest.raises(ValueError, match="the network has None class embeddings"):
        make(tiny_unet(), fd.Conditioning(3))
    with pytest.raises(ValueError, match="the network has 3 class embeddings"):
        make(tiny_unet(num_class_embeds=3), fd.Conditioning(3, 3))
    for shape in ((1, 7, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match="shape="):
            make(tiny_unet(), shape=shape)
    with pytest.raises(ValueError, match="dtype=torch.bfloat16: the network's is torch.float32"):
        fd.Sampler(tiny_unet(), schedule, shape=(1, 8, 8), device="cpu", dtype="bfloat16")


@pytest.mark.parametrize(
    "wrong", [lambda x, t: x[:, :1], lambda x, t: x[:1], lambda x, t: (x,), lambda x, t: None]
)
def test_a_network_that_returns_another_shape_is_refused(wrong):
    schedule = fd.NoiseSchedule.create("linear", 10)
    sampler = fd.Sampler(wrong, schedule, shape=(3, 4, 6), device="cpu")
    with pytest.raises(ValueError, match="network: returned .*call="):
        sampler.sample(range(2), num_steps=2)


def test_refused_weights_change_nothing(tiny_sampler, tiny_unet):
    sampler = tiny_sampler()
    before = sampler.sample(range(2), 0, num_steps=3)
    good = tiny_unet(seed=1, num_class_embeds=4).state_dict()
    missing = {key: value for key, value in good.items() if key != "conv_out.bias"}
    broken = {**good, "conv_in.bias": torch.full_like(good["conv_in.bias"], torch.nan)}
    for state, message in ((missing, "conv_out.bias is missing"), (broken, "conv_in.bias holds")):
        with pytest.raises(ValueError, match=message):
            sampler.update_weights(state)
        assert torch.equal(sampler.sample(range(2), 0, num_steps=3), before)


def test_a_preview_that_calls_its_own_sampler_is_an_error(tiny_sampler):
    sampler = tiny_sampler()
    with pytest.raises(RuntimeError, match="a callback called the sampler"):
        sampler.sample(0, 0, num_steps=2, on_step=lambda i, x0: sampler.sample(1, 0, num_steps=2))
    assert sampler.sample(0, 0, num_steps=2).isfinite().all()
