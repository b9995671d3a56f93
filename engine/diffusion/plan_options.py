"""Options of a plan by name and type, and those of a model where nothing is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

MULTISTEP_STEPS, STEPS = 20, 50
OF_DDPM = ("variance_type", "timesteps")
"""Options that ask for ddpm: OpenAI's scripts, whose respacings these are, draw by it."""


class PlanOptions(TypedDict, total=False):
    """What a plan may be told besides its solver and number of steps (solvers.make_plan).

    Attributes:
        spacing: "leading", "linspace" or "trailing".
        steps_offset: added to leading timesteps.
        sigmas: "karras", "exponential" or "beta" noise levels.
        timesteps: a list of one's own, or a respacing string of OpenAI's: "250", "ddim50",
            "10,20,30".
        eta: of ddim: 0 is deterministic, 1 as noisy as ddpm.
        variance_type: of ddpm: "fixed_small", "fixed_large", or "learned" and "learned_range" for a
            network of 2C channels.
        clip: bound of x0, 0 for none.
        threshold: of dynamic thresholding: the quantile of |x0| that an image is clipped to and
            divided by, held within [1, clip]; 0 for none.
        guidance_rescale: how far guided outputs are brought back to the deviation of their
            conditional half, in [0, 1].
        guidance_interval: (low, high): guide where low < sigma <= high only.
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
    steps nearer to the real images than 100 of ddpm.

    Args:
        options: by name; None is "not given".
        solver: the solver of the model's scheduler (`SamplingDefaults.solver`).
        num_timesteps: how many timesteps the model was trained with.
    """
    options, T = dict(options), num_timesteps
    if options.get("solver") is None:
        options["solver"] = solver
        free = all(options.get(name) is None for name in OF_DDPM)
        if options["solver"] == "ddpm" and free and T > MULTISTEP_STEPS:
            options["solver"] = "dpmpp_2m_sde"
            options["spacing"] = options.get("spacing") or "linspace"
    if options.get("num_steps") is None:
        multistep = str(options["solver"]).startswith("dpmpp_")
        options["num_steps"] = min(MULTISTEP_STEPS if multistep else STEPS, T)
    return options
