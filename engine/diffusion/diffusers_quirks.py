r"""Quirks of diffusers: deviations that we hold for wrong, and functions that reproduce them.

``make_plan(..)`` is right in each of these cases (measured against diffusers 0.42);
``make_plan(.., match_diffusers=True)`` gives what diffusers gives, or refuses:

| solver | where | diffusers | ours |
|---|---|---|---|
| ddpm | the last timestep is not 0: trailing spacing, an offset, a list | the last step adds noise: of variance beta for fixed_large, of one up to beta for learned_range, of 1e-20 for fixed_small | adds none |
| ddim | linspace spacing; trailing where num_steps does not divide T | a step from t ends at abar of t - T // num_steps, whatever the next timestep is; a last one above 0 leaves noise | ends at abar of the next timestep, or at 1 |
| dpmpp_2m, dpmpp_2m_sde | exponential or beta sigmas; karras of the cosine schedule, which is not matched | timesteps are cut to whole ones, up to one too few | rounded to the nearest |
| dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral | begin at abar = 0 (zero-terminal SNR) | 2^-24 stands for it, for epsilon prediction too | abar = 0, with v_prediction or sample |
| ddim | eta = 1 | the root of 1 - abar_s - sigma^2, which rounding may make negative: NaN | of a sum without cancellation; NaN is not matched |
| dpmpp_2m, dpmpp_2m_sde | sigmas whose first timesteps repeat | IndexError, unless set_begin_index was called | nothing is looked up by timestep |
| all | trailing spacing where rounding adds a point (61 of 1000) | one step more, at timestep -1 | none; a match is refused |
| ddpm | learned variance | v is the variance itself | v is its logarithm; a match is refused |
| ddpm | fixed_large_log | NaN | refused always |

A batch whose images depend on its size, as with a single generator there, is no matter of plans:
with seeds an image depends on its own only.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.timesteps import Steps, sigma_grid

Table = NDArray[np.float64]

Quirk = Callable[[NoiseSchedule, Steps, str | None, str | None], tuple[Steps, dict[str, Any]]]
"""A function that reproduces a quirk (a deviation) of diffusers for a solver.

It is called with the schedule, the right steps, the spacing of timesteps (None for a given list)
and that of sigmas (None for none), and returns diffusers' steps and the keyword arguments with
which the solver's function does what diffusers does.
"""

REFUSED = "match_diffusers=True: must be false"
SMALLEST_ABAR = 2.0**-24
"""The abar that diffusers' solvers by sigma take for abar = 0, whose sigma is infinite."""


def noise_at_end(
    schedule: NoiseSchedule, steps: Steps, spacing: str | None, sigmas: str | None
) -> tuple[Steps, dict[str, Any]]:
    """Reproduce the quirk of diffusers' ddpm: noise in the last step.

    Args:
        schedule, spacing, sigmas: not used.
        steps: the steps of the plan.

    Returns:
        The steps as they are, and the keyword argument of `solvers.ddpm` {"noise_at_end": True},
        which is of effect only if the last timestep is not 0.
    """
    return steps, {"noise_at_end": True}


def ends_by_arithmetic(
    schedule: NoiseSchedule, steps: Steps, spacing: str | None, sigmas: str | None
) -> tuple[Steps, dict[str, Any]]:
    """Reproduce the quirk of diffusers' ddim: a step from t ends at abar of t - T // num_steps.

    That holds for every step, whatever the next timestep of the plan is.

    Args:
        schedule: the forward process, T timesteps.
        steps: the steps of the plan, S = num_steps of them, at whole timesteps.
        spacing: the spacing of the timesteps: leading, linspace or trailing (the result is the
            same function of the timesteps for each); None for a given list, which is refused.
        sigmas: not used.

    Returns:
        The steps as they are, and the keyword argument of `solvers.ddim` {"ends": abar}: float64
        [S], the abar at which each step ends, which is 1 where t - T // S is negative.

    Raises:
        ValueError: if timesteps were given as a list, which diffusers' DDIMScheduler does not take.
    """
    if spacing is None:
        raise ValueError(f"{REFUSED} beside timesteps: diffusers' DDIMScheduler takes none")
    ends = steps.timesteps.astype(np.int64) - len(schedule) // len(steps.abar)
    abar = np.where(ends < 0, 1.0, schedule.alphas_cumprod[np.maximum(ends, 0)])
    return steps, {"ends": abar}


def abar_above_0(
    schedule: NoiseSchedule, steps: Steps, spacing: str | None, sigmas: str | None
) -> tuple[Steps, dict[str, Any]]:
    """Reproduce the quirk of diffusers' solvers by sigma: 2^-24 stands for abar = 0.

    Args:
        schedule, spacing, sigmas: not used.
        steps: the steps of the plan.

    Returns:
        The steps, with 2^-24 for a first abar of 0, and no keyword arguments ({}).
    """
    if steps.abar[0] == 0:
        steps = Steps(steps.timesteps, np.append(SMALLEST_ABAR, steps.abar[1:]))
    return steps, {}


def cut_timesteps(
    schedule: NoiseSchedule, steps: Steps, spacing: str | None, sigmas: str | None
) -> tuple[Steps, dict[str, Any]]:
    """Reproduce the quirk of diffusers' DPM-Solvers: timesteps of sigmas are cut to whole ones.

    Whether the sigma of a whole timestep, such as the first, lies below it is decided by rounding:
    diffusers' table of logarithms is float32.

    Args:
        schedule: the forward process.
        steps: the steps of the plan.
        spacing: not used.
        sigmas: the spacing of sigmas; the timesteps are cut to whole ones for exponential and beta.

    Returns:
        The steps, also changed by `abar_above_0`, and no keyword arguments ({}).
    """
    if sigmas in ("exponential", "beta"):
        abar = schedule.alphas_cumprod.astype(np.float32)
        table = ((1 - abar) / abar) ** np.float32(0.5)
        grid = sigma_grid(sigmas, float(table[-1]), float(table[0]), len(steps.abar))
        t = np.interp(np.log(grid), np.log(table).astype(np.float64), np.arange(len(table)))
        steps = Steps(np.floor(t), steps.abar)
    return abar_above_0(schedule, steps, spacing, sigmas)


def refuse_unmatched(T: int, n: int, spacing: str | None, variance_type: str | None) -> None:
    """Raise where no plan of a solver matches diffusers.

    Args:
        T: the number of timesteps of the schedule.
        n: the number of steps.
        spacing: the spacing of timesteps: leading, linspace or trailing; None for a given list.
        variance_type: the variance type of a solver that takes one; None for others.

    Raises:
        ValueError: if the variance type is "learned" (learned_range is matched), or if spacing is
            trailing and rounding makes more than n points of it, as for 61 of 1000.
    """
    if variance_type == "learned":
        raise ValueError(
            f"{REFUSED} for learned variance: diffusers takes v for the variance itself"
        )
    if spacing == "trailing" and len(np.arange(T, 0, -T / n)) > n:
        raise ValueError(
            f"{REFUSED} for num_steps={n} of {T} with trailing spacing: diffusers takes a step "
            "more there, at timestep -1"
        )
