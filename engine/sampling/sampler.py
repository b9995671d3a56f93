r"""Sampling: x_T from the seeds, then S times (network, fused update, advance), then images.

``backend="reference"`` is plain PyTorch: the U-Net as written, the update of
``kernels/reference/``, no compilation, no graph. ``backend="fused"`` is the fast path: on CUDA
the Triton kernels and a captured step, on the CPU the reference operations with the noise of many
steps drawn in one call; on both, the time half of our U-Net hoisted and the rest compiled if asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.plan_options import PlanOptions
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.execution.checks import check_state
from flashddpm.execution.executor import Executor
from flashddpm.execution.step import Call
from flashddpm.host import isolated
from flashddpm.kernels.tables import Purpose
from flashddpm.networks.conditioning import Conditioning
from flashddpm.sampling import chunks, inputs
from flashddpm.sampling.guests import Guest, Guests
from flashddpm.sampling.loading import Loadable
from flashddpm.sampling.trajectory import Trajectory, load_trajectory


class Sampler(Loadable):
    """Draws images from a network.

    Args:
        network: our UNet, or any callable that predicts from (x_t, t[, labels]).
        schedule: the forward process it was trained on.
        shape: (C, H, W) of an image.
        prediction_type: "epsilon", "sample" or "v_prediction".
        call: how to call a network of another signature: (x_t, t, labels) -> out, with x_t
            [L, C, H, W] in the network's dtype, t int64 [L], labels int64 [L] or None. If it has a
            parameter ``index`` it is given that by name, int64 [L]: each lane's place in ``seeds``,
            or its `Request.index`, by which to find conditions that are kept outside.
        conditioning: what labels the network takes.
        defaults: what ``sample`` does unless told otherwise: spacing, offset, clipping, variance.
        device: "auto", "cpu", "cuda" or "cuda:N"; a foreign module is moved there.
        dtype: of the network's input; by default the network's own.
        backend: "auto" is "fused".
        compile: True, False, or "auto": on CUDA always for our U-Net, on the CPU when the
            work asked for repays it, never for a foreign network.
        capture: whether the step becomes a CUDA graph; "auto" means on CUDA for our U-Net.
        tune: compile by trying many kernels for each operation (max-autotune), which takes minutes
            once for each shape: what is found is kept in the user's cache.
        graph_memory: bytes of the GPU that captured steps may hold, past which they run one by one;
            by default half of what is free when the first is captured.
        scheduler: the config with diffusers' keys that schedule, prediction_type and defaults were
            read from, if any; ``save_pretrained`` writes it.

    Raises:
        ValueError: an argument that is not allowed.
    """

    @isolated(grad=False)
    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        schedule: NoiseSchedule,
        *,
        shape: tuple[int, int, int],
        prediction_type: str = "epsilon",
        call: Call | None = None,
        conditioning: Conditioning | None = None,
        defaults: SamplingDefaults | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        backend: str = "auto",
        compile: bool | str = "auto",
        capture: bool | str = "auto",
        tune: bool = False,
        graph_memory: int | None = None,
        scheduler: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            network=network, schedule=schedule, shape=shape, prediction_type=prediction_type,
            call=call, conditioning=conditioning, defaults=defaults, device=device, dtype=dtype,
            backend=backend, compile=compile, capture=capture, tune=tune,
            graph_memory=graph_memory, scheduler=scheduler,
        )  # fmt: skip
        if not callable(network):
            raise ValueError(f"network={network!r}: must be a module or a function")
        if not isinstance(shape, Sequence) or len(shape) != 3:
            raise ValueError(f"shape={shape!r}: must be (C, H, W)")
        C, H, W = (arguments.integer("shape", side, 1) for side in shape)
        self.shape = (C, H, W)
        self.schedule = schedule
        self.prediction_type = arguments.one_of(
            "prediction_type", prediction_type, PREDICTION_TYPES
        )
        self.conditioning = conditioning or Conditioning()
        self.defaults = defaults or SamplingDefaults()
        self.executor = Executor(
            network,
            call,
            shape=self.shape,
            num_timesteps=len(schedule),
            conditioning=self.conditioning,
            device=arguments.resolve_device(device),
            dtype=dtype,
            backend=backend,
            compile=compile,
            capture=capture,
            tune=tune,
            graph_memory=graph_memory,
        )
        self._guests = Guests()

    @property
    def network(self) -> nn.Module | Callable[..., Tensor]:
        """The network, on the sampler's device."""
        return self.executor.network

    @property
    def device(self) -> torch.device:
        """Where it runs and where images are."""
        return self.executor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's input."""
        return self.executor.dtype

    @property
    def backend(self) -> str:
        """The path: "reference" or "fused"."""
        return self.executor.backend

    @isolated(grad=False)
    def initial_noise(self, seeds: int | Iterable[int] | Tensor) -> Tensor:
        """Return the x_T of these seeds, float32 [B, C, H, W]."""
        return self.executor.draw(arguments.seed_list(seeds), 0, Purpose.INITIAL)

    @isolated(grad=False)
    def step_noise(self, seeds: int | Iterable[int] | Tensor, key: int) -> Tensor:
        """Return the z of the step with noise key ``key``, float32 [B, C, H, W].

        The key of a step is its timestep (``Plan.noise_keys``).
        """
        key = arguments.integer("key", key, -(2**63), 2**63 - 1)
        return self.executor.draw(arguments.seed_list(seeds), key, Purpose.REVERSE_STEP)

    @isolated(grad=False)
    def plan(
        self, solver: str | Plan = "ddim", num_steps: int = 50, **options: Unpack[PlanOptions]
    ) -> Plan:
        """Return the rows that ``sample`` would apply; arguments are those of ``sample``."""
        if isinstance(solver, Plan):
            for name, value in options.items():
                if value is not None:
                    raise ValueError(f"{name}={value!r}: must not be given beside a Plan")
            if solver.timesteps.min() < 0 or solver.timesteps.max() > len(self.schedule) - 1:
                raise ValueError(
                    f"solver: the plan's timesteps must be in 0..{len(self.schedule) - 1}"
                )
            return solver
        return self.defaults.plan(self.schedule, self.prediction_type, solver, num_steps, options)

    @isolated(grad=False)
    def sample(
        self,
        seeds: int | Iterable[int] | Tensor,
        labels: int | Iterable[int] | Tensor | None = None,
        guidance: float | Sequence[float] = 1.0,
        solver: str | Plan = "ddim",
        num_steps: int = 50,
        *,
        image: Tensor | None = None,
        strength: float | None = None,
        batch_size: int = 64,
        exact: bool = False,
        bucket: int | None = None,
        progress: bool = False,
        on_step: Callable[[int, Tensor], None] | None = None,
        initial_noise: Tensor | None = None,
        step_noise: Callable[[int], Tensor | None] | None = None,
        **options: Unpack[PlanOptions],
    ) -> Tensor:
        """Draw one image a seed.

        Args:
            seeds: any number of 64-bit integers; an image depends on its own seed only.
            labels: one label, or one for each seed; None asks for the null class.
            guidance: w of out = uncond + w (cond - uncond), one or one for each seed; 1 is off
                and costs one network evaluation a step instead of two.
            solver: a name of solvers.SOLVERS, or a Plan of your own.
            num_steps: 1..T; of no effect beside a Plan.
            image: float [N, C, H, W] or [C, H, W] in [-1, 1] to begin at (SDEdit), noised.
            strength: in (0, 1], beside an image: the share of the steps that is taken.
            batch_size: images at a time.
            exact: run the compiled network on one shape always, whatever is asked for, so that an
                image's bits do not depend on how many others there are: at the price of a full
                batch each time.
            bucket: how many evaluations the network runs at a time, the spare ones included. By
                default as many as are asked for, or, compiled or captured, the next power of two
                and ``batch_size`` images at most: one shape for each is compiled.
            progress: show a bar.
            on_step: called after each step of each chunk with the step's number and the x0
                predicted by it, float32 [b, C, H, W].
            initial_noise: float [N, C, H, W] to begin with instead of the seeds' noise.
            step_noise: returns the noise of a step, float [N, C, H, W], by its number, to use
                instead of the seeds' (None where the step takes none); asked for in order, for all
                images in one batch. Steps are then not captured.
            options: of the plan (PlanOptions): None is the model's own, or none.

        Returns:
            float32 [N, C, H, W] in about [-1, 1], on the sampler's device.

        Raises:
            ValueError: an argument that is not allowed.
            NonFiniteError: the network's output turned NaN or infinite.
            RuntimeError: the network's weights were changed meanwhile, by another thread.
        """
        batch = arguments.integer("batch_size", batch_size, 1)
        images = inputs.images_of(seeds, labels, guidance, self.conditioning)
        count = len(images)
        plan, begin = self._begin(solver, num_steps, image, strength, count, options)
        if len(plan) > len(self.schedule):
            raise ValueError(f"solver: a plan of {len(plan)} rows; at most {len(self.schedule)}")
        width = chunks.choose_width(self.executor, images, plan, batch, exact, bucket)
        shape = (count, *self.shape)
        z = inputs.noise_of("initial_noise", initial_noise, shape, self.device)
        if step_noise is not None and count > batch:
            raise ValueError(
                f"step_noise: {count} seeds must be one batch, of at most batch_size={batch}"
            )

        result = torch.empty(shape, dtype=torch.float32, device=self.device)
        parts = [slice(i, i + batch) for i in range(0, count, batch)]
        with self.executor.following(), chunks.bar_of(progress, len(parts) * len(plan)) as bar:
            if exact and width.lanes:
                self.executor.prove_exact(width.lanes)
            for part in parts:
                result[part] = chunks.draw(
                    self.executor, images, plan, width, part, begin, z,
                    step_noise, on_step, bar.update,
                )  # fmt: skip
        return result

    @isolated(grad=False)
    def trajectory(
        self,
        seeds: int | Iterable[int] | Tensor,
        labels: int | Iterable[int] | Tensor | None = None,
        guidance: float | Sequence[float] = 1.0,
        solver: str | Plan = "ddim",
        num_steps: int = 50,
        *,
        image: Tensor | None = None,
        strength: float | None = None,
        **options: Unpack[PlanOptions],
    ) -> Trajectory:
        """Begin to draw images that are stepped by hand, and can be saved on their way.

        Arguments and errors are those of ``sample``; all images are one batch.
        """
        images = inputs.images_of(seeds, labels, guidance, self.conditioning)
        plan, begin = self._begin(solver, num_steps, image, strength, len(images), options)
        return Trajectory.begin(self.executor, plan, images, begin)

    @isolated(grad=False)
    def resume(self, path: str | PathLike[str]) -> Trajectory:
        """Return the trajectory that ``Trajectory.save`` wrote, to go on from.

        Raises:
            CheckpointError: no such file, or not one of images that this sampler draws.
        """
        return load_trajectory(self.executor, path)

    @isolated(grad=False)
    def predict(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, *, evaluations: int = 0
    ) -> Tensor:
        """Return what the network says of noisy images, without guidance, for training's losses.

        Args:
            x_t: float [B, C, H, W] on the sampler's device.
            t: int64 [B], timesteps.
            labels: int64 [B], or None for a network that takes none.
            evaluations: how many of one image are to come, for compile="auto" to judge by; all
                calls should then be of one B, since a network is compiled for each.

        Returns:
            [B, C or 2C, H, W] in the network's dtype.

        Raises:
            ValueError: the network returns another shape.
        """
        with self.executor.exclusive():
            self.executor.renew()
            return self.executor.predict(x_t, t, labels, evaluations)

    def _begin(
        self,
        solver: str | Plan,
        num_steps: int,
        image: Tensor | None,
        strength: float | None,
        count: int,
        options: PlanOptions,
    ) -> tuple[Plan, Tensor | None]:
        """Return the plan, and the images that it begins at."""
        plan = self.plan(solver, num_steps, **options)
        if strength is not None:
            plan = plan.from_image(strength)
        return plan, inputs.begin_of(image, (count, *self.shape), plan, self.device)

    @isolated(grad=False)
    def update_weights(self, state: dict[str, Tensor]) -> None:
        """Copy new weights into our U-Net, in place; every call follows them.

        Engines of this sampler first finish the images that they are at, and start no others
        meanwhile, so that every image is of one network.

        Args:
            state: a state dict with diffusers' keys.

        Raises:
            RuntimeError: called by a callback of an engine's, or of the sampler's own.
            ValueError: the network is not our UNet, or the state is not one of its finite,
                matching state dicts; then nothing was changed.
        """
        check_state(self.network, state)
        self.executor.check_not_within()
        with self._guests.emptied(), self.executor.exclusive():
            self.executor.update_weights(state)

    def welcome(self, guest: Guest) -> None:
        """Have whoever draws images over many calls, such as an `Engine`, empty at new weights."""
        self._guests.add(guest)
