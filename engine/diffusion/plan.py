"""A trajectory as a table: one row of numbers a step (kernels/tables.py), and how it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashddpm import arguments
from flashddpm.host import isolated
from flashddpm.kernels.tables import Column

Table = NDArray[np.float64]
Ints = NDArray[np.int64]

SHARES = (Column.THRESHOLD, Column.RESCALE)


@dataclass(frozen=True, eq=False)
class Plan:
    """A trajectory from its first timestep to x_0: rows in the order in which they are applied.

    It begins at initial[0] image + initial[1] z, where z has Purpose.INITIAL and noise key 0.

    Attributes:
        rows: float64 [S, len(Column)], read-only.
        noise_keys: int64 [S], read-only; the noise key of each row's z.
        initial: what the image and z are multiplied by; (0, 1), pure noise, needs no image.
        abar: float64 [S], read-only: how noisy each row's x_t is; None where that is not known.

    Raises:
        ValueError: wrong shapes, a number that is not finite in float32 (in which kernels read it),
            a negative sigma or clip, a threshold or rescale outside [0, 1], a threshold beside a
            clip below 1, an unguided that is neither 0 nor 1, a first row that reads history, noise
            keys that are negative, not integers, or repeat, or an abar outside [0, 1).
    """

    rows: Table
    noise_keys: Ints
    initial: tuple[float, float] = (0.0, 1.0)
    abar: Table | None = None

    @isolated(grad=False)
    def __post_init__(self) -> None:
        rows = np.array(self.rows, np.float64)
        _check_rows(rows)
        keys = np.array(self.noise_keys)
        if keys.shape != rows.shape[:1] or keys.dtype.kind not in "iu":
            raise ValueError(f"noise_keys of shape {keys.shape}: must be {len(rows)} integers")
        keys = keys.astype(np.int64)
        if (keys < 0).any() or len(np.unique(keys)) != len(keys):
            raise ValueError("noise_keys: must be in 0..2^63-1 and differ from one another")
        initial = tuple(arguments.number("initial", value, 0) for value in self.initial)
        if len(initial) != 2:
            raise ValueError(f"initial={self.initial!r}: must be two numbers")
        abar = None if self.abar is None else np.array(self.abar, np.float64)
        if abar is not None and (
            abar.shape != rows.shape[:1] or not ((abar >= 0) & (abar < 1)).all()
        ):
            raise ValueError(f"abar: must be {len(rows)} numbers in [0, 1)")
        for name, value in (("rows", rows), ("noise_keys", keys), ("abar", abar)):
            if value is not None:
                value.setflags(write=False)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "initial", initial)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows, self.noise_keys, self.initial, self.abar)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_steps(self) -> int:
        """Number of steps, and of evaluations of the network."""
        return len(self)

    @property
    def timesteps(self) -> Table:
        """What the network is told at each step, float64 [S]; may be fractional, and may repeat."""
        return self.rows[:, Column.TIMESTEP]

    @cached_property
    def fractional(self) -> bool:
        """Whether some timestep lies between the integers."""
        return bool((self.timesteps != self.timesteps.round()).any())

    @cached_property
    def content(self) -> bytes:
        """What tells its steps from those of another plan."""
        return self.rows.tobytes() + self.noise_keys.tobytes()

    @property
    def needs_image(self) -> bool:
        """Whether it begins at a noised image, which must be given."""
        return self.initial[0] != 0

    @cached_property
    def needs_stats(self) -> bool:
        """Whether some row asks for ``sample_stats``: has a threshold, or rescales."""
        return bool(self.rows[:, SHARES].any())

    @property
    def learns_variance(self) -> bool:
        """Whether the network must have 2C channels, the second C of them for the variance."""
        return bool(self.rows[:, Column.LOG_SIGMA].any())

    def from_image(self, strength: float) -> Plan:
        """Return the plan that begins at an image (SDEdit, Meng et al. 2022).

        The last int(strength S) rows of this plan, as in diffusers' img2img, from the image noised
        to the first of them: x_t = sqrt(abar_t) image + sqrt(1 - abar_t) z (S4).

        Args:
            strength: in (0, 1]; at 1 all rows are applied, yet to a noised image still.

        Raises:
            ValueError: a strength out of its range, or too small for one step, or a plan that does
                not know its abar.
        """
        n = len(self)
        strength = arguments.number("strength", strength, 0, 1)
        count = int(n * strength)
        if count == 0:
            raise ValueError(
                f"strength={strength!r}: must be at least {1 / n:g}, for one of {n} steps"
            )
        return self.begin_at(n - count)

    @isolated(grad=False)
    def begin_at(self, row: int) -> Plan:
        """Return the plan that begins at ``row``, in 0..S-1, from an image noised to its timestep.

        Rows keep their noise keys. The first has no previous x0 and takes its own instead
        (c_x0 + c_hist), which makes multistep solvers of first order there, as at any start.
        """
        row = arguments.integer("row", row, 0, len(self) - 1)
        if self.abar is None:
            raise ValueError("abar=None: must be known for a plan to begin at an image")
        rows = self.rows[row:].copy()
        rows[0, Column.C_X0] += rows[0, Column.C_HIST]
        rows[0, Column.C_HIST] = 0
        abar = self.abar[row]
        initial = (float(np.sqrt(abar)), float(np.sqrt(1 - abar)))
        return replace(
            self,
            rows=rows,
            noise_keys=self.noise_keys[row:],
            initial=initial,
            abar=self.abar[row:],
        )


def _check_rows(rows: Table) -> None:
    if rows.ndim != 2 or rows.shape[1] != len(Column) or len(rows) == 0:
        raise ValueError(f"rows of shape {rows.shape}: must be [S, {len(Column)}] with S >= 1")
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(rows.astype(np.float32))
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise ValueError(f"rows[{i}, {Column(j).name}]={rows[i, j]}: must be finite in float32")
    if (rows[:, [Column.SIGMA, Column.CLIP]] < 0).any():
        raise ValueError("rows: sigma and clip must not be negative")
    if (rows[:, SHARES] < 0).any() or (rows[:, SHARES] > 1).any():
        raise ValueError("rows: threshold and rescale must be in [0, 1]")
    if (rows[rows[:, Column.THRESHOLD] != 0, Column.CLIP] < 1).any():
        raise ValueError("rows: clip must be at least 1 where there is a threshold")
    if not np.isin(rows[:, Column.UNGUIDED], (0, 1)).all():
        raise ValueError("rows: unguided must be 0 or 1")
    if rows[0, Column.C_HIST] != 0:
        raise ValueError("rows[0, C_HIST]: must be 0, for the first step has no previous x0")
