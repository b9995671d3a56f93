r"""One step of training, on any of the three targets (Ho et al. 2020, eq. 14; S7):

    x_t = add_noise(x0)        the noise drawn in registers
    out = unet(x_t, t, label)
    loss = diffusion_loss(out) or hybrid_loss(out), which draw the same noise again
    backward -> clipping -> AdamW -> averages

Nothing in it waits for the device. On CUDA the network is compiled and, where one process trains,
the whole step is one CUDA graph: its inputs are copied into place and it is replayed.
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
from flashddpm.diffusion.parameterization import hybrid_rows, noising_rows, target_rows
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.execution.compile_cache import keep_compiled_code
from flashddpm.execution.cuda_graphs import CAPTURING, CapturedSteps
from flashddpm.kernels import reference
from flashddpm.networks.unet import UNet
from flashddpm.training.config import TrainConfig
from flashddpm.training.ema import Averages

log = logging.getLogger("flashddpm")

WARM_UPS = 3
"""Steps that run as they are before one is captured: what is compiled or tuned is, by then."""

MOMENTS = ("exp_avg", "exp_avg_sq")

Inputs = dict[str, Tensor]
"""x0 [B, C, H, W] in [-1, 1]; t, seeds and keys, and labels if there are any, int64 [B]."""


class TrainStep:
    """Weights, optimizer and averages, and the step that moves them.

    Args:
        config: the run's settings.
        unet: on its device; trained in place.
        schedule: the forward process.
        compile: whether the network is compiled.
        capture: whether the step is captured, on CUDA and in one process.
        parallel: whether gradients are averaged over the processes of torch.distributed, which
            meet at the first step.

    Attributes:
        whole: False if an error came between the moves of weights and of averages: then they are
            of two different steps.
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
        self.averages = Averages(self.params, config.ema_half_lives)
        # Read by captured steps, as the averages'.
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
        self._inputs: Inputs = {}

    @cached_property
    def network(self) -> Any:
        """The U-Net as a step calls it: compiled, and with gradients averaged over processes."""
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
        """Return everything that a step moves, by "model.", "ema-H." or a moment's and its name.

        They are not copies.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self.params.items():
            found[f"model.{name}"] = parameter.detach()
            for half_life, average in self.averages.of.items():
                found[f"ema-{half_life}.{name}"] = average[name]
            for key, moment in self._moments(parameter).items():
                found[f"{key}.{name}"] = moment
        return found

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over ``tensors`` after so many steps, in place: a graph knows where its own are."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        for parameter in self.params.values():
            self.optimizer.state[parameter]["step"].fill_(step)
        self.whole = True

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[parameter]
        if not state:  # as AdamW makes them at its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
            state |= {key: torch.zeros_like(parameter.detach()) for key in MOMENTS}
        return {key: state[key] for key in MOMENTS}

    def loss(self, inputs: Inputs) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        x0, t, seeds, keys = (inputs[name] for name in ("x0", "t", "seeds", "keys"))
        config = self.config
        # Without the cache of cast weights: within the caller's autocast it outlives the step.
        low = config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, low, cache_enabled=False):
            x_t = self.ops.add_noise(x0, t, seeds, keys, self.noising)
            out = self.network(x_t, t, inputs.get("labels"))
        of = self.ops.hybrid_loss if config.learns_variance else self.ops.diffusion_loss
        args = (x0, t, seeds, keys, self.targets, config.loss, config.huber_delta)
        return of(out, *args).mean()

    def gradients(self, inputs: Inputs) -> Tensor:
        """Leave the gradients of a batch's mean loss in the parameters; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.config.accumulate
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        split = {name: value.chunk(parts) for name, value in inputs.items()}
        for i in range(parts):
            last = i == parts - 1
            alone = nullcontext() if last else getattr(self.network, "no_sync", nullcontext)()
            with alone:
                loss = self.loss({name: value[i] for name, value in split.items()}) / parts
                loss.backward()
            total += loss.detach()
        return total

    def _step(self, inputs: Inputs) -> Tensor:
        """Return (loss, norm of the gradient), [2]; weights and averages have moved."""
        loss = self.gradients(inputs)
        gradients = [p.grad for p in self.params.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(self.params.values(), self.config.grad_clip, norm)
        self.whole = False
        self.optimizer.step()
        self.averages.update()
        self.whole = True
        return torch.stack([loss, norm])

    def __call__(self, inputs: Inputs, step: int) -> Tensor:
        """Take step number ``step``; return (loss, norm of the gradient before clipping), [2].

        Of a captured step the result is overwritten by the next.
        """
        self._rate.fill_(self.config.learning_rate_at(step))
        self.averages.set_rates(step)
        if not self._capture:
            return self._step(inputs)
        if self._graph is not None and _alike(inputs, self._inputs):
            for name, value in inputs.items():
                self._inputs[name].copy_(value)
            return self._graph()
        self._taken += 1
        if self._taken <= WARM_UPS:
            return self._aside(inputs)
        try:
            self._graph = self._captured(inputs)
        except RuntimeError as error:  # not itself: its traceback holds the step's tensors
            log.warning("the training step is not captured, so launches one by one: %s", error)
            self._capture, self.whole = False, True  # a capture runs nothing
            return self._step(inputs)
        log.info("captured the training step")
        return self._graph()

    def _captured(self, inputs: Inputs) -> CapturedSteps:
        """Return the step on copies of these inputs as a graph; nothing is run."""
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        self.optimizer.zero_grad(set_to_none=True)  # gradients of the graph lie in its own memory
        with CAPTURING:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # what steps have used so far, the graph allocates again
            stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
            return CapturedSteps(lambda: self._step(self._inputs), 1, pool, stream)

    def _aside(self, inputs: Inputs) -> Tensor:
        """Take a step on a stream of its own, as the one that is captured will be."""
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = self._step(inputs)
        current.wait_stream(stream)
        out.record_stream(current)
        return out


def _alike(a: Inputs, b: Inputs) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
