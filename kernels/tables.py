"""What kernels, reference and engine agree on: columns of a step's row, purposes of the noise.

A step is a row of float32 numbers (the float64 plan, cast once) and two integers:

    x0     = x0_xt x_t + x0_out out, then clipped to [-clip, clip]
    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist hist + sigma e^(log_sigma v) z
    hist   = x0

A coefficient that is exactly 0 is a term that is not added, whatever its value (noise, history and
variance are not even loaded), and clip = 0 means no clipping. Terms are added from left to right,
every product and sum rounded, starting from -0 (the one number that adds nothing: -0 + p is p, its
sign included).
``keys`` is the noise key of z. ``next`` is the row that follows; a row that points at itself is
the end, where nothing is loaded, computed or stored: row 0 of every table, that of idle slots, is.

Four columns are 0 for most plans:

- log_sigma: the network has 2C channels, and v, the second C of the slot's conditional lane, is
  how far the logarithm of sigma departs from that of the column (Nichol & Dhariwal 2021, eq. 15).
- threshold: ``sample_stats`` takes this quantile of the slot's |x0|, in [1, max(clip, 1)], for
  ``dynamic_threshold``; x0 is clipped to it and divided by it (Saharia et al. 2022, section 2.3).
- rescale: of a guided slot, ``sample_stats`` compares the deviation of out with that of its
  conditional lane for ``rescale_factor``, by which out is multiplied (Lin et al. 2023, eq. 15, 16).
- unguided: where it is not 0, a guided slot takes its conditional lane as it is, as an unguided one
  does (an interval of guidance: Kynkaanniemi et al. 2024). Both its lanes go on.
"""

from __future__ import annotations

from enum import IntEnum

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of images and of a network's output."""


class Column(IntEnum):
    """Columns of the float table ``rows`` [R, len(Column)]."""

    X0_XT = 0
    X0_OUT = 1
    C_X0 = 2
    C_XT = 3
    C_OUT = 4
    C_HIST = 5
    SIGMA = 6
    LOG_SIGMA = 7
    CLIP = 8
    THRESHOLD = 9
    RESCALE = 10
    UNGUIDED = 11
    TIMESTEP = 12  # read by the network only


IDLE = 0
"""The row of slots without an image, and of finished ones."""


class LossColumn(IntEnum):
    """Columns of the float table of ``hybrid_loss``, [T, len(LossColumn)]; its first three are all
    of ``diffusion_loss``'s.
    """

    X0 = 0  # of x_0 in the target
    EPS = 1  # of eps in the target
    WEIGHT = 2  # of the error's mean
    BOUND_WEIGHT = 3  # of the mean term of the variational bound
    OFFSET = 4  # log variance over the posterior's: offset + slope v
    SLOPE = 5
    GAIN = 6  # error of the model's mean for an error of its output
    PRECISION = 7  # 1 / the posterior's deviation
    HALF_BIN = 8  # half the width of a pixel's bin where the term is that of the decoder, else 0


class VlbColumn(IntEnum):
    """Columns of the float table of ``vlb_terms``, [T + 1, len(VlbColumn)]; a row a timestep, and
    the last for the prior.
    """

    X0 = 0  # of x_0 in what a perfect network says
    EPS = 1  # of eps in it
    OUT = 2  # of the network's output: 1, or 0 where there is none
    X0_OUT = 3  # error of the predicted x_0 for an error of the output
    EPS_OUT = 4  # error of the predicted eps for the same
    CLIP = 5  # bound of the predicted x_0, 0 for none
    OFFSET = 6  # log variance over the posterior's: offset + slope v
    SLOPE = 7
    GAIN = 8  # error of the model's mean for one of x_0, over the posterior's deviation
    HALF_BIN = 9  # half the width of a pixel's bin, over the same, where the decoder's, else 0


LOSSES = ("mse", "l1", "huber")
"""Of an error e: e^2, |e|, and e^2 / 2 up to delta and delta (|e| - delta / 2) beyond."""


class Purpose(IntEnum):
    """What a noise draw is for: the counter's second word. Append, never renumber."""

    INITIAL = 0
    REVERSE_STEP = 1
    TRAINING = 2
    TIMESTEP = 3
    LABEL_DROPOUT = 4
    INPAINTING = 5
    FLIP = 6
