"""Training steps of others, and of ours around their network.

diffusers' is that of its training example: U-Net, scheduler, AdamW, clipping and EMAModel.
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

LOSS, GRADIENT = 1e-5, 1e-3  # relative differences that float32 may show
NEGLIGIBLE = 1e-6  # of all gradients' norm: below, a gradient may be rounding, as a key's bias is
AHEAD = 4  # batches that our loader fetches ahead where a call is of several steps
DDPT = "denoising_diffusion_pytorch"
LEAST_FILES = 100  # that its Trainer wants to see


class Ours(Protocol):
    """What takes our steps: a Trainer, or OnTheirs."""

    data: Any
    draws: Draws
    device: torch.device
    stepper: TrainStep
    step: int

    def batch(self, step: int) -> TrainBatch:
        """Return the batch of a step, read now."""

    def train_step(self, batch: TrainBatch | None = None) -> Tensor:
        """Take a step; its batch is read now by default."""


class Peer(Protocol):
    """What takes theirs."""

    def gradients(self, batch: TrainBatch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch on given noise, and its gradients by name."""

    def steps(self, count: int) -> None:
        """Take so many steps, on data, timesteps and noise of its own."""


def ours_steps(ours: Ours, count: int) -> None:
    """Take so many steps, as ``Trainer.run`` does; one alone reads its batch itself."""
    if count == 1:
        ours.train_step()
        return
    with Loader(ours.data, ours.draws, ours.step, ours.device, AHEAD) as loader:
        for _ in range(count):
            ours.train_step(loader.next())


def ours_gradients(ours: Ours, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch and its gradients, under the names that checkpoints have."""
    loss = ours.stepper.gradients(batch).detach()
    twin = copy.deepcopy(ours.stepper.unet)  # a state dict may name and shape parameters its way
    for mine, parameter in zip(twin.parameters(), ours.stepper.params.values(), strict=True):
        assert parameter.grad is not None
        mine.data = parameter.grad.detach().clone()
    ours.stepper.optimizer.zero_grad(set_to_none=True)
    return loss, dict(twin.state_dict())


def agree(ours: Ours, peer: Peer, name: str) -> None:
    """Refuse to time steps whose losses or gradients differ on the same noise, in float32.

    Raises:
        AssertionError: they do.
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
    """Return the mean squared error as diffusers' example computes it.

    Args:
        network: (x_t, t, labels or None) -> out.
        scheduler: diffusers' DDPMScheduler.
        x0: images, float32 [B, C, H, W] in [-1, 1].
        t: timesteps, int64 [B].
        labels: classes, int64 [B], or None.
        noise: noise, float32 [B, C, H, W].
        precision: "float32" or "bfloat16", by autocast.
    """
    x_t = scheduler.add_noise(x0, noise, t)
    with torch.autocast(x0.device.type, torch.bfloat16, precision == "bfloat16"):
        out = network(x_t, t, labels)
    kind = scheduler.config.prediction_type
    target = {"epsilon": noise, "sample": x0}.get(kind)
    if target is None:
        target = scheduler.get_velocity(x0, noise, t)
    return F.mse_loss(out.float(), target)


class Diffusers:
    """The step of diffusers' training example, on a trainer's weights and data.

    At its best: the optimizer fused, the averaging by foreach, channels_last, no wait for a log.

    Args:
        trainer: whose settings it has.
        compiled: whether the network is compiled.
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
        """Return the mean loss of a batch."""
        precision = self.config.precision
        return usual_loss(self._network, self.scheduler, x0, t, labels, noise, precision)

    def _network(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.unet(x_t, t, labels, return_dict=False)[0]

    def gradients(self, batch: TrainBatch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch on given noise, and its gradients by name."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch.x0, batch.t, batch.labels, noise)
        loss.backward()
        return loss.detach(), _taken(self.unet)

    def steps(self, count: int) -> None:
        """Take so many steps on random images."""
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
    """denoising-diffusion-pytorch's Trainer, on images in memory.

    Its settings are its own (Adam, an average moved every tenth step); the learning rate is given.

    Args:
        data: square images.
        config: batch, precision, learning rate, T and clipping.
        folder: a new one for what it asks to be there.
        device: "cpu" or "cuda".
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
        """Yield images in [0, 1], as its data set gives them."""
        while True:
            images, _ = self.data.fetch(torch.randint(0, len(self.data), (self.batch,)))
            if self.device.type == "cuda":
                images = images.pin_memory().to(self.device, non_blocking=True)
            yield images.float() / 255

    def gradients(self, batch: TrainBatch, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch on given noise, and its gradients by name."""
        self.diffusion.zero_grad(set_to_none=True)
        loss = self.diffusion((batch.x0 + 1) / 2, times=batch.t, noise=noise)
        loss.backward()
        return loss.detach(), _taken(self.unet)

    def steps(self, count: int) -> None:
        """Take so many steps by its ``train``, without its progress bar."""
        module = importlib.import_module(f"{DDPT}.{DDPT}")
        bar = module.tqdm
        self.trainer.train_num_steps = self.trainer.step + count
        with (
            mock.patch.object(module, "tqdm", lambda **options: bar(**options | {"disable": True})),
            mock.patch.object(self.trainer.accelerator, "print"),
        ):
            self.trainer.train()


class OnTheirs:
    """Our step around denoising-diffusion-pytorch's network: our RMSUNet, their weights and betas.

    Args:
        peer: whose they are.
        config: the settings of ours; compiled and captured on CUDA, as a Trainer's is.
    """

    def __init__(self, peer: Lucidrains, config: TrainConfig) -> None:
        self.data, self.device, self.step = peer.data, peer.device, 0
        flags = lucidrains.Flags(image_size=peer.data.shape[1])
        state = peer.unet.state_dict()
        unet: Any = RMSUNet(lucidrains.unet_config(state, flags))
        unet.load_state_dict(state)
        unet.to(self.device).to(memory_format=torch.channels_last).train()
        schedule = NoiseSchedule.from_config({"trained_betas": peer.diffusion.betas.tolist()})
        cuda = self.device.type == "cuda"
        self.stepper = TrainStep(config, unet, schedule, compile=cuda, capture=cuda)
        self.draws = Draws(config, len(self.data))

    def batch(self, step: int) -> TrainBatch:
        """Return the batch of a step, read now."""
        with Loader(self.data, self.draws, step, self.device, ahead=0) as loader:
            return loader.next()

    def train_step(self, batch: TrainBatch | None = None) -> Tensor:
        """Take a step; its batch is read now by default."""
        batch = self.batch(self.step) if batch is None else batch
        loss, _ = self.stepper(batch, self.step)
        self.step += 1
        return loss


def _taken(network: nn.Module) -> dict[str, Tensor]:
    """Return the gradients by name, and leave none."""
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found
