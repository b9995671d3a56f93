"""Samplers from model folders and from live objects of diffusers, and back into folders."""

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
    """The ways of `Sampler` into and out of model folders."""

    schedule: NoiseSchedule
    prediction_type: str
    defaults: SamplingDefaults
    conditioning: Conditioning

    @property
    def network(self) -> nn.Module | Callable[..., Tensor]:
        """The network, on the sampler's device."""
        raise NotImplementedError

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Schedule, prediction type and defaults with diffusers' keys, as a folder has them.

        Raises:
            ValueError: diffusers has no settings for these defaults.
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
        """Load a model in diffusers' layout.

        Args:
            source: a folder, of a pipeline or flat; or OWNER/NAME on the Hugging Face Hub.
            device: as for the class.
            dtype: of the network; by default bfloat16 on CUDA and float32 on the CPU.
            allow_pickle: read .bin weights, checked, where there are no safetensors.
            revision: on the hub, a branch, tag or commit.
            tables: "float64", or "diffusers" for the bits of its float32 schedule.
            options: backend, compile, capture, tune and graph_memory, as for the class.

        Raises:
            CheckpointError: no such model, or files or keys missing, broken or not supported.
            ValueError: an argument that is not allowed.
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
        """Take over live objects of diffusers; their weights are copied, where and as they are.

        A U-Net that is more than its weights and config, with hooks, a forward or an attention
        processor of its own, say, is called itself, as any network of one's own is: not copied,
        and not compiled unless asked.

        Args:
            model: a DDPMPipeline or DDIMPipeline, or a UNet2DModel.
            scheduler: needed beside a UNet2DModel; beside a pipeline, in place of its own.
            conditioning: what labels the network takes; by default every embedding is a class.
            tables: "float64", or "diffusers" for the bits of its float32 schedule.
            options: backend, compile, capture, tune and graph_memory, as for the class.

        Raises:
            ValueError: other classes, or settings that we have no rows or layers for.
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
        """Write a folder that diffusers loads, and ``from_pretrained`` too.

        Args:
            folder: made if it does not exist; the one that was loaded may be saved over.

        Raises:
            ValueError: the network is not ours, or its defaults have no settings in diffusers.
        """
        save_pretrained(folder, self.network, self.scheduler_config, self.conditioning)

    def replace(self, **changes: Any) -> Self:
        """Return a sampler like this one, but for these arguments of the class.

        Nothing compiled is taken over. Unless another network is given both share theirs, and
        follow its weights, whoever changes them.

        Raises:
            TypeError: no such argument.
            ValueError: one that is not allowed.
        """
        if changes.keys() & {"schedule", "prediction_type", "defaults"}:
            changes = {"scheduler": None, **changes}  # they no longer are what it says
        return super().replace(**changes)
