r"""`Sampler`: draws images from seeds with a trained network, a schedule and a solver.

``backend="reference"`` is plain PyTorch: the network as written and kernels/reference/, neither
compiled nor captured. ``backend="fused"`` is the fast path: on CUDA Triton kernels and a captured
step, on the CPU the reference operations with the noise of many steps drawn in one call; on both,
our U-Net's time embeddings computed once for all steps, and the rest compiled if asked.
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
    """Draws images from a network; threads that call it at the same time take turns.

    Args:
        network: flashddpm's UNet or RMSUNet, or any module or function that predicts from (x_t, t[,
            labels]). A module is moved to the device.
        schedule: the forward process that the network was trained on.
        shape: (C, H, W) of an image, in pixels.
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".
        call: how to call a network of another signature, on L lanes (evaluations; a guided image
            takes two): (x_t, t, labels) -> [L, C or 2C, H, W], with x_t [L, C, H, W] in the
            network's dtype, t int64 [L] (float32 where timesteps are fractional), labels int64 [L]
            or None. A parameter ``index`` is given by name, int64 [L]: each lane's place in
            ``seeds``, or its `Request.index`, by which to find conditions that are kept outside.
        conditioning: the class labels that the network takes; None for no labels.
        defaults: how images are sampled where a call does not say: spacing, offset, clipping,
            variance.
        device: "auto" (CUDA where there is a GPU, else the CPU), "cpu", "cuda", "cuda:N" or a
            torch.device.
        dtype: the dtype of the network's input: float32, bfloat16 or float16, or its name; None for
            the network's own.
        backend: "reference", "fused" or "auto", which is "fused" (on CUDA without Triton,
            "reference").
        compile: True, False, or "auto": on CUDA always for flashddpm's networks, on the CPU when
            the work asked for repays it, never for others.
        capture: whether steps become CUDA graphs: True, False, or "auto", which is on CUDA for
            flashddpm's networks.
        tune: compile by trying many kernels for each operation (max-autotune): minutes for each
            shape, once, since what is found is kept in the user's cache.
        graph_memory: the bytes of GPU memory that captured steps may hold, past which steps run one
            by one; None for half of what is free when the first is captured.
        scheduler: the config with diffusers' keys, if any, that schedule, prediction_type and
            defaults were read from; ``save_pretrained`` writes it.

    Attributes:
        executor: the `Executor` that runs the network. The others are the arguments of their names.

    Raises:
        ValueError: if an argument is not allowed, or does not fit the network.
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
        """The network, a module or another callable, on the sampler's device."""
        return self.executor.network

    @property
    def device(self) -> torch.device:
        """The device on which the network runs and images are returned, a torch.device."""
        return self.executor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's input, a torch.dtype."""
        return self.executor.dtype

    @property
    def backend(self) -> str:
        """The backend (path) by which the network runs, "reference" or "fused"."""
        return self.executor.backend

    @isolated(grad=False)
    def initial_noise(self, seeds: int | Iterable[int] | Tensor) -> Tensor:
        """Return the standard normal noise of x_T, float32 [B, C, H, W], on the sampler's device.

        Args:
            seeds: one integer in [-2^63, 2^64), B of them, or a tensor of B integers.

        Raises:
            ValueError: if a seed is not allowed, or there is none.
        """
        return self.executor.draw(arguments.seed_list(seeds), 0, Purpose.INITIAL)

    @isolated(grad=False)
    def step_noise(self, seeds: int | Iterable[int] | Tensor, key: int) -> Tensor:
        """Return the standard normal noise of a step, float32 [B, C, H, W], on the device.

        Args:
            seeds: one integer in [-2^63, 2^64), B of them, or a tensor of B integers.
            key: the step's noise key (upper 64 bits of the counter), a signed 64-bit integer. It
                is the step's timestep, cut to an integer, for timesteps that do not repeat
                (``Plan.noise_keys``).

        Raises:
            ValueError: if a seed or the key is not allowed, or there is no seed.
        """
        key = arguments.integer("key", key, -(2**63), 2**63 - 1)
        return self.executor.draw(arguments.seed_list(seeds), key, Purpose.REVERSE_STEP)

    @isolated(grad=False)
    def plan(
        self, solver: str | Plan = "ddim", num_steps: int = 50, **options: Unpack[PlanOptions]
    ) -> Plan:
        """Return the plan that ``sample`` would follow: its steps, a row of coefficients each.

        Args:
            solver: the name of a solver (`sample` has the list), or a Plan, which is returned as it
                is.
            num_steps: the number of steps, in 1..T; of no effect beside a Plan.
            options: options of the plan, as `PlanOptions` says; None for the model's own.

        Raises:
            ValueError: if an argument or option is not allowed, an option is given beside a Plan,
                or a timestep of it is outside of 0..T-1.
        """
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
        """Draw one image for each seed; N is the number of seeds.

        Args:
            seeds: N integers in [-2^63, 2^64), or one; an image depends on its own seed only.
            labels: one class label, or one for each seed; None for the null class.
            guidance: the guidance scale w of out = uncond + w (cond - uncond), one or one for each
                seed; 1 is off and costs one network evaluation a step instead of two.
            solver: the name of a solver, "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler" or
                "euler_ancestral"; or a Plan of your own.
            num_steps: the number of steps, in 1..T; of no effect beside a Plan.
            image: floats [N, C, H, W] or [C, H, W] in [-1, 1] to begin at (SDEdit), which are
                noised; it needs strength, or a Plan that begins at an image.
            strength: the share of the steps that is taken, in (0, 1], beside an image.
            batch_size: the most images at a time.
            exact: whether to always run the compiled network on a full batch's lanes, so that an
                image's bits do not depend on how many others there are.
            bucket: the number of lanes (evaluations a step) to which each batch is padded, at least
                those it uses; None for no padding or, compiled or captured, the next power of two,
                at most the lanes of a full batch; with exact those always.
            progress: show a progress bar.
            on_step: called after each step of each batch with the step's number, from 0, and the x0
                that it predicts, float32 [b, C, H, W] for the batch's b images, a new tensor on the
                device; what it raises is raised here.
            initial_noise: floats [N, C, H, W], standard normal, for x_T in place of the seeds'.
            step_noise: called in order with the number of each step, from 0, returns its noise,
                floats [N, C, H, W], in place of the seeds', or None where the step takes none. All
                images must be one batch, and steps are not captured.
            options: options of the plan, as `PlanOptions` says; None for the model's own.

        Returns:
            float32 [N, C, H, W] in about [-1, 1], on the sampler's device.

        Raises:
            ValueError: if an argument or option is not allowed, exact images cannot be promised, or
                the network's output is of a wrong shape.
            NonFiniteError: if the network's output turned NaN or infinite.
            RuntimeError: if another thread changed the network meanwhile, if it was changed in a
                way that cannot be followed, or if a callback of this sampler calls it.
            CompilationError: if the compiler fails where compile=True or exact.
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
        """Begin to draw N images, one batch, which are stepped by hand and can be saved midway.

        Args:
            seeds: one integer in [-2^63, 2^64), N of them, or a tensor of integers.
            labels: one class label, or one for each seed; None for the null class, if any.
            guidance: the guidance scale w, one or one for each seed; 1 is off.
            solver: the name of a solver (`sample` has the list), or a Plan of your own.
            num_steps, image, strength, options: as `sample` says: the number of steps, in 1..T;
                floats [N, C, H, W] or [C, H, W] in [-1, 1] to begin at; the share of the steps
                then, in (0, 1]; and options of the plan (`PlanOptions`).

        Raises:
            ValueError: if an argument or option is not allowed.
            RuntimeError: if a callback of this sampler calls it, or the network's parameters were
                moved.
        """
        images = inputs.images_of(seeds, labels, guidance, self.conditioning)
        plan, begin = self._begin(solver, num_steps, image, strength, len(images), options)
        return Trajectory.begin(self.executor, plan, images, begin)

    @isolated(grad=False)
    def resume(self, path: str | PathLike[str]) -> Trajectory:
        """Return the trajectory that `Trajectory.save` wrote to a file, ready for its next step.

        Raises:
            CheckpointError: if the file is missing or broken, or is no trajectory of this sampler's
                images.
            ValueError: if its plan learns the variance and the U-Net does not predict it.
            RuntimeError: if a callback of this sampler calls it, or the network's parameters were
                moved.
        """
        return load_trajectory(self.executor, path)

    @isolated(grad=False)
    def predict(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, *, evaluations: int = 0
    ) -> Tensor:
        """Return the network's output for noisy images, without guidance, as losses take it.

        Args:
            x_t: floating-point [B, C, H, W], the noisy images, on the sampler's device.
            t: int64 [B], their timesteps, in 0..T-1; like x_t and labels not checked.
            labels: int64 [B], class labels, or None for a network that takes none.
            evaluations: the number of evaluations of one image to come, by which compile="auto"
                decides on the CPU; calls should then have one B, since each B is compiled.

        Returns:
            [B, C or 2C, H, W] in the network's dtype, without gradients.

        Raises:
            ValueError: if the network's output is of another shape.
            RuntimeError: if a callback of this sampler calls it, or the network's parameters were
                moved.
            CompilationError: if the compiler fails where compile=True.
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
        """Copy new weights into flashddpm's network, in place; all later calls use them.

        Engines of this sampler first finish the images under way, so that each is of one network.

        Args:
            state: a state dict with diffusers' keys, in any floating-point dtype, on any device.

        Raises:
            ValueError: if the network is not flashddpm's own, or the state does not have its keys
                and shapes, or numbers that are not finite in its dtype; nothing is changed then.
            RuntimeError: if a callback of the sampler or of one of its engines calls it.
        """
        check_state(self.network, state)
        self.executor.check_not_within()
        with self._guests.emptied(), self.executor.exclusive():
            self.executor.update_weights(state)

    def welcome(self, guest: Guest) -> None:
        """Have a guest (an object such as an `Engine`) end its images before weights change."""
        self._guests.add(guest)
