"""`Trainer`: a training run, from images to a model folder.

An image goes from its source (`flashddpm.data`) through the `Loader`, which draws its noise key
(upper half of the noise counter) and timestep, into a `TrainBatch`; `TrainStep` updates the
weights with it, and `Ema` their averages.

A step is a pure function of weights, moments, averages, seed and the step's number, so a resumed
run continues exactly where it stopped, whatever stopped it.

OUT is a model folder in diffusers' layout with the weights averaged over the first half-life, and
OUT/ema-H one with those of half-life H. Beside them are states/ (what a run is resumed from),
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
from torch import Tensor

from flashddpm import arguments
from flashddpm.checkpoints.model_folder import save_model
from flashddpm.data import ImageSource
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.distributed import World
from flashddpm.errors import DivergedError
from flashddpm.host import isolated
from flashddpm.io.files import write_json
from flashddpm.io.images import save_grid
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.unet import UNet
from flashddpm.sampling.sampler import Sampler
from flashddpm.training import resume
from flashddpm.training.config import TrainConfig
from flashddpm.training.draws import Draws
from flashddpm.training.initial_network import initial_network
from flashddpm.training.interrupts import held_signals
from flashddpm.training.loader import Loader, TrainBatch
from flashddpm.training.progress import Progress, plot_loss
from flashddpm.training.resume import State
from flashddpm.training.step import TrainStep

log = logging.getLogger("flashddpm")

AHEAD = 4
"""The number of batches that the loader fetches ahead."""
NEVER = 2**62
"""Stands for the number of the first step that was not finite while all steps were finite."""


class Trainer:
    """A training run: its network, averaged weights, optimizer and position.

    Args:
        config: the settings of the run.
        data: the images and labels. With labels, of K classes, the network is class-conditional and
            always has K + 1 class embeddings: number K, the null class, replaces dropped labels,
            and is not trained if label_dropout is 0.
        out: the folder of the run, OUT; it is made when something is written.
        device: "cpu", "cuda" or "cuda:N", or "auto" for CUDA where there is a GPU, else the CPU.
        compile: whether the network is compiled: True, False, or "auto", which is True on CUDA.
        world: the processes that train; each takes an equal part of every batch, and the first
            writes. None for one process.

    Attributes:
        config, data: the arguments.
        out: the folder of the run, a Path.
        world: the processes that train, a `World`.
        device: the torch.device of the network.
        compiled: whether the network is compiled.
        schedule: the `NoiseSchedule` of the forward process.
        unet: the network that is trained, float32, channels_last.
        stepper: the `TrainStep`, which holds optimizer and averages.
        draws: the random choices of the run, `Draws`.
        step: the number of steps that the run has taken.

    Raises:
        ValueError: if the settings make no network, batch_size is not a multiple of the number of
            processes times accumulate, ``compile`` is another value, or the device cannot be used.
        CheckpointError: if ``init`` names no model, or one that does not fit data and settings.
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
        unet = initial_network(config, data)
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
        self._first_bad = torch.full((), NEVER, dtype=torch.int64, device=self.device)

    @property
    def conditioning(self) -> Conditioning:
        """The labels that the model takes when it samples, a `Conditioning`.

        Its null_label (the label for "no label") is K, the number of classes, if labels are dropped
        in training, else None: the network has that embedding then too, but it is not trained.
        All is None for data without labels.
        """
        classes = self.data.num_classes
        null = classes if self.config.label_dropout else None
        return Conditioning(classes, null, self.data.class_names)

    @isolated(grad=True)
    def batch(self, step: int) -> TrainBatch:
        """Return this process's part of a step's batch on the run's device, read from the data now.

        Args:
            step: the number of the step, from 0.

        Raises:
            ValueError: if ``step`` is below 0.
            DataError: if an image cannot be read.
        """
        with self._loader(step, ahead=0) as loader:
            return loader.next()

    def _loader(self, start: int, ahead: int = AHEAD) -> Loader:
        return Loader(self.data, self.draws, start, self.device, ahead)

    @isolated(grad=True)
    def train_step(self, batch: TrainBatch | None = None) -> Tensor:
        """Take one training step and return its mean loss, a float32 scalar on the device.

        A loss that is not finite raises nothing here: see `check_finite`.

        Args:
            batch: this process's part of the batch of this step, on the device; None to read it
                now.

        Raises:
            DataError: if the batch is read, and an image cannot be.
        """
        batch = self.batch(self.step) if batch is None else batch
        loss, norm = self.stepper(batch, self.step)
        finite, first = loss.isfinite() & norm.isfinite(), self._first_bad
        self._first_bad = torch.where(finite, first, first.clamp(max=self.step + 1))
        self.step += 1
        return loss.clone()

    @isolated(grad=True)
    def averaged_unet(self, half_life: int | None = None) -> UNet:
        """Return a copy of the network with averaged weights, in eval mode and without gradients.

        Args:
            half_life: the half-life of the average in steps, one of the settings'
                ``ema_half_lives``; None for the first of them.

        Raises:
            ValueError: if the run has no average of this half-life.
        """
        averages = self.stepper.ema.weights
        chosen = next(iter(averages)) if half_life is None else half_life
        if chosen not in averages:
            raise ValueError(f"half_life={half_life!r}: must be one of {[*averages]}")
        unet = copy.deepcopy(self.unet)
        for name, parameter in unet.named_parameters():
            parameter.data.copy_(averages[chosen][name])
        return unet.eval().requires_grad_(False)

    @isolated(grad=True)
    def check_finite(self) -> None:
        """Raise if a loss, a gradient or a weight was not finite so far; waits for the device.

        Raises:
            DivergedError: if one was not; it has the number, from 1, of the first step whose loss
                or gradient was not finite, or of the last step if only weights were not.
        """
        bad = int(self._first_bad)
        if bad != NEVER or not self.stepper.ema.are_finite():
            raise DivergedError(bad if bad != NEVER else self.step)

    @isolated(grad=True)
    def save(self) -> None:
        """Write the run's model folders, settings and loss plot, then the state to resume from.

        In processes other than the first it only checks. Every file is written whole or not at all,
        and older states are removed only after all is written.

        Raises:
            DivergedError: if a loss, a gradient or a weight was not finite; nothing is written.
            OSError: if a file could not be written, as on a full disk; older states are kept.
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
        """Write a model folder for each half-life."""
        for number, half_life in enumerate(self.config.ema_half_lives):
            unet = self.averaged_unet(half_life)
            folder = self.out / f"ema-{half_life}" if number else self.out
            scheduler = self.config.scheduler_config()
            save_model(folder, unet.config, unet.state_dict(), scheduler, self.conditioning)

    @isolated(grad=True)
    def state(self) -> State:
        """Return the `State` of the run: copies, on the CPU, of all that its further steps use."""
        tensors = self.stepper.tensors()
        copies = {key: value.to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        return State(
            self.step, copies, self.config.to_dict(), self.data.fingerprint(), self._machine()
        )

    def _machine(self) -> dict[str, object]:
        return resume.machine(self.device, self.compiled, self.world.size)

    @isolated(grad=True)
    def resume(self, allow: Sequence[str] = ()) -> None:
        """Continue from the newest state in the run's folder that can be read.

        Where the machine, the libraries or the number of processes differ, the log says so: the
        data, noise and schedule are the same, but the last bits of sums may not be.

        Args:
            allow: names of settings that may differ from those the run was started with, besides
                those that always may (``config.may_change``); "data" for other data.

        Raises:
            CheckpointError: if there is no state, none that can be read, or one of another network.
            ValueError: if the run was started with other settings or data (the message names each),
                or a name in ``allow`` is not a setting.
        """
        state = resume.read_newest(self.out)
        resume.check_settings(state, self.config, self.data.fingerprint(), allow)
        resume.check_tensors(self.out, state, self.stepper.tensors())
        resume.report_machine(state.machine, self._machine())
        self.load(state)

    @isolated(grad=True)
    def load(self, state: State) -> None:
        """Continue from a state: copy its tensors into the run's own, and take over its step.

        Args:
            state: a state whose tensors have the run's names and shapes; its settings, data and
                machine are not compared.

        Raises:
            KeyError: if a tensor is missing.
            RuntimeError: if the shape of a tensor does not fit.
        """
        self.step = state.step
        self._first_bad.fill_(NEVER)
        self.stepper.load(state.tensors, state.step)

    @isolated(grad=True)
    def save_samples(self, count: int = 20, num_steps: int = 25) -> None:
        """Write OUT/samples/STEP.png, a grid of images drawn by DDIM with averaged weights.

        The weights are those of the first half-life of the settings; STEP has six digits or more.

        Args:
            count: the number of images, at least 1. Their seeds are 0..count-1, and image i has
                class i modulo K where there are K classes.
            num_steps: the number of solver steps; at most T are taken.

        Raises:
            ValueError: if ``count`` or ``num_steps`` is below 1.
            NonFiniteError: if the network's output turned NaN or infinite.
            OSError: if the picture cannot be written.
        """
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
        """Train until ``config.steps``, saving on the way, at the end and on Ctrl-C or SIGTERM.

        A signal is held back until the step under way has ended and the run is saved; then it is
        raised.

        Args:
            progress: whether the first process shows a progress bar.
            log_every: the number of steps between two lines of metrics.jsonl, at least 1. The host
                waits for the device only to write such a line, to save and to draw samples.

        Raises:
            ValueError: if ``log_every`` is below 1.
            DivergedError: if a loss, a gradient or a weight turned NaN or infinite; the last save
                is untouched.
            DataError: if an image cannot be read; the steps before it are saved.
            OSError: if a save failed; the one before is kept.
            KeyboardInterrupt: on Ctrl-C, after the run was saved.
        """
        arguments.integer("log_every", log_every, 1)
        config = self.config
        shown = progress and self.world.rank == 0
        line = Progress(self.out, self.step, config.steps, config.batch_size, shown)
        with held_signals() as signals, self._loader(self.step) as loader:
            try:
                self._train(loader, line, signals, log_every)
                self.world.minimum_(self._first_bad)
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
        """Take steps, and log, save and sample when due, until the last step or a signal."""
        config, first = self.config, self.world.rank == 0
        total, count = torch.zeros((), dtype=torch.float32, device=self.device), 0
        while self.step < config.steps and not self.world.any(bool(signals)):
            total += self.train_step(loader.next())
            count += 1
            line.advance()
            done = self.step == config.steps
            report = self.step % log_every == 0 or done
            save = self.step % config.save_every == 0 and not done
            sample = bool(config.sample_every) and self.step % config.sample_every == 0
            if report or save or sample:
                self.world.minimum_(self._first_bad)
                self.check_finite()
            if report:
                mean = self.world.mean(total) / count
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
