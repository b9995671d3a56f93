"""Training steps of diffusers and denoising-diffusion-pytorch, and ours around the latter's Unet.

diffusers' step is that of its training example: U-Net, scheduler, AdamW, clipping and EMAModel.
denoising-diffusion-pytorch's is its Trainer's own ``train``: Unet, GaussianDiffusion, Adam, EMA and
accelerate. Images come from memory: no side decodes a file, and none draws a progress bar.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashddpm.convert import lucidrains
from flashddpm.data import ImageData, to_float
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Purpose
from flashddpm.networks.rms_unet import RMSUNet
from flashddpm.training.config import TrainConfig
from flashddpm.training.draws import Draws
from flashddpm.training.loader import Loader, TrainBatch
from flashddpm.training.step import TrainStep
from flashddpm.training.trainer import Trainer

LOSS, GRADIENT = 1e-5, 1e-3  # largest relative differences allowed in float32
# A gradient below this share of the norm of all may be mere rounding, as that of a key's bias.
NEGLIGIBLE = 1e-6
AHEAD = 4  # batches that our loader fetches ahead where a call takes several steps
DDPT = "denoising_diffusion_pytorch"
LEAST_FILES = 100  # the number of image files that its Trainer insists on


class OurTraining(Protocol):
    """The side that takes our training steps: a `Trainer`, or `OnTheirs`.

    ``data`` are the training images, ``draws`` the run's random choices, ``stepper`` the training
    step with network and optimizer, and ``step`` is the number of the next step, from 0.
    """

    data: Any
    draws: Draws
    device: torch.device
    stepper: TrainStep
    step: int

    def batch(self, step: int) -> TrainBatch:
        """Read the batch of the step of this number from the data and return it."""

    def train_step(self, batch: TrainBatch | None = None) -> Tensor:
        """Take a step on a batch (read now if None) and return its loss, a float32 scalar."""


class Peer(Protocol):
    """The side that takes another implementation's steps: `DiffusersTraining` or `Lucidrains`."""

    def gradients(self, batch: TrainBatch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a batch, a float32 scalar, and its gradients by parameter name.

        The noise to add is given, float32 [B, C, H, W]. No gradient is left in the parameters.
        """

    def steps(self, count: int) -> None:
        """Take ``count`` training steps on images, timesteps and noise that it draws itself."""


def ours_steps(ours: OurTraining, count: int) -> None:
    """Take ``count`` training steps of ours, on batches that a loader fetches ahead.

    If ``count`` is 1, the batch is read as the step begins.
    """
    if count == 1:
        ours.train_step()
        return
    with Loader(ours.data, ours.draws, ours.step, ours.device, AHEAD) as loader:
        for _ in range(count):
            ours.train_step(loader.next())


def ours_gradients(ours: OurTraining, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return our mean loss of a batch, a float32 scalar, and its gradients, float32, by name.

    Names and shapes are those of the network's state dict. No weight is updated, and no gradient is
    left in ``.grad``. The batch is on the device of ``ours``. AssertionError: a gradient is None.
    """
    loss = ours.stepper.gradients(batch).detach()
    twin = copy.deepcopy(ours.stepper.unet)  # a state dict may name and shape parameters its way
    for mine, parameter in zip(twin.parameters(), ours.stepper.params.values(), strict=True):
        assert parameter.grad is not None
        mine.data = parameter.grad.detach().clone()
    ours.stepper.optimizer.zero_grad(set_to_none=True)
    return loss, dict(twin.state_dict())


def agree(ours: OurTraining, peer: Peer, name: str) -> None:
    """Check that two sides compute the same loss and gradients in float32, before either is timed.

    Both take our batch of step 0 with the same noise; they must have the same weights. ``name`` is
    the peer's, for the error's text.

    Raises:
        AssertionError: if the losses differ by more than 1e-5 of the peer's, if one side has a
            parameter that the other lacks, if a gradient of the peer's is all 0, or if the norm of
            a gradient's difference exceeds 1e-3 of the norm of the peer's (or of NEGLIGIBLE, 1e-6,
            of the norm of all of the peer's, if that is more).
    """
    batch = ours.batch(0)
    C, H, W = batch.x0.shape[1:]
    seeds, keys = batch.seeds.cpu(), batch.keys.cpu()
    noise = reference.philox(seeds, keys, (C, H, W), Purpose.TRAINING).to(batch.x0.device)
    mine, gradients = ours_gradients(ours, batch)
    theirs, others = peer.gradients(batch, noise)
    off = abs(float(mine) / float(theirs) - 1)
    if not off <= LOSS:
        raise AssertionError(f"loss: differs from {name}'s by {off:.3g} of it, not timed")
    if gradients.keys() != others.keys():
        odd = sorted(gradients.keys() ^ others.keys())
        raise AssertionError(f"gradients: only one side has {', '.join(odd[:5])}, not timed")
    least = NEGLIGIBLE * nn.utils.get_total_norm(others.values())
    for key, gradient in others.items():
        if not gradient.any():
            raise AssertionError(f"gradient of {key}: is 0, so nothing is checked, not timed")
        off = float((gradients[key] - gradient).norm() / gradient.norm().clamp(min=least))
        if not off <= GRADIENT:
            raise AssertionError(f"gradient of {key}: differs by {off:.3g} of it, not timed")


def usual_loss(
    network: Callable[..., Tensor],
    scheduler: Any,
    x0: Tensor,
    t: Tensor,
    labels: Tensor | None,
    noise: Tensor,
    precision: str,
) -> Tensor:
    """Return the mean squared error of a batch as diffusers' training example computes it.

    The target is the noise, x0 or the velocity, as the scheduler's prediction_type says.

    Args:
        network: called with (x_t, t, labels); returns its prediction, floating [B, C, H, W].
        scheduler: diffusers' DDPMScheduler.
        x0: images, float32 [B, C, H, W] in [-1, 1].
        t: timesteps, int64 [B] in 0..T-1.
        labels: classes, int64 [B], or None.
        noise: the noise to add, float32 [B, C, H, W].
        precision: "bfloat16" runs the network under autocast, "float32" without.

    Returns:
        The mean over all elements, a float32 scalar with a gradient.
    """
    x_t = scheduler.add_noise(x0, noise, t)
    with torch.autocast(x0.device.type, torch.bfloat16, precision == "bfloat16"):
        out = network(x_t, t, labels)
    kind = scheduler.config.prediction_type
    target = {"epsilon": noise, "sample": x0}.get(kind)
    if target is None:
        target = scheduler.get_velocity(x0, noise, t)
    return F.mse_loss(out.float(), target)


class DiffusersTraining:
    """The training step of diffusers' example, with a trainer's weights, settings and data.

    It runs at its best: fused AdamW, foreach averaging, channels_last, no wait for the GPU to log.

    Args:
        trainer: our trainer, whose weights are copied; its data must be an `ImageData`.
        compiled: whether the network is compiled by torch.compile.

    Attributes:
        config, device, data: the trainer's settings, device and images.
        scheduler: diffusers' DDPMScheduler.
        unet, params: diffusers' UNet2DModel, float32, and its parameters.
        ema: diffusers' EMAModel, of the trainer's first half-life.
        optimizer: the AdamW optimizer.

    Raises:
        ImportError: if diffusers is not installed.
    """

    def __init__(self, trainer: Trainer, compiled: bool = False) -> None:
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        config = trainer.config
        self.config, self.device = config, trainer.device
        assert isinstance(trainer.data, ImageData)
        self.data = trainer.data
        self.scheduler = DDPMScheduler.from_config(config.scheduler_config())
        self.unet: Any = UNet2DModel.from_config(trainer.unet.config.to_dict())
        self.unet.load_state_dict(trainer.unet.state_dict())
        self.unet.to(self.device).to(memory_format=torch.channels_last).train()
        if compiled:
            self.unet.compile(fullgraph=True, dynamic=False)
        self.params = list(self.unet.parameters())
        half_life = config.ema_half_lives[0]
        self.ema = EMAModel(self.params, decay=2 ** (-1 / half_life), foreach=True)
        self.optimizer = torch.optim.AdamW(
            self.params, lr=config.learning_rate, weight_decay=0.0, fused=True
        )

    def loss(self, x0: Tensor, t: Tensor, labels: Tensor | None, noise: Tensor) -> Tensor:
        """Return the mean loss of a batch, a float32 scalar, in the trainer's precision.

        Arguments are those of `usual_loss`: images x0 float32 [B, C, H, W] in [-1, 1], timesteps t
        int64 [B], labels int64 [B] or None, and the noise to add, float32 [B, C, H, W].
        """
        precision = self.config.precision
        return usual_loss(self._network, self.scheduler, x0, t, labels, noise, precision)

    def _network(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.unet(x_t, t, labels, return_dict=False)[0]

    def gradients(self, batch: TrainBatch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss, a float32 scalar, of a batch, and the gradients by parameter name.

        The noise to add is given, float32 [B, C, H, W]. No gradient is left in the parameters.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch.x0, batch.t, batch.labels, noise)
        loss.backward()
        return loss.detach(), _taken(self.unet)

    def steps(self, count: int) -> None:
        """Take ``count`` training steps on random images of the data, timesteps and noise."""
        for _ in range(count):
            x0, t, labels = self._batch()
            loss = self.loss(x0, t, labels, torch.randn_like(x0))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.params, self.config.grad_clip)
            self.optimizer.step()
            self.ema.step(self.params)

    def _batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return images, timesteps and labels, drawn at random."""
        B, T = self.config.batch_size, self.config.num_train_timesteps
        images, labels = self.data.fetch(torch.randint(0, len(self.data), (B,)))
        images = self._send(images).contiguous(memory_format=torch.channels_last)
        x0, t = to_float(images), torch.randint(0, T, (B,), device=self.device)
        if labels is not None and self.data.num_classes is not None:
            dropped = torch.rand(B) < self.config.label_dropout
            labels = self._send(torch.where(dropped, self.data.num_classes, labels))
        return x0, t, labels

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


class Lucidrains:
    """denoising-diffusion-pytorch's Trainer with its own Unet, on images in memory.

    Optimizer and averaging are its own: Adam, and an average that moves every tenth step.

    Args:
        data: square images.
        config: gives batch size, precision, learning rate, seed, number of timesteps and clipping.
        folder: a folder for the Trainer's files, in which there is no "pictures" yet.
        device: "cpu" or "cuda".

    Attributes:
        data, batch, device: the images, the batch size and the device.
        unet: its Unet of dim 32 and dim_mults (1, 2, 4), float32.
        diffusion, trainer: its GaussianDiffusion (predicts noise, linear betas) and its Trainer.

    Raises:
        ImportError: if denoising-diffusion-pytorch or accelerate is not installed.
        FileExistsError: if the folder holds "pictures" already.
    """

    def __init__(self, data: ImageData, config: TrainConfig, folder: Path, device: str) -> None:
        package = importlib.import_module(DDPT)
        self.data, self.batch, self.device = data, config.batch_size, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.unet: Any = package.Unet(dim=32, dim_mults=(1, 2, 4), channels=data.shape[0])
        self.unet.to(device)
        self.diffusion: Any = package.GaussianDiffusion(
            self.unet,
            image_size=data.shape[1],
            timesteps=config.num_train_timesteps,
            objective="pred_noise",
            beta_schedule="linear",
        ).to(device)
        self.trainer = self._trainer(package, config, folder)
        self.trainer.dl = self._batches()

    def _trainer(self, package: Any, config: TrainConfig, folder: Path) -> Any:
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(True)  # else it keeps the precision of its first use
        pictures = folder / "pictures"
        pictures.mkdir(parents=True)
        for i in range(LEAST_FILES):
            (pictures / f"{i}.png").touch()  # counted, never read
        with mock.patch.dict(os.environ, ACCELERATE_USE_CPU=str(self.device.type == "cpu")):
            return package.Trainer(
                self.diffusion,
                pictures,
                train_batch_size=self.batch,
                train_lr=config.learning_rate,
                max_grad_norm=config.grad_clip,
                amp=config.precision == "bfloat16",
                mixed_precision_type="bf16",
                save_and_sample_every=10**9,
                calculate_fid=False,
                results_folder=str(folder / "results"),
            )

    def _batches(self) -> Iterator[Tensor]:
        """Yield batches of images, float32 [B, C, H, W] in [0, 1], as its data set does."""
        while True:
            images, _ = self.data.fetch(torch.randint(0, len(self.data), (self.batch,)))
            if self.device.type == "cuda":
                images = images.pin_memory().to(self.device, non_blocking=True)
            yield images.float() / 255

    def gradients(self, batch: TrainBatch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss, a float32 scalar, of a batch, and the gradients by parameter name.

        The batch's labels are not used. The noise to add is given, float32 [B, C, H, W]. No
        gradient is left in the parameters.
        """
        self.diffusion.zero_grad(set_to_none=True)
        loss = self.diffusion((batch.x0 + 1) / 2, times=batch.t, noise=noise)
        loss.backward()
        return loss.detach(), _taken(self.unet)

    def steps(self, count: int) -> None:
        """Take ``count`` more training steps by the Trainer's own ``train``, silently."""
        module = importlib.import_module(f"{DDPT}.{DDPT}")
        bar = module.tqdm
        self.trainer.train_num_steps = self.trainer.step + count
        with (
            mock.patch.object(module, "tqdm", lambda **options: bar(**options | {"disable": True})),
            mock.patch.object(self.trainer.accelerator, "print"),
        ):
            self.trainer.train()


class OnTheirs:
    """Our side of the comparison with `Lucidrains`: our training step, from the peer's weights.

    The network is our RMSUNet, which computes what denoising-diffusion-pytorch's Unet does. On CUDA
    the step is compiled and captured as a CUDA graph, as a `Trainer`'s is.

    Args:
        peer: the peer; its weights are copied, and its betas, images and device are used.
        config: the settings of our step.

    Attributes:
        data, device, step: the peer's images and device, and the number of the next step, from 0.
        stepper, draws: the training step, with weights and optimizer, and the run's random choices.
    """

    def __init__(self, peer: Lucidrains, config: TrainConfig) -> None:
        self.data, self.device, self.step = peer.data, peer.device, 0
        flags = lucidrains.LucidrainsFlags(image_size=peer.data.shape[1])
        state = peer.unet.state_dict()
        unet: Any = RMSUNet(lucidrains.unet_config(state, flags))
        unet.load_state_dict(state)
        unet.to(self.device).to(memory_format=torch.channels_last).train()
        schedule = NoiseSchedule.from_config({"trained_betas": peer.diffusion.betas.tolist()})
        cuda = self.device.type == "cuda"
        self.stepper = TrainStep(config, unet, schedule, compile=cuda, capture=cuda)
        self.draws = Draws(config, len(self.data))

    def batch(self, step: int) -> TrainBatch:
        """Read and return the batch of step number ``step``; ValueError if that is below 0."""
        with Loader(self.data, self.draws, step, self.device, ahead=0) as loader:
            return loader.next()

    def train_step(self, batch: TrainBatch | None = None) -> Tensor:
        """Take a step on a batch (read now if None) and return its mean loss, a float32 scalar.

        A captured step overwrites the loss that the last call returned.
        """
        batch = self.batch(self.step) if batch is None else batch
        loss, _ = self.stepper(batch, self.step)
        self.step += 1
        return loss


def _taken(network: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a network by parameter name, and set them to None in the network."""
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found
