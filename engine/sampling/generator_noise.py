"""Noise from torch's generators, drawn one call after another as diffusers' pipelines draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.solvers import SOLVERS

Generators = torch.Generator | Sequence[torch.Generator]


class GeneratorNoise:
    """Standard normal noise from torch's generators, drawn call by call as diffusers does.

    Args:
        generator: one torch.Generator for the whole batch, alone or in a list; a list or tuple of
            one for each of the B images; or None for the device's default generator.
        shape: (B, C, H, W).
        device: the device of the noise. From CPU generators it is drawn on the CPU, then moved.

    Attributes:
        generators: the generators, one or B of them; [None] for the default one.
        shape, device: as above.

    Raises:
        ValueError: if one is no generator, if there are neither one nor B of them, or if they are
            of devices other than the CPU and this one, or of both.
    """

    def __init__(
        self, generator: Generators | None, shape: tuple[int, int, int, int], device: torch.device
    ) -> None:
        self.generators: Sequence[torch.Generator | None] = [None]
        self.shape, self.device = shape, device
        if generator is None:  # torch.randn then draws from the default one
            return
        several = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(several, (list, tuple)) or not all(
            isinstance(one, torch.Generator) for one in several
        ):
            raise ValueError(
                f"generator={generator!r}: must be a torch.Generator, or a list of them"
            )
        if len(several) not in (1, shape[0]):
            raise ValueError(
                f"generator: {len(several)} for {shape[0]} images; give one or one each"
            )
        kinds = {one.device.type for one in several}
        if len(kinds) > 1 or not kinds <= {"cpu", device.type}:
            raise ValueError(
                f"generator: of {', '.join(kinds)}; must all be of cpu or {device.type}"
            )
        self.generators = several

    def __call__(self, dtype: torch.dtype) -> Tensor:
        """Draw the next noise of a dtype, floating-point [B, C, H, W], on the device."""
        size = (self.shape[0] // len(self.generators), *self.shape[1:])
        drawn = [
            torch.randn(size, generator=one, device=one.device if one else self.device, dtype=dtype)
            for one in self.generators
        ]
        return torch.cat(drawn).to(self.device)


def noise_of(
    draws: GeneratorNoise, solver: str, plan: Plan, eta: float, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of `Sampler.sample` for noise drawn as a diffusers pipeline draws it.

    The noise of x_T is drawn here, and that of steps when ``sample`` asks for it.

    Args:
        draws: the generators of the noise.
        solver: the name of the plan's solver, a key of solvers.SOLVERS; another raises KeyError.
        plan: the plan (a row of coefficients a step).
        eta: the share of ddpm's noise that ddim adds, in [0, 1]; of no effect on other solvers.
        dtype: the dtype of the pipeline's network, in which diffusers draws.

    Returns:
        A dict of initial_noise, a tensor [B, C, H, W] in ``dtype``, and, where the solver draws in
        some step, of step_noise, a function that is called with the number of each step, from 0,
        and returns a floating-point tensor [B, C, H, W] or None; and of batch_size, which is B.
    """
    kinds = [_dtype_drawn(solver, eta, timestep, dtype) for timestep in plan.timesteps]

    def step_noise(i: int) -> Tensor | None:
        kind = kinds[i]
        return None if kind is None else draws(kind)

    noise: dict[str, Any] = {"initial_noise": draws(dtype)}
    if any(kinds):  # given to every step, it would keep them from being captured
        noise |= {"step_noise": step_noise, "batch_size": draws.shape[0]}  # which is for one batch
    return noise


def _dtype_drawn(
    solver: str, eta: float, timestep: float, dtype: torch.dtype
) -> torch.dtype | None:
    """Return the dtype of the noise that diffusers' scheduler draws at a step, None for none.

    It draws on last steps too, where none is added: a generator goes on from the same state.
    """
    record = SOLVERS[solver]
    if not record.draws(timestep, eta):
        return None
    return torch.float32 if record.draws_float32 else dtype
