r"""`TrainStep`: the training step, for all three prediction types (equation S7 of docs/math.md).

    x_t = add_noise(x0)        the noise drawn in registers
    out = unet(x_t, t, label)
    loss = diffusion_loss(out) or hybrid_loss(out), which draw the same noise again
    backward -> gradient clipping -> AdamW -> exponential moving averages

Nothing in a step waits for the device. On CUDA the network is compiled and, where one process
trains, the whole step is one CUDA graph: the batch is copied into static buffers, and the graph is
replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flashddpm import kernels
from flashddpm.diffusion.loss_tables import hybrid_rows, target_rows
from flashddpm.diffusion.parameterization import noising_rows
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.execution.compile_cache import keep_compiled_code
from flashddpm.execution.cuda_graphs import CAPTURING, CapturedSteps
from flashddpm.kernels import reference
from flashddpm.networks.unet import UNet
from flashddpm.training.config import TrainConfig
from flashddpm.training.ema import Ema
from flashddpm.training.loader import TrainBatch

log = logging.getLogger("flashddpm")

WARM_UPS = 3
"""Number of steps that run uncaptured first: by then all is compiled and tuned."""

MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainStep:
    """The weights, optimizer and averages of a training run, and the step that updates them.

    Call it with a batch and the step's number to take a step.

    Args:
        config: the settings of the run.
        unet: the network on its device, in float32; it is trained in place.
        schedule: the noise schedule of the forward process, T timesteps.
        compile: whether the network is compiled.
        capture: whether the step is captured as a CUDA graph, after three steps that are not; for
            one process on a GPU only.
        parallel: whether gradients are averaged over the processes of torch.distributed (its
            process group must exist by the first step, which all of them take).

    Attributes:
        config, unet: the arguments.
        device: the torch.device of the network.
        ops: the module with the operations add_noise, diffusion_loss and hybrid_loss:
            flashddpm.kernels on CUDA, kernels.reference on the CPU.
        noising: float32 [T, 2] on the device, the coefficients of x_0 and of eps in x_t.
        targets: float32 [T, columns] on the device, the table of the loss, as `target_rows` or, if
            the variance is learned, `hybrid_rows` returns it; one row for each timestep.
        params: the trained parameters by name, float32.
        ema: the averages of the parameters, an `Ema`.
        optimizer: the torch.optim.AdamW of the parameters, without weight decay.
        whole: whether weights and averages are of the same step; False if an error came after the
            weights' update and before the averages'.

    Raises:
        ValueError: if the loss weighting or the learned variance cannot be had with this schedule
            (`target_rows`, `hybrid_rows`).
    """

    def __init__(
        self,
        config: TrainConfig,
        unet: UNet,
        schedule: NoiseSchedule,
        compile: bool = False,
        capture: bool = False,
        parallel: bool = False,
    ) -> None:
        self.config, self.unet = config, unet
        self.device = next(unet.parameters()).device
        self.ops = kernels if self.device.type == "cuda" else reference
        self.noising = self._table(noising_rows(schedule))
        self.targets = self._table(self._loss_rows(schedule))
        self.params = dict(unet.named_parameters())
        self.ema = Ema(self.params, config.ema_half_lives)
        # On the device, where a captured step reads it.
        self._rate = torch.zeros((), dtype=torch.float32, device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.params.values(),
            lr=self._rate,
            weight_decay=0.0,
            fused=True,
            capturable=capture,
        )
        self.whole = True
        self._compile, self._parallel = compile, parallel
        self._capture, self._taken = capture, 0
        self._graph: CapturedSteps | None = None
        self._buffers: TrainBatch | None = None  # which the graph reads

    @cached_property
    def network(self) -> Any:
        """The network as a training step calls it: a callable (x_t, t, labels) -> out.

        x_t is float32 [B, C, H, W], t int64 [B], labels int64 [B] or None; out [B, C or 2C, H, W].

        It is made at first use: compiled if ``compile``, with gradients averaged over processes if
        ``parallel``, and else the network itself.
        """
        network: Any = self.unet
        if self._compile:
            keep_compiled_code()
            log.info("compiling the network for training")
            network = torch.compile(network, fullgraph=True, dynamic=False)
        if self._parallel:
            ids = [self.device.index] if self.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(network, device_ids=ids)
        return network

    def _table(self, rows: Any) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32, device=self.device)

    def _loss_rows(self, schedule: NoiseSchedule) -> Any:
        config = self.config
        weighting = (config.loss_weighting, config.weighting_gamma)
        if config.learns_variance:
            kind = (config.prediction_type, config.variance_type)
            return hybrid_rows(schedule, *kind, *weighting)
        return target_rows(schedule, config.prediction_type, *weighting)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a step updates, float32 tensors by name: the originals, not copies.

        A name is "model.", "ema-H." (H being a half-life in steps), "exp_avg." or "exp_avg_sq."
        (AdamW's moments), then the parameter's name, whose shape the tensor has.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self.params.items():
            found[f"model.{name}"] = parameter.detach()
            for half_life, average in self.ema.weights.items():
                found[f"ema-{half_life}.{name}"] = average[name]
            for key, moment in self._moments(parameter).items():
                found[f"{key}.{name}"] = moment
        return found

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Copy a run's state into the tensors of this object, in place: a CUDA graph reads them.

        Args:
            tensors: weights, averages and moments, of the names and shapes that `tensors` returns,
                on any device; further names are ignored.
            step: the number of steps that the state has been through, for AdamW's bias correction.

        Raises:
            KeyError: if a name is missing.
            RuntimeError: if a shape cannot be broadcast to that of the tensor it is copied into.
        """
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        for parameter in self.params.values():
            self.optimizer.state[parameter]["step"].fill_(step)
        self.whole = True

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return AdamW's moments of a parameter, zeros before the first step."""
        state = self.optimizer.state[parameter]
        if not state:  # as AdamW makes them at its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
            state |= {key: torch.zeros_like(parameter.detach()) for key in MOMENTS}
        return {key: state[key] for key in MOMENTS}

    def loss(self, batch: TrainBatch) -> Tensor:
        """Return the mean loss of a batch, a float32 scalar with its graph for the backward pass.

        It is the hybrid loss (with a term of the variational bound) if the variance is learned,
        else the weighted penalty of the network's error. The network runs under bfloat16 autocast
        if ``config.precision`` is "bfloat16".

        Args:
            batch: the images with their timesteps, labels, and seeds and keys of their noise, on
                the network's device.
        """
        x0, t, seeds, keys, labels = batch
        config = self.config
        # Without the cache of cast weights: within the caller's autocast it outlives the step.
        low = config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, low, cache_enabled=False):
            x_t = self.ops.add_noise(x0, t, seeds, keys, self.noising)
            out = self.network(x_t, t, labels)
        losses = self.ops.hybrid_loss if config.learns_variance else self.ops.diffusion_loss
        args = (x0, t, seeds, keys, self.targets, config.loss, config.huber_delta)
        return losses(out, *args).mean()

    def gradients(self, batch: TrainBatch) -> Tensor:
        """Compute the gradients of a batch's mean loss, and return it, a float32 scalar.

        The gradients replace those in the parameters' ``grad``; they are not clipped.

        Args:
            batch: this process's part of a step's batch, on the network's device. It is taken in
                ``config.accumulate`` equal parts, one after the other; that number must divide its
                size.
        """
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.config.accumulate
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for i, part in enumerate(batch.chunk(parts), 1):
            # Processes average their gradients once, after the last part.
            alone = nullcontext if i == parts else getattr(self.network, "no_sync", nullcontext)
            with alone():
                loss = self.loss(part) / parts
                loss.backward()
            total += loss.detach()
        return total

    def _step(self, batch: TrainBatch) -> Tensor:
        """Update weights and averages; return (loss, norm of the gradient), float32 [2]."""
        loss = self.gradients(batch)
        gradients = [p.grad for p in self.params.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(self.params.values(), self.config.grad_clip, norm)
        self.whole = False
        self.optimizer.step()
        self.ema.update()
        self.whole = True
        return torch.stack([loss, norm])

    def __call__(self, batch: TrainBatch, step: int) -> Tensor:
        """Take a training step: update the weights, AdamW's moments and the averages.

        Args:
            batch: this process's part of the step's batch, on the network's device.
            step: the number of the step, from 0, by which the learning rate and the rates of the
                averages are chosen.

        Returns:
            float32 [2] on the device: the mean loss, and the norm of the gradient before clipping.
            The next step overwrites it if the step is captured. Neither is checked to be finite.
        """
        self._rate.fill_(self.config.learning_rate_at(step))
        self.ema.set_rates(step)
        if not self._capture:
            return self._step(batch)
        if self._graph is not None and self._fill_buffers(batch):
            return self._graph()
        self._taken += 1
        if self._taken <= WARM_UPS:
            return self._aside(batch)
        try:
            self._graph = self._captured(batch)
        except RuntimeError as error:  # not itself: its traceback holds the step's tensors
            log.warning("the training step is not captured, so launches one by one: %s", error)
            self._capture, self.whole = False, True  # a capture runs nothing
            return self._step(batch)
        log.info("captured the training step")
        return self._graph()

    def _fill_buffers(self, batch: TrainBatch) -> bool:
        """Copy a batch to where the graph reads it; return False if its shapes do not fit."""
        buffers = [] if self._buffers is None else self._buffers.tensors()
        values = batch.tensors()
        if [buffer.shape for buffer in buffers] != [value.shape for value in values]:
            return False
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
        return True

    def _captured(self, batch: TrainBatch) -> CapturedSteps:
        """Return the captured graph of a step on buffers, copies of this batch; nothing is run."""
        buffers = self._buffers = batch.map(torch.clone)
        self.optimizer.zero_grad(set_to_none=True)  # gradients of the graph lie in its own memory
        with CAPTURING:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # what steps have used so far, the graph allocates again
            stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
            return CapturedSteps(lambda: self._step(buffers), 1, pool, stream)

    def _aside(self, batch: TrainBatch) -> Tensor:
        """Take a step on another CUDA stream than the current one, as the captured step will be."""
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = self._step(batch)
        current.wait_stream(stream)
        out.record_stream(current)
        return out
