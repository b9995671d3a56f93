"""The settings of a run: what is refused, and that all of them are checked, stored and told."""

import dataclasses
import json
import math

import numpy as np
import pytest

from flashddpm.networks.unet import UNet
from flashddpm.training.config import MAY_CHANGE, TrainConfig

CONFIG = TrainConfig(steps=6)
NAMES = [field.name for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("steps", [0, 1.5, "3", None, True]),
        ("data", [None, 3, b"x"]),
        ("init", [None, 3]),
        ("batch_size", [0, -1]),
        ("accumulate", [0, 1.0, 3, 128]),
        ("seed", [2**64, -(2**63) - 1, 1.5, None, [1], "1", True]),
        ("learning_rate", [-1e-3, math.nan, math.inf, "fast", "0.1", None]),
        ("lr_schedule", ["linear", None]),
        ("warmup_steps", [-1, 0.5]),
        ("grad_clip", [-1, math.nan]),
        ("ema_half_lives", [5, None, (), "55", (5, 0), (5, "6"), (5, True), (5, 5), (2.5,)]),
        ("label_dropout", [-0.1, 1.1, math.nan]),
        ("horizontal_flip", [1, "yes", None]),
        ("precision", ["float16", 32]),
        ("prediction_type", ["eps", None]),
        ("variance_type", ["small", None, "fixed_small_log"]),
        ("loss", ["l2", None]),
        ("huber_delta", [-1, 0, 2.0, math.nan, None]),
        ("loss_weighting", ["snr", None, [1.0] * 100]),
        ("min_snr_gamma", [-1, 3.0, math.nan, None]),
        ("p2_gamma", [-1, 2.0, math.inf, None]),
        ("timestep_sampling", ["stratified", None]),
        ("beta_schedule", ["cosine", None]),
        ("num_train_timesteps", [0, 100_001, 10.0]),
        ("block_out_channels", [8, None, (), "88", (8, 0), (8, "16"), (8, True)]),
        ("layers_per_block", [0, 1.0]),
        ("attention_head_dim", [0, None]),
        ("norm_num_groups", [0, None]),
        ("checkpoint_activations", [0, "on", None]),
        ("save_every", [0, None]),
        ("keep", [0, -1, None]),
        ("sample_every", [-1, None]),
    ],
)
def test_bad_settings_are_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{field}="):
            dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_checked(name):
    with pytest.raises(ValueError, match=f"^{name}="):
        dataclasses.replace(CONFIG, **{name: object()})


