"""`make_plan`: the `Plan` of a solver's name and options, the table that a sampler follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from flashddpm import arguments
from flashddpm.diffusion.diffusers_quirks import refuse_unmatched
from flashddpm.diffusion.parameterization import VARIANCE_TYPES
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.solvers import SOLVERS, Solver
from flashddpm.diffusion.timesteps import SPACINGS, Steps, spaced
from flashddpm.host import isolated
from flashddpm.kernels.tables import Column

OPTIONS = {"eta": 0.0, "variance_type": "fixed_small", "use_clipped_model_output": False}
"""Options that only some solvers take (`Solver.options`), and the value that turns each off."""


@isolated(grad=False)
def make_plan(
    schedule: NoiseSchedule,
    solver: str = "ddim",
    num_steps: int = 50,
    *,
    prediction_type: str,
    spacing: str = "leading",
    steps_offset: int = 0,
    sigmas: str | None = None,
    timesteps: ArrayLike | None = None,
    clip: float = 1.0,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    variance_type: str = "fixed_small",
    threshold: float = 0.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    match_diffusers: bool = False,
) -> Plan:
    """Return the plan of a named solver: the table of coefficients, one row a step, for an image.

    Args:
        schedule: the forward process, T timesteps.
        solver: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, euler or euler_ancestral.
        num_steps: the number of steps S, in 1..T; of no effect beside ``timesteps``.
        prediction_type: what the network predicts: epsilon, sample or v_prediction.
        spacing: the spacing of timesteps: leading, linspace or trailing (Lin et al. 2023, table 2).
        steps_offset: an integer, at least 0, added to leading timesteps.
        sigmas: karras, exponential or beta: noise levels of that spacing between the ends of the
            timesteps' (of the schedule, for the DPM-Solvers); None for those of the timesteps.
        timesteps: the timesteps themselves, [S] whole or fractional numbers, strictly decreasing
            within 0..T-1; None for those of ``spacing``.
        clip: the bound of |x0|, 0 for none; beside a threshold, the largest threshold, at least 1.
        eta: the noise of ddim, in [0, 1]: 0 is deterministic, 1 as noisy as ddpm.
        use_clipped_model_output: whether ddim derives eps again from the clipped x0; a bool.
        variance_type: the variance of ddpm: fixed_small, fixed_large, or learned and learned_range
            for a network of 2C output channels.
        threshold: the quantile, in [0, 1], of each image's |x0| for dynamic thresholding (Saharia
            et al. 2022, section 2.3); 0 for none.
        guidance_rescale: how far a guided output is rescaled to the standard deviation of the
            conditional one, in [0, 1] (Lin et al. 2023, section 3.4); 0 for not at all.
        guidance_interval: (low, high): guide only where low < sigma <= high, with
            sigma = sqrt((1 - abar) / abar); high may be infinite; None for everywhere.
        match_diffusers: whether to reproduce the errors of diffusers that diffusers_quirks lists
            (ddpm's noise in a last step above timestep 0, say), which are otherwise corrected.

    Returns:
        A plan whose ``rows`` are float64 [S, len(Column)] and which ends at x_0.

    Raises:
        ValueError: if an argument is out of its range or is an option that the solver does not
            take, for epsilon prediction where abar = 0, for sigmas that would begin there or stand
            beside timesteps, or if diffusers is to be matched where no plan matches it.
    """
    record = SOLVERS[arguments.one_of("solver", solver, SOLVERS)]
    arguments.one_of("spacing", spacing, SPACINGS)
    arguments.boolean("match_diffusers", match_diffusers)
    options = _own_options(
        record,
        eta=arguments.number("eta", eta, 0, 1),
        variance_type=arguments.one_of("variance_type", variance_type, VARIANCE_TYPES),
        use_clipped_model_output=use_clipped_model_output,
    )
    if record.noise_alone:
        options["noise_alone"] = spacing != "leading"
    steps = _steps(schedule, record, num_steps, spacing, steps_offset, sigmas, timesteps)
    if match_diffusers:
        own = spacing if timesteps is None else None
        refuse_unmatched(len(schedule), len(steps.abar), own, options.get("variance_type"))
        if record.quirk is not None:
            steps, quirks = record.quirk(schedule, steps, own, sigmas)
            options |= quirks
    plan = record.rows(schedule, steps, prediction_type=prediction_type, clip=clip, **options)
    return _adjusted(plan, clip, threshold, guidance_rescale, guidance_interval)


def _own_options(solver: Solver, **given: Any) -> dict[str, Any]:
    """Return those of OPTIONS that the solver's function takes; refuse others that are not off."""
    for name, value in given.items():
        off = OPTIONS[name]
        if name not in solver.options and value != off:
            raise ValueError(f"{name}={value!r}: must be {off!r}; {solver.name} has no such option")
    return {name: given[name] for name in solver.options}


def _steps(
    schedule: NoiseSchedule,
    solver: Solver,
    num_steps: int,
    spacing: str,
    steps_offset: int,
    sigmas: str | None,
    timesteps: ArrayLike | None,
) -> Steps:
    """Return the noise levels that a plan visits."""
    if timesteps is None:
        return spaced(
            schedule,
            num_steps,
            spacing,
            steps_offset,
            sigmas=sigmas,
            drop_last=solver.drop_last,
            fractional=solver.fractional,
        )
    if sigmas is not None:
        raise ValueError(f"sigmas={sigmas!r}: must be None beside timesteps")
    return Steps.at(schedule, timesteps)


def _adjusted(
    plan: Plan,
    clip: float,
    threshold: float,
    rescale: float,
    interval: tuple[float, float] | None,
) -> Plan:
    """Return the plan with threshold, guidance rescale and interval, as for every solver."""
    threshold = arguments.number("threshold", threshold, 0, 1)
    rescale = arguments.number("guidance_rescale", rescale, 0, 1)
    if threshold and clip < 1:
        raise ValueError(f"clip={clip!r}: must be at least 1 beside a threshold, as its largest")
    unguided = np.zeros(len(plan), bool)
    if interval is not None:
        low, high = _interval(interval)
        assert plan.abar is not None  # a solver's plan
        with np.errstate(divide="ignore"):
            sigma = np.sqrt((1 - plan.abar) / plan.abar)
        unguided = (sigma <= low) | (sigma > high)
    if not threshold and not rescale and not unguided.any():
        return plan
    rows = plan.rows.copy()
    rows[:, Column.THRESHOLD], rows[:, Column.UNGUIDED] = threshold, unguided
    rows[:, Column.RESCALE] = np.where(unguided, 0, rescale)  # there is nothing to bring back
    return replace(plan, rows=rows)


def _interval(interval: tuple[float, float]) -> tuple[float, float]:
    name = f"guidance_interval={interval!r}"
    try:
        low, high = interval
    except (TypeError, ValueError):
        raise ValueError(f"{name}: must be two sigmas, (low, high)") from None
    low = arguments.number("guidance_interval", low, 0)
    if high != np.inf:
        high = arguments.number("guidance_interval", high, 0)
    if low >= high:
        raise ValueError(f"{name}: low must be below high")
    return low, float(high)
