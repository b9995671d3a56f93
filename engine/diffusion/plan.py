"""`Plan`: the steps of one image as a table of coefficients (kernels/tables.py), one row a step."""

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
    """The steps of one image, down to x_0, as a table of coefficients: one row a step.

    Rows are in the order in which they are applied. The image begins at initial[0] image +
    initial[1] z, with z normal noise: the stream Purpose.INITIAL of the image's seed, key 0.

    Attributes:
        rows: float64 [S, len(Column)], read-only; the columns are those of kernels.tables.Column.
        noise_keys: int64 [S], read-only, at least 0, all different: the key (the upper 64 bits of
            the noise's counter) of each row's z.
        initial: two numbers, at least 0, by which the image and z are multiplied; (0, 1), pure
            noise, needs no image.
        abar: float64 [S], read-only, in [0, 1): the share of the signal's variance in each row's
            x_t; None where that is not known.

    Raises:
        ValueError: if a shape is wrong, a number is not finite in float32 (in which kernels read
            it), sigma or clip is negative, threshold or rescale is outside of [0, 1], clip is below
            1 beside a threshold, unguided is neither 0 nor 1, the first row reads history, noise
            keys are negative, not integers, or repeat, initial is no two numbers of at least 0, or
            abar is outside of [0, 1).
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
        """The number of steps S, an int, which is also that of calls of the network."""
        return len(self)

    @property
    def timesteps(self) -> Table:
        """The timesteps that the network is told, float64 [S]; may be fractional, may repeat."""
        return self.rows[:, Column.TIMESTEP]

    @cached_property
    def fractional(self) -> bool:
        """Whether some timestep lies between the integers, a bool."""
        return bool((self.timesteps != self.timesteps.round()).any())

    @cached_property
    def content(self) -> bytes:
        """The bytes of rows and noise keys, which are equal for plans of equal steps."""
        return self.rows.tobytes() + self.noise_keys.tobytes()

    @property
    def needs_image(self) -> bool:
        """Whether the plan begins at a noised image, which must be given, a bool."""
        return self.initial[0] != 0

    @cached_property
    def needs_stats(self) -> bool:
        """Whether some row has a threshold or rescales (kernel ``sample_stats`` runs), a bool."""
        return bool(self.rows[:, SHARES].any())

    @property
    def learns_variance(self) -> bool:
        """Whether the network must have 2C output channels, the last C for the variance; a bool."""
        return bool(self.rows[:, Column.LOG_SIGMA].any())

    def from_image(self, strength: float) -> Plan:
        """Return the plan that begins at an image, noised (SDEdit, Meng et al. 2022).

        It has the last int(strength S) rows of this plan, as in diffusers' img2img, and begins at
        the image noised to the first of them: x_t = sqrt(abar_t) image + sqrt(1 - abar_t) z (S4).

        Args:
            strength: the share of the steps that is taken, in (0, 1]; at 1 all rows are applied,
                yet still to a noised image.

        Raises:
            ValueError: if the strength is out of its range, or too small for one step, or the
                plan's abar is None.
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
        """Return the plan that begins at a row of this one, from an image noised to its timestep.

        Rows keep their noise keys. The first has no previous x0 and takes its own instead
        (c_x0 + c_hist), which makes multistep solvers of first order there, as at any start.

        Args:
            row: the number of the row, in 0..S-1.

        Raises:
            ValueError: if the row is out of its range, or the plan's abar is None.
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
