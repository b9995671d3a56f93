r"""Solvers: from a schedule and a list of timesteps to a `Plan`, one row of numbers a step.

Every solver here is affine in what a step has at hand, so a step is a row (kernels/contract.py):

    x0     = x0_xt x_t + x0_out out, then clipped                              (S7)
    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist (previous x0) + sigma e^(log_sigma v) z

Throughout, t is a step's timestep, s the next entry of the list (past its end abar_s = 1),
a = sqrt(abar) and b = sqrt(1 - abar), so that x_t = a_t x_0 + b_t eps (S4). All in float64.

Every solver takes the schedule, its timesteps (integers, [S], strictly decreasing), the
prediction type (epsilon, sample or v_prediction) and the bound ``clip`` of x0 (0 for none), and
raises ValueError for an argument out of its range, or for epsilon prediction where abar = 0.

To add one: write the function, name it in SOLVERS, add its test to tests/engine/test_solvers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashddpm import arguments
from flashddpm.kernels.contract import Column
from flashddpm.parameterization import LEARNED_VARIANCES, eps_rows, x0_rows
from flashddpm.schedule import NoiseSchedule

Table = NDArray[np.float64]
Ints = NDArray[np.int64]

SPACINGS = ("leading", "linspace", "trailing")
FIXED_VARIANCES = ("fixed_small", "fixed_large")
VARIANCE_TYPES = (*FIXED_VARIANCES, *LEARNED_VARIANCES)


def timesteps(
    num_steps: int,
    num_train_timesteps: int,
    spacing: str = "leading",
    steps_offset: int = 0,
    *,
    drop_last: bool = False,
) -> Ints:
    """Return diffusers' timesteps (Lin et al. 2023, table 2), int64 [num_steps], decreasing.

    Leading and linspace spacing begin a single step at timestep 0, as diffusers does.

    Args:
        num_steps: number of timesteps, in 1..num_train_timesteps.
        num_train_timesteps: T of the schedule.
        spacing: leading, linspace or trailing.
        steps_offset: added to leading timesteps; the other spacings have no use for it.
        drop_last: take num_steps + 1 points and drop the last, as DPM-Solver does; trailing
            spacing, which has no point to drop, stays as it is.

    Raises:
        ValueError: an argument out of its range, or timesteps that would repeat or pass T - 1.
    """
    T = arguments.integer("num_train_timesteps", num_train_timesteps, 1)
    n = arguments.integer("num_steps", num_steps, 1, T)
    arguments.one_of("spacing", spacing, SPACINGS)
    offset = arguments.integer("steps_offset", steps_offset, 0)
    points = n + 1 if drop_last else n
    if spacing == "leading":
        grid = np.arange(points, dtype=np.float64)[::-1] * (T // points) + offset
    elif spacing == "linspace":
        grid = np.linspace(0, T - 1, points).round()[::-1]
    else:
        # Rounding can add a point near 0 (n = 61 of T = 1000), which [:n] leaves out.
        grid = np.arange(T, 0, -T / n).round() - 1
    steps = grid[:n].astype(np.int64)
    if steps[0] >= T:
        raise ValueError(
            f"steps_offset={offset}: must be at most {T - 1 - steps[0] + offset}, for {n} steps of "
            f"{spacing} spacing to stay below {T}"
        )
    if (np.diff(steps) >= 0).any():
        raise ValueError(
            f"num_steps={n}: must be below num_train_timesteps={T}, or timesteps of {spacing} "
            "spacing repeat (this solver takes one more point and drops it)"
        )
    return steps


def noise_keys(timesteps: ArrayLike) -> Ints:
    """Return floor(t) + 2^32 (number of earlier entries with that floor), int64 [S]."""
    floor = np.floor(np.asarray(timesteps, np.float64)).astype(np.int64)
    order = np.argsort(floor, kind="stable")
    repeats = np.empty_like(floor)
    repeats[order] = np.arange(len(floor)) - np.searchsorted(floor[order], floor[order])
    return floor + (repeats << 32)


@dataclass(frozen=True, eq=False)
class Plan:
    """A trajectory from its first timestep to x_0: rows in the order in which they are applied.

    Attributes:
        rows: float64 [S, len(Column)], read-only.
        noise_keys: int64 [S], read-only; the noise key of each row's z.

    Raises:
        ValueError: wrong shapes, a number that is not finite in float32 (in which kernels read it),
            a negative sigma or clip, a threshold or rescale outside [0, 1], a threshold beside a
            clip below 1, a first row that reads history, or noise keys that are negative, not
            integers, or repeat.
    """

    rows: Table
    noise_keys: Ints

    def __post_init__(self) -> None:
        rows = np.array(self.rows, np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(Column) or len(rows) == 0:
            raise ValueError(f"rows of shape {rows.shape}: must be [S, {len(Column)}] with S >= 1")
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(rows.astype(np.float32))
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise ValueError(f"rows[{i}, {Column(j).name}]={rows[i, j]}: must be finite in float32")
        if (rows[:, [Column.SIGMA, Column.CLIP]] < 0).any():
            raise ValueError("rows: sigma and clip must not be negative")
        shares = rows[:, [Column.THRESHOLD, Column.RESCALE]]
        if (shares < 0).any() or (shares > 1).any():
            raise ValueError("rows: threshold and rescale must be in [0, 1]")
        if (rows[rows[:, Column.THRESHOLD] != 0, Column.CLIP] < 1).any():
            raise ValueError("rows: clip must be at least 1 where there is a threshold")
        if rows[0, Column.C_HIST] != 0:
            raise ValueError("rows[0, C_HIST]: must be 0, for the first step has no previous x0")
        keys = np.array(self.noise_keys)
        if keys.shape != rows.shape[:1] or keys.dtype.kind not in "iu":
            raise ValueError(f"noise_keys of shape {keys.shape}: must be {len(rows)} integers")
        keys = keys.astype(np.int64)
        if (keys < 0).any() or len(np.unique(keys)) != len(keys):
            raise ValueError("noise_keys: must be in 0..2^63-1 and differ from one another")
        for name, value in (("rows", rows), ("noise_keys", keys)):
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_steps(self) -> int:
        """Number of steps, and of evaluations of the network."""
        return len(self)

    @property
    def timesteps(self) -> Table:
        """What the network is told at each step, float64 [S]."""
        return self.rows[:, Column.TIMESTEP]

    @property
    def needs_stats(self) -> bool:
        """Whether some row asks for ``sample_stats``: has a threshold, or rescales."""
        return bool(self.rows[:, [Column.THRESHOLD, Column.RESCALE]].any())

    @property
    def learns_variance(self) -> bool:
        """Whether the network must have 2C channels, the second C of them for the variance."""
        return bool(self.rows[:, Column.LOG_SIGMA].any())


def _begin(
    schedule: NoiseSchedule, steps: ArrayLike, prediction_type: str, clip: float
) -> tuple[Table, Table, Table]:
    """Return rows [S, len(Column)] that hold x0 and timestep, abar_t [S] and abar_s [S]."""
    t = np.asarray(steps)
    if t.ndim != 1 or t.size == 0 or t.dtype.kind not in "iu":
        raise ValueError("steps: must be a list of at least one integer timestep")
    t = t.astype(np.int64)
    if t.min() < 0 or t.max() >= len(schedule) or (np.diff(t) >= 0).any():
        raise ValueError(f"steps: must strictly decrease within 0..{len(schedule) - 1}")
    abar = schedule.alphas_cumprod[t]
    rows = np.zeros((len(t), len(Column)))
    rows[:, [Column.X0_XT, Column.X0_OUT]] = x0_rows(abar, prediction_type)
    rows[:, Column.CLIP] = arguments.number("clip", clip, 0)
    rows[:, Column.TIMESTEP] = t
    return rows, abar, np.append(abar[1:], 1.0)


def _finish(rows: Table) -> Plan:
    return Plan(rows, noise_keys(rows[:, Column.TIMESTEP]))


def ddpm(
    schedule: NoiseSchedule,
    steps: ArrayLike,
    *,
    prediction_type: str = "epsilon",
    clip: float = 1.0,
    variance_type: str = "fixed_small",
) -> Plan:
    r"""Ancestral sampling: x_s ~ N(mu~(x_t, x_0), variance) (S5, S6; Ho et al. 2020, eq. 6-7).

    A step from t to s is one step of the process whose alpha is alpha = abar_t / abar_s, so with
    beta = 1 - alpha

        c_x0 = a_s beta / (1 - abar_t),   c_xt = sqrt(alpha) (1 - abar_s) / (1 - abar_t).

    The variance is, with beta~ = beta (1 - abar_s) / (1 - abar_t) and v the second C channels of
    the network's output,

        fixed_small     beta~                                          (section 3.2 there)
        fixed_large     beta
        learned_range   beta^((1 + v)/2) beta~^((1 - v)/2)             (Nichol & Dhariwal, eq. 15)
        learned         e^v

    so for learned_range sigma = (beta beta~)^(1/4) e^(log(beta / beta~) v / 4). (Of learned, v is
    the logarithm as in Nichol & Dhariwal; diffusers takes v for the variance itself.) The last step
    adds no noise, at whatever timestep it is; it is the only one where beta~ = 0.
    """
    arguments.one_of("variance_type", variance_type, VARIANCE_TYPES)
    rows, abar, abar_s = _begin(schedule, steps, prediction_type, clip)
    beta = (abar_s - abar) / abar_s
    small = beta * (1 - abar_s) / (1 - abar)
    rows[:, Column.C_X0] = np.sqrt(abar_s) * beta / (1 - abar)
    rows[:, Column.C_XT] = np.sqrt(abar / abar_s) * (1 - abar_s) / (1 - abar)
    beta, small = beta[:-1], small[:-1]  # the last step adds no noise
    columns: dict[str, tuple[Table | float, Table | float]] = {
        "fixed_small": (np.sqrt(small), 0),
        "fixed_large": (np.sqrt(beta), 0),
        "learned_range": ((beta * small) ** 0.25, (np.log(beta) - np.log(small)) / 4),
        "learned": (1, 0.5),
    }
    rows[:-1, Column.SIGMA], rows[:-1, Column.LOG_SIGMA] = columns[variance_type]
    return _finish(rows)


def ddim(
    schedule: NoiseSchedule,
    steps: ArrayLike,
    *,
    prediction_type: str = "epsilon",
    clip: float = 1.0,
    eta: float = 0.0,
) -> Plan:
    r"""x_s = a_s x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma z (Song et al. 2021, eq. 12 and 16).

    sigma^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s): eta = 0 is deterministic and
    eta = 1 is ddpm, fixed_small. eps comes from the raw output, clipped or not, as in diffusers; it
    is affine in (x_t, out), whence c_xt and c_out. The root is taken of a sum without cancellation:

        1 - abar_s - sigma^2 = (1 - abar_s) (1 - eta^2 + eta^2 q),
        q = abar_t (1 - abar_s) / (abar_s (1 - abar_t)).
    """
    eta = arguments.number("eta", eta, 0, 1)
    rows, abar, abar_s = _begin(schedule, steps, prediction_type, clip)
    q = abar * (1 - abar_s) / (abar_s * (1 - abar))
    direction = np.sqrt((1 - abar_s) * (1 - eta**2 + eta**2 * q))
    rows[:, Column.C_X0] = np.sqrt(abar_s)
    eps = eps_rows(abar, prediction_type)
    rows[:, [Column.C_XT, Column.C_OUT]] = direction[:, None] * eps
    rows[:, Column.SIGMA] = eta * np.sqrt((1 - abar_s) / (1 - abar) * (abar_s - abar) / abar_s)
    return _finish(rows)


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: ArrayLike,
    *,
    prediction_type: str = "epsilon",
    clip: float = 0.0,
) -> Plan:
    r"""DPM-Solver++(2M), midpoint form (Lu et al. 2022b, algorithm 2).

    With lambda = log(a / b), h = lambda_s - lambda_t, and r = h_previous / h,

        x_s = (b_s / b_t) x_t - a_s (e^-h - 1) D,   D = (1 + 1 / 2r) x0 - (1 / 2r) x0_previous,

    where -a_s (e^-h - 1) = a_s - a_t b_s / b_t, which is finite at both ends. The first step has no
    previous x0 and the last has infinite h: there 1 / 2r = 0 (first order; diffusers'
    final_sigmas_type zero). So it is after a step from abar = 0, where h_previous is infinite;
    diffusers puts 2^-24 for that abar.
    """
    rows, abar, abar_s = _begin(schedule, steps, prediction_type, clip)
    b_ratio = np.sqrt((1 - abar_s) / (1 - abar))
    gain = np.sqrt(abar_s) - np.sqrt(abar) * b_ratio
    with np.errstate(divide="ignore"):
        h = np.diff((np.log(abar) - np.log1p(-abar)) / 2)
    half_inverse_r = np.zeros_like(abar)
    half_inverse_r[1:-1] = h[1:] / (2 * h[:-1])
    rows[:, Column.C_XT] = b_ratio
    rows[:, Column.C_X0] = gain * (1 + half_inverse_r)
    rows[:, Column.C_HIST] = -gain * half_inverse_r
    return _finish(rows)


SOLVERS: dict[str, Callable[..., Plan]] = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
DROP_LAST = ("dpmpp_2m",)
"""Solvers whose timesteps are num_steps + 1 points less the last."""


def make_plan(
    schedule: NoiseSchedule,
    solver: str = "ddim",
    num_steps: int = 50,
    *,
    prediction_type: str,
    spacing: str = "leading",
    steps_offset: int = 0,
    clip: float = 1.0,
    eta: float = 0.0,
    variance_type: str = "fixed_small",
    threshold: float = 0.0,
    guidance_rescale: float = 0.0,
) -> Plan:
    """Return the plan of a named solver over ``num_steps`` timesteps of the given spacing.

    The arguments are those of `timesteps` and of the solver's own function; these hold for every
    solver:

    Args:
        clip: bound of x0, 0 for none; with a threshold, the largest that it may be, at least 1.
        threshold: the quantile of |x0| that each image is clipped to and divided by, where it is
            above 1 (dynamic thresholding, Saharia et al. 2022, section 2.3: .995); 0 for none.
            diffusers names it dynamic_thresholding_ratio, and ``clip`` sample_max_value.
        guidance_rescale: how far a guided output is brought back to the deviation of its
            conditional half (Lin et al. 2023, section 3.4: .7); 0 for not at all.

    Raises:
        ValueError: an argument out of its range, or one that the solver has no use for.
    """
    solve: Any = SOLVERS[arguments.one_of("solver", solver, SOLVERS)]
    options: dict[str, float | str] = {
        "clip": clip,
        "eta": arguments.number("eta", eta, 0, 1),
        "variance_type": arguments.one_of("variance_type", variance_type, VARIANCE_TYPES),
    }
    for name, off in (("eta", 0.0), ("variance_type", "fixed_small")):
        if name not in solve.__kwdefaults__:
            value = options.pop(name)
            if value != off:
                raise ValueError(f"{name}={value!r}: must be {off!r}; {solver} has no such option")
    steps = timesteps(
        num_steps, len(schedule), spacing, steps_offset, drop_last=solver in DROP_LAST
    )
    plan = solve(schedule, steps, prediction_type=prediction_type, **options)
    threshold = arguments.number("threshold", threshold, 0, 1)
    rescale = arguments.number("guidance_rescale", guidance_rescale, 0, 1)
    if threshold and clip < 1:
        raise ValueError(f"clip={clip!r}: must be at least 1 beside a threshold, as its largest")
    if not threshold and not rescale:
        return plan
    rows = plan.rows.copy()
    rows[:, Column.THRESHOLD], rows[:, Column.RESCALE] = threshold, rescale
    return Plan(rows, plan.noise_keys)
