"""Replacements of diffusers' DDPMPipeline and DDIMPipeline, called as those are, over a `Sampler`.

from flashddpm import DDPMPipeline  # instead of: from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("folder").to("cuda")
image = pipe(generator=torch.manual_seed(0)).images[0]

Noise is drawn as diffusers draws it, from ``generator=`` or else from torch's default generator of
the pipeline's device: x_T in the network's dtype, then once a step, wherever its scheduler would
draw. In float32 the pictures are diffusers' to rounding, up to the quirks (deviations that we hold
for wrong) that `flashddpm.diffusion.diffusers_quirks` lists, which ``match_diffusers=True``
reproduces. In 16 bits pictures differ: diffusers rounds x_t after every step, we keep float32.

With ``seeds=`` noise is ours (kernels/reference/noise.py), and nothing is drawn from torch: an
image depends on its own seed only, whatever the batch, and on a GPU noisy steps are captured too.

Another scheduler is set as in diffusers, by its class:

pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

Callbacks and offloading are not supported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.checkpoints.pretrained import read_live_scheduler
from flashddpm.diffusion.plan_options import PlanOptions
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.host import isolated
from flashddpm.io.images import CHANNELS, to_pil
from flashddpm.networks.registry import Network
from flashddpm.sampling.generator_noise import GeneratorNoise, Generators, noise_of
from flashddpm.sampling.sampler import Sampler

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass(frozen=True)
class PipelineOutput:
    """The images that a pipeline returns; also output["images"] or output[0].

    Attributes:
        images: by output_type, "pil": a list of B PIL images; "np": a NumPy array, float32 [B, H,
            W, C] in [0, 1]; or "pt": a tensor, float32 [B, C, H, W] in [0, 1].
    """

    images: Any

    def __getitem__(self, key: str | int) -> Any:
        return self.images if key == "images" else (self.images,)[key]  # type: ignore[index]


@dataclass(frozen=True)
class SchedulerSettings:
    """The settings of a pipeline's scheduler.

    Attributes:
        config: the settings by diffusers' keys, as ``from_config`` of its schedulers takes them.
    """

    config: dict[str, Any]


class _Pipeline:
    """What both pipelines share: loading, their device, and drawing images from noise."""

    def __init__(
        self, sampler: Sampler | None = None, *, unet: Any = None, scheduler: Any = None
    ) -> None:
        if sampler is None:
            sampler = Sampler.from_diffusers(unet, scheduler)
        elif unet is not None or scheduler is not None:
            raise ValueError("sampler: must not be given beside unet or scheduler")
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler={type(sampler).__name__}: must be a flashddpm.Sampler")
        self.sampler = sampler
        self._progress = True

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Self:
        """Load a model in diffusers' layout, on the CPU and in float32 unless told otherwise.

        Args:
            folder: a folder, of a pipeline or flat, or OWNER/NAME on the Hugging Face Hub.
            torch_dtype: the dtype of the network: float32, bfloat16 or float16.
            device: "cpu", "cuda", "cuda:N" or "auto", or a torch.device.
            options: other arguments of `Sampler.from_pretrained`: allow_pickle, revision, tables,
                backend, compile, capture, tune or graph_memory.

        Raises:
            CheckpointError: if there is no such model, or if files or keys are missing, broken or
                not supported.
            ValueError: if an argument is not allowed.
        """
        return cls(Sampler.from_pretrained(folder, device=device, dtype=torch_dtype, **options))

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the model to a folder, made if missing, that diffusers and `from_pretrained` load.

        Raises:
            ValueError: if the network is not flashddpm's own, if the path is a file, or if
                diffusers has no settings for the sampler's defaults.
            OSError: if a file cannot be written.
        """
        self.sampler.save_pretrained(folder)

    @property
    def unet(self) -> nn.Module | Callable[..., Tensor]:
        """The network, a module or another callable, on the pipeline's device."""
        return self.sampler.network

    @property
    def scheduler(self) -> SchedulerSettings:
        """The scheduler's `SchedulerSettings`; assign a scheduler of diffusers to draw by it.

        Assigning one makes a new sampler of the same network, with its schedule in float64.

        Raises:
            ValueError: if the one assigned is of a class, or has settings, that are not supported;
                or, when read, if diffusers has no settings for the sampler's defaults.
        """
        return SchedulerSettings(self.sampler.scheduler_config)

    @scheduler.setter
    @isolated(grad=False)
    def scheduler(self, scheduler: Any) -> None:
        config, schedule, prediction_type, defaults = read_live_scheduler(scheduler)
        self.sampler = self.sampler.replace(
            schedule=schedule,
            prediction_type=prediction_type,
            defaults=defaults,
            scheduler=config,
        )

    @property
    def components(self) -> dict[str, Sampler]:
        """The arguments for another pipeline, {"sampler": sampler}, which shares the network."""
        return {"sampler": self.sampler}

    @property
    def device(self) -> torch.device:
        """The device on which the network runs, a torch.device."""
        return self.sampler.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's input, a torch.dtype."""
        return self.sampler.dtype

    @isolated(grad=False)
    def to(self, *where: str | torch.device | torch.dtype) -> Self:
        """Move the pipeline to a device, a dtype or both, and return it.

        If either changes, the pipeline gets a new sampler with a copy of the network; the sampler
        that it had stays as it was.

        Args:
            where: devices ("cpu", "cuda", "cuda:N", "auto" or a torch.device) and dtypes
                (torch.float32, torch.bfloat16 or torch.float16), in any order.

        Raises:
            ValueError: if there is no such device or dtype, or a network that is not flashddpm's
                own would have to be moved.
        """
        device, dtype = self.device, self.dtype
        for target in where:
            if isinstance(target, torch.dtype):
                dtype = arguments.resolve_dtype(target, dtype)
            else:
                device = arguments.resolve_device(target)
        if (device, dtype) != (self.device, self.dtype):
            self.sampler = _moved(self.sampler, device, dtype)
        return self

    def set_progress_bar_config(self, disable: bool = False) -> None:
        """Show a progress bar while steps are taken, or, with ``disable`` true, none.

        Raises:
            ValueError: if disable is no bool.
        """
        self._progress = not arguments.boolean("disable", disable)

    def _defaults(self) -> SamplingDefaults:
        """Return the defaults that this pipeline reads from the scheduler's config."""
        return self.sampler.defaults

    @isolated(grad=False)
    def _run(
        self,
        num_steps: int,
        options: PlanOptions,
        batch_size: int | None,
        generator: Generators | None,
        seeds: int | Iterable[int] | Tensor | None,
        labels: int | Iterable[int] | Tensor | None,
        guidance: float | Sequence[float],
        output_type: str,
        return_dict: bool,
    ) -> PipelineOutput | tuple[Any]:
        """Sample by a plan of these options, and return images of the type that was asked for."""
        sampler, defaults = self.sampler, self._defaults()
        arguments.one_of("output_type", output_type, OUTPUT_TYPES)
        arguments.boolean("return_dict", return_dict)
        if output_type == "pil" and sampler.shape[0] not in CHANNELS:
            raise ValueError(
                f"output_type='pil': must be np or pt for images of {sampler.shape[0]} channels; "
                "pictures have 1 to 4"
            )
        if generator is not None and seeds is not None:
            raise ValueError("seeds: must not be given beside generator")
        solver = defaults.solver
        plan = defaults.plan(sampler.schedule, sampler.prediction_type, solver, num_steps, options)
        seed = _seeds(batch_size, seeds)
        noise: dict[str, Any] = {}
        if seeds is None:
            draws = GeneratorNoise(generator, (len(seed), *sampler.shape), sampler.device)
            noise = noise_of(draws, solver, plan, options.get("eta") or 0.0, sampler.dtype)
        x = sampler.sample(seed, labels, guidance, plan, progress=self._progress, **noise)
        images: Any = to_pil(x) if output_type == "pil" else (x / 2 + 0.5).clamp(0, 1)
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        return PipelineOutput(images) if return_dict else (images,)


