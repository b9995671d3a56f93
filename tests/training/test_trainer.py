"""A run: that it learns, what stops it, and what it leaves."""

import dataclasses
import json
import math
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from flashddpm.checkpoints.model_folder import load_conditioning, load_unet, save_model
from flashddpm.data import ImageData
from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.errors import CheckpointError, DivergedError
from flashddpm.networks.conditioning import Conditioning
from flashddpm.sampling.sampler import Sampler
from flashddpm.training.trainer import Trainer

# Learning


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_falls_on_two_images(tmp_path, training, prediction_type):
    steps = 100 if prediction_type == "v_prediction" else 60
    run = training.trainer(
        tmp_path,
        training.PLAIN,
        steps=steps,
        batch_size=16,
        warmup_steps=10,
        num_train_timesteps=1000,
        prediction_type=prediction_type,
    )
    losses = [float(run.train_step()) for _ in range(steps)]
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:5]) / 5
    assert 0.8 < losses[0] < 1.2  # the untrained network predicts 0, and targets have variance 1


def test_the_averages_are_of_the_weights(tmp_path, training):
    run = training.trainer(tmp_path)
    averages = run.stepper.ema.weights
    expected = {h: {n: p.detach().double() for n, p in run.stepper.params.items()} for h in (3, 20)}
    for step in range(3):
        run.train_step()
        for h in (3, 20):
            d = min(0.5 ** (1 / h), (1 + step) / (10 + step))
            for name, p in run.stepper.params.items():
                expected[h][name] = d * expected[h][name] + (1 - d) * p.detach().double()
                found = averages[h][name].double()
                torch.testing.assert_close(found, expected[h][name], rtol=1e-6, atol=1e-7)


def test_the_averaged_unet_is_a_copy(tmp_path, training):
    run = training.trainer(tmp_path)
    run.step = 10**6  # where averages of different half-lives go different ways
    run.train_step()
    for half_life, chosen in ((None, 3), (3, 3), (20, 20)):
        unet, average = run.averaged_unet(half_life), run.stepper.ema.weights[chosen]
        assert not unet.training and not any(p.requires_grad for p in unet.parameters())
        assert run.unet.training and all(p.requires_grad for p in run.stepper.params.values())
        before = {name: value.clone() for name, value in average.items()}
        for name, p in unet.named_parameters():
            assert torch.equal(p, average[name])
            p.zero_()
        assert all(torch.equal(value, before[name]) for name, value in average.items())
    for bad in (0, 4):
        with pytest.raises(ValueError, match=rf"^half_life={bad}: must be one of \[3, 20\]"):
            run.averaged_unet(bad)


def test_training_leaves_global_generators_alone(tmp_path, training):
    before = torch.get_rng_state()
    run = training.trainer(tmp_path)
    run.train_step()
    run.save()
    run.batch(0)
    run.save_samples(2, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_the_weights(tmp_path, training):
    torch.manual_seed(123)
    one = training.trainer(tmp_path).unet.conv_in.weight
    torch.manual_seed(456)
    assert torch.equal(one, training.trainer(tmp_path).unet.conv_in.weight)
    assert not torch.equal(one, training.trainer(tmp_path, seed=4).unet.conv_in.weight)
    training.trainer(tmp_path, seed=2**64 - 1).train_step()
    training.trainer(tmp_path, seed=-1).train_step()


def test_a_step_trains_on_what_was_drawn(tmp_path, training):
    """The images, mirrored where said; the null class where labels are dropped."""
    pixels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    data = ImageData(pixels, torch.arange(4), 4)
    run = training.trainer(tmp_path, data, horizontal_flip=True, label_dropout=0.5, batch_size=16)
    batch, keys = run.batch(3), run.draws.keys(3)
    index, flip, drop = (f(keys) for f in (run.draws.index, run.draws.flips, run.draws.label_drops))
    assert flip.any() and not flip.all() and drop.any()
    images = pixels[index].float() / 127.5 - 1
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    assert torch.equal(batch.x0, images)
    assert batch.x0.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.labels, torch.where(drop, 4, index))
    assert torch.equal(batch.t, run.draws.timesteps(keys)) and torch.equal(batch.keys, keys)
    assert torch.equal(batch.seeds, run.draws.seeds(keys))
    assert training.trainer(tmp_path, training.PLAIN).batch(0).labels is None


def test_the_network_is_in_training_mode_and_channels_last(tmp_path, training):
    run = training.trainer(tmp_path)
    convolutions = [m for m in run.unet.modules() if isinstance(m, nn.Conv2d)]
    assert run.unet.training
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


