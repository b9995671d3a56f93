r"""Noise schedules: the betas of the forward process, and the tables that follow from them.

The process is q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I)   (S1, S2), with
alpha_t = 1 - beta_t, abar_t = prod_{s<=t} alpha_s, t = 0..T-1 (Ho et al. 2020, section 2).
The posterior q(x_{t-1} | x_t, x_0) (S5; eq. 6-7 there) has the mean
sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
and the variance (1 - abar_{t-1}) / (1 - abar_t) beta_t, with abar_{-1} = 1.

S1 to S5 are equations of docs/math.md. All tables are float64 NumPy arrays of shape [T].
``tables="diffusers"`` asks for the values that diffusers has, which computes betas and abar in
float32: 1 - abar_0 of the linear schedule, say, is off by 1.7e-4 of itself there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flashddpm import arguments
from flashddpm.host import isolated

Table = NDArray[np.float64]

MAX_TIMESTEPS = 100_000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
TABLES = ("float64", "diffusers")


def linear(T: int, start: float = 1e-4, end: float = 0.02) -> Table:
    """Return betas evenly spaced from ``start`` to ``end``, float64 [T] (Ho et al. 2020).

    Args:
        T: the number of timesteps, at least 1; a negative T is a ValueError of NumPy.
        start: the first beta; not checked.
        end: the last beta; not checked.
    """
    return np.linspace(start, end, T)


def scaled_linear(T: int, start: float = 1e-4, end: float = 0.02) -> Table:
    """Return betas whose square roots are evenly spaced, float64 [T] (Rombach et al. 2022).

    Args:
        T: the number of timesteps, at least 1; a negative T is a ValueError of NumPy.
        start: the first beta, at least 0; not checked otherwise.
        end: the last beta, at least 0; not checked otherwise.

    Raises:
        ValueError: if ``start`` or ``end`` is negative.
    """
    return np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2


def squaredcos_cap_v2(T: int, start: float = 1e-4, end: float = 0.02) -> Table:
    """Return the betas of the cosine schedule, float64 [T] (Nichol & Dhariwal 2021, eq. 17).

    They are at most 0.999, and otherwise those of abar = cos^2((t/T + 0.008) / 1.008 pi/2).

    Args:
        T: the number of timesteps, at least 1; not checked.
        start, end: not used; they are there for the signature of the other schedules.
    """
    abar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def sigmoid(T: int, start: float = 1e-4, end: float = 0.02) -> Table:
    """Return betas on a logistic curve from ``start`` to ``end``, over [-6, 6]; float64 [T].

    As diffusers has it (GeoDiff, Xu et al. 2022): beta_t = start + (end - start) s(u), with s the
    logistic function and u from -6 to 6 in T even points.

    Args:
        T: the number of timesteps, at least 1; a negative T is a ValueError of NumPy.
        start: a number, not checked; the first beta is start + 0.0025 (end - start).
        end: a number, not checked; the last beta is end - 0.0025 (end - start), if T is above 1.
    """
    return 1 / (1 + np.exp(-np.linspace(-6, 6, T))) * (end - start) + start


def rescale_zero_terminal_snr(betas: ArrayLike) -> Table:
    """Return betas whose last abar is 0, so that x_T is noise alone (Lin et al. 2023, algorithm 1).

    sqrt(abar) is shifted and scaled: the first stays as it is, and the last becomes 0.

    Args:
        betas: numbers in (0, 1), [T], with T of at least 2; neither is checked.

    Returns:
        The new betas, float64 [T], the last of which is 1; for T = 1, NaN.
    """
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1 - np.concatenate([abar[:1], abar[1:] / abar[:-1]])


def _float32_betas(beta_schedule: str, T: int, start: float, end: float) -> Tensor:
    """Return a named schedule as diffusers has it, float32 [T]."""

    def even(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, T, dtype=torch.float32, device="cpu")

    if beta_schedule == "linear":
        return even(start, end)
    if beta_schedule == "scaled_linear":
        return even(start**0.5, end**0.5) ** 2
    if beta_schedule == "sigmoid":
        return torch.sigmoid(even(-6, 6)) * (end - start) + start
    return torch.from_numpy(squaredcos_cap_v2(T)).float()


def _float32_abar(betas: Tensor, rescale: bool) -> Tensor:
    """Return abar of betas as diffusers computes it, float32 [T]."""
    if rescale:  # rescale_zero_terminal_snr, rounded as often
        root = (1 - betas).cumprod(0).sqrt()
        first, last = root[0].clone(), root[-1].clone()
        abar = ((root - last) * (first / (first - last))) ** 2
        betas = 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
    return (1 - betas).cumprod(0)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise schedule of a forward process: tables of one number a timestep, from its betas.

    Attributes:
        betas: float64 [T], read-only, in (0, 1), but the last may be 1; given as a list, tuple or
            array of numbers.

    Raises:
        ValueError: if betas are no row of 1 to 100000 numbers, if one is not finite or not in (0,
            1] or is 1 before the last, or if they are so small that abar does not strictly decrease
            in float64.
    """

    betas: Table

    @isolated(grad=False)
    def __post_init__(self) -> None:
        try:
            given = np.asarray(self.betas)
            if given.dtype.kind not in "fiu":
                raise TypeError
            betas = given.astype(np.float64)
        except (TypeError, ValueError):
            raise ValueError("betas: must be a list of numbers") from None
        if betas.ndim != 1 or not 1 <= betas.size <= MAX_TIMESTEPS:
            raise ValueError(f"betas of shape {betas.shape}: must be one row of 1..{MAX_TIMESTEPS}")
        good = np.isfinite(betas) & (betas > 0) & (betas <= 1)
        good[:-1] &= betas[:-1] < 1
        if not good.all():
            t = int(np.argmin(good))
            raise ValueError(
                f"betas[{t}]={betas[t]}: must be finite and in (0, 1); the last may be 1"
            )
        betas.setflags(write=False)
        object.__setattr__(self, "betas", betas)
        if not (np.diff(self.alphas_cumprod, prepend=1.0) < 0).all():
            raise ValueError("betas: alphas_cumprod must strictly decrease; some beta is too small")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.betas,)

    @classmethod
    @isolated(grad=False)
    def create(
        cls,
        beta_schedule: str = "linear",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        *,
        rescale_betas_zero_snr: bool = False,
        tables: str = "float64",
    ) -> NoiseSchedule:
        """Return a schedule by its name, with diffusers' names and defaults.

        Args:
            beta_schedule: linear, scaled_linear, squaredcos_cap_v2 (cosine) or sigmoid.
            num_train_timesteps: the number of timesteps T, in 1..100000.
            beta_start: the first beta, in [0, 1]; not used by squaredcos_cap_v2.
            beta_end: the last beta, in [0, 1]; not used by squaredcos_cap_v2.
            rescale_betas_zero_snr: whether the betas are rescaled so that the last abar is 0
                (`rescale_zero_terminal_snr`).
            tables: "float64", or "diffusers" for betas of which ``alphas_cumprod``, rounded to
                float32, is diffusers' table, bit for bit: 1 - abar_t / abar_{t-1}, as its
                DDPMScheduler takes them.

        Raises:
            ValueError: if an argument is out of its range, if the betas are not allowed
                (`NoiseSchedule`), or if there is only one timestep to rescale.
        """
        arguments.one_of("beta_schedule", beta_schedule, BETA_SCHEDULES)
        T = arguments.integer("num_train_timesteps", num_train_timesteps, 1, MAX_TIMESTEPS)
        start = arguments.number("beta_start", beta_start, 0, 1)
        end = arguments.number("beta_end", beta_end, 0, 1)
        make = {
            "linear": linear,
            "scaled_linear": scaled_linear,
            "squaredcos_cap_v2": squaredcos_cap_v2,
            "sigmoid": sigmoid,
        }[beta_schedule]
        schedule = cls._finish(make(T, start, end), rescale_betas_zero_snr)
        if arguments.one_of("tables", tables, TABLES) == "float64":
            return schedule
        betas = _float32_betas(beta_schedule, T, start, end)
        return cls._rounded(_float32_abar(betas, rescale_betas_zero_snr))

    @classmethod
    @isolated(grad=False)
    def from_config(cls, config: Mapping[str, Any], tables: str = "float64") -> NoiseSchedule:
        """Return the schedule that a diffusers scheduler_config.json describes.

        Args:
            config: a mapping, of which the keys num_train_timesteps, beta_start, beta_end,
                beta_schedule, trained_betas (T numbers, in place of the four before it) and
                rescale_betas_zero_snr are read; a key that is missing has the default of `create`.
            tables: "float64", or "diffusers" for its values of betas and abar, which are computed
                in float32.

        Raises:
            ValueError: if a setting is out of its range, the betas are not allowed
                (`NoiseSchedule`), or there is only one timestep to rescale.
        """
        rescale = arguments.boolean(
            "rescale_betas_zero_snr", config.get("rescale_betas_zero_snr") or False
        )
        trained = config.get("trained_betas")
        if trained is not None:
            schedule = cls._finish(trained, rescale)
            if arguments.one_of("tables", tables, TABLES) == "float64":
                return schedule
            betas = torch.tensor(np.asarray(trained), dtype=torch.float32, device="cpu")
            return cls._rounded(_float32_abar(betas, rescale))
        return cls.create(
            config.get("beta_schedule", "linear"),
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", 1e-4),
            config.get("beta_end", 0.02),
            rescale_betas_zero_snr=rescale,
            tables=tables,
        )

    @classmethod
    def _finish(cls, betas: Table, rescale: bool) -> NoiseSchedule:
        schedule = cls(betas)
        if not rescale:
            return schedule
        if len(schedule) == 1:
            raise ValueError("rescale_betas_zero_snr=True: needs at least 2 timesteps")
        return cls(rescale_zero_terminal_snr(schedule.betas))

    @classmethod
    def _rounded(cls, abar: Tensor) -> NoiseSchedule:
        """Return the schedule of these alphas_cumprod, float32 [T]."""
        table = np.append(1.0, abar.double().numpy())
        if not (np.diff(table) < 0).all():
            raise ValueError("tables='diffusers': alphas_cumprod must strictly decrease in float32")
        return cls(1 - table[1:] / table[:-1])

    def __len__(self) -> int:
        return self.betas.size

    @cached_property
    def alphas(self) -> Table:
        """The table alpha_t = 1 - beta_t, float64 [T]   (S1)."""
        return 1 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Table:
        """The table abar_t = prod_{s<=t} alpha_s, float64 [T], decreasing   (S3, S4)."""
        return np.cumprod(self.alphas, dtype=np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> Table:
        """The table abar_{t-1}, float64 [T], with abar_{-1} = 1."""
        return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    @cached_property
    def snr(self) -> Table:
        """The signal-to-noise ratios SNR_t = abar_t / (1 - abar_t), float64 [T]."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef_x0(self) -> Table:
        """The coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0), float64 [T]   (S5)."""
        return np.sqrt(self.alphas_cumprod_prev) * self.betas / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef_xt(self) -> Table:
        """The coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0), float64 [T]   (S5)."""
        return np.sqrt(self.alphas) * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> Table:
        """The variance beta~_t of q(x_{t-1} | x_t, x_0), float64 [T]; 0 at t = 0   (S5)."""
        return (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod) * self.betas
