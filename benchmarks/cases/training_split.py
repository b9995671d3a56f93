"""Measurements of the parts of one training step: the time and the memory that each takes."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flashddpm import kernels
from flashddpm.benchmarks.measure import harness, kernel_time
from flashddpm.benchmarks.peers.training_peers import usual_loss
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Purpose
from flashddpm.training.loader import TrainBatch
from flashddpm.training.step import TrainStep
from flashddpm.training.trainer import Trainer

CALLS = 8
"""The number of calls in the CUDA graph that times one part."""
WARM_UPS = 5  # steps on a GPU: the network is compiled and the step captured by then
MIB = 2**20

Part = Callable[[], Any]


def parts(trainer: Trainer) -> dict[str, Part]:
    """Return the parts of a training step on the device, as functions that can be repeated.

    The weights, the averages and the gradients change as the parts are called.

    Args:
        trainer: the run, of which the batch of its next step is used.

    Returns:
        The name of a part -> a function without arguments, whose result is to be dropped:
        "noising_and_loss" (x_t, the loss and its gradient with respect to the network's output),
        "network" (forward and backward), "optimizer" (gradient clipping and AdamW) and "averages"
        (of the weights).
    """
    stepper, config = trainer.stepper, trainer.config
    batch = trainer.batch(trainer.step)
    x_t, out, d_out = _around_the_network(stepper, batch)
    around = _with_network(stepper, lambda *_: out)
    stepper.gradients(batch)  # for the optimizer; `network` drops them and makes new ones

    def noising_and_loss() -> None:
        torch.autograd.grad(around.loss(batch), out)

    def network() -> None:
        stepper.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(trainer.device.type, torch.bfloat16, config.precision == "bfloat16"):
            made = stepper.network(x_t, batch.t, batch.labels)
        made.backward(d_out)

    def optimizer() -> None:
        gradients = [p.grad for p in stepper.params.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(stepper.params.values(), config.grad_clip, norm)
        stepper.optimizer.step()

    return {
        "noising_and_loss": noising_and_loss,
        "network": network,
        "optimizer": optimizer,
        "averages": stepper.ema.update,
    }


def _with_network(stepper: TrainStep, network: Callable[..., Tensor]) -> TrainStep:
    """Return the same step around another network."""
    other = copy.copy(stepper)
    other.network = network
    return other


def _around_the_network(stepper: TrainStep, batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the network's input x_t, its output (a leaf), and the loss's gradient for it."""
    seen: list[Tensor] = []

    def watched(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        out = stepper.network(x_t, t, labels).detach().requires_grad_()
        seen.extend((x_t, out))
        return out

    loss = _with_network(stepper, watched).loss(batch)
    x_t, out = seen
    (d_out,) = torch.autograd.grad(loss, out)
    return x_t, out, d_out


def milliseconds(trainer: Trainer, rounds: int) -> dict[str, float]:
    """Measure the median time of each part of a training step and of the whole step.

    The trainer takes steps meanwhile. On CUDA the parts on the device are timed in CUDA graphs,
    since the whole step is one.

    Args:
        trainer: the run.
        rounds: the number of measurements of each, at least 1.

    Returns:
        Milliseconds under the keys "data_ms" (reading the batch), "noising_and_loss_ms" (without
        the network), "network_ms" (forward and backward), "optimizer_ms" (clipping and AdamW),
        "averages_ms" (of the weights), "whole_ms" (the step, reading included) and "rest_ms" (the
        whole less the parts, which may be negative).
    """
    cuda = trainer.device.type == "cuda"
    for _ in range(WARM_UPS if cuda else 1):
        trainer.train_step()
    device = parts(trainer)
    calls: dict[str, Part] = {
        "data": lambda: trainer.batch(trainer.step),
        **({} if cuda else device),
        "whole": trainer.train_step,
    }
    taken = interleaved(calls, rounds)
    if cuda:
        for name, part in device.items():
            taken[name] = kernel_time.median_seconds(partial(_itself, part), CALLS, rounds)
    order = ("data", *device)
    values = {f"{name}_ms": 1e3 * taken[name] for name in order}
    values["whole_ms"] = 1e3 * taken["whole"]
    values["rest_ms"] = 1e3 * (taken["whole"] - sum(taken[name] for name in order))
    return values


def _itself(part: Part) -> Part:
    return part


def interleaved(calls: dict[str, Part], rounds: int) -> dict[str, float]:
    """Time several functions in turn and return the median seconds of a call of each.

    Args:
        calls: the name of a function -> the function, called without arguments.
        rounds: how many times each is timed, at least 1, after one call to warm up.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + rounds):
        for name, function in calls.items():
            found[name].append(harness.seconds(function))
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def mebibytes(trainer: Trainer) -> dict[str, float]:
    """Measure the memory that our training step and the usual one hold as the backward pass begins.

    The usual step stores noise and target as tensors, as diffusers' example does. Both run the same
    network on the same noise, ours by the operators of the kernels on every device, for what is
    kept is the same. The weights count on neither side.

    Args:
        trainer: the run, of which the batch of its next step is used; the gradients of its network
            are overwritten on CUDA.

    Returns:
        "ours_mib" and "usual_mib" (MiB), "saved_mib" (MiB, their difference) and "saved_share" (as
        a fraction of the usual); on CUDA also "ours_peak_mib" and "usual_peak_mib", the most memory
        (MiB) during forward and backward over that before them.

    Raises:
        ImportError: if diffusers is not installed.
    """
    sides = both_losses(trainer, trainer.batch(trainer.step))
    params = list(trainer.unet.parameters())
    live = {name: live_bytes(loss, held, params) for name, (loss, held) in sides.items()}
    values = {f"{name}_mib": size / MIB for name, size in live.items()}
    saved = live["usual"] - live["ours"]
    values |= {"saved_mib": saved / MIB, "saved_share": saved / live["usual"]}
    if trainer.device.type == "cuda":
        for name, (loss, _) in sides.items():
            values[f"{name}_peak_mib"] = peak_bytes(loss, params) / MIB
    return values


Side = tuple[Callable[[], Tensor], Iterable[Tensor]]
"""A function that returns the loss of a batch, and the tensors that its caller holds meanwhile."""


def both_losses(trainer: Trainer, batch: TrainBatch) -> dict[str, Side]:
    """Return the losses of our step and of the usual one, around the trainer's network, uncompiled.

    The caller of the usual loss holds the noise, float32 [B, C, H, W], as a variable of its loop.

    Args:
        trainer: the run.
        batch: the batch, on the run's device.

    Returns:
        "ours" and "usual" -> a function without arguments that returns the mean loss, a float32
        scalar to differentiate, and the tensors that its caller holds.

    Raises:
        ImportError: if diffusers is not installed.
    """
    from diffusers import DDPMScheduler

    config, unet = trainer.config, trainer.unet
    ours = _with_network(trainer.stepper, unet)
    ours.ops = kernels
    scheduler: Any = DDPMScheduler.from_config(config.scheduler_config())
    x0, t, seeds, keys, labels = batch
    C, H, W = x0.shape[1:]
    noise = reference.philox(seeds.cpu(), keys.cpu(), (C, H, W), Purpose.TRAINING)
    noise = noise.to(x0.device).contiguous(memory_format=torch.channels_last)
    usual = [value for value in (x0, t, labels, noise) if value is not None]
    return {
        "ours": (lambda: ours.loss(batch), batch.tensors()),
        "usual": (
            lambda: usual_loss(unet, scheduler, x0, t, labels, noise, config.precision),
            usual,
        ),
    }


def live_bytes(
    loss: Callable[[], Tensor], held: Iterable[Tensor], apart: Iterable[Tensor] = ()
) -> int:
    """Return the bytes of memory that a loss keeps for its gradient, and that its caller holds.

    Tensors that share memory count once.

    Args:
        loss: called once without arguments; returns a tensor with a gradient.
        held: the tensors that the caller holds.
        apart: tensors, such as weights, whose memory is not counted.
    """
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    for tensor in held:
        note(tensor)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = loss()  # alive to the end: no memory is used twice
    for tensor in apart:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del graph
    return sum(found.values())


def peak_bytes(loss: Callable[[], Tensor], params: Iterable[nn.Parameter]) -> int:
    """Return the most bytes of GPU memory in use during forward and backward, beyond those before.

    Both run twice, and the second run is measured; the gradients of the parameters stay.

    Args:
        loss: called without arguments; returns a scalar tensor on the GPU to differentiate.
        params: the parameters whose gradients are dropped before each run.
    """
    params = list(params)
    for _ in range(2):  # the first warms up
        for parameter in params:
            parameter.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss().backward()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
