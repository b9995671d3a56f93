r"""Training: a run, from its data to a folder that is a model.

A step (``train_step.py``) is a pure function of weights, moments, averages, seed and number, so a
resumed run goes on exactly where it stopped, whatever stopped it.

OUT is a model folder in diffusers' layout with the weights averaged over the first half-life;
ema-H/ is one with those of half-life H. Beside them stand states/ (what to go on from),
``train_config.json``, ``metrics.jsonl`` and ``loss.png``.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from flashddpm import arguments
from flashddpm.checkpoints.model_folder import save_model
from flashddpm.data import ImageSource
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.distributed import World
from flashddpm.errors import CheckpointError, DivergedError
from flashddpm.host import ints, isolated
from flashddpm.io.files import write_json
from flashddpm.io.images import save_grid
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.unet import UNet
from flashddpm.sampling.sampler import Sampler
from flashddpm.training import resume
from flashddpm.training.config import TrainConfig
from flashddpm.training.draws import Draws
from flashddpm.training.initial_network import first_network
from flashddpm.training.interrupts import held_signals
from flashddpm.training.loader import Batch, Loader
from flashddpm.training.progress import Progress, plot_loss
from flashddpm.training.resume import State
from flashddpm.training.step import Inputs, TrainStep

log = logging.getLogger("flashddpm")

AHEAD = 4
"""Batches that are fetched before they are wanted."""
NEVER = 2**62
"""The step that was not finite, of a run in which all were."""


class Trainer:
    """A run: its network, averaged weights, optimizer and position.

    Args:
        config: the run's settings.
        data: images and labels; with labels, the network is class-conditional and has one more
            class, the null class, that labels are dropped to.
        out: the run's folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        compile: whether the network is compiled: True, False, or "auto": on CUDA.
        world: the processes that train, of which each takes an equal part of every batch and the
            first writes.

    Raises:
        ValueError: settings or a device that cannot be used.
        CheckpointError: ``init`` names no model, or one that does not fit data and settings.
    """

    @isolated(grad=True)
    def __init__(
        self,
        config: TrainConfig,
        data: ImageSource,
        out: str | PathLike[str],
        device: str | torch.device = "auto",
        compile: bool | str = "auto",
        world: World | None = None,
    ) -> None:
        self.config, self.data, self.out = config, data, Path(out)
        self.world = world or World()
        config.part_of(self.world.size)
        self.device = arguments.resolve_device(device)
        cuda = self.device.type == "cuda"
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile={compile!r}: must be True, False or 'auto'")
        self.compiled = cuda if compile == "auto" else bool(compile)
        self.schedule = NoiseSchedule.create(config.beta_schedule, config.num_train_timesteps)
        unet = first_network(config, data)
        unet.checkpoint_activations = config.checkpoint_activations
        self.unet = unet.to(self.device).to(memory_format=torch.channels_last).train()
        alone = self.world.size == 1
        self.stepper = TrainStep(
            config,
            self.unet,
            self.schedule,
            compile=self.compiled,
            capture=cuda and alone,
            parallel=not alone,
        )
        self.draws = Draws(config, len(data), self.world.rank, self.world.size)
        self.step = 0
        self._bad = torch.full((), NEVER, dtype=torch.int64, device=self.device)

    @property
    def conditioning(self) -> Conditioning:
        """The labels that the model takes; the null class only if it is trained."""
        classes = self.data.num_classes
        null = classes if self.config.label_dropout else None
        return Conditioning(classes, null, self.data.class_names)

    def inputs(self, batch: Batch) -> Inputs:
        """Return what a step takes: images, labels (some dropped), timesteps, seeds and keys."""
        extra, labels = dict(batch.extra), {}
        drop = extra.pop("drop")
        if batch.labels is not None and self.data.num_classes is not None:
            null = torch.full_like(batch.labels, self.data.num_classes)
            labels["labels"] = torch.where(drop, null, batch.labels)
        return {"x0": batch.x0, **labels, **extra}

    @isolated(grad=True)
    def draw(self, step: int) -> Inputs:
        """Return what a step trains on, read now."""
        with self._loader(step, ahead=0) as loader:
            return self.inputs(loader.next())

    def _loader(self, start: int, ahead: int = AHEAD) -> Loader:
        return Loader(self.data, self.draws, start, self.device, ahead)

    @isolated(grad=True)
    def train_step(self, batch: Batch | None = None) -> Tensor:
        """Take one step and return its loss, a scalar on the device.

        Args:
            batch: what the loader has for this step; read now by default.
        """
        inputs = self.draw(self.step) if batch is None else self.inputs(batch)
        loss, norm = self.stepper(inputs, self.step)
        fine = loss.isfinite() & norm.isfinite()
        self._bad = torch.where(fine, self._bad, self._bad.clamp(max=self.step + 1))
        self.step += 1
        return loss.clone()

    @isolated(grad=True)
    def averaged_unet(self, half_life: int | None = None) -> UNet:
        """Return a U-Net with averaged weights, in evaluation mode.

        Args:
            half_life: which average; the first by default.

        Raises:
            ValueError: the run has no such average.
        """
        averages = self.stepper.averages.of
        chosen = next(iter(averages)) if half_life is None else half_life
        if chosen not in averages:
            raise ValueError(f"half_life={half_life!r}: must be one of {[*averages]}")
        unet = copy.deepcopy(self.unet)
        for name, parameter in unet.named_parameters():
            parameter.data.copy_(averages[chosen][name])
        return unet.eval().requires_grad_(False)

    @isolated(grad=True)
    def check_finite(self) -> None:
        """Refuse to go on if anything was not finite so far.

        Raises:
            DivergedError: a loss, a gradient or a weight was not; it names the first such step,
                or the last one if only the weights tell.
        """
        bad = int(self._bad)
        if bad != NEVER or not self.stepper.averages.are_finite():
            raise DivergedError(bad if bad != NEVER else self.step)

    @isolated(grad=True)
    def save(self) -> None:
        """Write the run, in the first process: models first, then the state to go on from.

        Every file is written whole or not at all, and older states go only after that.

        Raises:
            DivergedError: something was not finite; nothing is written.
            OSError: the disk is full, say; the states before this one are kept.
        """
        self.check_finite()
        if self.world.rank:
            return
        try:
            self._save_models()
            write_json(self.out / TrainConfig.FILE, self.config.to_dict())
            plot_loss(self.out)
            resume.write(self.out, self.state(), self.config.keep)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.out}: step {self.step} could not be saved ({error.strerror or error}); "
                "what was saved before is kept",
            ) from error

    def _save_models(self) -> None:
        for number, half_life in enumerate(self.config.ema_half_lives):
            unet = self.averaged_unet(half_life)
            folder = self.out / f"ema-{half_life}" if number else self.out
            scheduler = self.config.scheduler_config()
            save_model(folder, unet.config, unet.state_dict(), scheduler, self.conditioning)

    @isolated(grad=True)
    def state(self) -> State:
        """Return a copy of everything that the run's future depends on, on the CPU."""
        tensors = self.stepper.tensors()
        copies = {key: value.to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        return State(
            self.step, copies, self.config.to_dict(), self.data.fingerprint(), self._machine()
        )

    def _machine(self) -> dict[str, object]:
        return resume.machine(self.device, self.compiled, self.world.size)

    @isolated(grad=True)
    def resume(self, allow: Sequence[str] = ()) -> None:
        """Go on from the newest state in the run's folder that can be read.

        Where the machine, the libraries or the number of processes differ, the log says so: the
        data, noise and schedule are the same, the last bits of sums may not be.

        Args:
            allow: settings that may differ from the run's, besides those that always may.

        Raises:
            CheckpointError: no state there, only broken ones, or one of another network.
            ValueError: the run was started with other settings or data; each is named.
        """
        state = resume.read_newest(self.out)
        where = self.out / resume.FOLDER
        expected = self.stepper.tensors()
        wrong = sorted(
            key
            for key in expected.keys() | state.tensors.keys()
            if key not in expected
            or key not in state.tensors
            or state.tensors[key].shape != expected[key].shape
        )
        resume.check_settings(state, self.config, self.data.fingerprint(), allow)
        if wrong:
            raise CheckpointError(f"{where}: is of another network: {', '.join(wrong[:5])} differ")
        resume.report_machine(state.machine, self._machine())
        self.load(state)

    @isolated(grad=True)
    def load(self, state: State) -> None:
        """Take over a state whose tensors fit."""
        self.step = state.step
        self._bad.fill_(NEVER)
        self.stepper.load(state.tensors, state.step)

    @isolated(grad=True)
    def save_samples(self, count: int = 20, num_steps: int = 25) -> None:
        """Write samples/STEP.png: a grid drawn by the averaged weights, from seeds 0, 1, ..."""
        classes = self.data.num_classes
        sampler = Sampler(
            self.averaged_unet(),
            self.schedule,
            shape=self.data.shape,
            prediction_type=self.config.prediction_type,
            conditioning=self.conditioning,
            defaults=SamplingDefaults.from_config(self.config.scheduler_config()),
            device=self.device,
            compile=False,
            capture=False,
        )
        labels = None if classes is None else [i % classes for i in range(count)]
        steps = min(num_steps, len(self.schedule))
        x = sampler.sample(range(count), labels, solver="ddim", num_steps=steps)
        columns = classes and (10 // classes * classes or 10)  # a class a column, or several
        save_grid(x, self.out / "samples" / f"{self.step:06}.png", columns=columns)

    @isolated(grad=True)
    def run(self, progress: bool = True, log_every: int = 50) -> None:
        """Train to ``config.steps``, saving on the way, at the end and on Ctrl-C or SIGTERM.

        The device is waited for every ``log_every`` steps, and to save and to draw samples.

        Raises:
            DivergedError: a loss, a gradient or a weight turned NaN or infinite; the last save is
                untouched.
            OSError: a save failed; the one before is kept.
        """
        arguments.integer("log_every", log_every, 1)
        config = self.config
        shown = progress and self.world.rank == 0
        line = Progress(self.out, self.step, config.steps, config.batch_size, shown)
        with held_signals() as signals, self._loader(self.step) as loader:
            try:
                self._train(loader, line, signals, log_every)
                self._agree()
                self.save()
            except DivergedError:
                raise
            except BaseException:
                if self.stepper.whole:
                    self.save()
                raise
            finally:
                line.close()
            if signals and self.world.rank == 0:
                name = signal.Signals(signals[0]).name
                log.info("%s: stopped after step %d of %d, saved", name, self.step, config.steps)

    def _train(self, loader: Loader, line: Progress, signals: list[int], log_every: int) -> None:
        """Take steps, with what is due after each, to the last one or a signal."""
        config, first = self.config, self.world.rank == 0
        total, count = torch.zeros((), dtype=torch.float32, device=self.device), 0
        while self.step < config.steps and not self._anyone(bool(signals)):
            total += self.train_step(loader.next())
            count += 1
            line.advance()
            done = self.step == config.steps
            report = self.step % log_every == 0 or done
            save = self.step % config.save_every == 0 and not done
            sample = bool(config.sample_every) and self.step % config.sample_every == 0
            if report or save or sample:
                self._agree()
                self.check_finite()
            if report:
                mean = self._mean(total) / count
                if not math.isfinite(mean):
                    raise DivergedError(self.step)
                if first:
                    rate = config.learning_rate_at(self.step - 1)
                    line.log(self.step, loader.wait_seconds, loss=mean, learning_rate=rate)
                total, count = torch.zeros_like(total), 0
            if save:
                self.save()
            if sample and first:
                self.save_samples()

    def _anyone(self, value: bool) -> bool:
        """Return whether it is so in any process."""
        if self.world.size == 1:
            return value
        flag = ints(int(value))  # on the CPU, over gloo: no GPU is waited for
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _agree(self) -> None:
        """Tell every process of a step that was not finite in one."""
        if self.world.size > 1:
            dist.all_reduce(self._bad, dist.ReduceOp.MIN)

    def _mean(self, value: Tensor) -> float:
        """Return the mean over the processes."""
        if self.world.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value) / self.world.size