class DDPMPipeline(_Pipeline):
    """Draws images by the solver of the model's scheduler: ddpm, unless that says otherwise.

    Args:
        sampler: the `Sampler` to draw with; None to make one of ``unet`` and ``scheduler``.
        unet, scheduler: a UNet2DModel and a scheduler of diffusers, in place of a sampler; the
            weights are copied (`Sampler.from_diffusers`).

    Attributes:
        sampler: the sampler in use; it is replaced by `to` and by setting ``scheduler``.

    Raises:
        ValueError: if sampler is no `Sampler` or is given beside unet or scheduler, or if these are
            of classes, or have settings, that are not supported.
    """

    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators | None = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seeds: int | Iterable[int] | Tensor | None = None,
        class_labels: int | Iterable[int] | Tensor | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        match_diffusers: bool = False,
    ) -> PipelineOutput | tuple[Any]:
        """Draw images; B is their number.

        Args:
            batch_size: B; None for 1, or for as many as seeds.
            generator: the torch.Generator of the noise, drawn as diffusers draws it, or a list of
                B; None for torch's own of the pipeline's device, which torch.manual_seed sets.
            num_inference_steps: the number of steps, in 1..T.
            output_type: "pil"; "np", float32 [B, H, W, C] in [0, 1]; or "pt", float32 [B, C, H, W]
                in [0, 1] on the pipeline's device.
            return_dict: whether to return a `PipelineOutput`, or else a tuple of its images alone.
            seeds: the seeds of our noise, B integers in [-2^63, 2^64), in place of a generator:
                images then depend on neither the batch nor what was drawn before.
            class_labels: one class label, or one for each image; None for the null class.
            guidance_scale: the guidance scale w of out = uncond + w (cond - uncond), one or one for
                each image; 1 is off.
            match_diffusers: whether to reproduce diffusers' quirks (deviations held for wrong).

        Raises:
            ValueError: if an argument is not allowed.
            NonFiniteError: if the network's output turned NaN or infinite.
            RuntimeError: if another thread changed the network's weights meanwhile.
        """
        return self._run(
            num_inference_steps,
            {"match_diffusers": match_diffusers},
            batch_size,
            generator,
            seeds,
            class_labels,
            guidance_scale,
            output_type,
            return_dict,
        )