# A run, and its end


def test_saving_on_the_way_changes_nothing(tmp_path, training, whole):
    run = training.trainer(tmp_path, save_every=1, sample_every=3)
    training.assert_same(training.run(run, log_every=1), whole[1])
    names = [file.name for file in sorted((tmp_path / "samples").iterdir())]
    assert names == ["000003.png", "000006.png"]


def test_the_log(tmp_path, training, whole):
    lines = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    run = training.trainer(tmp_path)
    losses = [float(run.train_step()) for _ in range(6)]
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-6)
    rates = [run.config.learning_rate_at(step - 1) for step in (2, 4, 6)]
    assert [line["learning_rate"] for line in lines] == rates
    assert all(line["images_per_second"] > 0 for line in lines)
    assert all(0 <= line["loader_wait"] <= 1 for line in lines)
    assert (whole[0] / "loss.png").exists()
    with pytest.raises(ValueError, match="^log_every=0: must be at least 1"):
        run.run(log_every=0)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_an_interrupt_leaves_a_run_to_resume(tmp_path, training, monkeypatch, whole, stop):
    run = training.trainer(tmp_path)
    body = run.unet.body

    def interrupted(*args):
        if run.step == stop:
            raise KeyboardInterrupt
        return body(*args)

    monkeypatch.setattr(run.unet, "body", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.run(run)
    rest = training.resumed(tmp_path)
    assert rest.step == stop
    training.assert_same(training.run(rest), whole[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_the_step(tmp_path, training, caplog, whole, number):
    """Ctrl-C right after the optimizer's step must not lose the average's."""
    run, came = training.trainer(tmp_path), []
    run.stepper.optimizer.register_step_post_hook(
        lambda *_: signal.raise_signal(number) if run.step == 2 else None
    )
    before = signal.signal(number, lambda *args: came.append((args[0], run.step)))
    try:
        with caplog.at_level("INFO", "flashddpm"):
            training.run(run)
        assert came == [(number, 3)]
        assert f"{number.name}: stopped after step 3 of 6, saved" in caplog.text
        assert training.resumed(tmp_path).step == 3
        signal.raise_signal(number)
        assert len(came) == 2
    finally:
        signal.signal(number, before)
    training.assert_same(training.run(training.resumed(tmp_path)), whole[1])


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN])
def handler(request):
    """What Ctrl-C does; a shell's background jobs, such as a test run, ignore it."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_a_keyboard_interrupt_unless_ignored(tmp_path, training, whole, handler):
    run = training.trainer(tmp_path)
    run.stepper.optimizer.register_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    if handler is signal.SIG_IGN:
        training.assert_same(training.run(run), whole[1])
    else:
        with pytest.raises(KeyboardInterrupt):
            training.run(run)
        assert training.resumed(tmp_path).step == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_runs_in_another_thread(tmp_path, training, whole):
    run = training.trainer(tmp_path)
    thread = threading.Thread(target=training.run, args=(run,))
    thread.start()
    thread.join()
    training.assert_same(run, whole[1])


def test_an_error_in_a_step_leaves_a_run_to_resume(tmp_path, training, monkeypatch, whole):
    run = training.trainer(tmp_path)
    run.train_step()
    monkeypatch.setattr(run.unet, "body", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.run(run)
    rest = training.resumed(tmp_path)
    assert rest.step == 1
    training.assert_same(training.run(rest), whole[1])


def test_an_error_between_weights_and_averages_saves_neither(tmp_path, training, whole):
    """No memory for the average's update, say: the weights of a step without its averages."""
    run = training.trainer(tmp_path, save_every=2)
    update, n = run.stepper.ema.update, []

    def failing():
        n.append(0)
        return update() if len(n) < 4 else 1 / 0

    run.stepper.ema.update = failing
    with pytest.raises(ZeroDivisionError):
        training.run(run)
    rest = training.resumed(tmp_path)
    assert rest.step == 2
    training.assert_same(training.run(rest), whole[1])


def test_an_error_of_the_data_leaves_a_run_to_resume(tmp_path, training, monkeypatch, whole):
    run = training.trainer(tmp_path)
    calls, fetch = [], ImageData.fetch

    def failing(self, index):
        calls.append(0)
        if len(calls) == 4:
            raise OSError("a.png: is gone")
        return fetch(self, index)

    monkeypatch.setattr(ImageData, "fetch", failing)
    with pytest.raises(OSError, match="^a.png: is gone"):
        training.run(run)
    monkeypatch.setattr(ImageData, "fetch", fetch)
    rest = training.resumed(tmp_path)
    assert rest.step == 3
    training.assert_same(training.run(rest), whole[1])


# A run that diverges


def diverge_by_weights(run):
    run.unet.conv_in.weight.data[0, 0, 0, 0] = torch.nan


def diverge_by_gradient(run):
    """The loss and the gradient of this step are finite; the weights after it are not."""

    def spoil(*_):
        run.unet.conv_out.bias.grad.fill_(torch.nan)

    run.stepper.optimizer.register_step_pre_hook(spoil)


def diverge_by_one_gradient(run):
    """Only the gradient of the first step from here is not finite."""
    hook = run.unet.conv_out.bias.register_hook(lambda g: (hook.remove(), g * math.inf)[1])


def diverge_by_loss(run):
    loss = run.stepper.loss
    run.stepper.loss = lambda inputs: loss(inputs) + math.inf


@pytest.mark.parametrize(
    ("diverge", "settings", "named"),
    [
        (diverge_by_weights, {"log_every": 1}, 5),
        (diverge_by_weights, {}, 5),
        (diverge_by_loss, {"log_every": 1}, 5),
        (diverge_by_loss, {"save_every": 5}, 5),
        (diverge_by_loss, {}, 5),
        (diverge_by_one_gradient, {}, 5),
        (diverge_by_one_gradient, {"grad_clip": 0.0}, 5),
        (diverge_by_gradient, {"save_every": 5}, 5),
        (diverge_by_gradient, {"steps": 5}, 5),
        (diverge_by_gradient, {"log_every": 1}, 5),
        (diverge_by_gradient, {"sample_every": 5}, 5),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_its_last_save(
    tmp_path, training, diverge, settings, named
):
    settings = dict(settings)
    log_every = settings.pop("log_every", 50)
    run = training.run(training.trainer(tmp_path, steps=4))
    run.config = dataclasses.replace(training.TINY, **{"save_every": 500, **settings})
    run.stepper.config = run.config
    before = training.files(tmp_path)
    diverge(run)
    with pytest.raises(DivergedError, match=f"at step {named}; the last save is unt") as raised:
        training.run(run, log_every=log_every)
    assert raised.value.step == named
    for name in ("learning_rate", "grad_clip", "float32", "warm-up"):
        assert name in str(raised.value)
    assert raised.value.__context__ is None
    after = training.files(tmp_path)
    assert before.pop("metrics.jsonl") in after.pop("metrics.jsonl")
    assert before == after
    assert all(math.isfinite(json.loads(line)["loss"]) for line in open(tmp_path / "metrics.jsonl"))
    assert training.resumed(tmp_path).step == 4


def test_losses_whose_sum_is_not_finite_are_refused(tmp_path, training):
    run = training.trainer(tmp_path)
    step = run.train_step
    run.train_step = lambda batch: step(batch) * 0 + 3e38
    with pytest.raises(DivergedError, match="at step 2;"):
        training.run(run, log_every=2)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_interrupt_does_not_save_a_run_that_diverged(tmp_path, training, monkeypatch):
    run = training.run(training.trainer(tmp_path, steps=2))
    before = training.files(tmp_path)
    diverge_by_weights(run)
    run.config = training.TINY
    run.train_step()
    monkeypatch.setattr(run.unet, "body", lambda *_: signal.default_int_handler(2, None))
    # A KeyboardInterrupt that nobody expects would end the whole session.
    with pytest.raises((DivergedError, KeyboardInterrupt)) as raised:
        training.run(run)
    assert raised.type is DivergedError
    with pytest.raises(DivergedError):
        run.save()
    assert training.files(tmp_path) == before
    run.resume(["steps"])
    assert run.step == 2
    run.save()  # it is finite again


# What a run leaves


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range", "learned"])
def test_the_folders_are_models_for_us_and_for_diffusers(tmp_path, training, labels, variance_type):
    data = training.LABELLED if labels else training.PLAIN
    kind = {"prediction_type": "v_prediction", "variance_type": variance_type}
    run = training.run(training.trainer(tmp_path, data, steps=3, **kind))
    classes, channels = data.num_classes, 1 if variance_type == "fixed_large" else 2

    import diffusers

    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([5, 99])
    null = torch.tensor([0, 2]) if labels else None
    for folder, half_life in ((tmp_path, 3), (tmp_path / "ema-20", 20)):
        ours = load_unet(folder, torch.device("cpu"), torch.float32)
        for name, p in ours.named_parameters():
            assert torch.equal(p, run.stepper.ema.weights[half_life][name])
        assert load_conditioning(folder, ours.config) == Conditioning(classes, classes)
        assert ours.config.num_class_embeds == (3 if labels else None)
        theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
        with torch.no_grad():
            out = ours(x, t, null)
            torch.testing.assert_close(out, theirs(x, t, null).sample)
        assert out.shape == (2, channels, 8, 8)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    np.testing.assert_allclose(
        pipeline.scheduler.alphas_cumprod.numpy(), run.schedule.alphas_cumprod, rtol=2e-4
    )
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.variance_type == variance_type
    sampler = Sampler.from_pretrained(tmp_path, device="cpu", compile=False)
    drawn = sampler.sample(range(2), 1 if labels else None, solver="ddpm", num_steps=4)
    assert drawn.shape == (2, 1, 8, 8) and drawn.isfinite().all()
    run.save_samples(4, 2)
    assert (tmp_path / "samples" / "000003.png").exists()


def test_images_that_are_not_square(tmp_path, training):
    images = torch.zeros(3, 2, 4, 8, dtype=torch.uint8)
    training.run(training.trainer(tmp_path, ImageData(images, None, None), steps=1))
    config = load_unet(tmp_path, torch.device("cpu"), torch.float32).config
    assert config.sample_size == (4, 8)
    assert config.in_channels == config.out_channels == 2


# What a run begins with


def test_a_run_from_a_model(tmp_path, training, whole):
    data = training.LABELLED
    config = dataclasses.replace(training.TINY, block_out_channels=(32, 64, 96),
        norm_num_groups=8, attention_head_dim=32, init=str(whole[0]))  # fmt: skip
    run = Trainer(config, data, tmp_path, "cpu")
    assert run.unet.config.block_out_channels == (8, 16) and run.unet.training
    given = load_unet(whole[0], torch.device("cpu"), torch.float32)
    for name, p in given.named_parameters():
        assert torch.equal(run.stepper.params[name], p) and run.stepper.params[name].requires_grad
        assert torch.equal(run.stepper.ema.weights[20][name], p)
    training.run(run)
    again = Trainer(config, data, tmp_path, "cpu")
    again.resume()
    training.assert_same(again, training.state(run))
    for changes, message in (
        ({"prediction_type": "sample"}, "has prediction_type='epsilon'; the settings 'sample'"),
        ({"beta_schedule": "sigmoid"}, "has beta_schedule='linear'; the settings 'sigmoid'"),
        ({"num_train_timesteps": 50}, "has num_train_timesteps=100; the settings 50"),
        ({"variance_type": "learned"}, "has out_channels=1; the data and settings ask for 2"),
    ):
        with pytest.raises(CheckpointError, match=f"^{whole[0]}: {message}"):
            Trainer(dataclasses.replace(config, **changes), data, tmp_path, "cpu")
    with pytest.raises(CheckpointError, match="has num_class_embeds=3; .* ask for None"):
        Trainer(config, training.PLAIN, tmp_path, "cpu")


def test_a_model_of_other_noise_levels_is_refused(tmp_path, training):
    run = training.trainer(tmp_path / "a")
    scheduler = run.config.scheduler_config() | {"beta_end": 0.03}
    folder = tmp_path / "model"
    save_model(folder, run.unet.config, run.unet.state_dict(), scheduler, run.conditioning)
    config = dataclasses.replace(training.TINY, block_out_channels=(32, 64, 96),
        norm_num_groups=8, attention_head_dim=32, init=str(folder))  # fmt: skip
    with pytest.raises(CheckpointError, match="has beta_end=0.03; the settings 0.02"):
        Trainer(config, training.LABELLED, tmp_path, "cpu")


def test_settings_that_do_not_fit_each_other_are_refused(tmp_path, training):
    for changes, message in (
        ({"norm_num_groups": 3}, "block_out_channels=8: must be a multiple of norm_num_groups=3"),
        ({"attention_head_dim": 12}, "attention_head_dim=12: must divide 16 channels"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            training.trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match="^device='gpu'"):
        Trainer(training.TINY, training.PLAIN, tmp_path, "gpu")
    for bad in ("on", None, 2):
        with pytest.raises(ValueError, match=f"^compile={bad!r}: must be True, False or 'auto'"):
            Trainer(training.TINY, training.PLAIN, tmp_path, "cpu", compile=bad)
    assert not list(tmp_path.iterdir())
