"""One step: the loss that was asked for, its gradients, AdamW, and no wait for the device."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashddpm import kernels
from flashddpm.diffusion.loss_tables import hybrid_rows
from flashddpm.diffusion.parameterization import LEARNED_VARIANCES, PREDICTION_TYPES
from flashddpm.kernels import reference
from flashddpm.kernels.tables import LOSSES
from flashddpm.networks.unet import UNet
from flashddpm.training.loader import TrainBatch
from flashddpm.training.trainer import Trainer

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


def noise(batch: TrainBatch) -> Tensor:
    return kernels.philox(batch.seeds, batch.keys, (1, 8, 8), kernels.Purpose.TRAINING)


def gradients(trainer: Trainer) -> Tensor:
    found = [p.grad for p in trainer.stepper.params.values()]
    return torch.cat([g.flatten() for g in found if g is not None])


# The loss


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["constant", *WEIGHTS_OF_X0_ERROR])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_loss_is_the_weighted_penalty_of_the_target(
    tmp_path, training, prediction_type, name, loss
):
    settings, of_x0 = WEIGHTS_OF_X0_ERROR.get(name, ({}, None))
    settings = settings | ({"huber_delta": 0.5} if loss == "huber" else {})
    run = training.trainer(tmp_path, prediction_type=prediction_type, loss=loss, **settings)
    batch = run.batch(0)
    x0, eps = batch.x0.double(), noise(batch).double()
    abar = torch.from_numpy(run.schedule.alphas_cumprod)[batch.t].reshape(-1, 1, 1, 1)
    a, b = abar.sqrt(), (1 - abar).sqrt()
    target = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}
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


def test_each_loss_and_weighting_trains_its_own_way(tmp_path, training):
    choices: list[dict[str, Any]] = [
        {},
        {"loss": "l1"},
        {"loss": "huber"},
        {"loss": "huber", "huber_delta": 0.1},
        *(settings for settings, _ in WEIGHTS_OF_X0_ERROR.values()),
    ]
    found = []
    for i, settings in enumerate(choices):
        run = training.trainer(tmp_path / str(i), steps=2, grad_clip=0.0, **settings)
        assert all(math.isfinite(float(run.train_step())) for _ in range(2))
        found.append(gradients(run))
    for i, one in enumerate(found):
        assert one.isfinite().all() and one.abs().max() > 0
        for other in found[:i]:
            assert (one - other).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("variance_type", LEARNED_VARIANCES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_learned_variance_has_the_hybrid_loss(tmp_path, training, variance_type, prediction_type):
    kind = {"variance_type": variance_type, "prediction_type": prediction_type}
    weighting = {"loss_weighting": "min_snr", "min_snr_gamma": 3.0}
    run = training.trainer(tmp_path, **kind, **weighting, grad_clip=0.0)
    assert run.unet.config.out_channels == 2
    batch = run.batch(0)
    rows = hybrid_rows(run.schedule, prediction_type, variance_type, "min_snr", 3.0)
    out = torch.zeros(4, 2, 8, 8, requires_grad=True)  # of the untrained network
    draws = (batch.t, batch.seeds, batch.keys)
    table = torch.tensor(rows, dtype=torch.float32)
    expected = reference.hybrid_loss(out, batch.x0, *draws, table).mean()
    expected.backward()
    assert float(run.train_step()) == pytest.approx(float(expected.detach()), rel=1e-6)
    bias = run.stepper.params["conv_out.bias"].grad
    want = out.grad.sum((0, 2, 3))
    assert want[1] != 0  # the variance is trained too
    torch.testing.assert_close(bias, want, rtol=1e-4, atol=1e-6)


# Gradients, and what is done with them


def test_a_step_is_adamw_on_the_mean_loss(tmp_path, training):
    run = training.trainer(tmp_path, grad_clip=0.0)
    run.train_step()  # some weights start at 0, where all gradients before them vanish
    twin = UNet(run.unet.config)
    twin.load_state_dict(run.unet.state_dict())
    batch = run.batch(1)
    x0, t, eps = batch.x0, batch.t, noise(batch)
    abar = torch.from_numpy(run.schedule.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    out = twin((abar.sqrt() * x0 + (1 - abar).sqrt() * eps).float(), t, batch.labels)
    (out - eps).square().mean().backward()
    before = training.state(run)
    run.train_step()
    for name, p in twin.named_parameters():
        found = run.stepper.params[name]
        torch.testing.assert_close(found.grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)
        g, m, v = found.grad, before[f"exp_avg.{name}"], before[f"exp_avg_sq.{name}"]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**2)) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
        expected = before[f"model.{name}"] - run.config.learning_rate_at(1) * step
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-7, msg=name)


def test_the_learning_rate_of_each_step(tmp_path, training):
    run = training.trainer(tmp_path, steps=100, warmup_steps=10, lr_schedule="cosine")
    for step in (0, 1):
        run.train_step()
        rate = float(run.stepper.optimizer.param_groups[0]["lr"])
        assert rate == pytest.approx(run.config.learning_rate_at(step), rel=1e-6) and rate < 2e-3
    assert run.stepper.optimizer.param_groups[0]["weight_decay"] == 0


def test_gradients_are_clipped_to_a_norm(tmp_path, training):
    def one(clip: float) -> tuple[Tensor, Tensor]:
        run = training.trainer(tmp_path, grad_clip=clip)
        norm = run.stepper(run.batch(0), 0)[1]
        return gradients(run), norm

    (free, norm), (loose, _), (tight, same) = one(0.0), one(1e6), one(0.01)
    assert float(free.norm()) > 0.1
    assert float(norm) == float(same) == pytest.approx(float(free.norm()), rel=1e-5)
    assert torch.equal(free, loose)
    assert float(tight.norm()) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(tight / tight.norm(), free / free.norm(), rtol=1e-5, atol=1e-7)


def test_bfloat16_trains_float32_weights(tmp_path, training):
    run = training.trainer(tmp_path, precision="bfloat16")
    losses = [float(run.train_step()) for _ in range(3)]
    exact = training.trainer(tmp_path)
    expected = [float(exact.train_step()) for _ in range(3)]
    assert losses == pytest.approx(expected, rel=0.02) and losses != expected
    state = training.state(run)
    assert all(value.dtype is torch.float32 for name, value in state.items() if "." in name)


def test_a_batch_in_parts_is_the_batch(tmp_path, training):
    """To the rounding of float32 sums: 1e-5 of the largest gradient, 1e-6 of the loss."""
    found = []
    for parts in (1, 2, 4):
        run = training.trainer(tmp_path, accumulate=parts, grad_clip=0.0)
        run.train_step()
        loss = float(run.train_step())
        found.append((loss, gradients(run)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert (gradient - found[0][1]).abs().max() <= 1e-5 * found[0][1].abs().max()


# Memory and time


def saved_bytes(run: Trainer) -> int:
    """Bytes that the forward pass keeps for the backward pass, but the weights."""
    weights = {p.data_ptr() for p in run.stepper.params.values()}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            held[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run.stepper.loss(run.batch(0))
    del loss
    return sum(held.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointed_activations_save_memory_and_change_no_bit(tmp_path, training, precision):
    runs = [
        training.trainer(
            tmp_path / str(flag),
            checkpoint_activations=flag,
            precision=precision,
            block_out_channels=(16, 16),
            layers_per_block=2,
        )  # fmt: skip
        for flag in (False, True)
    ]
    for _ in range(3):
        losses = [run.train_step() for run in runs]
        assert torch.equal(*losses) and torch.equal(*map(gradients, runs))
    training.assert_same(runs[1], training.state(runs[0]))
    plain, checkpointed = map(saved_bytes, runs)
    assert 0 < checkpointed < 0.5 * plain
    assert not runs[1].averaged_unet()(torch.zeros(1, 1, 8, 8), 3, torch.zeros(1).long()).grad_fn


class NoWaiting(TorchDispatchMode):
    """Refuses what would have the host wait for a device to know a value or a shape."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select",
             "unique", "_unique2", "allclose", "isnan_any")  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITS, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [{}, {"variance_type": "learned_range"}, {"accumulate": 2, "checkpoint_activations": True}],
)
def test_a_step_waits_for_nothing(tmp_path, training, changes):
    run = training.trainer(tmp_path, **changes)
    run.train_step()
    with run._loader(1, ahead=0) as loader:
        batch = loader.next()
    with pytest.raises(AssertionError), NoWaiting():
        float(torch.ones(()))
    with NoWaiting():
        run.train_step(batch)
    assert run.step == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_compiled_step_has_the_same_loss(tmp_path, training, checkpoint):
    """To 1e-5 over 4 steps: fused loops round otherwise."""
    changes = {"block_out_channels": (8,), "checkpoint_activations": checkpoint}
    plain = training.trainer(tmp_path, **changes)
    config = plain.config
    compiled = Trainer(config, training.LABELLED, tmp_path, "cpu", compile=True)
    for _ in range(4):
        want = float(plain.train_step())
        assert float(compiled.train_step()) == pytest.approx(want, rel=1e-5)
    assert compiled.stepper.network is not compiled.unet
