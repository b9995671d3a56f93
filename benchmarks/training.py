"""A training step: ours against the usual one of diffusers' U-Net and scheduler, eager PyTorch.

Both have the same weights, images, optimizer, clipping and averaging. Before anything is timed,
both must give the same loss and the same gradients on the same noise.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashddpm.benchmarks.harness import Result, compare
from flashddpm.benchmarks.runner import Case
from flashddpm.data import ImageData, to_float
from flashddpm.kernels import reference
from flashddpm.kernels.contract import Purpose
from flashddpm.train_config import TrainConfig
from flashddpm.trainer import Trainer

IMAGES, CLASSES = 1024, 10
LOSS, GRADIENT = 1e-5, 1e-3  # relative differences that float32 may show
SIZES = {"cpu": (16,), "cuda": (64, 256)}


def data() -> ImageData:
    """Return random images of the bundled model's size."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 1, 28, 28), generator=random, dtype=torch.uint8)
    return ImageData(images, torch.arange(IMAGES) % CLASSES, CLASSES)


class Diffusers:
    """The step of diffusers' training example, on the weights and data of a trainer."""

    def __init__(self, trainer: Trainer) -> None:
        from diffusers import DDPMScheduler, UNet2DModel

        config = trainer.config
        self.config, self.device, self.data = config, trainer.device, trainer.data
        self.scheduler = DDPMScheduler.from_config(config.scheduler_config())
        self.unet: Any = UNet2DModel.from_config(trainer.unet.config.to_dict())
        self.unet.load_state_dict(trainer.unet.state_dict())
        self.unet.to(self.device, memory_format=torch.channels_last).train()
        self.params = list(self.unet.parameters())
        self.ema = [parameter.detach().clone() for parameter in self.params]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=config.learning_rate, weight_decay=0.0, fused=True
        )

    def loss(self, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of noised images."""
        x_t = self.scheduler.add_noise(x0, noise, t)
        enabled = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled):
            out = self.unet(x_t, t, labels, return_dict=False)[0]
        return F.mse_loss(out.float(), noise)

    def step(self) -> None:
        """Take a step on random images."""
        B, T = self.config.batch_size, self.config.num_train_timesteps
        index = torch.randint(0, len(self.data), (B,))
        assert self.data.labels is not None
        x0 = to_float(self.data.images[index]).to(self.device)
        labels = torch.where(
            torch.rand(B) < self.config.label_dropout, CLASSES, self.data.labels[index]
        ).to(self.device)
        t = torch.randint(0, T, (B,), device=self.device)
        loss = self.loss(x0, torch.randn_like(x0), t, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, self.config.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.params, strict=True):
                average.lerp_(parameter, 1 - self.config.ema_decay)


def agree(trainer: Trainer, peer: Diffusers) -> None:
    """Refuse to time steps whose losses or gradients differ on the same noise, in float32.

    Raises:
        AssertionError: they do.
    """
    x0, labels, t, seeds, keys = trainer.draw(0)
    assert labels is not None
    twin = copy.deepcopy(trainer.unet)
    x_t = trainer.ops.add_noise(x0, t, seeds, keys, trainer.noising)
    out = twin(x_t, t, labels)
    mine = trainer.ops.diffusion_loss(out, x0, t, seeds, keys, trainer.targets).mean()
    mine.backward()
    C, H, W = x0.shape[1:]
    noise = reference.philox(seeds.cpu(), keys.cpu(), (C, H, W), Purpose.TRAINING)
    theirs = peer.loss(x0, noise.to(x0.device), t, labels)
    theirs.backward()
    torch.testing.assert_close(mine, theirs, rtol=LOSS, atol=0)
    for parameter in twin.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    gradients = twin.state_dict()  # under diffusers' names, which parameters need not have
    for name, parameter in peer.unet.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
        if not error <= GRADIENT:
            raise AssertionError(f"gradient of {name}: differs by {error:.3g}, not timed")
    peer.optimizer.zero_grad(set_to_none=True)


def training_step(batch: int, precision: str) -> Case:
    """Return the case of a training step of so many images."""
    case = f"training-{precision}-batch-{batch}"

    def measure(device: str) -> Iterator[Result]:
        with tempfile.TemporaryDirectory() as folder:
            made = data()
            for kind in dict.fromkeys(("float32", precision)):  # checked in float32
                config = TrainConfig(steps=10**6, batch_size=batch, precision=kind)
                trainer = Trainer(config, made, folder, device)
                peer = Diffusers(trainer)
                if kind == "float32":
                    agree(trainer, peer)
            comparison = compare(trainer.train_step, peer.step, rounds=5, warm_ups=3)
        note = (
            f"a step of {batch} 28x28 images, the default network of `flashddpm train`, "
            f"{precision}, data in memory, AdamW, clipping and averaging alike"
        )
        yield Result.of(case, "diffusers' training example, eager", note, comparison)

    return Case(case, "training", measure, ("diffusers",))


def training(device: str) -> list[Case]:
    """Return the cases."""
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32",)
    return [training_step(batch, dtype) for dtype in dtypes for batch in SIZES[device]]
