"""`PlanOptions`: the options of a plan by name and type, and the defaults where none are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from flashddpm import arguments
from flashddpm.diffusion.solvers import SOLVERS

ANCESTRAL, IN_ITS_PLACE = "ddpm", "dpmpp_2m_sde"
"""A model whose scheduler is the first solver is sampled by the second, linspace spacing."""


class PlanOptions(TypedDict, total=False):
    """The options of a plan besides its solver and number of steps, all of which may be left out.

    make_plan.make_plan takes them all, with defaults of its own; for `SamplingDefaults.plan`, and
    all that draw by it, None stands for the model's own setting. T is the schedule's number of
    timesteps.

    Attributes:
        spacing: the spacing of timesteps: "leading", "linspace" or "trailing" (Lin et al. 2023,
            table 2).
        steps_offset: an integer, at least 0, added to leading timesteps.
        sigmas: "karras", "exponential" or "beta": noise levels of that spacing between the ends of
            the timesteps' (of the schedule, for the DPM-Solvers); None for those of the timesteps.
        timesteps: the timesteps themselves, numbers, whole or fractional, strictly decreasing
            within 0..T-1, or one of OpenAI's respacing strings: "250", "ddim50", "10,20,30". The
            number of steps and steps_offset are then of no effect, nor is spacing, except that
            Euler's methods with leading spacing start from z.
        eta: the noise of ddim, in [0, 1]: 0 is deterministic, 1 as noisy as ddpm.
        variance_type: the variance of ddpm: "fixed_small", "fixed_large", or "learned" and
            "learned_range" for a network of 2C channels.
        clip: the bound of |x0|, 0 for none; beside a threshold, the largest threshold, at least 1.
        threshold: the quantile, in [0, 1], of dynamic thresholding (Saharia et al. 2022, section
            2.3: .995): each image is clipped to that quantile of its |x0|, held within [1, clip],
            and divided by it; 0 for none. diffusers names it dynamic_thresholding_ratio, and clip
            sample_max_value.
        guidance_rescale: how far a guided output is brought back to the standard deviation of the
            conditional one (Lin et al. 2023, section 3.4: .7), in [0, 1]; 0 for not at all.
        guidance_interval: (low, high): guide where low < sigma <= high only, sigma being
            sqrt((1 - abar) / abar), and take the conditional output elsewhere (Kynkaanniemi et al.
            2024); high may be infinite.
        use_clipped_model_output: whether ddim derives eps again from the clipped x0.
        match_diffusers: whether to reproduce the quirks of diffusers, which are otherwise
            corrected: docs/parity.md and flashddpm.diffusion.diffusers_quirks have the table of
            them.
    """

    spacing: str | None
    steps_offset: int | None
    sigmas: str | None
    timesteps: Sequence[float] | str | None
    eta: float | None
    variance_type: str | None
    clip: float | None
    threshold: float | None
    guidance_rescale: float | None
    guidance_interval: tuple[float, float] | None
    use_clipped_model_output: bool | None
    match_diffusers: bool | None


def with_defaults(options: Mapping[str, Any], solver: str, num_timesteps: int) -> dict[str, Any]:
    """Return a copy of the options in which solver and num_steps are always set.

    A model whose scheduler is ddpm, as it is for all that were saved with the scheduler of their
    training, is sampled by dpmpp_2m_sde with linspace spacing: the solver study of
    docs/evaluation.md finds its 20 steps nearer to the real images than 100 of ddpm. It stays ddpm
    if variance_type or timesteps are given (OpenAI's scripts, whose respacings these are, draw by
    it), or if T is at most 20.

    Args:
        options: solver, num_steps and the fields of `PlanOptions` by name, all optional; None is
            the same as left out. Only the solver's name is checked here.
        solver: the solver of the model's scheduler (`SamplingDefaults.solver`): ddpm, ddim,
            dpmpp_2m, dpmpp_2m_sde, euler or euler_ancestral.
        num_timesteps: the number of timesteps T that the model was trained with.

    Returns:
        A new dict of the same keys and values, with solver, num_steps (if not given, the solver's
        default, 20 or 50, at most T) and, where dpmpp_2m_sde replaces ddpm, spacing.

    Raises:
        ValueError: if the solver that is taken, given or the model's own, is unknown.
    """
    options, T = dict(options), num_timesteps
    if options.get("solver") is None:
        options["solver"] = solver
        asked = (*SOLVERS[ANCESTRAL].options, "timesteps")
        free = all(options.get(name) is None for name in asked)
        if solver == ANCESTRAL and free and T > SOLVERS[IN_ITS_PLACE].default_steps:
            options["solver"] = IN_ITS_PLACE
            options["spacing"] = options.get("spacing") or "linspace"
    chosen = SOLVERS[arguments.one_of("solver", options["solver"], SOLVERS)]
    if options.get("num_steps") is None:
        options["num_steps"] = min(chosen.default_steps, T)
    return options
