"""What kernels, reference and engine agree on: columns of a step's row, purposes of the noise.

A step is a row of float32 numbers (the float64 plan, cast once) and two integers:

    x0     = x0_xt x_t + x0_out out, then clipped to [-clip, clip]
    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist hist + sigma z,   hist becomes x0

A coefficient that is exactly 0 is a term that is neither loaded nor added, clip = 0 means no
clipping, and terms are added from left to right, every product and sum rounded, starting from -0
(the one number that adds nothing: -0 + p is p, its sign included).
``keys`` is the noise key of z. ``next`` is the row that follows; a row that points at itself is
the end, where nothing is loaded, computed or stored: row 0 of every table is such a row of rest.
"""

from __future__ import annotations

from enum import IntEnum


class Column(IntEnum):
    """Columns of the float table ``rows`` [R, len(Column)]."""

    X0_XT = 0
    X0_OUT = 1
    C_X0 = 2
    C_XT = 3
    C_OUT = 4
    C_HIST = 5
    SIGMA = 6
    CLIP = 7
    TIMESTEP = 8  # read by the network only


REST = 0
"""The row of slots that are idle or finished."""


class Purpose(IntEnum):
    """What a noise draw is for: the counter's second word. Append, never renumber."""

    INITIAL = 0
    REVERSE_STEP = 1
    TRAINING = 2
    TIMESTEP = 3
    LABEL_DROPOUT = 4
    INPAINTING = 5
