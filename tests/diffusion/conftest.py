"""What a row does, written out."""

import numpy as np
import pytest

from flashddpm.kernels.tables import Column


@pytest.fixture(scope="session", name="apply")
def _apply():
    """A function: x_next and x0 of one row, in float64 (kernels/tables.py)."""

    def apply(row, x, out, hist, z):
        x0 = row[Column.X0_XT] * x + row[Column.X0_OUT] * out
        if row[Column.CLIP]:
            x0 = np.clip(x0, -row[Column.CLIP], row[Column.CLIP])
        x_next = row[Column.C_X0] * x0 + row[Column.C_XT] * x + row[Column.C_OUT] * out
        if row[Column.C_HIST]:
            x_next = x_next + row[Column.C_HIST] * hist
        return x_next + row[Column.SIGMA] * z, x0

    return apply


def unclipped_map(rows):
    """Coefficients of (x_t, out, hist, z) in x_next, [S, 4]."""
    c = rows[:, Column.C_X0]
    return np.stack(
        [
            c * rows[:, Column.X0_XT] + rows[:, Column.C_XT],
            c * rows[:, Column.X0_OUT] + rows[:, Column.C_OUT],
            rows[:, Column.C_HIST],
            rows[:, Column.SIGMA],
        ],
        -1,
    )


@pytest.fixture(scope="session")
def assert_same_map():
    """A function: two plans map (x_t, out, hist, z) to the same x_next, unclipped."""

    def check(a, b, rtol):
        a, b = unclipped_map(a.rows), unclipped_map(b.rows)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())

    return check
