"""Sides of the sampling benchmarks: our sampler, and diffusers' U-Net and scheduler in a loop.

Each side draws a batch of images in two ways: ``timed`` with noise of its own, as a user does, and
``given`` with noise that is handed in, so that all sides can be checked to draw the same images
before any is timed.
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
"""The number of shapes for which Dynamo may compile one network before it gives up."""

MODES = {
    "graphs": "reduce-overhead",
    "best": "max-autotune",
    "graphless": "max-autotune-no-cudagraphs",
}
"""The modes of torch.compile for diffusers' U-Net on CUDA, by the ``how`` of `diffusers_unet`."""


class Side(Protocol):
    """One implementation with a batch to draw, set up once, as the benchmarks call it."""

    def timed(self) -> Tensor:
        """Draw the batch with noise of its own, as a user does.

        Returns:
            The images, floating [B, C, H, W] in about [-1, 1], on the side's device.
        """

    def given(self, x_T: Tensor, seed: int) -> Tensor:
        """Draw the batch with given noise, to check that sides agree.

        Args:
            x_T: the initial noise, float32 [B, C, H, W], on the side's device.
            seed: the seed of the noise of the steps, which `noise_of` draws.

        Returns:
            The images, float32 [B, C, H, W] in about [-1, 1], on the side's device.
        """


def noise_of(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Callable[[int], Tensor]:
    """Return a function that draws the noise of one step after the other on the CPU.

    Args:
        shape: the shape of the noise, [B, C, H, W].
        dtype: the floating dtype whose precision the values are rounded to.
        seed: the seed of the generator.

    Returns:
        A function that is called with the number of the step, which it ignores, and returns the
        next standard normal noise, float32 of that shape on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    return lambda step: torch.randn(tuple(shape), generator=generator).to(dtype).float()


class Ours:
    """The side of flashddpm: a `Sampler` that draws a batch with the seeds 0, 1, 2, ....

    Images of a network with classes have the labels 0, 1, 2, ... in turn.

    Args:
        sampler: the sampler, around whatever network.
        batch: the number of images B.
        solver: the name of a solver, "ddpm" or "ddim".
        num_steps: the number of steps.
        dtype: the floating dtype to whose precision ``given`` rounds the noise of steps.

    Attributes:
        sampler, dtype: as given.
        arguments: the keyword arguments of `Sampler.sample`: seeds, labels, solver, num_steps and
            batch_size.
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
        """Draw the batch with the noise of the seeds 0..B-1.

        Returns:
            The images, float32 [B, C, H, W] in about [-1, 1], on the sampler's device.
        """
        return self.sampler.sample(**self.arguments)

    def given(self, x_T: Tensor, seed: int) -> Tensor:
        """Draw the batch with given noise.

        DDIM takes no noise in its steps, and none is handed to it, so that the steps may be
        captured as a CUDA graph as they are when timed.

        Args:
            x_T: the initial noise, float32 [B, C, H, W].
            seed: the seed of the noise of the steps, which `noise_of` draws.

        Returns:
            The images, float32 [B, C, H, W] in about [-1, 1], on the sampler's device.

        Raises:
            ValueError: if ``x_T`` has another shape than the batch.
        """
        options: dict[str, Any] = {"initial_noise": x_T}
        if self.arguments["solver"] != "ddim":
            options["step_noise"] = noise_of(x_T.shape, self.dtype, seed)
        return self.sampler.sample(**self.arguments, **options)


class Diffusers:
    """The side of diffusers: its U-Net and scheduler in the loop of its pipelines.

    Timesteps are copied to the network's device beforehand, so that no step waits for a copy.

    Args:
        of: the model, which gives the scheduler's config, the shape of images and the labels.
        unet: diffusers' U-Net on ``device``; images between steps have its dtype.
        batch: the number of images B.
        solver: "ddpm" or "ddim".
        num_steps: the number of steps.
        device: "cpu" or "cuda".
        noise_dtype: the dtype to whose precision ``given`` rounds the noise of steps; by default
            the network's.

    Raises:
        KeyError: if the solver is another.
        ImportError: if diffusers is not installed.

    Attributes:
        unet, batch, device: as given.
        shape: (C, H, W) of an image.
        scheduler: diffusers' scheduler, set to ``num_steps``.
        timesteps: of each step, its timestep on the CPU and on the device, int64 scalars.
        labels: the class of each image, int64 [B] on the device, or None.
        dtype, noise_dtype: the dtype of the network, and that of given noise.
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
        """Draw the batch with noise of torch's global generator.

        Returns:
            The images, [B, C, H, W] in the network's dtype, in about [-1, 1], on the device.
        """
        shape = (self.batch, *self.shape)
        return self._run(torch.randn(shape, device=self.device, dtype=self.dtype))

    def given(self, x_T: Tensor, seed: int) -> Tensor:
        """Draw the batch with given noise.

        Args:
            x_T: the initial noise, float32 [B, C, H, W] on the device.
            seed: the seed of the noise of the steps, which `noise_of` draws.

        Returns:
            The images, float32 [B, C, H, W] in about [-1, 1], on the device.
        """
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
    """Return a function that calls diffusers' U-Net with the signature of our networks.

    Args:
        network: diffusers' UNet2DModel, or what is called as it is.

    Returns:
        A function of x_t [B, C, H, W] in the network's dtype, timesteps t int64 [B] and labels
        int64 [B] or None; it returns the network's output, [B, C, H, W].
    """

    def call(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return network(x_t, t, labels, return_dict=False)[0]

    return call


def fuse_projections(unet: nn.Module) -> None:
    """Fuse the query, key and value projections of every attention of diffusers' U-Net, in place.

    Args:
        unet: diffusers' U-Net; each attention then computes all three by one matrix product.

    Raises:
        ImportError: if diffusers is not installed.
    """
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    processor: Any = FusedAttnProcessor2_0()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
            module.set_processor(processor)


@lru_cache(maxsize=4)
def diffusers_unet(name: str, dtype: torch.dtype, device: str, how: str = "best") -> nn.Module:
    """Return diffusers' U-Net with the weights of a benchmark model, compiled if asked.

    The latest four are kept: the same arguments give the same module. Compilation itself happens at
    the first call. It sets options of torch._dynamo and torch._inductor for the whole process.

    Args:
        name: the name of the model: "bundled", "cifar10" or "pixels256".
        dtype: the dtype of weights and images.
        device: "cpu" or "cuda".
        how: "eager" for the network as it is. Compiled, channels_last and, on CUDA, with fused
            query, key and value projections: "graphs" by torch.compile's mode reduce-overhead,
            "best" by max-autotune, both of which capture CUDA graphs, or "graphless" by
            max-autotune without graphs. On the CPU these three are one, compiled by the default
            mode. (cudnn.benchmark is on for every side.)

    Raises:
        KeyError: if there is no such model, or, on CUDA, no such ``how``.
        ImportError: if diffusers is not installed.
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
    """Return our sampler of a benchmark model.

    The latest four are kept: the same arguments give the same sampler.

    Args:
        name: the name of the model: "bundled", "cifar10" or "pixels256".
        dtype: the dtype of the network.
        device: "cpu" or "cuda".
        how: "best" compiles the network, and on CUDA captures the step as a CUDA graph; "tuned"
            does so with max-autotune; "uncaptured" compiles without capturing; "reference" is plain
            PyTorch; "diffusers" runs diffusers' compiled U-Net in our loop, its step captured by us
            on CUDA.

    Raises:
        KeyError: if there is no such model or no such ``how``.
        ImportError: if ``how`` is "diffusers", which is not installed.
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
