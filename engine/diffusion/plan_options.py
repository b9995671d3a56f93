"""Options of a plan by name and type, and the solver and steps of a model where nothing is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from flashddpm import arguments
from flashddpm.diffusion.solvers import SOLVERS

ANCESTRAL, IN_ITS_PLACE = "ddpm", "dpmpp_2m_sde"
"""A model whose scheduler names the first is sampled by the second, with linspace spacing."""


class PlanOptions(TypedDict, total=False):
    """What a plan may be told besides its solver and number of steps.

    make_plan.make_plan takes them all, with defaults; to `SamplingDefaults.plan`, and to all that
    draw by it, None is the model's own.

    Attributes:
        spacing: "leading", "linspace" or "trailing" (Lin et al. 2023, table 2).
        steps_offset: added to leading timesteps.
        sigmas: "karras", "exponential" or "beta": noise levels between the ends of the spacing (of
            the schedule, for the DPM-Solvers); None for those of the spacing itself.
        timesteps: a list of one's own, whole or fractional, strictly decreasing within 0..T-1, or a
            respacing string of OpenAI's: "250", "ddim50", "10,20,30". The number of steps and
            steps_offset are then of no effect, nor is spacing, except that Euler's methods with
            leading spacing start from z.
        eta: of ddim, in [0, 1]: 0 is deterministic, 1 as noisy as ddpm.
        variance_type: of ddpm: "fixed_small", "fixed_large", or "learned" and "learned_range" for a
            network of 2C channels.
        clip: bound of x0, 0 for none; with a threshold, the largest that it may be, at least 1.
        threshold: of dynamic thresholding (Saharia et al. 2022, section 2.3: .995): the quantile of
            |x0| that each image is clipped to and divided by, held within [1, clip]; 0 for none.
            diffusers names it dynamic_thresholding_ratio, and clip sample_max_value.
        guidance_rescale: how far a guided output is brought back to the deviation of its
            conditional half (Lin et al. 2023, section 3.4: .7), in [0, 1]; 0 for not at all.
        guidance_interval: (low, high): guide where low < sigma <= high only, sigma being
            sqrt((1 - abar) / abar), and take the conditional output elsewhere (Kynkaanniemi et al.
            2024); high may be infinite.
        use_clipped_model_output: of ddim: derive eps again from the clipped x0.
        match_diffusers: do as diffusers does where we hold that for wrong: docs/parity.md and
            flashddpm.diffusion.diffusers_quirks have the table of its quirks.
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
    """Return options of `Sampler.plan` with a solver and a number of steps.

    A model that names ancestral sampling, as all do that were saved with the scheduler they were
    trained with, is sampled by dpmpp_2m_sde: the solver study of docs/evaluation.md finds its 20
    steps nearer to the real images than 100 of ddpm. Options of ddpm alone ask for ddpm, and so do
    timesteps: OpenAI's scripts, whose respacings these are, draw by it.

    Args:
        options: by name; None is "not given".
        solver: the solver of the model's scheduler (`SamplingDefaults.solver`).
        num_timesteps: how many timesteps the model was trained with.

    Raises:
        ValueError: an unknown solver.
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
