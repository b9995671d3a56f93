r"""Training: the simple objective of Ho et al. 2020 (eq. 14, S7) on any of the three targets.

The penalty of the error may be another than the square, and its weight another than 1.

A step is: images -> ``add_noise`` (x_t; noise in registers) -> U-Net -> ``diffusion_loss`` (the
same noise drawn again) -> clipping -> AdamW -> exponential moving average of the weights. Which
images, timesteps, noise and dropped labels a step uses is a pure function of (seed, step), so a
resumed run goes on exactly where it stopped.

OUT is a model folder in diffusers' layout holding the averaged weights; beside them stand
``trainer.safetensors`` (everything needed to go on), ``train_config.json`` and ``metrics.jsonl``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from flashddpm import arguments, kernels
from flashddpm.checkpoint import Conditioning, save_model
from flashddpm.data import ImageData, to_float
from flashddpm.errors import CheckpointError, DivergedError
from flashddpm.files import read_tensors, write_atomic, write_json
from flashddpm.images import save_grid
from flashddpm.kernels import reference
from flashddpm.kernels.contract import Purpose
from flashddpm.parameterization import noising_rows, target_rows
from flashddpm.sampler import Sampler
from flashddpm.schedule import NoiseSchedule
from flashddpm.train_config import MAY_CHANGE, TrainConfig
from flashddpm.unet import UNet

STATE = "trainer.safetensors"


class Trainer:
    """A run: its network, averaged weights, optimizer and position.

    Args:
        config: the run's settings.
        data: images and labels; with labels, the network is class-conditional and has one more
            class, the null class, that labels are dropped to.
        out: the run's folder.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: settings or a device that cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        out: str | PathLike[str],
        device: str | torch.device = "auto",
    ) -> None:
        self.config, self.data, self.out = config, data, Path(out)
        self.device = arguments.resolve_device(device)
        self.ops = kernels if self.device.type == "cuda" else reference
        self.schedule = NoiseSchedule.create(config.beta_schedule, config.num_train_timesteps)
        self.noising = self._table(noising_rows(self.schedule))
        self.targets = self._table(
            target_rows(
                self.schedule,
                config.prediction_type,
                config.loss_weighting,
                config.weighting_gamma,
            )
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # torch.manual_seed reseeds CUDA too
            unet = UNet(config.unet_config(data))
        unet.to(self.device).to(memory_format=torch.channels_last)
        self.unet = unet.train()
        self.params = dict(self.unet.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(
            self.params.values(), lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        self.step = 0
        self._epoch, self._order = -1, torch.empty(0)

    def _table(self, rows: Any) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=self.device)

    @property
    def conditioning(self) -> Conditioning:
        """The labels that the model takes; the null class only if it is trained."""
        classes = self.data.num_classes
        return Conditioning(classes, classes if self.config.label_dropout else None)

    def draw(self, step: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """Return what a step trains on: x0 [B, C, H, W], labels, t, seeds and keys [B].

        The key is the number of the image in the run; the timestep and whether the label is
        dropped are counted noise of that key.
        """
        B, config = self.config.batch_size, self.config
        keys = torch.arange(step * B, (step + 1) * B)
        seeds = torch.full_like(keys, arguments.seed_list(config.seed)[0])
        word = reference.philox_words(seeds, keys, Purpose.TIMESTEP, 1)[0][:, 0]
        t = (word * len(self.schedule)) >> 32
        index = torch.stack([self._image(int(key)) for key in keys])
        x0 = to_float(self.data.images[index]).to(self.device)
        x0 = x0.contiguous(memory_format=torch.channels_last)
        labels = None
        if self.data.labels is not None and self.data.num_classes is not None:
            word = reference.philox_words(seeds, keys, Purpose.LABEL_DROPOUT, 1)[0][:, 0]
            drop = word < config.label_dropout * 2.0**32
            labels = torch.where(drop, self.data.num_classes, self.data.labels[index])
            labels = labels.to(self.device)
        return x0, labels, t.to(self.device), seeds.to(self.device), keys.to(self.device)

    def _image(self, key: int) -> Tensor:
        """Return the index of image number ``key``: every epoch is a permutation of its own."""
        epoch, position = divmod(key, len(self.data))
        if epoch != self._epoch:
            seed = (self.config.seed + epoch * 0x9E3779B9) % 2**63
            generator = torch.Generator().manual_seed(seed)
            self._order = torch.randperm(len(self.data), generator=generator)
            self._epoch = epoch
        return self._order[position]

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to 0."""
        config = self.config
        rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
        return rate

    def train_step(self) -> Tensor:
        """Take one step and return its loss, a scalar on the device."""
        config = self.config
        x0, labels, t, seeds, keys = self.draw(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, config.precision == "bfloat16"):
            x_t = self.ops.add_noise(x0, t, seeds, keys, self.noising)
            out = self.unet(x_t, t, labels)
        loss = self.ops.diffusion_loss(
            out, x0, t, seeds, keys, self.targets, config.loss, config.huber_delta
        ).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.params.values(), config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages = list(self.ema.values())
            torch._foreach_lerp_(averages, list(self.params.values()), 1 - decay)
        self.step += 1
        return loss.detach()

    def averaged_unet(self) -> UNet:
        """Return a U-Net with the averaged weights, in evaluation mode."""
        unet = copy.deepcopy(self.unet)
        for name, parameter in unet.named_parameters():
            parameter.data.copy_(self.ema[name])
        return unet.eval().requires_grad_(False)

    def is_finite(self) -> bool:
        """Return whether every weight always was finite: if one was not, its average stays so."""
        return bool(torch.stack([value.isfinite().all() for value in self.ema.values()]).all())

    def save(self) -> None:
        """Write the run: model folder first, then the state to go on from, atomically.

        Raises:
            DivergedError: some weight was not finite; nothing is written.
        """
        if not self.is_finite():
            raise DivergedError(self.step)
        unet = self.averaged_unet()
        scheduler = self.config.scheduler_config()
        save_model(self.out, unet.config, unet.state_dict(), scheduler, self.conditioning)
        write_json(self.out / "train_config.json", dataclasses.asdict(self.config))
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.params.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"ema.{name}"] = self.ema[name]
            moments = self.optimizer.state[parameter]  # empty before the first step
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = moments.get(key, torch.zeros_like(parameter))
        tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
        metadata = {"step": str(self.step), "config": json.dumps(dataclasses.asdict(self.config))}
        write_atomic(self.out / STATE, safetensors.torch.save(tensors, metadata))

    def resume(self) -> None:
        """Go on from the state in the run's folder.

        Raises:
            CheckpointError: no state there, a broken one, or one of another network.
            ValueError: the run was started with other settings (see MAY_CHANGE).
        """
        path = self.out / STATE
        tensors = read_tensors(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        expected = {
            f"{kind}.{name}": parameter
            for kind in ("model", "ema", "exp_avg", "exp_avg_sq")
            for name, parameter in self.params.items()
        }
        wrong = sorted(expected.keys() ^ tensors.keys())
        wrong += [
            key
            for key in sorted(expected.keys() & tensors.keys())
            if tensors[key].shape != expected[key].shape
        ]
        if wrong:
            raise CheckpointError(f"{path}: is of another network: {', '.join(wrong[:5])} differ")
        try:
            step = arguments.integer("step", int(metadata["step"]), 0)
            stored = dict(json.loads(metadata["config"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its metadata are no trainer's: {error!r}") from error
        self._check_settings(stored)
        self.step = step
        for name, parameter in self.params.items():
            parameter.data.copy_(tensors[f"model.{name}"])
            self.ema[name].copy_(tensors[f"ema.{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=self.device),
                **{
                    key: torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"])
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }

    def _check_settings(self, stored: dict[str, Any]) -> None:
        """Refuse to go on with settings other than those that the run was started with.

        A setting that is younger than the run was at its default then.
        """
        given, defaults = (
            json.loads(json.dumps(dataclasses.asdict(config)))
            for config in (self.config, TrainConfig(self.config.steps))
        )
        had = defaults | stored
        changed = [
            f"{name}={value!r} (the run has {had[name]!r})"
            for name, value in given.items()
            if name not in MAY_CHANGE and had[name] != value
        ]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: a resumed run may change only {', '.join(MAY_CHANGE)}"
            )

    def save_samples(self, count: int = 20, num_steps: int = 25) -> None:
        """Write samples/STEP.png: a grid drawn by the averaged weights, from seeds 0, 1, ..."""
        classes = self.data.num_classes
        _, C, H, W = self.data.images.shape
        sampler = Sampler(
            self.averaged_unet(),
            self.schedule,
            shape=(C, H, W),
            prediction_type=self.config.prediction_type,
            conditioning=self.conditioning,
            device=self.device,
            compile=False,
            capture=False,
        )
        labels = None if classes is None else [i % classes for i in range(count)]
        steps = min(num_steps, len(self.schedule))
        x = sampler.sample(range(count), labels, num_steps=steps, spacing="trailing")
        save_grid(
            x,
            self.out / "samples" / f"{self.step:06}.png",
            columns=None if classes is None else min(classes, 10),
        )

    def log(self, loss: float, images_per_second: float) -> None:
        """Append a line to metrics.jsonl."""
        self.out.mkdir(parents=True, exist_ok=True)
        line = {"step": self.step, "loss": loss, "images_per_second": images_per_second}
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def run(self, progress: bool = True, log_every: int = 50) -> None:
        """Train to ``config.steps``, saving on the way, at the end and on Ctrl-C or SIGTERM.

        Raises:
            DivergedError: the loss or the weights turned NaN or infinite, which is looked at every
                ``log_every`` steps and before each save and each grid of samples.
        """
        from tqdm import tqdm

        arguments.integer("log_every", log_every, 1)
        config = self.config
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=not progress)
        total, count, start = torch.zeros((), device=self.device), 0, time.perf_counter()
        with held_signals() as signals, bar:
            try:
                while self.step < config.steps and not signals:
                    total += self.train_step()
                    count += 1
                    bar.update()
                    done = self.step == config.steps
                    log = self.step % log_every == 0 or done
                    save = self.step % config.save_every == 0 and not done
                    sample = config.sample_every and self.step % config.sample_every == 0
                    look = log or save or sample
                    if look and not (math.isfinite(float(total)) and self.is_finite()):
                        break  # refused below
                    if log:
                        loss = float(total) / count
                        rate = count * config.batch_size / (time.perf_counter() - start)
                        bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
                        self.log(loss, rate)
                        total.zero_()
                        count, start = 0, time.perf_counter()
                    if save:
                        self.save()
                    if sample:
                        self.save_samples()
            finally:
                if not math.isfinite(float(total)):
                    raise DivergedError(self.step)
                self.save()


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Hold back SIGINT and SIGTERM until the block ends; the list names those that came.

    An interrupt inside a step would leave weights, averages and position of two different steps.
    Outside the main thread, where Python allows no handlers, nothing is held back.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if came:
        signal.raise_signal(came[0])
