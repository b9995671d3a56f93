"""Training steps of both sides: the same loss and gradients, or no figure."""

import copy
import math

import pytest
import torch
from torch import nn

from flashddpm.benchmarks.cases import suites, training
from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.peers import training_peers
from flashddpm.convert import lucidrains
from flashddpm.training.config import TrainConfig
from flashddpm.training.trainer import Trainer

SMALL = {"batch_size": 3, "block_out_channels": (16, 32, 32), "ema_half_lives": (2,)}


def trainer_of(folder, labels=True, **settings):
    """A trainer of a small network; none of its weights are 0, so that all have a gradient."""
    config = TrainConfig(9, **SMALL | settings)
    data = training.data(labels=labels)
    trainer = Trainer(config, data, folder, "cpu")
    trainer.unet.load_state_dict(training.first_weights("default", data, config).state_dict())
    return trainer


@pytest.fixture
def trainer(tmp_path):
    return trainer_of(tmp_path)


@pytest.fixture
def lucid(tmp_path):
    """Its Trainer on images of 8x8 and 16 of them, the fewest that it takes."""
    data = training.data((1, 8, 8), labels=False)
    config = TrainConfig(9, batch_size=16, label_dropout=0.0, warmup_steps=0)
    return training_peers.Lucidrains(data, config, tmp_path / "lucid", "cpu"), config


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusers_step_has_our_loss_and_gradients(tmp_path, kind):
    trainer = trainer_of(tmp_path, prediction_type=kind)
    training_peers.agree(trainer, training_peers.DiffusersTraining(trainer), "diffusers")


def test_without_labels(tmp_path):
    trainer = trainer_of(tmp_path, labels=False)
    training_peers.agree(trainer, training_peers.DiffusersTraining(trainer), "diffusers")


def test_steps_of_denoising_diffusion_pytorch_have_our_loss_and_gradients(lucid):
    peer, config = lucid
    training_peers.agree(training_peers.OnTheirs(peer, config), peer, "theirs")


def off_by(peer, what):
    """Make its loss, or only its gradient, 1% larger."""
    theirs = isinstance(peer, training_peers.Lucidrains)
    of, name = (peer.diffusion, "forward") if theirs else (peer, "loss")
    original = getattr(of, name)

    def off(*arguments, **options):
        value = original(*arguments, **options)
        other = value * 1.01
        return other if what == "loss" else other + (value - other).detach()

    setattr(of, name, off)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_another_step_is_not_timed(trainer, lucid, what):
    theirs, config = lucid
    pairs = [
        (trainer, training_peers.DiffusersTraining(trainer)),
        (training_peers.OnTheirs(theirs, config), theirs),
    ]
    match = "loss: differs from peer's by" if what == "loss" else "gradient of .*: differs"
    for ours, peer in pairs:
        off_by(peer, what)
        with pytest.raises(AssertionError, match=match):
            training_peers.agree(ours, peer, "peer")


def test_a_parameter_that_one_side_lacks_is_not_timed(trainer):
    peer = training_peers.DiffusersTraining(trainer)
    peer.unet.register_parameter("odd", nn.Parameter(torch.zeros(1)))
    loss = peer.loss
    peer.loss = lambda *arguments: loss(*arguments) + 0 * peer.unet.odd.sum()
    with pytest.raises(AssertionError, match="only one side has odd"):
        training_peers.agree(trainer, peer, "peer")


def test_gradients_that_are_zero_agree_on_nothing(tmp_path):
    """A fresh network's output is 0, and with it all gradients but the last layer's."""
    trainer = Trainer(TrainConfig(9, **SMALL), training.data(), tmp_path, "cpu")
    with pytest.raises(AssertionError, match="is 0, so nothing is checked"):
        training_peers.agree(trainer, training_peers.DiffusersTraining(trainer), "peer")


def test_agreement_leaves_the_weights_and_no_gradient(trainer):
    peer = training_peers.DiffusersTraining(trainer)
    before = copy.deepcopy(trainer.unet.state_dict())
    training_peers.agree(trainer, peer, "peer")
    for network in (trainer.unet, peer.unet):
        assert all(p.grad is None for p in network.parameters())
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("count", [1, 3])
def test_both_sides_take_the_steps_asked_for(trainer, count):
    """The moved weights, the average towards them, the number of updates."""
    peer = training_peers.DiffusersTraining(trainer)
    first = {name: p.detach().clone() for name, p in trainer.stepper.params.items()}
    ours = [p.detach().clone() for p in peer.params]
    training_peers.ours_steps(trainer, count)
    peer.steps(count)
    assert trainer.step == peer.ema.optimization_step == count
    assert {int(s["step"]) for s in peer.optimizer.state.values()} == {count}
    assert any(not torch.equal(first[n], p) for n, p in trainer.stepper.params.items())
    moved = [not torch.equal(a, b) for a, b in zip(ours, peer.params, strict=True)]
    averaged = [not torch.equal(a, b) for a, b in zip(ours, peer.ema.shadow_params, strict=True)]
    assert sum(moved) > len(moved) // 2 and sum(averaged) > len(averaged) // 2


def test_several_of_our_steps_are_the_same_as_one_by_one(tmp_path):
    """The loader that fetches ahead gives what a step reads itself."""
    a, b = (trainer_of(tmp_path / name) for name in "ab")
    training_peers.ours_steps(a, 3)
    for _ in range(3):
        training_peers.ours_steps(b, 1)
    for mine, other in zip(a.unet.parameters(), b.unet.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_clipping_of_the_peer_is_ours(trainer, monkeypatch):
    peer = training_peers.DiffusersTraining(trainer)
    seen = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda *a: seen.append(a[1]) or clip(*a)
    )  # fmt: skip
    peer.steps(1)
    assert seen == [trainer.config.grad_clip]


