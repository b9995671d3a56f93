"""diffusers' DDPMPipeline and DDIMPipeline, by their calling conventions, over a `Sampler`.

from flashddpm import DDPMPipeline  # instead of: from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("folder").to("cuda")
image = pipe(generator=torch.manual_seed(0)).images[0]

Noise is drawn as diffusers draws it, from ``generator=`` or else from torch's default generator of
the pipeline's device: x_T in the network's dtype, then once a step, wherever its scheduler would
draw. In float32 the pictures are diffusers' to rounding, up to the quirks that
`flashddpm.diffusion.diffusers_quirks` lists, which ``match_diffusers=True`` brings back. In 16 bits
diffusers rounds x_t after every step; here it stays float32, and pictures differ by that.

With ``seeds=`` noise is ours (noise.py), and nothing is drawn from torch: an image depends on its
own seed only, whatever the batch, and on a GPU noisy steps are captured too.

Another scheduler is set as in diffusers, by its class:

pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

Not here: callbacks, offloading.
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
    """What a pipeline returns.

    Attributes:
        images: PIL images; or float32 in [0, 1], an array [B, H, W, C] or a tensor [B, C, H, W].
    """

    images: Any

    def __getitem__(self, key: str | int) -> Any:
        return self.images if key == "images" else (self.images,)[key]  # type: ignore[index]


@dataclass(frozen=True)
class SchedulerSettings:
    """What a pipeline's scheduler is set to.

    Attributes:
        config: with diffusers' keys: what ``from_config`` of its schedulers takes.
    """

    config: dict[str, Any]


class _Pipeline:
    """What both pipelines share: where they run, and from noise to pictures."""

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
        """Load what `Sampler.from_pretrained` loads; its other options may be given too.

        As in diffusers the model is on the CPU, in float32, unless told otherwise here or by `to`.

        Raises:
            CheckpointError: files or keys missing, broken or not supported.
            ValueError: an argument that is not allowed.
        """
        return cls(Sampler.from_pretrained(folder, device=device, dtype=torch_dtype, **options))

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write what `Sampler.save_pretrained` writes; errors are its own."""
        self.sampler.save_pretrained(folder)

    @property
    def unet(self) -> nn.Module | Callable[..., Tensor]:
        """The network, on the pipeline's device."""
        return self.sampler.network

    @property
    def scheduler(self) -> SchedulerSettings:
        """The settings of the scheduler; set one of diffusers to draw by it, with this network.

        The schedule is then computed in float64, as `from_pretrained` does by default.

        Raises:
            ValueError: one of another class, or settings that we have no rows for.
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
        """What another pipeline of ours is made of: ``DDIMPipeline(**pipe.components)``."""
        return {"sampler": self.sampler}

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.sampler.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network."""
        return self.sampler.dtype

    @isolated(grad=False)
    def to(self, *where: str | torch.device | torch.dtype) -> Self:
        """Move to a device, a dtype or both; return the pipeline, with a new sampler.

        The sampler that it had stays as it was, with its own copy of the weights.

        Raises:
            ValueError: no such device or dtype, or a network that is not flashddpm's UNet.
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
        """Show a bar while steps are taken, or not."""
        self._progress = not arguments.boolean("disable", disable)

    def _defaults(self) -> SamplingDefaults:
        """Return what the scheduler's config says to this pipeline."""
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
        """Sample by a plan of these options; return what was asked for."""
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
    """Draws by the model's own solver: that of its scheduler, ddpm unless it says otherwise.

    Args:
        sampler: what to draw with.
        unet, scheduler: of diffusers, in its place (`Sampler.from_diffusers`).

    Attributes:
        sampler: the one in use; another one after `to` and after a scheduler is set.
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
        """Draw images.

        Args:
            batch_size: how many; by default 1, or as many as seeds.
            generator: of the noise, drawn as by diffusers; or one for each image; by default
                torch's own of the pipeline's device, which torch.manual_seed sets.
            num_inference_steps: 1..T.
            output_type: "pil"; "np", float32 [B, H, W, C] in [0, 1]; or "pt", float32
                [B, C, H, W] in [0, 1] on the pipeline's device.
            return_dict: False for a tuple of one.
            seeds: of our noise, one an image, in place of a generator: the way to images that
                depend on neither the batch nor what was drawn before.
            class_labels: one, or one for each image; None asks for the null class.
            guidance_scale: w of out = uncond + w (cond - uncond), one or one for each image.
            match_diffusers: draw diffusers' pictures where we hold them for wrong, too
                (flashddpm.diffusion.diffusers_quirks).

        Raises:
            ValueError: an argument that is not allowed.
            NonFiniteError: the network's output turned NaN or infinite.
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
    """Draws by ddim, whatever the model's own solver is.

    As in diffusers the settings are those that a DDIMScheduler takes from the model's config.

    Args:
        sampler: what to draw with.
        unet, scheduler: of diffusers, in its place (`Sampler.from_diffusers`).

    Attributes:
        sampler: the one in use; another one after `to` and after a scheduler is set.
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
        """Draw images; arguments and errors are those of `DDPMPipeline`, and these.

        Args:
            eta: 0 is deterministic, 1 as noisy as ddpm.
            use_clipped_model_output: take eps from the clipped x0, not from the output.

        Raises:
            ValueError: the model's config has settings of DDIMScheduler that we have no rows for.
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
