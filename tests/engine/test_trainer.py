from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from scipy import stats
from torch import Tensor, nn

from flashddpm import kernels
from flashddpm.checkpoint import WEIGHTS, Conditioning, load_conditioning, load_unet
from flashddpm.data import ImageData
from flashddpm.errors import CheckpointError, DivergedError
from flashddpm.kernels.contract import LOSSES
from flashddpm.parameterization import PREDICTION_TYPES
from flashddpm.train_config import ONLY_WITH
from flashddpm.trainer import MAY_CHANGE, STATE, TrainConfig, Trainer
from flashddpm.unet import UNet

STRIPES = torch.tensor([[255, 0] * 4, [0, 0, 255, 255] * 2], dtype=torch.uint8)
PLAIN = ImageData(STRIPES[:, None, None].expand(2, 1, 8, 8).contiguous(), None, None)
LABELLED = ImageData(PLAIN.images.repeat(3, 1, 1, 1), torch.tensor([0, 1] * 3), 2)
TINY = TrainConfig(
    steps=6,
    batch_size=4,
    seed=3,
    learning_rate=5e-3,
    warmup_steps=2,
    num_train_timesteps=100,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    attention_head_dim=8,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(out: Path, data: ImageData = LABELLED, **changes: Any) -> Trainer:
    return Trainer(dataclasses.replace(TINY, **changes), data, out, "cpu")


def resumed(out: Path, data: ImageData = LABELLED, **changes: Any) -> Trainer:
    fresh = trainer(out, data, **changes)
    fresh.resume()
    return fresh


def train(run: Trainer, **settings: Any) -> Trainer:
    run.run(progress=False, **settings)
    return run


def state(run: Trainer) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    found = {"step": torch.tensor(run.step)}
    for name, p in run.params.items():
        found |= {f"model.{name}": p.detach(), f"ema.{name}": run.ema[name]}
        for key, value in run.optimizer.state[p].items():
            found[f"{key}.{name}"] = value
    return {name: value.clone() for name, value in found.items()}


def assert_same(actual: Trainer, expected: dict[str, Tensor]) -> None:
    found = state(actual)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is value.dtype and found[name].stride() == value.stride(), name
        assert torch.equal(found[name], value), name


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run of 6 steps, uninterrupted: its folder and its last state."""
    out = tmp_path_factory.mktemp("whole")
    return out, state(train(trainer(out), log_every=2))


# Learning


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_falls_on_two_images(tmp_path: Path, prediction_type: str) -> None:
    steps = 100 if prediction_type == "v_prediction" else 60
    run = trainer(
        tmp_path,
        PLAIN,
        steps=steps,
        batch_size=16,
        warmup_steps=10,
        num_train_timesteps=1000,
        prediction_type=prediction_type,
    )
    losses = [float(run.train_step()) for _ in range(steps)]
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:5]) / 5
    assert 0.8 < losses[0] < 1.2  # the untrained network predicts 0, and targets have variance 1


WEIGHTS_OF_X0_ERROR: dict[str, tuple[dict[str, Any], Any]] = {
    "min_snr": ({"loss_weighting": "min_snr"}, lambda snr: snr.clamp(max=5)),
    "min_snr_3": (
        {"loss_weighting": "min_snr", "min_snr_gamma": 3.0},
        lambda snr: snr.clamp(max=3),
    ),
    "truncated_snr": ({"loss_weighting": "truncated_snr"}, lambda snr: snr.clamp(min=1)),
    "p2": ({"loss_weighting": "p2"}, lambda snr: snr / (1 + snr)),
    "p2_half": ({"loss_weighting": "p2", "p2_gamma": 0.5}, lambda snr: snr / (1 + snr).sqrt()),
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["constant", *WEIGHTS_OF_X0_ERROR])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_loss_is_the_weighted_penalty_of_the_target(
    tmp_path: Path, prediction_type: str, name: str, loss: str
) -> None:
    settings, of_x0 = WEIGHTS_OF_X0_ERROR.get(name, ({}, None))
    settings = settings | ({"huber_delta": 0.5} if loss == "huber" else {})
    run = trainer(tmp_path, prediction_type=prediction_type, loss=loss, **settings)
    x0, _, t, seeds, keys = run.draw(0)
    eps = kernels.philox(seeds, keys, (1, 8, 8), kernels.Purpose.TRAINING).double()
    abar = torch.from_numpy(run.schedule.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    a, b = abar.sqrt(), (1 - abar).sqrt()
    target = {"epsilon": eps, "sample": x0.double(), "v_prediction": a * eps - b * x0}
    snr = abar / (1 - abar)
    weight = {"epsilon": 1 / snr, "sample": 1, "v_prediction": 1 / (snr + 1)}[prediction_type]
    weight = 1 if of_x0 is None else of_x0(snr) * weight
    size = target[prediction_type].abs()  # the untrained network predicts 0
    penalty = {
        "mse": size.square(),
        "l1": size,
        "huber": torch.where(size > 0.5, 0.5 * (size - 0.25), size.square() / 2),
    }[loss]
    expected = (weight * penalty).mean()
    assert float(run.train_step()) == pytest.approx(float(expected), rel=1e-5)


def test_each_loss_and_weighting_trains_its_own_way(tmp_path: Path) -> None:
    choices: list[dict[str, Any]] = [
        {},
        {"loss": "l1"},
        {"loss": "huber"},
        {"loss": "huber", "huber_delta": 0.1},
        *(settings for settings, _ in WEIGHTS_OF_X0_ERROR.values()),
    ]
    gradients = []
    for i, settings in enumerate(choices):
        run = trainer(tmp_path / str(i), steps=2, grad_clip=0.0, **settings)
        assert all(math.isfinite(float(run.train_step())) for _ in range(2))
        run.save()
        stored = json.loads((run.out / "train_config.json").read_text())
        assert stored.items() >= settings.items()
        gradients.append(torch.cat([p.grad.flatten() for p in run.params.values()]))
    for i, one in enumerate(gradients):
        assert one.isfinite().all() and one.abs().max() > 0
        for other in gradients[:i]:
            assert (one - other).norm() > 1e-3 * one.norm()


def test_a_step_is_adamw_on_the_mean_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, grad_clip=0.0)
    run.train_step()  # some weights start at 0, where all gradients before them vanish
    twin = UNet(run.unet.config)
    twin.load_state_dict(run.unet.state_dict())
    x0, labels, t, seeds, keys = run.draw(1)
    eps = kernels.philox(seeds, keys, (1, 8, 8), kernels.Purpose.TRAINING)
    abar = torch.from_numpy(run.schedule.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    out = twin((abar.sqrt() * x0 + (1 - abar).sqrt() * eps).float(), t, labels)
    (out - eps).square().mean().backward()
    before = state(run)
    run.train_step()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(run.params[name].grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)
        g, m, v = run.params[name].grad, before[f"exp_avg.{name}"], before[f"exp_avg_sq.{name}"]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
        expected = before[f"model.{name}"] - run.learning_rate(1) * step
        torch.testing.assert_close(
            run.params[name].detach(), expected, rtol=1e-5, atol=1e-7, msg=name
        )


def test_bfloat16_trains_float32_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, precision="bfloat16")
    losses = [float(run.train_step()) for _ in range(3)]
    exact = trainer(tmp_path)
    expected = [float(exact.train_step()) for _ in range(3)]
    assert losses == pytest.approx(expected, rel=0.02) and losses != expected
    assert all(value.dtype is torch.float32 for name, value in state(run).items() if "." in name)


# Averages, learning rate, clipping


@pytest.mark.parametrize("decay", [0.999, 0.15])
def test_the_average_follows_its_recursion(tmp_path: Path, decay: float) -> None:
    run = trainer(tmp_path, ema_decay=decay)
    average = {name: p.detach().double() for name, p in run.params.items()}
    for expected_decay in (1 / 10, 2 / 11, 3 / 12):
        d = min(decay, expected_decay)
        run.train_step()
        for name, p in run.params.items():
            average[name] = d * average[name] + (1 - d) * p.detach().double()
            torch.testing.assert_close(run.ema[name].double(), average[name], rtol=1e-6, atol=1e-7)
            assert not run.ema[name].requires_grad  # or a graph of all steps would hang on it
    run.step = 10**6
    run.train_step()
    for name, p in run.params.items():
        average[name] = decay * average[name] + (1 - decay) * p.detach().double()
        torch.testing.assert_close(run.ema[name].double(), average[name], rtol=1e-6, atol=1e-7)


def test_the_averaged_unet_is_a_copy(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train_step()
    unet = run.averaged_unet()
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
    assert run.unet.training and all(p.requires_grad for p in run.params.values())
    before = {name: value.clone() for name, value in run.ema.items()}
    for name, p in unet.named_parameters():
        assert torch.equal(p, run.ema[name])
        p.zero_()
    assert all(torch.equal(value, before[name]) for name, value in run.ema.items())


def test_learning_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=100, warmup_steps=10, learning_rate=1e-3)
    assert [run.learning_rate(s) for s in (0, 4, 9, 10, 99)] == [1e-4, 5e-4, 1e-3, 1e-3, 1e-3]
    assert trainer(tmp_path, warmup_steps=0).learning_rate(0) == TINY.learning_rate
    run = trainer(tmp_path, steps=100, warmup_steps=10, learning_rate=1e-3, lr_schedule="cosine")
    expected = [1e-4, 1e-3 * 0.5 * (1 + math.cos(math.pi / 4)), 5e-4, 0.0]
    assert [run.learning_rate(s) for s in (0, 25, 50, 100)] == pytest.approx(expected, abs=1e-18)
    run.train_step()
    run.train_step()
    assert run.optimizer.param_groups[0]["lr"] == run.learning_rate(1) < 2e-4
    assert run.optimizer.param_groups[0]["weight_decay"] == 0


def test_gradients_are_clipped_to_a_norm(tmp_path: Path) -> None:
    def gradient(clip: float) -> Tensor:
        run = trainer(tmp_path, grad_clip=clip)
        run.train_step()
        return torch.cat([p.grad.flatten() for p in run.params.values() if p.grad is not None])

    free, loose, tight = gradient(0.0), gradient(1e6), gradient(0.01)
    assert float(free.norm()) > 0.1
    assert torch.equal(free, loose)
    assert float(tight.norm()) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(tight / tight.norm(), free / free.norm(), rtol=1e-5, atol=1e-7)


# Draws


def numbered(count: int) -> ImageData:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    return ImageData(images.contiguous(), torch.arange(count), count)


def drawn_images(run: Trainer, steps: int) -> list[int]:
    x0 = torch.cat([run.draw(step)[0] for step in range(steps)])
    return ((x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_draws_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    small, large = (trainer(tmp_path, numbered(10), batch_size=n) for n in (8, 16))
    for step in (0, 3, 1):
        halves = zip(small.draw(2 * step), small.draw(2 * step + 1), strict=True)
        for pair, expected in zip(halves, large.draw(step), strict=True):
            assert torch.equal(torch.cat(pair), expected)


def test_draws_are_a_function_of_seed_and_step(tmp_path: Path) -> None:
    run, other = trainer(tmp_path, numbered(10)), trainer(tmp_path, numbered(10), seed=4)
    first = run.draw(5)
    for step in (0, 99, 5):
        again = run.draw(step)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], run.draw(6)[2])
    assert not torch.equal(first[2], other.draw(5)[2])
    assert drawn_images(run, 5) != drawn_images(other, 5)


def test_draws_are_those_of_the_runs_that_are_stored(tmp_path: Path) -> None:
    """A run that was started with an older version goes on with the same data."""
    run = trainer(tmp_path, numbered(10), label_dropout=0.5, num_train_timesteps=1000)
    x0, labels, t, seeds, keys = run.draw(7)
    assert ((x0[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [8, 6, 9, 6]
    assert labels.tolist() == [8, 6, 10, 6]
    assert t.tolist() == [622, 354, 343, 949]
    assert seeds.tolist() == [3, 3, 3, 3]
    assert keys.tolist() == [28, 29, 30, 31]


@pytest.mark.parametrize("timesteps", [1, 7, 1000])
def test_timesteps_are_uniform(tmp_path: Path, timesteps: int) -> None:
    run = trainer(tmp_path, PLAIN, num_train_timesteps=timesteps, batch_size=4000)
    t = torch.cat([run.draw(step)[2] for step in range(2)])
    assert t.dtype is torch.int64 and 0 <= int(t.min()) and int(t.max()) < timesteps
    cells = min(timesteps, 50)
    counts = torch.bincount(t * cells // timesteps, minlength=cells)
    # One seed, so one outcome: a uniform draw fails here with probability 0.001.
    assert cells == 1 or stats.chisquare(counts.numpy()).pvalue > 0.001
    if timesteps == 7:
        pairs = torch.bincount(t[::2] * 7 + t[1::2], minlength=49)
        assert stats.chisquare(pairs.numpy()).pvalue > 0.001


def test_labels_are_dropped_at_the_rate_asked_for(tmp_path: Path) -> None:
    data = numbered(5)
    for rate in (0.0, 0.1, 1.0):
        run = trainer(tmp_path, data, label_dropout=rate, batch_size=4000)
        x0, labels, t, _, _ = run.draw(0)
        truth = ((x0[:, 0, 0, 0] + 1) * 127.5).round().long()
        dropped = labels == 5
        assert torch.equal(labels[~dropped], truth[~dropped])
        spread = 4 * math.sqrt(rate * (1 - rate) / 4000)
        assert abs(float(dropped.float().mean()) - rate) <= spread
        if rate == 0.1:
            # Neither the image nor the timestep has a say in it.
            table = torch.stack([torch.bincount(truth[dropped == d]) for d in (False, True)])
            assert stats.chi2_contingency(table.numpy()).pvalue > 0.001
            kept, lost = (t[dropped == d].float().numpy() for d in (False, True))
            assert stats.ks_2samp(kept, lost).pvalue > 0.001


def test_every_epoch_is_a_permutation_of_its_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, numbered(10), batch_size=3)
    images = drawn_images(run, 10)
    epochs = [images[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(10)) not in epochs


def test_a_batch_may_be_larger_than_the_data(tmp_path: Path) -> None:
    images = drawn_images(trainer(tmp_path, numbered(3), batch_size=7), 3)
    assert all(sorted(images[i : i + 3]) == [0, 1, 2] for i in range(0, 21, 3))


def test_training_leaves_global_generators_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run = trainer(tmp_path)
    run.train_step()
    run.save()
    run.draw(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(123)
    one = trainer(tmp_path).unet.conv_in.weight
    torch.manual_seed(456)
    assert torch.equal(one, trainer(tmp_path).unet.conv_in.weight)
    assert not torch.equal(one, trainer(tmp_path, seed=4).unet.conv_in.weight)
    trainer(tmp_path, seed=2**64 - 1).train_step()
    trainer(tmp_path, seed=-1).train_step()


# Stopping and going on


@pytest.mark.parametrize(
    ("first", "data", "precision"),
    [(1, LABELLED, "float32"), (4, PLAIN, "float32"), (4, LABELLED, "bfloat16")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, first: int, data: ImageData, precision: str
) -> None:
    whole = train(trainer(tmp_path / "a", data, precision=precision))
    train(trainer(tmp_path / "b", data, precision=precision, steps=first, save_every=1))
    rest = train(resumed(tmp_path / "b", data, precision=precision))
    assert_same(rest, state(whole))
    assert files(tmp_path / "a").keys() == files(tmp_path / "b").keys()
    for name in (f"unet/{WEIGHTS}", "train_config.json"):
        assert files(tmp_path / "a")[name] == files(tmp_path / "b")[name], name


def test_saving_on_the_way_changes_nothing(tmp_path: Path, whole: Any) -> None:
    assert_same(train(trainer(tmp_path, save_every=1, sample_every=3), log_every=1), whole[1])
    names = [file.name for file in sorted((tmp_path / "samples").iterdir())]
    assert names == ["000003.png", "000006.png"]


def test_the_log(tmp_path: Path, whole: Any) -> None:
    lines = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    run = trainer(tmp_path)
    losses = [float(run.train_step()) for _ in range(6)]
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-6)
    assert all(line["images_per_second"] > 0 for line in lines)
    with pytest.raises(ValueError, match="^log_every=0: must be at least 1"):
        run.run(log_every=0)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_an_interrupt_leaves_a_run_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any, stop: int
) -> None:
    run = trainer(tmp_path, lr_schedule="constant")
    body = run.unet.body

    def interrupted(*args: Any) -> Tensor:
        if run.step == stop:
            raise KeyboardInterrupt
        return body(*args)

    monkeypatch.setattr(run.unet, "body", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    rest = resumed(tmp_path)
    assert rest.step == stop
    assert_same(train(rest), whole[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_the_step(tmp_path: Path, whole: Any, number: int) -> None:
    """Ctrl-C right after the optimizer's step must not lose the average's."""
    run, came = trainer(tmp_path), []
    run.optimizer.register_step_post_hook(
        lambda *_: signal.raise_signal(number) if run.step == 2 else None
    )
    before = signal.signal(number, lambda *args: came.append((args[0], run.step)))
    try:
        train(run)
        assert came == [(number, 3)]
        assert files(tmp_path) and resumed(tmp_path).step == 3
        signal.raise_signal(number)
        assert len(came) == 2
    finally:
        signal.signal(number, before)
    assert_same(train(resumed(tmp_path)), whole[1])


def test_ctrl_c_is_a_keyboard_interrupt(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.optimizer.register_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert resumed(tmp_path).step == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_runs_in_another_thread(tmp_path: Path, whole: Any) -> None:
    run = trainer(tmp_path)
    thread = threading.Thread(target=train, args=(run,))
    thread.start()
    thread.join()
    assert_same(run, whole[1])


def test_an_error_in_a_step_leaves_a_run_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)
    run.train_step()
    monkeypatch.setattr(run.unet, "body", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(run)
    assert resumed(tmp_path).step == 1


def test_a_finished_run_has_nothing_to_do(tmp_path: Path, whole: Any) -> None:
    out = Path(shutil.copytree(whole[0], tmp_path / "out"))
    assert_same(train(resumed(out)), whole[1])
    assert train(resumed(out, steps=2)).step == 6
    assert_same(resumed(out), whole[1])


# What a run may not go on from


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"^{out / STATE}: is missing"):
            resumed(out)


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (PLAIN, {}),
        (LABELLED, {"block_out_channels": (8, 24)}),
        (LABELLED, {"layers_per_block": 2}),
        (ImageData(LABELLED.images, LABELLED.labels, 3), {}),
    ],
)
def test_another_network_is_refused(whole: Any, data: ImageData, changes: dict[str, Any]) -> None:
    run = trainer(whole[0], data, **changes)
    before = state(run)
    with pytest.raises(CheckpointError, match=f"^{whole[0] / STATE}: is of another network: "):
        run.resume()
    assert_same(run, before)


def test_other_settings_are_refused(whole: Any) -> None:
    run = trainer(
        whole[0],
        learning_rate=1e-3,
        prediction_type="v_prediction",
        attention_head_dim=4,
        steps=9,
        save_every=2,
        sample_every=1,
    )
    before = state(run)
    with pytest.raises(ValueError) as raised:
        run.resume()
    assert not isinstance(raised.value, CheckpointError)
    message = str(raised.value)
    assert "learning_rate=0.001 (the run has 0.005)" in message
    assert "prediction_type='v_prediction' (the run has 'epsilon')" in message
    assert "attention_head_dim=4 (the run has 8)" in message
    assert message.count("the run has") == 3
    assert_same(run, before)


def test_every_setting_but_three_is_compared(whole: Any) -> None:
    assert resumed(whole[0], **dict.fromkeys(MAY_CHANGE, 1)).step == 6
    other = {
        "lr_schedule": "cosine",
        "precision": "bfloat16",
        "prediction_type": "sample",
        "loss": "l1",
        "loss_weighting": "truncated_snr",
        "beta_schedule": "sigmoid",
    }
    for field in dataclasses.fields(TrainConfig):
        # Settings that the parameters' shapes depend on make another network.
        if field.name in (*MAY_CHANGE, *ONLY_WITH, "block_out_channels", "layers_per_block"):
            continue
        value = other.get(field.name)
        if value is None:
            value = getattr(TINY, field.name) * 2 if field.name != "norm_num_groups" else 2
            value = 0.5 if field.name in ("ema_decay", "label_dropout") else value
        with pytest.raises(ValueError, match=f"^{field.name}="):
            resumed(whole[0], **{field.name: value})


@pytest.mark.parametrize(
    ("name", "value", "owner"),
    [
        ("huber_delta", 0.5, {"loss": "huber"}),
        ("min_snr_gamma", 3.0, {"loss_weighting": "min_snr"}),
        ("p2_gamma", 0.5, {"loss_weighting": "p2"}),
    ],
)
def test_settings_of_a_loss_are_compared_too(
    tmp_path: Path, name: str, value: float, owner: dict[str, Any]
) -> None:
    trainer(tmp_path, **owner).save()
    assert resumed(tmp_path, **owner).step == 0
    with pytest.raises(ValueError, match=f"^{name}={value} \\(the run has"):
        resumed(tmp_path, **owner, **{name: value})


def test_a_state_of_an_older_version_has_fewer_settings(tmp_path: Path, whole: Any) -> None:
    """What it does not name was at its default: that goes on, and nothing else does."""
    settings = dataclasses.asdict(TINY)
    for name in ("loss", "huber_delta", "loss_weighting", "min_snr_gamma", "p2_gamma"):
        del settings[name]
    tensors = safetensors.torch.load_file(whole[0] / STATE)
    metadata = {"step": "6", "config": json.dumps(settings)}
    safetensors.torch.save_file(tensors, tmp_path / STATE, metadata)
    assert_same(resumed(tmp_path), whole[1])
    for name, value, default in (("loss", "l1", "mse"), ("loss_weighting", "p2", "constant")):
        with pytest.raises(ValueError, match=f"^{name}='{value}' .the run has '{default}'"):
            resumed(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"step": "6"},
        {"config": "{}"},
        {"step": "six", "config": "{}"},
        {"step": "-1", "config": "{}"},
        {"step": "6", "config": "{"},
        {"step": "6", "config": "3"},
    ],
)
def test_broken_metadata_are_refused(tmp_path: Path, whole: Any, metadata: Any) -> None:
    tensors = safetensors.torch.load_file(whole[0] / STATE)
    safetensors.torch.save_file(tensors, tmp_path / STATE, metadata)
    with pytest.raises(CheckpointError, match=f"^{tmp_path / STATE}: its metadata"):
        resumed(tmp_path)


def test_a_broken_state_is_refused(tmp_path: Path, whole: Any) -> None:
    content = (whole[0] / STATE).read_bytes()
    for broken in (content[:-1], b"", b"\xff" * 100):
        (tmp_path / STATE).write_bytes(broken)
        with pytest.raises(CheckpointError, match=f"^{tmp_path / STATE}: cannot be read"):
            resumed(tmp_path)


def test_the_state_keeps_its_format(whole: Any) -> None:
    with safetensors.safe_open(whole[0] / STATE, "pt") as file:
        assert file.metadata().keys() == {"step", "config"}
        assert file.metadata()["step"] == "6"
        keys = set(file.keys())
    names = {key.split(".", 1)[1] for key in keys}
    assert keys == {f"{k}.{n}" for k in ("model", "ema", "exp_avg", "exp_avg_sq") for n in names}
    assert {"conv_in.weight", "class_embedding.weight"} < names
    assert "mid_block.attentions.0.to_qkv.weight" in names
    assert json.loads((whole[0] / "train_config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(TINY))
    )


# A run that diverges


def diverge_by_weights(run: Trainer) -> None:
    run.unet.conv_in.weight.data[0, 0, 0, 0] = torch.nan


def diverge_by_gradient(run: Trainer) -> None:
    """The loss of this step is finite; the weights after it are not."""

    def spoil(*_: Any) -> None:
        run.unet.conv_out.bias.grad.fill_(torch.nan)

    run.optimizer.register_step_pre_hook(spoil)


def diverge_by_loss(run: Trainer) -> None:
    take_step = run.train_step
    run.train_step = lambda: take_step() * math.inf  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("diverge", "settings", "noticed"),
    [
        (diverge_by_weights, {"log_every": 1}, 5),
        (diverge_by_weights, {}, 6),
        (diverge_by_loss, {"log_every": 1}, 5),
        (diverge_by_loss, {"save_every": 5}, 5),
        (diverge_by_loss, {}, 6),
        (diverge_by_gradient, {"save_every": 5}, 5),
        (diverge_by_gradient, {"steps": 5}, 5),
        (diverge_by_gradient, {"log_every": 1}, 5),
        (diverge_by_gradient, {"sample_every": 5}, 5),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_its_last_save(
    tmp_path: Path, diverge: Any, settings: dict[str, int], noticed: int
) -> None:
    log_every = settings.pop("log_every", 50)
    run = train(trainer(tmp_path, steps=4))
    run.config = dataclasses.replace(TINY, **{"save_every": 500, **settings})
    before = files(tmp_path)
    diverge(run)
    with pytest.raises(DivergedError, match=f"at step {noticed}; the last save is unt") as raised:
        train(run, log_every=log_every)
    assert raised.value.step == noticed
    assert raised.value.__context__ is None
    after = files(tmp_path)
    assert before.pop("metrics.jsonl") in after.pop("metrics.jsonl")
    assert before == after
    assert all(math.isfinite(json.loads(line)["loss"]) for line in open(tmp_path / "metrics.jsonl"))
    assert resumed(tmp_path).step == 4


def test_an_interrupt_does_not_save_a_run_that_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(trainer(tmp_path, steps=2))
    before = files(tmp_path)
    diverge_by_weights(run)
    run.config = TINY
    run.train_step()
    monkeypatch.setattr(run.unet, "body", lambda *_: signal.default_int_handler(2, None))
    # A KeyboardInterrupt that nobody expects would end the whole session.
    with pytest.raises((DivergedError, KeyboardInterrupt)) as raised:
        train(run)
    assert raised.type is DivergedError
    with pytest.raises(DivergedError):
        run.save()
    assert files(tmp_path) == before


# What a run leaves


@pytest.mark.parametrize("data", [LABELLED, PLAIN], ids=["labelled", "plain"])
def test_the_folder_is_a_model_for_us_and_for_diffusers(tmp_path: Path, data: ImageData) -> None:
    run = train(trainer(tmp_path, data, steps=3, prediction_type="v_prediction"))
    ours = load_unet(tmp_path, torch.device("cpu"), torch.float32)
    for name, p in ours.named_parameters():
        assert torch.equal(p, run.ema[name])
    classes = data.num_classes
    assert load_conditioning(tmp_path, ours.config) == Conditioning(classes, classes)
    assert ours.config.num_class_embeds == (None if classes is None else 3)

    import diffusers

    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 99])
    labels = None if classes is None else torch.tensor([0, 2])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, labels), theirs(x, t, labels).sample)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    np.testing.assert_allclose(
        pipeline.scheduler.alphas_cumprod.numpy(), run.schedule.alphas_cumprod, rtol=2e-4
    )
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_images_that_are_not_square(tmp_path: Path) -> None:
    images = torch.zeros(3, 2, 4, 8, dtype=torch.uint8)
    train(trainer(tmp_path, ImageData(images, None, None), steps=1))
    config = load_unet(tmp_path, torch.device("cpu"), torch.float32).config
    assert config.sample_size == (4, 8)
    assert config.in_channels == config.out_channels == 2


# Settings


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("steps", [0, 1.5, "3", None, True]),
        ("batch_size", [0, -1]),
        ("seed", [2**64, -(2**63) - 1, 1.5, None, [1], "1", True]),
        ("learning_rate", [-1e-3, math.nan, math.inf, "fast", "0.1", None]),
        ("lr_schedule", ["linear", None]),
        ("warmup_steps", [-1, 0.5]),
        ("grad_clip", [-1, math.nan]),
        ("ema_decay", [-0.1, 1.1, math.nan]),
        ("label_dropout", [-0.1, 1.1, math.nan]),
        ("precision", ["float16", 32]),
        ("prediction_type", ["eps", None]),
        ("loss", ["l2", None]),
        ("huber_delta", [-1, 0, 2.0, math.nan, None]),
        ("loss_weighting", ["snr", None, [1.0] * 100]),
        ("min_snr_gamma", [-1, 3.0, math.nan, None]),
        ("p2_gamma", [-1, 2.0, math.inf, None]),
        ("beta_schedule", ["cosine", None]),
        ("num_train_timesteps", [0, 100_001, 10.0]),
        ("block_out_channels", [8, None, (), "88", (8, 0), (8, "16"), (8, True)]),
        ("layers_per_block", [0, 1.0]),
        ("attention_head_dim", [0, None]),
        ("norm_num_groups", [0, None]),
        ("save_every", [0, None]),
        ("sample_every", [-1, None]),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{field}="):
            dataclasses.replace(TINY, **{field: value})


def test_settings_of_another_loss_are_refused() -> None:
    for changes, message in (
        ({"huber_delta": 0.5, "loss": "l1"}, "huber_delta=0.5: is of loss='huber' only"),
        ({"huber_delta": 0.0, "loss": "huber"}, "huber_delta=0: must be above 0"),
        ({"p2_gamma": 0.5, "loss_weighting": "min_snr"}, "p2_gamma=0.5: is of loss_weighting='p2'"),
        ({"min_snr_gamma": 3}, "min_snr_gamma=3.0: is of loss_weighting='min_snr' only"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            dataclasses.replace(TINY, **changes)


def test_every_setting_is_checked() -> None:
    for field in dataclasses.fields(TrainConfig):
        with pytest.raises(ValueError, match=f"^{field.name}="):
            dataclasses.replace(TINY, **{field.name: object()})


def test_settings_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"norm_num_groups": 3}, "block_out_channels=8: must be a multiple of norm_num_groups=3"),
        ({"attention_head_dim": 12}, "attention_head_dim=12: must divide 16 channels"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match="^device='gpu'"):
        Trainer(TINY, PLAIN, tmp_path, "gpu")
    assert not list(tmp_path.iterdir())


def test_the_network_is_in_training_mode_and_channels_last(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    convolutions = [m for m in run.unet.modules() if isinstance(m, nn.Conv2d)]
    assert run.unet.training
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    assert run.draw(0)[0].is_contiguous(memory_format=torch.channels_last)
