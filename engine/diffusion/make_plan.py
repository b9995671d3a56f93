"""From a solver's name and options to its `Plan`: steps, rows, and what holds for every solver."""

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
"""Options that some solvers take (`Solver.options`), and what the others may be given for them."""


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
    """Return the plan of a named solver over ``num_steps`` timesteps of the given spacing.

    Args:
        schedule: the forward process.
        solver: a name of solvers.SOLVERS.
        num_steps: the number of steps, in 1..T; of no effect beside ``timesteps``.
        prediction_type: epsilon, sample or v_prediction.
        spacing, steps_offset, sigmas, timesteps, clip, eta, use_clipped_model_output,
            variance_type, threshold, guidance_rescale, guidance_interval, match_diffusers: as
            `plan_options.PlanOptions` says, but a list of timesteps is a list of numbers.

    Raises:
        ValueError: an argument out of its range, or one that the solver has no use for.
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
    """Return those of OPTIONS that the solver's function takes; the others must say nothing."""
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
    """Return the plan with what holds for every solver: threshold, guidance rescale, interval."""
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
