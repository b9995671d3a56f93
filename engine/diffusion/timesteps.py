r"""Timesteps and noise levels of a plan: spacings of timesteps, spacings of sigma, and lists.

A noise level is abar, or sigma = sqrt((1 - abar) / abar), x_t then being a (x_0 + sigma eps). A
whole timestep has the abar of the schedule. Between two whole timesteps sigma is linear in t, and
the timestep of a sigma is linear in log sigma, as in diffusers (not quite inverse to one another).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashddpm import arguments
from flashddpm.diffusion.schedule import NoiseSchedule

Table = NDArray[np.float64]
Ints = NDArray[np.int64]

SPACINGS = ("leading", "linspace", "trailing")
SIGMA_SPACINGS = ("karras", "exponential", "beta")


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
        num_steps: the number of timesteps, in 1..num_train_timesteps.
        num_train_timesteps: the number of timesteps T of the schedule.
        spacing: leading, linspace or trailing.
        steps_offset: an integer, at least 0, added to leading timesteps; not used by other
            spacings.
        drop_last: whether to take num_steps + 1 points and drop the last, as DPM-Solver does;
            trailing spacing, which has no point to drop, stays as it is.

    Raises:
        ValueError: if an argument is out of its range, or timesteps would repeat or pass T - 1.
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


def respaced(respacing: str, num_train_timesteps: int = 1000) -> Ints:
    """Return the timesteps of one of OpenAI's respacing strings, int64 [S], decreasing.

        "ddim50"    every k-th from 0 on, with the k that makes 50 of them
        "10,20,30"  as many in each of three equal sections (the first ones a timestep longer if
                    need be), evenly from a section's first to its last; one alone is the first
        "250"       the same with one section
        ""          all

    Args:
        respacing: such a string.
        num_train_timesteps: the number of timesteps T of the schedule.

    Raises:
        ValueError: if the string is no respacing, or asks for no timestep, for more than a section
            has, or for a number that no k makes.
    """
    T = arguments.integer("num_train_timesteps", num_train_timesteps, 1)
    allowed = "must be a number of steps, several with commas between, or ddim and a number"
    text = respacing if isinstance(respacing, str) else "?"
    match = re.fullmatch(r"(ddim)?(\d{1,9}(?:,\d{1,9})*)?", text, re.ASCII)
    counts = [int(part) for part in match[2].split(",")] if match and match[2] else []
    if respacing == "":
        counts = [T]
    elif not match or not counts or (match[1] and len(counts) > 1) or sum(counts) == 0:
        raise ValueError(f"timestep_respacing={respacing!r}: {allowed}")
    if match and match[1]:
        return _strided(respacing, counts[0], T)
    size, longer = divmod(T, len(counts))
    steps: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise ValueError(
                f"timestep_respacing={respacing!r}: {count} timesteps do not fit in section "
                f"{i + 1}, which has {length}"
            )
        # Summed one by one, as there: where it should end in .5, the error decides the rounding.
        offset = 0.0
        for _ in range(count):
            steps.append(start + round(offset))
            offset += (length - 1) / max(count - 1, 1)
        start += length
    return np.array(steps[::-1], np.int64)


def _strided(respacing: str, n: int, T: int) -> Ints:
    """Return n of T timesteps, every k-th from 0 on; k = T, which would take one, is refused."""
    for k in range(1, T):
        if -(-T // k) <= n:
            break
    else:
        k = 1
    if -(-T // k) != n:
        raise ValueError(
            f"timestep_respacing={respacing!r}: no stride takes {n} of {T} timesteps; must be "
            f"ddim{-(-T // k)}, say"
        )
    return np.arange(0, T, k)[::-1]


def sigma_grid(spacing: str, high: float, low: float, num_steps: int) -> Table:
    r"""Return sigmas from ``high`` down to ``low``, float64 [num_steps]; a single one is ``high``.

    With u = 0 .. 1 in even steps,

        karras       (high^(1/7) + u (low^(1/7) - high^(1/7)))^7    (Karras et al. 2022, eq. 5)
        exponential  high (low / high)^u
        beta         low + (high - low) B(1 - u),  B the quantile function of Beta(0.6, 0.6)
                     (Lee et al. 2024)

    Args:
        spacing: karras, exponential or beta.
        high: the first sigma, finite and at least ``low``; not checked.
        low: the last sigma, above 0; not checked.
        num_steps: the number of sigmas, at least 1; not checked.

    Raises:
        ValueError: if the spacing is unknown.
    """
    arguments.one_of("sigmas", spacing, SIGMA_SPACINGS)
    u = np.linspace(0, 1, num_steps)
    if spacing == "karras":
        return (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if spacing == "exponential":
        return high * (low / high) ** u
    return low + (high - low) * _beta_quantile(1 - u)


def _beta_quantile(p: Table, a: float = 0.6) -> Table:
    """Return x with I_x(a, a) = p, I the distribution function of Beta(a, a).

    By bisection below 1/2, about which I is symmetric. There the series of the integral of
    t^(a-1) (1-t)^(a-1), x^a sum_k (1-a)_k / k! x^k / (a + k), gains a bit a term.
    """
    k = np.arange(60)
    terms = np.cumprod(np.append(1, (k[:-1] + 1 - a) / k[1:])) / (a + k)
    terms *= math.gamma(2 * a) / math.gamma(a) ** 2
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(60):
        x = (low + high) / 2
        less = x**a * (terms * x[:, None] ** k).sum(-1) < np.minimum(p, 1 - p)
        low, high = np.where(less, x, low), np.where(less, high, x)
    return np.where(p < 0.5, low, 1 - low)


def noise_keys(timesteps: ArrayLike) -> Ints:
    """Return the key of each timestep's noise, int64 [S], all different.

    The key is the upper 64 bits of the noise's counter: floor(t) + 2^32 (the number of earlier
    entries with that floor).

    Args:
        timesteps: numbers, [S], at least 0 and below 2^31, whole or fractional, in any order; not
            checked.
    """
    floor = np.floor(np.asarray(timesteps, np.float64)).astype(np.int64)
    order = np.argsort(floor, kind="stable")
    repeats = np.empty_like(floor)
    repeats[order] = np.arange(len(floor)) - np.searchsorted(floor[order], floor[order])
    return floor + (repeats << 32)


@dataclass(frozen=True, eq=False)
class Steps:
    """The noise levels that a plan visits, and what the network is told of each.

    Attributes:
        timesteps: float64 [S], not rising: what the network is told, each a float32 number, as it
            takes them; they may repeat where they are the ones nearest to sigmas.
        abar: float64 [S], strictly increasing in [0, 1): the share of the signal's variance in x_t.

    Raises:
        ValueError: if the shapes differ, timesteps rise or abar does not rise strictly; the range
            of abar and the dtypes are not checked.
    """

    timesteps: Table
    abar: Table

    def __post_init__(self) -> None:
        t, abar = self.timesteps, self.abar
        if t.shape != abar.shape or (np.diff(t) > 0).any() or (np.diff(abar) <= 0).any():
            raise ValueError("steps: timesteps must not rise, and abar must, strictly")

    @classmethod
    def at(cls, schedule: NoiseSchedule, timesteps: ArrayLike) -> Steps:
        """Return the steps at given timesteps; abar between whole ones is interpolated.

        Args:
            schedule: the forward process, T timesteps.
            timesteps: numbers, [S], whole or fractional, strictly decreasing within 0..T-1.

        Raises:
            ValueError: if the timesteps are not such numbers, or one is fractional and next to abar
                = 0.
        """
        try:
            given = np.asarray(timesteps)
        except ValueError:  # lists of unequal length
            given = np.empty(0)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iuf":
            raise ValueError("timesteps: must be a list of at least one number")
        t, last = _float32(given), len(schedule) - 1
        if not ((t >= 0) & (t <= last)).all() or (np.diff(t) >= 0).any():
            raise ValueError(f"timesteps: must strictly decrease within 0..{last}")
        return cls(t, _abar(schedule, t))

    @classmethod
    def of_sigmas(cls, schedule: NoiseSchedule, sigmas: Table, *, whole: bool = False) -> Steps:
        """Return the steps at given noise levels; the timesteps are interpolated in log sigma.

        Args:
            schedule: the forward process.
            sigmas: float64 [S], strictly decreasing, finite, within the sigmas of the schedule; one
                beyond them, which is not checked, has the timestep of the nearest end.
            whole: whether the network is told the nearest whole timestep; abar stays that of sigma.
                There diffusers, whose DPM-Solver does so for Karras sigmas, cuts the fraction
                off for the other spacings, and for every spacing of the cosine schedule: up to one
                timestep too few.

        Raises:
            ValueError: if sigmas do not strictly decrease.
        """
        t = np.interp(np.log(sigmas), np.log(_sigmas(schedule)), np.arange(len(schedule)))
        return cls(_float32(t.round() if whole else t), 1 / (1 + sigmas**2))


def spaced(
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: str = "leading",
    steps_offset: int = 0,
    *,
    sigmas: str | None = None,
    drop_last: bool = False,
    fractional: bool = False,
) -> Steps:
    """Return the steps of a spacing of timesteps, or of a spacing of sigmas between its ends.

    Args:
        schedule: the forward process, T timesteps, which says abar.
        num_steps: the number of steps, in 1..T.
        spacing: the spacing of timesteps: leading, linspace or trailing.
        steps_offset: an integer, at least 0, added to leading timesteps.
        sigmas: the spacing of sigmas: karras, exponential or beta; None for those of the timesteps.
            Beside ``drop_last`` they span the whole schedule.
        drop_last: whether to take num_steps + 1 timesteps and drop the last (not for trailing).
        fractional: whether timesteps of linspace spacing, and those of sigmas, stay unrounded.

    Raises:
        ValueError: if an argument is out of its range, timesteps would repeat or pass T - 1, or
            sigmas would begin at abar = 0.
    """
    T = len(schedule)
    if sigmas is not None and drop_last:
        n = arguments.integer("num_steps", num_steps, 1, T)
        arguments.one_of("spacing", spacing, SPACINGS)
        ends = Steps.at(schedule, [T - 1, 0] if T > 1 else [0])
    else:
        t: ArrayLike = timesteps(num_steps, T, spacing, steps_offset, drop_last=drop_last)
        if fractional and spacing == "linspace":
            t = np.linspace(0, T - 1, num_steps)[::-1]
        ends = Steps.at(schedule, t)
        n = len(ends.timesteps)
    if sigmas is None:
        return ends
    arguments.one_of("sigmas", sigmas, SIGMA_SPACINGS)
    if ends.abar[0] == 0:
        raise ValueError(
            f"sigmas={sigmas!r}: must be None where the first step has alphas_cumprod = 0 "
            "(a zero-terminal-SNR schedule), whose sigma is infinite"
        )
    high, low = np.sqrt((1 - ends.abar) / ends.abar)[[0, -1]]
    return Steps.of_sigmas(schedule, sigma_grid(sigmas, high, low, n), whole=not fractional)


def _float32(numbers: ArrayLike) -> Table:
    """Round to float32: else 332.99999999999994, say, would have another noise key than 333."""
    return np.asarray(numbers, np.float32).astype(np.float64)


def _sigmas(schedule: NoiseSchedule) -> Table:
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)


def _abar(schedule: NoiseSchedule, t: Table) -> Table:
    """Return abar at timesteps within 0..T-1; exactly the schedule's at whole ones."""
    floor = np.floor(t).astype(np.int64)
    exact = schedule.alphas_cumprod[floor]
    sigma = _sigmas(schedule)
    above = sigma[np.minimum(floor + 1, len(sigma) - 1)]
    fraction = t - floor
    if not np.isfinite(above[fraction > 0]).all():
        raise ValueError(
            "timesteps: must be whole above T - 2 where the last alphas_cumprod is 0 "
            "(a zero-terminal-SNR schedule), for sigma is infinite there"
        )
    with np.errstate(invalid="ignore"):
        between = sigma[floor] + fraction * (above - sigma[floor])
    return np.where(fraction == 0, exact, 1 / (1 + between**2))