def test_labels_of_the_peer_are_dropped_as_often_as_ours(tmp_path):
    trainer = trainer_of(tmp_path, batch_size=1000, label_dropout=0.3)
    _, _, labels = training_peers.DiffusersTraining(trainer)._batch()
    share = (labels == training.CLASSES).float().mean().item()
    assert abs(share - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 1000)
    assert set(labels.tolist()) == set(range(training.CLASSES + 1))


def test_its_trainer_takes_the_steps_asked_for_on_images_in_memory(lucid, capsys):
    peer, _ = lucid
    batch = next(peer.trainer.dl)
    assert batch.shape == (16, 1, 8, 8) and 0 <= batch.min() < batch.max() <= 1
    assert (batch * 255 - (batch * 255).round()).abs().max() < 1e-4
    before = [p.detach().clone() for p in peer.unet.parameters()]
    peer.steps(2)
    peer.steps(1)
    assert peer.trainer.step == 3 == int(peer.trainer.ema.step)
    moved = [not torch.equal(a, b) for a, b in zip(before, peer.unet.parameters(), strict=True)]
    assert sum(moved) > len(moved) // 2
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_its_trainer_has_the_precision_asked_for_each_time(tmp_path):
    data = training.data((1, 8, 8), labels=False)
    for i, kind in enumerate(("float32", "bfloat16", "float32")):
        config = TrainConfig(9, batch_size=16, precision=kind)
        peer = training_peers.Lucidrains(data, config, tmp_path / str(i), "cpu")
        out = []
        peer.unet.final_conv.register_forward_hook(lambda *a, out=out: out.append(a[-1].dtype))
        peer.steps(1)
        assert out == [getattr(torch, kind)]


def test_our_step_around_their_network_moves_it(lucid):
    peer, config = lucid
    ours = training_peers.OnTheirs(peer, config)
    before = copy.deepcopy(ours.stepper.unet.state_dict())
    training_peers.ours_steps(ours, 2)
    assert ours.step == 2
    after = ours.stepper.unet.state_dict()
    assert sum(not torch.equal(before[k], after[k]) for k in before) > len(before) // 2
    assert lucidrains.unet_config(after, lucidrains.LucidrainsFlags(image_size=8)).dim == 32


# Cases


@pytest.fixture
def compared(monkeypatch):
    """The sides that are timed, each called once, with no clock."""
    sides = []

    def compare(ours, peer, rounds, warm_ups):
        sides.append((ours, peer))
        ours()
        peer()
        return harness.Comparison(1, 2, 2, 2, 2, 0, rounds)

    monkeypatch.setattr(training, "compare", compare)
    return sides


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_case_of_diffusers(compared, precision):
    case = training.against_diffusers("default", 2, precision, compiled=False)
    (result,) = case.measure("cpu")
    assert result.case == case.name == f"training-default-{precision}-batch-2-eager"
    assert result.peer == "diffusers' training example, eager"
    ((ours, peer),) = compared
    trainer = ours.args[0]
    assert trainer.config.precision == peer.func.__self__.config.precision == precision
    assert trainer.step == 1 == peer.func.__self__.ema.optimization_step
    assert len(trainer.config.ema_half_lives) == 1


def test_a_case_of_denoising_diffusion_pytorch(compared, monkeypatch):
    monkeypatch.setattr(training, "DDPT_SHAPE", (1, 8, 8))
    case = training.against_ddpt(16, "bfloat16")
    (result,) = case.measure("cpu")
    assert result.case == case.name == "training-ddpt-bfloat16-batch-16"
    ((ours, peer),) = compared
    assert ours.args[0].step == 1 == peer.func.__self__.trainer.step
    assert ours.args[0].stepper.config.precision == "bfloat16"


def test_a_case_whose_sides_differ_gives_no_figure(compared, monkeypatch):
    usual = training_peers.usual_loss
    monkeypatch.setattr(training_peers, "usual_loss", lambda *a: 1.001 * usual(*a))
    with pytest.raises(AssertionError, match="loss: differs from diffusers"):
        list(training.against_diffusers("default", 2, "bfloat16", False).measure("cpu"))
    assert compared == []


def test_the_published_network_is_trained_from_its_weights(monkeypatch):
    from flashddpm.benchmarks.peers import models

    small = models.CIFAR10 | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    small |= {"norm_num_groups": 8}
    of = models.Model("cifar10", models.random_unet(small), {}, training.Conditioning())
    monkeypatch.setattr(training, "model", lambda name: {"cifar10": of}[name])
    with training.training("cifar10", training.settings(2, "float32"), "cpu") as trainer:
        assert trainer.data.shape == (3, 32, 32) and trainer.data.num_classes is None
        for name, value in of.unet.state_dict().items():
            assert torch.equal(trainer.unet.state_dict()[name], value), name
        training_peers.agree(trainer, training_peers.DiffusersTraining(trainer), "diffusers")


def test_the_cases():
    for device in ("cpu", "cuda"):
        cases = training.cases(device)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert {case.suite for case in cases} == {"training"}
        assert all(name.startswith("training-") for name in names)
        assert [c.name for c in suites.chosen(device, "training")] == names
        assert any("-compiled" in name for name in names) == (device == "cuda")
        for batch in training.BATCHES[device]:
            for kind in ("float32", "bfloat16"):
                assert f"training-default-{kind}-batch-{batch}-eager" in names
                assert f"training-ddpt-{kind}-batch-{batch}" in names
