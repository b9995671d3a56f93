"""The same images by each peer: diffusers as a user runs it, and at its best; our own eager path.

Every side draws a batch in two ways: as it is timed, with noise of its own, and with noise that is
given, so that all sides must give the same images before any is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn

from flashddpm.benchmarks.peers.models import Model, model
from flashddpm.sampling.sampler import Sampler

RECOMPILE_LIMIT = 64
"""Shapes that one network is compiled for, past which Dynamo would stop."""

MODES = {
    "graphs": "reduce-overhead",
    "best": "max-autotune",
    "graphless": "max-autotune-no-cudagraphs",
}
"""Of torch.compile on CUDA, for diffusers' U-Net."""


class Side(Protocol):
    """A way to draw a batch."""

    def timed(self) -> Tensor:
        """Draw the batch as a user does."""

    def given(self, x_T: Tensor, seed: int) -> Tensor:
        """Draw it from x_T, float32 [B, C, H, W], with the noise of `noise_of` (seed)."""


def noise_of(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Callable[[int], Tensor]:
    """Return what draws the noise of one step after the other, float32, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(tuple(shape), generator=generator).to(dtype).float()


class Ours:
    """A sampler of ours, for images of seeds 0, 1, 2, ...; labels in turn.

    Args:
        sampler: ours, around whatever network.
        dtype: that the given noise is rounded to.
    """

    def __init__(
        self, sampler: Sampler, batch: int, solver: str, num_steps: int, dtype: torch.dtype
    ) -> None:
        self.sampler, self.dtype = sampler, dtype
        classes = sampler.conditioning.num_classes
        labels = None if classes is None else [i % classes for i in range(batch)]
        self.arguments: dict[str, Any] = {
            "seeds": range(batch),
            "labels": labels,
            "solver": solver,
            "num_steps": num_steps,
            "batch_size": batch,
        }

    def timed(self) -> Tensor:
        """Draw the batch, with the noise of the seeds."""
        return self.sampler.sample(**self.arguments)

    def given(self, x_T: Tensor, seed: int) -> Tensor:
        """Draw it with given noise; without any where the solver takes none, to be captured."""
        options: dict[str, Any] = {"initial_noise": x_T}
        if self.arguments["solver"] != "ddim":
            options["step_noise"] = noise_of(x_T.shape, self.dtype, seed)
        return self.sampler.sample(**self.arguments, **options)


class Diffusers:
    """diffusers' U-Net and scheduler, in the loop of its pipelines.

    The network is told each timestep on its own device: a step waits for no copy.

    Args:
        of: the model.
        unet: diffusers'.
        batch, solver, num_steps, device: what is drawn.
        noise_dtype: that the given noise is rounded to; by default the network's.
    """

    def __init__(
        self,
        of: Model,
        unet: nn.Module,
        batch: int,
        solver: str,
        num_steps: int,
        device: str,
        noise_dtype: torch.dtype | None = None,
    ) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler

        kind: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[solver]
        self.unet, self.batch, self.device, self.shape = unet, batch, device, of.shape
        self.scheduler = kind.from_config(of.scheduler)
        self.scheduler.set_timesteps(num_steps)
        self.timesteps = [(t, t.to(device)) for t in self.scheduler.timesteps]
        labels = of.labels(batch)
        self.labels = None if labels is None else torch.tensor(labels, device=device)
        self.dtype: torch.dtype = next(unet.parameters()).dtype
        self.noise_dtype = noise_dtype or self.dtype

    def timed(self) -> Tensor:
        """Draw the batch, with torch's noise."""
        shape = (self.batch, *self.shape)
        return self._run(torch.randn(shape, device=self.device, dtype=self.dtype))

    def given(self, x_T: Tensor, seed: int) -> Tensor:
        """Draw it with given noise."""
        from diffusers.schedulers import scheduling_ddpm

        noise = noise_of(x_T.shape, self.noise_dtype, seed)

        def randn_tensor(shape: Any, **options: Any) -> Tensor:
            return noise(0).to(self.device, self.dtype)

        with mock.patch.object(scheduling_ddpm, "randn_tensor", randn_tensor):
            return self._run(x_T.to(self.dtype)).float()

    @torch.no_grad()
    def _run(self, x: Tensor) -> Tensor:
        for t, on_device in self.timesteps:
            out = self.unet(x, on_device, self.labels, return_dict=False)[0]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x


def as_called(network: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return diffusers' U-Net as our loop calls a network: (x_t, t, labels) -> out."""

    def call(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return network(x_t, t, labels, return_dict=False)[0]

    return call


def fuse_projections(unet: nn.Module) -> None:
    """Make one product of the queries, keys and values of every attention of diffusers' U-Net."""
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    processor: Any = FusedAttnProcessor2_0()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
            module.set_processor(processor)


@lru_cache(maxsize=4)
def diffusers_unet(name: str, dtype: torch.dtype, device: str, how: str = "best") -> nn.Module:
    """Return diffusers' U-Net on a model's weights.

    Args:
        name: of the model.
        dtype: of the network.
        device: "cpu" or "cuda".
        how: "eager", or compiled and channels_last, which is "best" on the CPU. On CUDA also with
            fused projections: "graphs" in torch.compile's mode reduce-overhead, "best" in
            max-autotune, both of which capture CUDA graphs, "graphless" in max-autotune without.
            (cudnn.benchmark is on for every side.)
    """
    if device == "cpu" and how not in ("eager", "best"):
        return diffusers_unet(name, dtype, device, "best")
    unet = model(name).diffusers_unet(device, dtype)
    if how == "eager":
        return unet
    unet.to(memory_format=torch.channels_last)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._inductor.config.autotune_num_choices_displayed = 0  # a table for each convolution
    if device == "cuda":
        fuse_projections(unet)
    mode = MODES[how] if device == "cuda" else None
    unet.compile(fullgraph=True, dynamic=False, mode=mode)
    return unet


@lru_cache(maxsize=4)
def sampler(name: str, dtype: torch.dtype, device: str, how: str = "best") -> Sampler:
    """Return our sampler of a model.

    Args:
        name: of the model.
        dtype: of the network.
        device: "cpu" or "cuda".
        how: "best" is compiled, "tuned" compiled by max-autotune, "uncaptured" compiled and without
            graphs, "reference" plain PyTorch, "diffusers" diffusers' best U-Net in our loop, its
            step captured by us on CUDA.
    """
    of = model(name)
    if how == "diffusers":
        unet = diffusers_unet(name, dtype, device, "graphless")
        own = {"compile": False, "capture": device == "cuda"}
        return of.around(unet, device, call=as_called(unet), dtype=dtype, **own)
    options: dict[str, dict[str, Any]] = {
        "best": {"compile": True},
        "tuned": {"compile": True, "tune": True},
        "uncaptured": {"compile": True, "capture": False},
        "reference": {"backend": "reference"},
    }
    return of.sampler(device, dtype, **options[how])
