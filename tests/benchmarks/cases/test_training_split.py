"""What a step is made of: the parts do its work, and memory is counted as by hand."""

import pytest
import torch

from flashddpm.benchmarks.cases import training, training_split
from flashddpm.training.config import TrainConfig
from flashddpm.training.trainer import Trainer

B, PIXELS, T = 2, 28 * 28, 50
PARTS = ["noising_and_loss", "network", "optimizer", "averages"]


def trainer_of(folder, **settings):
    config = TrainConfig(
        9,
        batch_size=B,
        num_train_timesteps=T,
        block_out_channels=(16, 32, 32),
        ema_half_lives=(2,),
        warmup_steps=0,
        **settings,
    )
    return Trainer(config, training.data(), folder, "cpu")


def weights(trainer):
    averages = trainer.stepper.ema.weights[2]
    return [v.detach().clone() for v in (*trainer.unet.parameters(), *averages.values())]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_parts_together_are_a_step(tmp_path, precision):
    """Network, optimizer and averages in turn move weights as a whole step does."""
    whole, apart = (trainer_of(tmp_path / name, precision=precision) for name in "ab")
    whole.train_step()
    stepper = apart.stepper
    stepper._rate.fill_(apart.config.learning_rate_at(0))
    stepper.ema.set_rates(0)
    parts = training_split.parts(apart)
    assert list(parts) == PARTS
    stepper.optimizer.zero_grad(set_to_none=True)
    before = weights(apart)
    for name in PARTS[:2]:
        parts[name]()
        assert all(torch.equal(a, b) for a, b in zip(before, weights(apart), strict=True)), name
    for name in PARTS[2:]:
        parts[name]()
    for a, b in zip(weights(whole), weights(apart), strict=True):
        assert torch.equal(a, b)


def test_a_part_does_its_own_work_only(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    parts = training_split.parts(trainer)
    calls = []
    for name in ("add_noise", "diffusion_loss"):
        original = getattr(trainer.stepper.ops, name)
        monkeypatch.setattr(
            trainer.stepper.ops, name, lambda *a, n=name, f=original: calls.append(n) or f(*a)
        )
    trainer.unet.register_forward_hook(lambda *a: calls.append("network"))
    trainer.stepper.optimizer.register_step_post_hook(lambda *a: calls.append("optimizer"))
    seen = {}
    for name, part in parts.items():
        part()
        part()  # can be repeated
        seen[name], calls[:] = calls[: len(calls) // 2], []
    assert seen == {
        "noising_and_loss": ["add_noise", "diffusion_loss"],
        "network": ["network"],
        "optimizer": ["optimizer"],
        "averages": [],
    }


def test_the_network_part_leaves_the_gradients_of_a_step_each_time(tmp_path):
    trainer = trainer_of(tmp_path)
    parts = training_split.parts(trainer)
    wanted = [p.grad.clone() for p in trainer.unet.parameters()]
    assert wanted[-1].any()
    for _ in range(2):
        parts["network"]()
        for parameter, gradient in zip(trainer.unet.parameters(), wanted, strict=True):
            assert torch.equal(parameter.grad, gradient)


def test_the_rest_is_the_whole_less_the_parts(tmp_path, monkeypatch):
    taken = dict(zip(["data", *PARTS, "whole"], [1, 2, 3, 4, 5, 21.5], strict=True))

    def interleaved(calls, rounds):
        assert rounds == 7 and list(calls) == list(taken)
        for function in calls.values():
            function()
        return taken

    monkeypatch.setattr(training_split, "interleaved", interleaved)
    trainer = trainer_of(tmp_path)
    values = training_split.milliseconds(trainer, 7)
    assert trainer.step == 2  # one to warm up; a draw takes no step
    assert values == {
        "data_ms": 1e3, "noising_and_loss_ms": 2e3, "network_ms": 3e3, "optimizer_ms": 4e3,
        "averages_ms": 5e3, "whole_ms": 21.5e3, "rest_ms": 6.5e3,
    }  # fmt: skip


def test_medians_are_of_calls_in_turn_without_the_first(monkeypatch):
    order = []
    times = {"a": iter([100, 1, 5, 3]), "b": iter([100, 20, 10, 30])}
    monkeypatch.setattr(training_split.harness, "seconds", lambda function: next(function()))
    calls = {name: lambda n=name: order.append(n) or times[n] for name in times}
    assert training_split.interleaved(calls, 3) == {"a": 3, "b": 20}
    assert order == ["a", "b"] * 4


# Memory


def test_live_bytes_by_hand():
    x, w = torch.zeros(8), torch.zeros(8, requires_grad=True)
    kept = torch.zeros(4)
    held = [x, x[:2], kept]  # x counts once
    loss = lambda: (w * x).exp().sum()  # noqa: E731  keeps x, and exp its result
    assert training_split.live_bytes(loss, held) == 32 + 16 + 32
    other = lambda: (w * w).sum()  # noqa: E731  keeps w
    assert training_split.live_bytes(other, held) == 32 + 16 + 32
    assert training_split.live_bytes(other, held, [w]) == 32 + 16


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_saved_memory_by_hand(tmp_path, precision, prediction_type):
    """Noise, the target unless it is noise or x0, and in bfloat16 half of the output in float32.

    Less what only ours has: seeds and keys, and the table of targets.
    """
    trainer = trainer_of(tmp_path, precision=precision, prediction_type=prediction_type)
    values = training_split.mebibytes(trainer)
    image = 4 * B * PIXELS
    usual = image * (2 if prediction_type == "v_prediction" else 1)
    usual += image // 2 if precision == "bfloat16" else 0
    ours = 2 * 8 * B + 3 * 4 * T
    assert values["saved_mib"] * 2**20 == usual - ours
    assert values["saved_mib"] == values["usual_mib"] - values["ours_mib"]
    assert values["saved_share"] == values["saved_mib"] / values["usual_mib"]
    assert list(values) == ["ours_mib", "usual_mib", "saved_mib", "saved_share"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_both_ways_that_are_counted_are_one_loss(tmp_path, prediction_type):
    trainer = trainer_of(tmp_path, prediction_type=prediction_type)
    torch.nn.init.normal_(trainer.unet.conv_out.weight, std=0.1)
    batch = trainer.batch(0)
    sides = training_split.both_losses(trainer, batch)
    ours, usual = (loss() for loss, _ in sides.values())
    torch.testing.assert_close(ours, usual, rtol=1e-5, atol=0)
    assert trainer.stepper.ops is not training_split.kernels or trainer.device.type == "cuda"


def test_the_cases_of_parts_and_memory(monkeypatch):
    made = training.settings

    monkeypatch.setattr(training, "settings", lambda batch, *rest, **more: made(2, *rest, **more))
    (split,) = training.split("default", 64, "float32").measure("cpu")
    assert split.case == "training-split-default-float32-batch-64"
    parts = sum(v for k, v in split.values.items() if k not in ("whole_ms", "rest_ms"))
    assert split.values["whole_ms"] == pytest.approx(parts + split.values["rest_ms"])
    (memory,) = training.memory("default", 64, "bfloat16", "v_prediction").measure("cpu")
    assert memory.case == "training-memory-default-bfloat16-batch-64-v_prediction"
    assert 0 < memory.values["saved_mib"] < memory.values["ours_mib"]
