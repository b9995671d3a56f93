r"""The forward process: q(x_t | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t I)   (S1, S2).

alpha_t = 1 - beta_t, abar_t = prod_{s<=t} alpha_s, t = 0..T-1 (Ho et al. 2020, section 2).
The posterior q(x_{t-1} | x_t, x_0) (S5; eq. 6-7 there) has the mean
sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
and the variance (1 - abar_{t-1}) / (1 - abar_t) beta_t, with abar_{-1} = 1.

All tables are float64 NumPy arrays of shape [T]. ``tables="diffusers"`` asks for the values that
diffusers has, which computes betas and abar in float32: 1 - abar_0 of the linear schedule, say, is
off by 1.7e-4 of itself there.
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
    """Betas evenly spaced (Ho et al. 2020, section 4)."""
    return np.linspace(start, end, T)


def scaled_linear(T: int, start: float = 1e-4, end: float = 0.02) -> Table:
    """sqrt(beta) evenly spaced (Rombach et al. 2022)."""
    return np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2


def squaredcos_cap_v2(T: int, start: float = 1e-4, end: float = 0.02) -> Table:
    """Abar = cos^2((t/T + 0.008) / 1.008 pi/2), beta capped at 0.999 (Nichol & Dhariwal 2021).

    ``start`` and ``end`` do not enter.
    """
    abar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def sigmoid(T: int, start: float = 1e-4, end: float = 0.02) -> Table:
    """Beta follows a logistic curve over [-6, 6] (GeoDiff, Xu et al. 2022), as diffusers has it."""
    return 1 / (1 + np.exp(-np.linspace(-6, 6, T))) * (end - start) + start


def rescale_zero_terminal_snr(betas: ArrayLike) -> Table:
    """Shift and scale sqrt(abar): the first stays, the last becomes 0 (Lin et al. 2023, alg. 1)."""
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
    """The tables of a forward process, from its ``betas``, float64 [T].

    Raises:
        ValueError: not 1 <= T <= 100000, a beta that is not finite or not in (0, 1], or 1 before
            the last, or betas so small that abar does not strictly decrease in float64.
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
        """Return one of the named schedules, under diffusers' names and defaults.

        With ``tables="diffusers"``, ``alphas_cumprod`` rounded to float32 is diffusers' table, bit
        for bit, and betas are 1 - abar_t / abar_{t-1}, as its DDPMScheduler takes them.
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

        Keys read: num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
        rescale_betas_zero_snr. ``tables`` is as for `create`.
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
        """alpha_t = 1 - beta_t   (S1)."""
        return 1 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Table:
        """abar_t = prod_{s<=t} alpha_s   (S3, S4)."""
        return np.cumprod(self.alphas, dtype=np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> Table:
        """abar_{t-1}, with abar_{-1} = 1."""
        return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    @cached_property
    def snr(self) -> Table:
        """SNR_t = abar_t / (1 - abar_t)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef_x0(self) -> Table:
        """Coefficient of x_0 in the posterior's mean   (S5)."""
        return np.sqrt(self.alphas_cumprod_prev) * self.betas / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef_xt(self) -> Table:
        """Coefficient of x_t in the posterior's mean   (S5)."""
        return np.sqrt(self.alphas) * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_variance(self) -> Table:
        """beta~_t, the posterior's variance   (S5); 0 at t = 0."""
        return (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod) * self.betas
