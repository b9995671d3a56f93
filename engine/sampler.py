r"""Sampling: x_T from the seeds, then S times (network, fused update, advance), then images.

``backend="reference"`` is plain PyTorch: the U-Net as written, the update of
``kernels/reference.py``, no compilation, no graph. ``backend="fused"`` is the fast path: on CUDA
the Triton kernels and a captured step, on the CPU the reference operations with the noise of many
steps drawn in one call; on both, the time half of our U-Net hoisted and the rest compiled if asked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from flashddpm import arguments, kernels
from flashddpm.checkpoint import (
    CheckpointError,
    Conditioning,
    load_conditioning,
    load_scheduler_config,
    load_unet,
)
from flashddpm.errors import NonFiniteError
from flashddpm.graph import CapturedStep
from flashddpm.kernels import reference
from flashddpm.kernels.contract import Column, Purpose
from flashddpm.network import HoistedUNet, flops_per_image
from flashddpm.noise import CompiledNoise
from flashddpm.parameterization import PREDICTION_TYPES
from flashddpm.schedule import NoiseSchedule
from flashddpm.slots import Network, Slots, evaluate, step, update
from flashddpm.solvers import Plan, make_plan
from flashddpm.unet import UNet

log = logging.getLogger("flashddpm")

BACKENDS = ("auto", "reference", "fused")
NOISE_BYTES = 16 << 20
"""Most memory that noise drawn ahead may take, on the CPU."""

# compile="auto" on the CPU: compiling takes about a minute and saves about a quarter of the time
# of eager convolutions, which run at some 20 GFLOP/s a core (docs/performance.md).
COMPILE_SECONDS, SAVED, FLOPS_PER_CORE = 60.0, 0.25, 20e9


@dataclass(frozen=True)
class SamplingDefaults:
    """What a scheduler config says of sampling; arguments of ``sample`` override it."""

    spacing: str = "leading"
    steps_offset: int = 0
    clip: float = 1.0
    variance_type: str = "fixed_small"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SamplingDefaults:
        """Read diffusers' keys.

        Raises:
            ValueError: a setting that we have no rows for.
        """
        multistep = config.get("_class_name") == "DPMSolverMultistepScheduler"
        for key, allowed in {
            "thresholding": False,
            "set_alpha_to_one": True,
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "use_karras_sigmas": False,
            "final_sigmas_type": "zero",
        }.items():
            if config.get(key, allowed) != allowed:
                raise ValueError(f"{key}={config[key]!r}: only {allowed!r} is supported")
        clip = not multistep and config.get("clip_sample", True)
        return cls(
            config.get("timestep_spacing", "linspace" if multistep else "leading"),
            config.get("steps_offset", 0),
            arguments.number("clip_sample_range", config.get("clip_sample_range", 1.0), 0)
            if clip
            else 0.0,
            arguments.one_of(
                "variance_type",
                config.get("variance_type") or "fixed_small",
                ("fixed_small", "fixed_large"),
            ),
        )


class Sampler:
    """Draws images from a network.

    Args:
        network: our UNet, or any callable that predicts from (x_t, t[, labels]).
        schedule: the forward process it was trained on.
        shape: (C, H, W) of an image.
        prediction_type: "epsilon", "sample" or "v_prediction".
        call: how to call a network of another signature: (x_t, t, labels) -> out, with x_t
            [L, C, H, W] in the network's dtype, t int64 [L], labels int64 [L] or None.
        conditioning: what labels the network takes.
        defaults: spacing, offset, clipping and variance unless ``sample`` is told otherwise.
        device: "auto", "cpu", "cuda" or "cuda:N"; a foreign module is moved there.
        dtype: of the network's input; by default the network's own.
        backend: "auto" is "fused".
        compile: True, False, or "auto": on CUDA always for our U-Net, on the CPU when the
            work asked for repays it, never for a foreign network.
        capture: whether the step becomes a CUDA graph; "auto" means on CUDA for our U-Net.

    Raises:
        ValueError: an argument that is not allowed.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        schedule: NoiseSchedule,
        *,
        shape: tuple[int, int, int],
        prediction_type: str = "epsilon",
        call: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
        conditioning: Conditioning | None = None,
        defaults: SamplingDefaults | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        compile: bool | str = "auto",
        capture: bool | str = "auto",
    ) -> None:
        if not callable(network):
            raise ValueError(f"network={network!r}: must be a module or a function")
        if len(shape) != 3:
            raise ValueError(f"shape={shape!r}: must be (C, H, W)")
        C, H, W = (arguments.integer("shape", side, 1) for side in shape)
        self.shape = (C, H, W)
        self.schedule = schedule
        self.prediction_type = arguments.one_of(
            "prediction_type", prediction_type, PREDICTION_TYPES
        )
        self.conditioning = conditioning or Conditioning()
        self.defaults = defaults or SamplingDefaults()
        self.device = arguments.resolve_device(device)
        self.backend = arguments.one_of("backend", backend, BACKENDS)
        if self.backend == "auto":
            self.backend = "fused"
        fused = self.backend == "fused"
        cuda = self.device.type == "cuda"
        for name, flag in (("compile", compile), ("capture", capture)):
            if flag not in (True, False, "auto"):
                raise ValueError(f"{name}={flag!r}: must be True, False or 'auto'")
        if not fused and True in (compile, capture):
            raise ValueError("backend='reference': is never compiled or captured")
        if capture is True and not cuda:
            raise ValueError(f"capture=True: needs a CUDA device, not {self.device}")

        own = isinstance(network, UNet) and call is None
        self.compile = compile if fused and (own or compile is True) else False
        self.capture = fused and cuda and (own if capture == "auto" else bool(capture))
        self.ops = kernels if fused and cuda else reference
        if isinstance(network, nn.Module):
            network = network.to(self.device)
        self.network = network
        self.dtype = arguments.resolve_dtype(dtype, _dtype_of(network))
        self._hoisted: HoistedUNet | None = None
        if fused and own:
            assert isinstance(network, UNet)
            network.to(memory_format=torch.channels_last)
            with torch.no_grad():
                self._hoisted = HoistedUNet(network, len(schedule))
            self._predict: Network = self._hoisted
        else:
            self._predict = call or _positional(network)
        self._compiled: Network | None = None
        self._noise = CompiledNoise()
        self._buffers: dict[tuple[int, int, bool], Slots] = {}
        self._captured: dict[tuple[int, int, bool], CapturedStep] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        compile: bool | str = "auto",
    ) -> Sampler:
        """Load a folder in diffusers' layout.

        Args:
            folder: with unet/, scheduler/ and, for labels, flashddpm.json.
            device, backend, compile: as for the class.
            dtype: of the network; by default bfloat16 on CUDA and float32 on the CPU.

        Raises:
            CheckpointError: files or keys missing, broken or not supported.
            ValueError: an argument that is not allowed.
        """
        target = arguments.resolve_device(device)
        cuda = target.type == "cuda"
        kind = arguments.resolve_dtype(dtype, torch.bfloat16 if cuda else torch.float32)
        arguments.one_of("backend", backend, BACKENDS)
        unet = load_unet(folder, target, kind)
        config = load_scheduler_config(folder)
        size = unet.config.sample_size
        if size is None or unet.config.in_channels != unet.config.out_channels:
            raise CheckpointError(
                f"{folder}: sample_size={size}, in_channels={unet.config.in_channels}, "
                f"out_channels={unet.config.out_channels}: must name a size, and as many "
                "channels out as in"
            )
        H, W = (size, size) if isinstance(size, int) else size
        try:
            schedule = NoiseSchedule.from_config(config)
            defaults = SamplingDefaults.from_config(config)
            prediction_type = arguments.one_of(
                "prediction_type", config.get("prediction_type", "epsilon"), PREDICTION_TYPES
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: scheduler_config.json: {error}") from error
        return cls(
            unet,
            schedule,
            shape=(unet.config.in_channels, H, W),
            prediction_type=prediction_type,
            conditioning=load_conditioning(folder, unet.config),
            defaults=defaults,
            device=target,
            dtype=kind,
            backend=backend,
            compile=compile,
        )

    def initial_noise(self, seeds: int | Iterable[int] | Tensor) -> Tensor:
        """Return the x_T of these seeds, float32 [B, C, H, W]."""
        return self._draw(arguments.seed_list(seeds), 0, Purpose.INITIAL)

    def step_noise(self, seeds: int | Iterable[int] | Tensor, key: int) -> Tensor:
        """Return the z of the step with noise key ``key``, float32 [B, C, H, W].

        The key of a step is its timestep (``Plan.noise_keys``).
        """
        key = arguments.integer("key", key, -(2**63), 2**63 - 1)
        return self._draw(arguments.seed_list(seeds), key, Purpose.REVERSE_STEP)

    def _draw(self, seeds: Sequence[int], key: int, purpose: Purpose) -> Tensor:
        seed = torch.tensor(seeds, device=self.device)
        return self.ops.philox(seed, torch.full_like(seed, key), self.shape, purpose)

    def plan(
        self,
        solver: str | Plan = "ddim",
        num_steps: int = 50,
        *,
        spacing: str | None = None,
        eta: float = 0.0,
        variance_type: str | None = None,
        clip: float | None = None,
    ) -> Plan:
        """Return the rows that ``sample`` would apply; arguments are those of ``sample``."""
        if isinstance(solver, Plan):
            return solver
        defaults = self.defaults
        return make_plan(
            self.schedule,
            solver,
            num_steps,
            prediction_type=self.prediction_type,
            spacing=defaults.spacing if spacing is None else spacing,
            steps_offset=defaults.steps_offset,
            eta=eta,
            variance_type=defaults.variance_type if variance_type is None else variance_type,
            clip=defaults.clip if clip is None else clip,
        )

    @torch.no_grad()
    def sample(
        self,
        seeds: int | Iterable[int] | Tensor,
        labels: int | Iterable[int] | Tensor | None = None,
        guidance: float | Sequence[float] = 1.0,
        solver: str | Plan = "ddim",
        num_steps: int = 50,
        *,
        spacing: str | None = None,
        eta: float = 0.0,
        variance_type: str | None = None,
        clip: float | None = None,
        batch_size: int = 64,
        progress: bool = False,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw one image a seed.

        Args:
            seeds: any number of 64-bit integers; an image depends on its own seed only.
            labels: one label, or one for each seed; None asks for the null class.
            guidance: w of out = uncond + w (cond - uncond), one or one for each seed; 1 is off
                and costs one network evaluation a step instead of two.
            solver: "ddpm", "ddim", "dpmpp_2m", or a Plan of your own.
            num_steps: 1..T.
            spacing: "leading", "linspace" or "trailing"; None is the model's own.
            eta: of ddim: 0 is deterministic, 1 as noisy as ddpm.
            variance_type: of ddpm: "fixed_small" or "fixed_large"; None is the model's own.
            clip: bound of x0, 0 for none; None is the model's own.
            batch_size: images at a time.
            progress: show a bar.
            on_step: called after each step of each chunk with the step's number and the x0
                predicted by it, float32 [b, C, H, W]; steps are then not captured.

        Returns:
            float32 [N, C, H, W] in about [-1, 1], on the sampler's device.

        Raises:
            ValueError: an argument that is not allowed.
            NonFiniteError: the network's output turned NaN or infinite.
        """
        seed = arguments.seed_list(seeds)
        label = self._labels(labels, len(seed))
        scale = self._guidance(guidance, len(seed), labels)
        batch = arguments.integer("batch_size", batch_size, 1)
        plan = self.plan(
            solver, num_steps, spacing=spacing, eta=eta, variance_type=variance_type, clip=clip
        )
        if len(plan) > len(self.schedule):
            raise ValueError(f"solver: a plan of {len(plan)} rows; at most {len(self.schedule)}")
        batch = min(batch, len(seed))
        guided = any(w != 1 for w in scale)
        compiled = self._compiles(len(plan) * (len(seed) + sum(w != 1 for w in scale)))

        result = torch.empty(len(seed), *self.shape, device=self.device)
        chunks = range(0, len(seed), batch)
        with self._lock, _bar(progress, len(chunks) * len(plan)) as bar:
            for start in chunks:
                part = slice(start, start + batch)
                # A compiled or captured network has one shape: the last chunk's spare slots rest.
                size = batch if compiled or self.capture else len(seed[part])
                slots = self._slots(size, 2 * size if guided else size)
                slots.load_plan(plan)
                noise = self._draw(seed[part], 0, Purpose.INITIAL)
                slots.admit(
                    noise,
                    seed[part],
                    None if label is None else label[part],
                    self.conditioning.null_label,
                    scale[part],
                )
                for i, x0 in enumerate(self._run(slots, plan, compiled, on_step is not None)):
                    bar.update()
                    if on_step is not None and x0 is not None:
                        on_step(i, x0[: len(seed[part])])
                self._check_finite(slots, seed[part], len(plan))
                result[part] = slots.x[: len(seed[part])]
        return result

    def _labels(self, labels: Any, count: int) -> list[int] | None:
        """Return the label of every image, the null class where none is asked for."""
        known = arguments.label_list(labels, count, self.conditioning.num_classes)
        if known is not None or self.conditioning.num_classes is None:
            return known
        if self.conditioning.null_label is None:
            raise ValueError("labels=None: this model has no null class; give a label")
        return [self.conditioning.null_label] * count

    def _guidance(self, guidance: Any, count: int, labels: Any) -> list[float]:
        values = list(guidance) if isinstance(guidance, Iterable) else [guidance] * count
        if len(values) != count:
            raise ValueError(
                f"guidance: {len(values)} values for {count} seeds; give one or one each"
            )
        values = [arguments.number("guidance", value) for value in values]
        if any(value != 1 for value in values):
            if self.conditioning.null_label is None:
                raise ValueError(
                    f"guidance={guidance!r}: must be 1 for a model without a null class"
                )
            if labels is None:
                raise ValueError(f"guidance={guidance!r}: must be 1 where no labels are given")
        return values

    def _compiles(self, evaluations: int) -> bool:
        """Return whether to compile for this many network evaluations of one image."""
        if self.compile != "auto":
            return bool(self.compile)
        return self._compiled is not None or self.auto_compile(evaluations)[0]

    def auto_compile(self, evaluations: int) -> tuple[bool, str]:
        """Return what compile="auto" chooses for so many evaluations of one image, and why."""
        if self.device.type == "cuda":
            return True, "our U-Net on CUDA is always compiled"
        if not isinstance(self.network, UNet):
            return False, "a foreign network is compiled only when asked"
        flops = evaluations * flops_per_image(self.network, self.shape)
        seconds = flops / (FLOPS_PER_CORE * torch.get_num_threads())
        chosen = seconds * SAVED > COMPILE_SECONDS
        verb = "repays" if chosen else "does not repay"
        return chosen, (
            f"about {seconds:.0f} s of work {verb} about {COMPILE_SECONDS:.0f} s of compiling"
        )

    def _slots(self, S: int, L: int) -> Slots:
        labelled = self.conditioning.num_classes is not None
        key = (S, L, labelled)
        if key not in self._buffers:
            if not self.capture:
                self._buffers.clear()
            self._buffers[key] = Slots(
                S, L, self.shape, len(self.schedule) + 1, self.dtype, self.device, labelled
            )
        return self._buffers[key]

    def _run(
        self, slots: Slots, plan: Plan, compiled: bool, previews: bool
    ) -> Iterator[Tensor | None]:
        """Take every step of the plan; yield after each, with its x0 if previews are wanted."""
        network = self._network(compiled)
        if self.capture and not previews:
            replay = self._capture(slots, network)
            for _ in range(len(plan)):
                replay()
                yield None
            return
        noise = self._ahead(slots, plan, compiled)
        for i in range(len(plan)):
            out = evaluate(slots, network)
            x0 = _preview(slots, out, i + 1) if previews else None
            update(slots, out, self.ops, next(noise))
            yield x0

    def _network(self, compiled: bool) -> Network:
        if not compiled:
            return self._predict
        if self._compiled is None:
            mode = "max-autotune-no-cudagraphs" if self.device.type == "cuda" else None
            log.info("compiling the network (%s)", mode or "default")
            self._compiled = torch.compile(self._predict, fullgraph=True, dynamic=False, mode=mode)
        return self._compiled

    def _capture(self, slots: Slots, network: Network) -> CapturedStep:
        """Return the captured step of these buffers; captured with every slot at rest."""
        key = (len(slots.idx), len(slots.lane_slot), slots.lane_label is not None)
        if key not in self._captured:
            idx = slots.idx.clone()
            slots.idx.zero_()
            self._captured[key] = CapturedStep(lambda: step(slots, network, self.ops), self.device)
            slots.idx.copy_(idx)
        return self._captured[key]

    def _ahead(self, slots: Slots, plan: Plan, compiled: bool) -> Iterator[Tensor | None]:
        """Yield each step's noise, drawn for many steps in one call on the fused CPU path."""
        S, n = len(slots.idx), plan.num_steps
        if self.ops is not reference or self.backend == "reference":
            for _ in range(n):
                yield None
            return
        draw = self._noise if compiled else reference.philox
        many = max(1, NOISE_BYTES // max(4 * slots.x[0].numel() * S, 1))
        for start in range(0, n, many):
            keys = torch.tensor(plan.noise_keys[start : start + many])
            if not plan.rows[start : start + many, Column.SIGMA].any():
                yield from [None] * len(keys)
                continue
            z = draw(
                slots.seeds.repeat(len(keys)),
                keys.repeat_interleave(S),
                self.shape,
                Purpose.REVERSE_STEP,
            )
            yield from z.unflatten(0, (len(keys), S))

    def _check_finite(self, slots: Slots, seeds: Sequence[int], num_steps: int) -> None:
        for seed, row in zip(seeds, slots.nonfinite.tolist(), strict=False):
            if row:
                raise NonFiniteError(seed, row - 1, num_steps)

    def update_weights(self, state: dict[str, Tensor]) -> None:
        """Copy new weights into our U-Net, in place, and derive again what depends on them.

        Args:
            state: a state dict with diffusers' keys.

        Raises:
            ValueError: the network is not our UNet.
            RuntimeError: keys or shapes do not match (PyTorch's own message).
        """
        if not isinstance(self.network, UNet):
            raise ValueError("update_weights: the network is not a flashddpm UNet")
        with self._lock, torch.no_grad():
            self.network.load_state_dict(state)
            if self._hoisted is not None:
                self._hoisted.refresh()


def _preview(slots: Slots, out: Tensor, row: int) -> Tensor:
    """Return the x0 that the slots, all on one row, predict from their output."""
    cond = out[slots.lane_cond.long()].float()
    guided = slots.lane_uncond >= 0
    uncond = out[slots.lane_uncond.clamp(min=0).long()]
    both = reference.combine(cond, uncond, slots.guidance)
    o = torch.where(guided.reshape(-1, 1, 1, 1), both, cond)
    return reference.predict_x0(slots.x, o, slots.rows[row].tolist())


def _dtype_of(network: Any) -> torch.dtype:
    if isinstance(network, nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.float32


def _positional(network: Callable[..., Tensor]) -> Network:
    def call(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return network(x_t, t) if labels is None else network(x_t, t, labels)

    return call


def _bar(progress: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="step", disable=not progress)
