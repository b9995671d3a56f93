r"""Solvers (samplers): each turns a schedule and timesteps into a `Plan`, one table row a step.

Every solver here is affine in what a step has at hand, so a step is a row of coefficients
(kernels/tables.py), with out the network's output, z normal noise and v the learned variance:

    x0     = x0_xt x_t + x0_out out, then clipped                              (S7)
    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist (previous x0) + sigma e^(log_sigma v) z

Throughout, t is a step's timestep, s the next entry of the list (past its end abar_s = 1),
a = sqrt(abar) and b = sqrt(1 - abar), so that x_t = a_t x_0 + b_t eps (S4). All in float64.

To add one: write the function and its record, by which make_plan, the command line, scheduler
configs and pipelines know it, and test its rows in tests/diffusion/test_solvers_diffusers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashddpm import arguments
from flashddpm.diffusion import diffusers_quirks
from flashddpm.diffusion.diffusers_quirks import Quirk
from flashddpm.diffusion.parameterization import VARIANCE_TYPES, eps_rows, x0_rows
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.timesteps import Steps, noise_keys
from flashddpm.kernels.tables import Column

Table = NDArray[np.float64]


def _begin(
    schedule: NoiseSchedule, steps: ArrayLike | Steps, prediction_type: str, clip: float
) -> tuple[Table, Table, Table]:
    """Return rows [S, len(Column)] that hold x0 and timestep, abar_t [S] and abar_s [S]."""
    if not isinstance(steps, Steps):
        t = np.asarray(steps)
        if t.ndim != 1 or t.size == 0 or t.dtype.kind not in "iu":
            raise ValueError("steps: must be a list of at least one integer timestep")
        t = t.astype(np.int64)
        if t.min() < 0 or t.max() >= len(schedule) or (np.diff(t) >= 0).any():
            raise ValueError(f"steps: must strictly decrease within 0..{len(schedule) - 1}")
        steps = Steps.at(schedule, t)
    abar = steps.abar
    rows = np.zeros((len(abar), len(Column)))
    rows[:, [Column.X0_XT, Column.X0_OUT]] = x0_rows(abar, prediction_type)
    rows[:, Column.CLIP] = arguments.number("clip", clip, 0)
    rows[:, Column.TIMESTEP] = steps.timesteps
    return rows, abar, np.append(abar[1:], 1.0)


def _finish(rows: Table, abar: Table) -> Plan:
    return Plan(rows, noise_keys(rows[:, Column.TIMESTEP]), abar=abar)


def ddpm(
    schedule: NoiseSchedule,
    steps: ArrayLike | Steps,
    *,
    prediction_type: str = "epsilon",
    clip: float = 1.0,
    variance_type: str = "fixed_small",
    noise_at_end: bool = False,
) -> Plan:
    r"""Return the plan (a row of coefficients a step) of ancestral sampling, DDPM.

    A step draws x_s ~ N(mu~(x_t, x_0), variance) (S5, S6; Ho et al. 2020, eq. 6-7). From t to s it
    is one step of the process whose alpha is alpha = abar_t / abar_s, so with beta = 1 - alpha

        c_x0 = a_s beta / (1 - abar_t),   c_xt = sqrt(alpha) (1 - abar_s) / (1 - abar_t).

    The variance is, with beta~ = beta (1 - abar_s) / (1 - abar_t) and v the second C channels of
    the network's output,

        fixed_small     beta~                                          (section 3.2 there)
        fixed_large     beta
        learned_range   beta^((1 + v)/2) beta~^((1 - v)/2)             (Nichol & Dhariwal, eq. 15)
        learned         e^v

    so for learned_range sigma = (beta beta~)^(1/4) e^(log(beta / beta~) v / 4). (diffusers takes v
    of learned for the variance itself, not its logarithm.)

    Args:
        schedule: the forward process of T timesteps.
        steps: integer timesteps [S], strictly decreasing in 0..T-1, or `Steps` of any noise levels.
        prediction_type: what the network predicts: epsilon, sample or v_prediction.
        clip: the bound of |x0|, a number of at least 0; 0 for none.
        variance_type: fixed_small, fixed_large, learned_range or learned, as above.
        noise_at_end: whether the last step adds noise if it is above timestep 0, as in diffusers,
            1e-20 then standing for beta~ = 0; otherwise it adds none.

    Raises:
        ValueError: if an argument is out of its range, or for epsilon where abar = 0.
    """
    arguments.one_of("variance_type", variance_type, VARIANCE_TYPES)
    rows, abar, abar_s = _begin(schedule, steps, prediction_type, clip)
    beta = (abar_s - abar) / abar_s
    small = beta * (1 - abar_s) / (1 - abar)
    rows[:, Column.C_X0] = np.sqrt(abar_s) * beta / (1 - abar)
    rows[:, Column.C_XT] = np.sqrt(abar / abar_s) * (1 - abar_s) / (1 - abar)
    small[-1] = 1e-20
    columns: dict[str, tuple[Table | float, Table | float]] = {
        "fixed_small": (np.sqrt(small), 0),
        "fixed_large": (np.sqrt(beta), 0),
        "learned_range": ((beta * small) ** 0.25, (np.log(beta) - np.log(small)) / 4),
        "learned": (1, 0.5),
    }
    rows[:, Column.SIGMA], rows[:, Column.LOG_SIGMA] = columns[variance_type]
    if not noise_at_end or rows[-1, Column.TIMESTEP] == 0:
        rows[-1, [Column.SIGMA, Column.LOG_SIGMA]] = 0
    return _finish(rows, abar)


def ddim(
    schedule: NoiseSchedule,
    steps: ArrayLike | Steps,
    *,
    prediction_type: str = "epsilon",
    clip: float = 1.0,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    ends: Table | None = None,
) -> Plan:
    r"""Return the plan of DDIM (Song et al. 2021, eq. 12 and 16).

    A step is x_s = a_s x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma z, with
    sigma^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s). eps is affine in (x_t, out),
    whence c_xt and c_out. The root is taken of a sum without cancellation:

        1 - abar_s - sigma^2 = (1 - abar_s) (1 - eta^2 + eta^2 q),
        q = abar_t (1 - abar_s) / (abar_s (1 - abar_t)).

    Args:
        schedule, steps, prediction_type, clip: as for `ddpm`: the forward process, [S] decreasing
            integers or `Steps`, epsilon, sample or v_prediction, and the bound of |x0| (0: none).
        eta: in [0, 1]: 0 is deterministic, 1 has the noise of `ddpm` with fixed_small.
        use_clipped_model_output: take eps = (x_t - a_t x_0) / b_t of the clipped x_0; otherwise eps
            is that of the raw output, whether x_0 is clipped or not, as in diffusers.
        ends: float64 [S], the abar_s that each step ends at, not checked; None for those of the
            next timesteps.

    Raises:
        ValueError: if an argument is out of its range, or for epsilon where abar = 0.
    """
    eta = arguments.number("eta", eta, 0, 1)
    arguments.boolean("use_clipped_model_output", use_clipped_model_output)
    rows, abar, abar_s = _begin(schedule, steps, prediction_type, clip)
    abar_s = abar_s if ends is None else ends
    q = abar * (1 - abar_s) / (abar_s * (1 - abar))
    direction = np.sqrt((1 - abar_s) * (1 - eta**2 + eta**2 * q))
    rows[:, Column.C_X0] = np.sqrt(abar_s)
    eps = eps_rows(abar, "sample" if use_clipped_model_output else prediction_type)
    rows[:, [Column.C_XT, Column.C_OUT]] = direction[:, None] * eps
    if use_clipped_model_output:  # out stands for x_0 in these
        rows[:, Column.C_X0] += rows[:, Column.C_OUT]
        rows[:, Column.C_OUT] = 0
    rows[:, Column.SIGMA] = eta * np.sqrt((1 - abar_s) / (1 - abar) * (abar_s - abar) / abar_s)
    return _finish(rows, abar)


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: ArrayLike | Steps,
    *,
    prediction_type: str = "epsilon",
    clip: float = 0.0,
) -> Plan:
    r"""Return the plan of DPM-Solver++(2M), midpoint form (Lu et al. 2022b, algorithm 2).

    With lambda = log(a / b), h = lambda_s - lambda_t, and r = h_previous / h,

        x_s = (b_s / b_t) x_t - a_s (e^-h - 1) D,   D = (1 + 1 / 2r) x0 - (1 / 2r) x0_previous,

    where -a_s (e^-h - 1) = a_s - a_t b_s / b_t, which is finite at both ends. The first step has no
    previous x0 and the last has infinite h: there 1 / 2r = 0 (first order; diffusers'
    final_sigmas_type zero). So it is after a step from abar = 0, where h_previous is infinite;
    diffusers puts 2^-24 for that abar.

    Args:
        schedule, steps, prediction_type, clip: as for `ddpm`: the forward process, [S] decreasing
            integers or `Steps`, epsilon, sample or v_prediction, and the bound of |x0| (0: none).

    Raises:
        ValueError: if an argument is out of its range, or for epsilon where abar = 0.
    """
    rows, abar, abar_s = _begin(schedule, steps, prediction_type, clip)
    b_ratio = np.sqrt((1 - abar_s) / (1 - abar))
    gain = np.sqrt(abar_s) - np.sqrt(abar) * b_ratio
    rows[:, Column.C_XT] = b_ratio
    rows[:, [Column.C_X0, Column.C_HIST]] = _extrapolate(gain, abar)
    return _finish(rows, abar)


def dpmpp_2m_sde(
    schedule: NoiseSchedule,
    steps: ArrayLike | Steps,
    *,
    prediction_type: str = "epsilon",
    clip: float = 0.0,
) -> Plan:
    r"""Return the plan of SDE-DPM-Solver++(2M), midpoint form (Lu et al. 2022b).

    The reverse SDE over a step, with D of `dpmpp_2m` for x0 and its first and last steps:

        x_s = (b_s / b_t) e^-h x_t + a_s (1 - e^-2h) D + b_s sqrt(1 - e^-2h) z.

    As e^-h = a_t b_s / (a_s b_t), with alpha = abar_t / abar_s and beta = 1 - alpha these are

        a_s beta / (1 - abar_t) D + sqrt(alpha) (1 - abar_s) / (1 - abar_t) x_t + sqrt(beta~) z:

    the rows of `ddpm`, with D for x0, which lifts the order of the spread from 1 to 2 (measured on
    Gaussian data). diffusers names it sde-dpmsolver++, and puts 2^-24 for abar = 0.

    Args:
        schedule, steps, prediction_type, clip: as for `ddpm`: the forward process, [S] decreasing
            integers or `Steps`, epsilon, sample or v_prediction, and the bound of |x0| (0: none).

    Raises:
        ValueError: if an argument is out of its range, or for epsilon where abar = 0.
    """
    rows, abar, abar_s = _begin(schedule, steps, prediction_type, clip)
    beta = (abar_s - abar) / abar_s
    gain = np.sqrt(abar_s) * beta / (1 - abar)
    rows[:, Column.C_XT] = np.sqrt(abar / abar_s) * (1 - abar_s) / (1 - abar)
    rows[:, [Column.C_X0, Column.C_HIST]] = _extrapolate(gain, abar)
    rows[:, Column.SIGMA] = np.sqrt(beta * (1 - abar_s) / (1 - abar))
    return _finish(rows, abar)


def _extrapolate(gain: Table, abar: Table) -> Table:
    """Return ``gain`` of D as coefficients (of x0, of the previous x0), [S, 2]; see `dpmpp_2m`."""
    with np.errstate(divide="ignore"):
        h = np.diff((np.log(abar) - np.log1p(-abar)) / 2)
    half_inverse_r = np.zeros_like(abar)
    half_inverse_r[1:-1] = h[1:] / (2 * h[:-1])
    return np.stack([gain * (1 + half_inverse_r), -gain * half_inverse_r], -1)


def euler(
    schedule: NoiseSchedule,
    steps: ArrayLike | Steps,
    *,
    prediction_type: str = "epsilon",
    clip: float = 0.0,
    noise_alone: bool = True,
) -> Plan:
    r"""Return the plan of Euler's method (Karras et al. 2022, eq. 4).

    It solves dx~/dsigma = (x~ - x0) / sigma. There x~ = x / a = x_0 + sigma eps and sigma = b / a,
    so a step to sigma_s is

        x~_s = x~_t + (sigma_s - sigma_t) (x~_t - x0) / sigma_t = x0 + sigma_s eps,

    and times a_s it is `ddim` with eta = 0.

    Args:
        schedule, steps, prediction_type, clip: as for `ddpm`: the forward process, [S] decreasing
            integers or `Steps`, epsilon, sample or v_prediction, and the bound of |x0| (0: none).
        noise_alone: whether to start from x_T = b_T z (x~_T = sigma_T z, without the signal's
            share), as diffusers does for linspace and trailing spacing; if false, from x_T = z, as
            for leading.

    Raises:
        ValueError: if an argument is out of its range, or for epsilon where abar = 0.
    """
    plan = ddim(schedule, steps, prediction_type=prediction_type, clip=clip)
    return _start_alone(plan) if noise_alone else plan


def euler_ancestral(
    schedule: NoiseSchedule,
    steps: ArrayLike | Steps,
    *,
    prediction_type: str = "epsilon",
    clip: float = 0.0,
    noise_alone: bool = True,
) -> Plan:
    r"""Return the plan of ancestral Euler: a step down to sigma_down, then noise up to sigma_s.

    As in k-diffusion, sigma_up^2 = sigma_s^2 (1 - sigma_s^2 / sigma_t^2) is the noise's variance
    and sigma_down^2 = sigma_s^2 - sigma_up^2. Times a_s^2, sigma_up^2 is (1 - abar_s) (1 - q) with
    q = sigma_s^2 / sigma_t^2, the variance of `ddim` with eta = 1, whose steps these are.

    Args:
        schedule, steps, prediction_type, clip: as for `ddpm`: the forward process, [S] decreasing
            integers or `Steps`, epsilon, sample or v_prediction, and the bound of |x0| (0: none).
        noise_alone: whether to start from x_T = b_T z, as for `euler`; if false, from x_T = z.

    Raises:
        ValueError: if an argument is out of its range, or for epsilon where abar = 0.
    """
    plan = ddim(schedule, steps, prediction_type=prediction_type, clip=clip, eta=1.0)
    return _start_alone(plan) if noise_alone else plan


def _start_alone(plan: Plan) -> Plan:
    assert plan.abar is not None  # a plan of ours
    return replace(plan, initial=(0.0, float(np.sqrt(1 - plan.abar[0]))))


@dataclass(frozen=True, kw_only=True)
class Solver:
    """The record of a solver: all that make_plan, command line, configs and pipelines know of it.

    Attributes:
        name: its name, as make_plan's argument ``solver`` takes it.
        rows: its function, called with (schedule, steps, prediction_type=, clip=) and its options
            as keywords; returns a `Plan`.
        options: those of "eta", "variance_type" and "use_clipped_model_output" that the function
            takes; make_plan refuses the others.
        default_steps: the number of steps where none is given.
        drop_last: whether its timesteps are num_steps + 1 points less the last.
        fractional: whether its network is told fractional timesteps, not the nearest whole ones.
        noise_alone: whether its function takes ``noise_alone``, false for leading spacing
            (`euler`).
        scheduler_class: the name of its diffusers class, in scheduler_config.KEYS; None for none.
        algorithm_type: that setting of the class, where one class has several solvers; else None.
        quirk: called for match_diffusers with (schedule, steps, spacing, sigmas), returns the steps
            and keywords of ``rows`` that reproduce diffusers' errors; None for no error.
        draws: called with (timestep, eta), returns whether diffusers draws noise at such a step,
            even if it then adds none.
        draws_float32: whether diffusers draws in float32, not in the network's dtype.
    """

    name: str
    rows: Callable[..., Plan]
    options: tuple[str, ...] = ()
    default_steps: int = 50
    drop_last: bool = False
    fractional: bool = False
    noise_alone: bool = False
    scheduler_class: str | None = None
    algorithm_type: str | None = None
    quirk: Quirk | None = None
    draws: Callable[[float, float], bool] = lambda timestep, eta: False
    draws_float32: bool = False


_RECORDS = (
    Solver(
        name="ddpm",
        rows=ddpm,
        options=("variance_type",),
        scheduler_class="DDPMScheduler",
        quirk=diffusers_quirks.noise_at_end,
        draws=lambda timestep, eta: timestep > 0,
    ),
    Solver(
        name="ddim",
        rows=ddim,
        options=("eta", "use_clipped_model_output"),
        scheduler_class="DDIMScheduler",
        quirk=diffusers_quirks.ends_by_arithmetic,
        draws=lambda timestep, eta: eta > 0,
    ),
    Solver(
        name="dpmpp_2m",
        rows=dpmpp_2m,
        default_steps=20,
        drop_last=True,
        scheduler_class="DPMSolverMultistepScheduler",
        algorithm_type="dpmsolver++",
        quirk=diffusers_quirks.cut_timesteps,
    ),
    Solver(
        name="dpmpp_2m_sde",
        rows=dpmpp_2m_sde,
        default_steps=20,
        drop_last=True,
        scheduler_class="DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++",
        quirk=diffusers_quirks.cut_timesteps,
        draws=lambda timestep, eta: True,
        draws_float32=True,
    ),
    Solver(
        name="euler",
        rows=euler,
        fractional=True,
        noise_alone=True,
        scheduler_class="EulerDiscreteScheduler",
        quirk=diffusers_quirks.abar_above_0,
    ),
    Solver(
        name="euler_ancestral",
        rows=euler_ancestral,
        fractional=True,
        noise_alone=True,
        scheduler_class="EulerAncestralDiscreteScheduler",
        quirk=diffusers_quirks.abar_above_0,
        draws=lambda timestep, eta: True,
    ),
)
SOLVERS = {solver.name: solver for solver in _RECORDS}
"""The records of all solvers by name."""