class DDIMPipeline(_Pipeline):
    """Draws images by ddim, whatever the solver of the model's scheduler is.

    As in diffusers the settings are those that a DDIMScheduler takes from the model's config.

    Args:
        sampler: the `Sampler` to draw with; None to make one of ``unet`` and ``scheduler``.
        unet, scheduler: a UNet2DModel and a scheduler of diffusers, in place of a sampler; the
            weights are copied (`Sampler.from_diffusers`).

    Attributes:
        sampler: the sampler in use; it is replaced by `to` and by setting ``scheduler``.

    Raises:
        ValueError: if sampler is no `Sampler` or is given beside unet or scheduler, or if these are
            of classes, or have settings, that are not supported.
    """

    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seeds: int | Iterable[int] | Tensor | None = None,
        class_labels: int | Iterable[int] | Tensor | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        match_diffusers: bool = False,
    ) -> PipelineOutput | tuple[Any]:
        """Draw images by ddim; B is their number.

        Args:
            batch_size, generator, seeds: B (None for 1, or as many as seeds); the noise's source, a
                torch.Generator, B of them or None for torch's own; or B seeds of our noise instead.
            output_type, return_dict: "pil", "np" or "pt"; `PipelineOutput` if true, else (images,).
            class_labels: one class label, or one for each image; None for the null class.
            guidance_scale: w of out = uncond + w (cond - uncond), one or one for each; 1 is off.
            match_diffusers: whether to reproduce diffusers' quirks (deviations held for wrong).
            eta: the share of ddpm's noise, in [0, 1]: 0 is deterministic, 1 as noisy as ddpm.
            num_inference_steps: the number of steps, in 1..T.
            use_clipped_model_output: whether eps is derived from the clipped x0; None is False.

        Raises:
            ValueError: if an argument is not allowed, or the model's config has settings of a
                DDIMScheduler that are not supported.
            NonFiniteError: if the network's output turned NaN or infinite.
            RuntimeError: if another thread changed the network's weights meanwhile.
        """
        options: PlanOptions = {"match_diffusers": match_diffusers, "eta": eta}
        if use_clipped_model_output is not None:
            options["use_clipped_model_output"] = use_clipped_model_output
        return self._run(
            num_inference_steps,
            options,
            batch_size,
            generator,
            seeds,
            class_labels,
            guidance_scale,
            output_type,
            return_dict,
        )

    def _defaults(self) -> SamplingDefaults:
        try:
            config = self.sampler.scheduler_config
        except ValueError:  # a sampler made by hand, with what no scheduler of diffusers can say
            return replace(self.sampler.defaults, solver="ddim", sigmas=None)
        return SamplingDefaults.from_config(config, "DDIMScheduler")


def _seeds(batch_size: int | None, seeds: int | Iterable[int] | Tensor | None) -> list[int]:
    """Return one seed an image; where noise is not ours, they are of no effect."""
    count = None if batch_size is None else arguments.integer("batch_size", batch_size, 1)
    if seeds is None:
        return list(range(count or 1))
    seed = arguments.seed_list(seeds)
    if count not in (None, len(seed)):
        raise ValueError(f"batch_size={count}: must be {len(seed)}, one image a seed, or left out")
    return seed


def _moved(sampler: Sampler, device: torch.device, dtype: torch.dtype) -> Sampler:
    """Return a sampler like this one, with a copy of its network, elsewhere."""
    if not isinstance(sampler.network, Network):
        raise ValueError(
            f"sampler.network={type(sampler.network).__name__}: only flashddpm's UNet is moved; "
            "make a Sampler of this one where it shall run"
        )
    network = copy.deepcopy(sampler.network).to(device, dtype)
    return sampler.replace(network=network, device=device, dtype=dtype)
