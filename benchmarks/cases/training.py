"""Benchmarks of a training step: ours against diffusers' example and lucidrains' Trainer.

The latter is the Trainer of the package denoising-diffusion-pytorch. Both sides have the same
weights, images, batch size, precision and clipping, and average the weights. Before anything is
timed, both must give the same loss and the same gradients on the same noise, in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from flashddpm.benchmarks.cases import training_split
from flashddpm.benchmarks.measure.harness import Measurement, compare
from flashddpm.benchmarks.measure.runner import BenchmarkCase
from flashddpm.benchmarks.peers.models import model, random_unet
from flashddpm.benchmarks.peers.training_peers import (
    DDPT,
    DiffusersTraining,
    Lucidrains,
    OnTheirs,
    OurTraining,
    Peer,
    agree,
    ours_steps,
)
from flashddpm.checkpoints.model_folder import save_model
from flashddpm.data import ImageData
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.unet import UNet
from flashddpm.training.config import TrainConfig
from flashddpm.training.trainer import Trainer

IMAGES, CLASSES = 1024, 10
NETWORKS = {"default": (1, 28, 28), "cifar10": (3, 32, 32)}
"""A network's name -> (C, H, W) of its images.

"default" is the network of `flashddpm train`, with labels, "cifar10" that of Ho et al. 2020 for
CIFAR-10, without labels.
"""
DDPT_SHAPE = (3, 32, 32)
BATCHES = {"cpu": (16, 64), "cuda": (64, 256)}
STEPS = {"cpu": 1, "cuda": 10}  # steps of a call: on a GPU enough for the host to run ahead
ROUNDS = {"cpu": 3, "cuda": 5}
WARM_UPS = {"cpu": 1, "cuda": 2}  # on a GPU the first steps compile, and the fourth is captured


def data(shape: tuple[int, int, int] = NETWORKS["default"], labels: bool = True) -> ImageData:
    """Return random training images of a fixed seed.

    Args:
        shape: (C, H, W) of an image.
        labels: whether the images have labels.

    Returns:
        The data set: ``images``, uint8 [1024, C, H, W] on the CPU; ``labels``, 0..9 in turn, int64
        [1024], and ``num_classes``, 10; without labels both are None.

    Raises:
        ValueError: if a size in ``shape`` is 0.
    """
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, *shape), generator=random, dtype=torch.uint8)
    if not labels:
        return ImageData(images, None, None)
    return ImageData(images, torch.arange(IMAGES) % CLASSES, CLASSES)


def settings(batch: int, precision: str, prediction_type: str = "epsilon") -> TrainConfig:
    """Return the settings of a training run: the defaults of `flashddpm train`, but one average.

    The weights are averaged once, with a half-life of 700 steps, since peers keep one average.

    Args:
        batch: the number of images of a step, at least 1.
        precision: "float32" or "bfloat16" (autocast).
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".

    Raises:
        ValueError: if a setting is none of those named.
    """
    return TrainConfig(
        steps=10**6,
        batch_size=batch,
        precision=precision,
        prediction_type=prediction_type,
        ema_half_lives=(700,),
    )


def first_weights(network: str, made: ImageData, config: TrainConfig) -> UNet:
    """Return a network of random weights, without layers whose weights are all zero.

    The output of a freshly initialised network is 0, and with it all gradients but those of its
    last layer: the check that two sides have the same gradients would be void.

    Args:
        network: "default", or the name of a benchmark model: "bundled", "cifar10" or "pixels256".
        made: the images, whose shape and classes decide the default network.
        config: the settings of the run, which decide the default network.

    Returns:
        The network, float32 on the CPU; that of a model is shared, and must not be changed.

    Raises:
        KeyError: if there is no such network.
    """
    if network != "default":
        return model(network).unet
    return random_unet(config.unet_config(made.shape, made.num_classes).to_dict())


@contextmanager
def training(network: str, config: TrainConfig, device: str) -> Iterator[Trainer]:
    """Yield a trainer on random images, whose temporary folder is removed when the block ends.

    It is removed also if the block raises, and the exception goes on to the caller.

    Args:
        network: "default" (with labels) or "cifar10" (without).
        config: the settings of the run.
        device: "cpu" or "cuda"; on CUDA the network is compiled, and the step captured.

    Raises:
        KeyError: if there is no such network.
    """
    made = data(NETWORKS[network], labels=network == "default")
    unet = first_weights(network, made, config)
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "first")
        save_model(first, unet.config, unet.state_dict(), config.scheduler_config(), Conditioning())
        begun = TrainConfig.from_dict(config.to_dict() | {"init": str(first)})
        yield Trainer(begun, made, Path(folder, "run"), device)


def timed(
    case: str, called: str, note: str, ours: OurTraining, peer: Peer, device: str
) -> Measurement:
    """Measure our training steps against a peer's: both sides take some steps in turn.

    Args:
        case: the name of the measurement.
        called: what the peer is called in reports.
        note: what is trained, for the description in reports.
        ours: what takes our steps: a `Trainer` or an `OnTheirs`.
        peer: what takes the peer's steps: a `DiffusersTraining` or a `Lucidrains`.
        device: "cpu" or "cuda", which decides how many steps a call takes (1 or 10), the number of
            rounds, and that of the warm-up calls.

    Returns:
        The comparison of the seconds of a call; its values are the fields of `Comparison`.

    Raises:
        KeyError: if the device is neither "cpu" nor "cuda".
    """
    count = STEPS[device]
    comparison = compare(
        partial(ours_steps, ours, count),
        partial(peer.steps, count),
        rounds=ROUNDS[device],
        warm_ups=WARM_UPS[device],
    )
    return Measurement.of(case, called, f"a call is {count} steps of {note}", comparison)


def against_diffusers(network: str, batch: int, precision: str, compiled: bool) -> BenchmarkCase:
    """Return the benchmark case of our training step against that of diffusers' training example.

    Its ``measure`` yields one comparison, of the seconds of a call on each side: 1 step on the CPU,
    10 on CUDA. It raises AssertionError if losses or gradients of both differ in float32.

    Args:
        network: "default" (that of `flashddpm train`, with labels) or "cifar10" (without).
        batch: the number of images of a step.
        precision: "float32" or "bfloat16" (autocast).
        compiled: whether the network of diffusers is compiled; ours is, on CUDA.
    """
    how = "compiled" if compiled else "eager"
    case = f"training-{network}-{precision}-batch-{batch}-{how}"

    def measure(device: str) -> Iterator[Measurement]:
        for kind in dict.fromkeys(("float32", precision)):  # gradients: checked in float32
            with training(network, settings(batch, kind), device) as trainer:
                peer = DiffusersTraining(trainer, compiled)
                if kind == "float32":
                    agree(trainer, peer, "diffusers")
                if kind == precision:
                    C, H, W = trainer.data.shape
                    note = (
                        f"{batch} {H}x{W} images, the {network} network, {precision}, data in "
                        "memory, fused AdamW, clipping and averaging by foreach alike"
                    )
                    called = f"diffusers' training example, {how}"
                    yield timed(case, called, note, trainer, peer, device)

    return BenchmarkCase(case, "training", measure, ("diffusers",))


def against_ddpt(batch: int, precision: str) -> BenchmarkCase:
    """Return the benchmark case of our training step against denoising-diffusion-pytorch's Trainer.

    Both train that package's network. The case's ``measure`` yields one comparison, of the seconds
    of a call on each side: 1 step on the CPU, 10 on CUDA. It raises AssertionError if losses or
    gradients of both differ in float32.

    Args:
        batch: the number of images of a step.
        precision: "float32" or "bfloat16" (autocast).
    """
    case = f"training-ddpt-{precision}-batch-{batch}"

    def measure(device: str) -> Iterator[Measurement]:
        made = data(DDPT_SHAPE, labels=False)
        for kind in dict.fromkeys(("float32", precision)):
            with tempfile.TemporaryDirectory() as folder:
                config = settings(batch, kind)
                peer = Lucidrains(made, config, Path(folder), device)
                ours = OnTheirs(peer, config)
                if kind == "float32":
                    agree(ours, peer, "denoising-diffusion-pytorch")
                if kind == precision:
                    note = (
                        f"{batch} 32x32 images, its Unet(dim=32, dim_mults=(1, 2, 4)), "
                        f"{precision}, data in memory; its optimizer, average and log are its own"
                    )
                    called = "denoising-diffusion-pytorch Trainer"
                    yield timed(case, called, note, ours, peer, device)

    return BenchmarkCase(case, "training", measure, (DDPT, "accelerate"))


def split(network: str, batch: int, precision: str) -> BenchmarkCase:
    """Return the benchmark case that splits the time of our training step into its parts.

    Its values are median milliseconds: of reading the batch, of noising and loss, the network, the
    optimizer and the averages of the weights, of the whole step, and of the rest
    (``training_split.milliseconds``).

    Args:
        network: "default" or "cifar10".
        batch: the number of images of a step.
        precision: "float32" or "bfloat16" (autocast).
    """
    case = f"training-split-{network}-{precision}-batch-{batch}"

    def measure(device: str) -> Iterator[Measurement]:
        with training(network, settings(batch, precision), device) as trainer:
            values = training_split.milliseconds(trainer, 2 * ROUNDS[device])
        note = (
            f"{batch} images, the {network} network, {precision}; medians, each part by itself, "
            "the batch read as the step begins; rest: the whole less the parts"
        )
        yield Measurement(case, "nothing", note, values)

    return BenchmarkCase(case, "training", measure)


def memory(network: str, batch: int, precision: str, prediction_type: str) -> BenchmarkCase:
    """Return the benchmark case of the memory saved by storing neither the noise nor the target.

    Its values are the MiB that our step and the usual one hold as the backward pass begins, and
    what is saved (``training_split.mebibytes``).

    Args:
        network: "default" or "cifar10".
        batch: the number of images of a step.
        precision: "float32" or "bfloat16" (autocast).
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".
    """
    case = f"training-memory-{network}-{precision}-batch-{batch}-{prediction_type}"

    def measure(device: str) -> Iterator[Measurement]:
        config = settings(batch, precision, prediction_type=prediction_type)
        with training(network, config, device) as trainer:
            values = training_split.mebibytes(trainer)
        note = (
            f"{batch} images, the {network} network as it is, not compiled, {precision}, "
            f"{prediction_type}: inputs and what is kept for the backward pass, our kernels "
            "against noise and target as tensors"
        )
        yield Measurement(case, "the usual step", note, values)

    return BenchmarkCase(case, "training", measure, ("diffusers",))


def cases(device: str) -> list[BenchmarkCase]:
    """Return the benchmark cases of training: against both peers, parts of a step, and memory.

    Args:
        device: "cpu" or "cuda".

    Raises:
        KeyError: if the device is neither "cpu" nor "cuda".
    """
    cuda = device == "cuda"
    dtypes = ("bfloat16", "float32") if cuda else ("float32", "bfloat16")
    networks = tuple(NETWORKS) if cuda else ("default",)
    sizes = [(dtype, batch) for dtype in dtypes for batch in BATCHES[device]]
    largest = BATCHES[device][-1]
    return [
        *(
            against_diffusers(network, batch, dtype, compiled)
            for network in networks
            for compiled in ((False, True) if cuda else (False,))
            for dtype, batch in sizes
        ),
        *(against_ddpt(batch, dtype) for dtype, batch in sizes),
        *(split(network, largest, dtype) for network in networks for dtype in dtypes),
        *(
            memory(network, largest, dtype, kind)
            for network in networks
            for dtype in dtypes
            for kind in ("epsilon", "v_prediction")
        ),
    ]
