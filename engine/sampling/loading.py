"""`Loadable`: samplers made from model folders or diffusers' live objects, and saved to folders."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.checkpoints.pretrained import (
    Pretrained,
    load_diffusers,
    load_pretrained,
    save_pretrained,
    scheduler_config,
)
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.execution.backends import BACKENDS
from flashddpm.host import isolated
from flashddpm.networks.conditioning import Conditioning
from flashddpm.sampling.remade import Remade
from flashddpm.sampling.run_options import RunOptions


class Loadable(Remade):
    """The base class of `Sampler` that loads it from, and saves it to, model folders.

    Attributes:
        schedule: the forward process that the network was trained on.
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".
        defaults: how images are sampled where a call does not say: spacing, clipping, variance.
        conditioning: the class labels that the network takes.
    """

    schedule: NoiseSchedule
    prediction_type: str
    defaults: SamplingDefaults
    conditioning: Conditioning

    @property
    def network(self) -> nn.Module | Callable[..., Tensor]:
        """The network, a module or another callable, on the sampler's device."""
        raise NotImplementedError

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The schedule, prediction type and defaults as a dict with the keys of diffusers' configs.

        Raises:
            ValueError: if the sampler was made without such a config, and diffusers' scheduler for
                its solver has no settings for its defaults.
        """
        known = self._arguments["scheduler"]
        if known is not None:
            return dict(known)
        return scheduler_config(self.schedule, self.prediction_type, self.defaults)

    @classmethod
    @isolated(grad=False)
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        *,
        allow_pickle: bool = False,
        revision: str | None = None,
        tables: str = "float64",
        **options: Unpack[RunOptions],
    ) -> Self:
        """Load a model in diffusers' layout, and return a sampler of it.

        Args:
            source: a folder, of a pipeline or flat, or OWNER/NAME of a repository on the Hugging
                Face Hub, which is downloaded.
            device: "auto" (CUDA where there is a GPU, else the CPU), "cpu", "cuda", "cuda:N" or a
                torch.device.
            dtype: the dtype of the network: float32, bfloat16 or float16, or its name; None for
                bfloat16 on CUDA and float32 on the CPU.
            allow_pickle: whether .bin weights are read, with checks, where there are no
                safetensors.
            revision: a branch, tag or commit on the hub; None for the default branch.
            tables: the precision of the schedule: "float64", or "diffusers" for the bits of its
                float32 tables.
            options: how the sampler runs: backend, compile and capture, "auto" by default; tune,
                False; and graph_memory, None (`RunOptions`).

        Raises:
            CheckpointError: if there is no such model, or if files or keys are missing, broken or
                not supported.
            ValueError: if an argument is not allowed.
        """
        target = arguments.resolve_device(device)
        cuda = target.type == "cuda"
        kind = arguments.resolve_dtype(dtype, torch.bfloat16 if cuda else torch.float32)
        arguments.one_of("backend", options.get("backend", "auto"), BACKENDS)
        model = load_pretrained(source, target, kind, allow_pickle, revision, tables)
        return cls._of(model, options)

    @classmethod
    @isolated(grad=False)
    def from_diffusers(
        cls,
        model: Any,
        scheduler: Any = None,
        *,
        conditioning: Conditioning | None = None,
        tables: str = "float64",
        **options: Unpack[RunOptions],
    ) -> Self:
        """Make a sampler of live objects of diffusers, with a copy of their weights.

        The copy is on the device and in the dtype of the original. A U-Net that is more than its
        weights and config, with hooks or a forward or an attention processor of its own, say, is
        not copied: it is called itself, and not compiled unless asked.

        Args:
            model: a DDPMPipeline, a DDIMPipeline or a UNet2DModel.
            scheduler: a scheduler of diffusers, needed beside a UNet2DModel; beside a pipeline it
                replaces the pipeline's own.
            conditioning: the class labels that the network takes; None for as many classes as it
                has class embeddings.
            tables: the precision of the schedule: "float64", or "diffusers" for the bits of its
                float32 tables.
            options: how the sampler runs: backend, compile and capture, "auto" by default; tune,
                False; and graph_memory, None (`RunOptions`).

        Raises:
            ValueError: if an object is of another class, has settings or weights that are not
                supported, or there is no scheduler; or if another argument is not allowed.
        """
        return cls._of(load_diffusers(model, scheduler, conditioning, tables), options)

    @classmethod
    def _of(cls, model: Pretrained, options: RunOptions) -> Self:
        parameter = next(model.unet.parameters())
        return cls(
            network=model.unet,
            schedule=model.schedule,
            shape=model.shape,
            prediction_type=model.prediction_type,
            conditioning=model.conditioning,
            defaults=model.defaults,
            device=parameter.device,
            dtype=parameter.dtype,
            scheduler=model.scheduler,
            **options,
        )

    @isolated(grad=False)
    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the model to a folder that diffusers and ``from_pretrained`` load.

        Args:
            folder: the folder, which is made if it is missing; a model in it is replaced.

        Raises:
            ValueError: if the network is not flashddpm's own, if the path is a file, or if
                diffusers has no settings for the sampler's defaults.
            OSError: if a file cannot be written.
        """
        save_pretrained(folder, self.network, self.scheduler_config, self.conditioning)

    def replace(self, **changes: Any) -> Self:
        """Return a new sampler with the arguments of this one, except for those given here.

        Nothing compiled is taken over. Unless another network is given, both use the same one, and
        follow changes of its weights.

        Args:
            changes: arguments of `Sampler`, by name. If schedule, prediction_type or defaults are
                among them, scheduler (the config with diffusers' keys) is dropped unless it is
                given too.

        Raises:
            TypeError: if there is no such argument.
            ValueError: if a value is not allowed.
        """
        if changes.keys() & {"schedule", "prediction_type", "defaults"}:
            changes = {"scheduler": None, **changes}  # they no longer are what it says
        return super().replace(**changes)