def test_settings_of_another_loss_are_refused():
    for changes, message in (
        ({"huber_delta": 0.5, "loss": "l1"}, "huber_delta=0.5: is of loss='huber' only"),
        ({"huber_delta": 0.0, "loss": "huber"}, "huber_delta=0: must be above 0"),
        ({"p2_gamma": 0.5, "loss_weighting": "min_snr"}, "p2_gamma=0.5: is of loss_weighting='p2'"),
        ({"min_snr_gamma": 3}, "min_snr_gamma=3.0: is of loss_weighting='min_snr' only"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            dataclasses.replace(CONFIG, **changes)


def test_settings_of_a_network_that_is_taken_from_init_are_refused():
    for name, value in (
        ("block_out_channels", (8, 16)),
        ("layers_per_block", 2),
        ("attention_head_dim", 8),
        ("norm_num_groups", 4),
    ):
        with pytest.raises(ValueError, match=f"^{name}=.*must not be given beside init"):
            dataclasses.replace(CONFIG, init="folder", **{name: value})
    dataclasses.replace(CONFIG, init="folder")


def test_a_batch_has_equal_parts():
    config = dataclasses.replace(CONFIG, batch_size=12, accumulate=2)
    assert [config.part_of(n) for n in (1, 2, 3, 6)] == [12, 6, 4, 2]
    for n in (4, 5, 12):
        message = f"^batch_size=12: must be a multiple of {n} processes times accumulate=2"
        with pytest.raises(ValueError, match=message):
            config.part_of(n)
    with pytest.raises(ValueError, match="^accumulate=5: must divide batch_size=12"):
        dataclasses.replace(config, accumulate=5)


def test_stored_settings_are_the_same_settings():
    config = dataclasses.replace(
        CONFIG, batch_size=np.int64(8), learning_rate=np.float32(0.25), grad_clip=2, seed=2**64 - 1,
        ema_half_lives=[np.int32(4), 2], block_out_channels=[8, 16], loss="huber", huber_delta=1,
        horizontal_flip=True,
    )  # fmt: skip
    stored = json.loads(json.dumps(config.to_dict()))
    assert list(stored) == NAMES
    assert TrainConfig.from_dict(stored) == config
    assert stored["ema_half_lives"] == [4, 2] and stored["grad_clip"] == 2.0
    assert TrainConfig.from_dict({"steps": 6}) == CONFIG
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 7


def test_a_file_with_other_settings_is_refused():
    with pytest.raises(ValueError, match="^ema_decay=0.999: is no setting of a run"):
        TrainConfig.from_dict({"steps": 6, "ema_decay": 0.999})
    with pytest.raises(ValueError, match="^steps: is missing"):
        TrainConfig.from_dict({"seed": 6})
    with pytest.raises(ValueError, match="^steps=6.0: must be an integer"):
        TrainConfig.from_dict({"steps": 6.0})


def test_every_setting_has_its_help():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"].endswith("."), field.name
    assert set(MAY_CHANGE) < set(NAMES)


def test_learning_rate():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1e-3)
    rates = [config.learning_rate_at(s) for s in (0, 4, 9, 10, 99)]
    assert rates == [1e-4, 5e-4, 1e-3, 1e-3, 1e-3]
    assert dataclasses.replace(config, warmup_steps=0).learning_rate_at(0) == 1e-3
    config = dataclasses.replace(config, lr_schedule="cosine")
    expected = [1e-4, 1e-3 * 0.5 * (1 + math.cos(math.pi / 4)), 5e-4, 0.0]
    rates = [config.learning_rate_at(s) for s in (0, 25, 50, 100)]
    assert rates == pytest.approx(expected, abs=1e-18)


def test_only_a_constant_rate_leaves_the_number_of_steps_free():
    assert CONFIG.may_change == MAY_CHANGE and "steps" in MAY_CHANGE
    cosine = dataclasses.replace(CONFIG, lr_schedule="cosine")
    assert set(MAY_CHANGE) - set(cosine.may_change) == {"steps"}


def test_the_network_of_the_settings():
    config = TrainConfig(
        steps=1, block_out_channels=(8, 16, 24), norm_num_groups=4, attention_head_dim=8,
        layers_per_block=2, variance_type="learned_range",
    )  # fmt: skip
    made = config.unet_config((3, 8, 16), 5)
    assert (made.sample_size, made.in_channels, made.out_channels) == ((8, 16), 3, 6)
    assert made.num_class_embeds == 6 and made.layers_per_block == 2
    assert made.down_block_types == ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    assert made.up_block_types == ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    UNet(made)
    plain = TrainConfig(steps=1).unet_config((1, 8, 8), None)
    assert (plain.sample_size, plain.out_channels, plain.num_class_embeds) == (8, 1, None)


def test_the_scheduler_of_the_settings_is_diffusers():
    import diffusers

    from flashddpm.diffusion.schedule import NoiseSchedule

    for beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        config = TrainConfig(
            steps=1, beta_schedule=beta_schedule, num_train_timesteps=100,
            prediction_type="v_prediction", variance_type="fixed_large",
        )  # fmt: skip
        theirs = diffusers.DDPMScheduler.from_config(config.scheduler_config())
        ours = NoiseSchedule.create(beta_schedule, 100)
        np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), ours.alphas_cumprod, rtol=2e-4)
        assert theirs.config.prediction_type == "v_prediction"
        assert theirs.config.variance_type == "fixed_large"
