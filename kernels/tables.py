"""The columns of the coefficient tables, the names of the losses and the purposes of noise.

Kernels, reference and engine agree on them. A step of one image is a row of float32 numbers (the
float64 plan, which is the table of the image's steps, cast once) and two integers:

    x0     = x0_xt x_t + x0_out out, then clipped to [-clip, clip]
    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist hist + sigma e^(log_sigma v) z
    hist   = x0

A coefficient that is exactly 0 is a term that is not added, whatever its value (noise, history and
variance are not even loaded), and clip = 0 means no clipping. Terms are added from left to right,
every product and sum rounded, starting from -0 (the one number that adds nothing: -0 + p is p, its
sign included).
``keys`` holds the key (the upper 64 bits of the noise counter) of z. ``next`` holds the row that
follows; a row that points at itself is the end, where nothing is loaded, computed or stored. Row 0
of every table, the row of idle slots (a slot is the place of one image in a batch), is such an end.

Four columns are 0 for most plans (a lane is one evaluation of the network; a guided image has a
conditional and an unconditional one):

- log_sigma: the network has 2C channels, v is the second C of the slot's conditional lane, and
  log_sigma v is how far the logarithm of the noise's deviation departs from that of the column
  sigma (Nichol & Dhariwal 2021, eq. 15).
- threshold: ``sample_stats`` takes this quantile of the slot's |x0|, in [1, max(clip, 1)], for
  ``dynamic_threshold``; x0 is clipped to it and divided by it (Saharia et al. 2022, section 2.3).
- rescale: for a guided slot, ``sample_stats`` compares the standard deviation of out with that of
  the conditional lane; out is multiplied by the resulting ``rescale_factor`` (Lin et al. 2023, eq.
  15, 16).
- unguided: where it is not 0, a guided slot uses the output of its conditional lane alone, as an
  unguided slot does (an interval of guidance: Kynkaanniemi et al. 2024). Both its lanes get x_next.
"""

from __future__ import annotations

from enum import IntEnum

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes allowed for images and for a network's output."""


class Column(IntEnum):
    """The columns of the float32 table ``rows`` [R, len(Column)], one row a step of sampling.

    x_next = c_x0 x0 + c_xt x_t + c_out out + c_hist hist + sigma e^(log_sigma v) z, where x0 is
    x0_xt x_t + x0_out out, clipped, and z is noise; a term whose coefficient is 0 is not added.

    Attributes:
        X0_XT: the factor of x_t in the predicted x0.
        X0_OUT: the factor of the network's output in the predicted x0.
        C_X0, C_XT, C_OUT, C_HIST: the factors in x_next of x0 (clipped), of x_t, of the network's
            output and of the history, which is the x0 of the previous step.
        SIGMA: the standard deviation of the step's noise in x_next; 0 draws none.
        LOG_SIGMA: the factor of the network's variance channels v in the exponent of the noise's
            standard deviation, sigma e^(log_sigma v); 0 leaves v unread.
        CLIP: the bound of |x0|, and of the dynamic threshold if it is above 1; 0 does not clip.
        THRESHOLD: the quantile in (0, 1] of dynamic thresholding; 0 does without.
        RESCALE: the strength phi of guidance rescaling; 0 does without.
        UNGUIDED: not 0 where the step uses the conditional output alone, even of a guided image.
        TIMESTEP: the timestep that the network is given; the kernels do not read it.
    """

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
    TIMESTEP = 12


IDLE = 0
"""The row of slots without an image and of slots whose image is finished."""


class LossColumn(IntEnum):
    """The columns of ``hybrid_loss``'s float32 table, [T, len(LossColumn)], one row a timestep.

    The first three are all the columns of ``diffusion_loss``'s table. v is the second C of the
    network's 2C channels.

    Attributes:
        X0: the factor k0 of x_0 in the training target k0 x_0 + k1 eps.
        EPS: the factor k1 of the noise eps in the target.
        WEIGHT: the weight w of the mean penalty of the prediction error.
        BOUND_WEIGHT: the weight b of the mean term of the variational bound.
        OFFSET, SLOPE: the model's log variance over the posterior's is offset + slope v.
        GAIN: the error of the model's mean for a unit error of the network's output.
        PRECISION: 1 / the posterior's standard deviation.
        HALF_BIN: half the width of a pixel's bin (the interval of x_0 that is rounded to the
            pixel's value), in the units of x_0, where the term is the decoder's negative log
            likelihood of that bin (t = 0); else 0.
    """

    X0 = 0
    EPS = 1
    WEIGHT = 2
    BOUND_WEIGHT = 3
    OFFSET = 4
    SLOPE = 5
    GAIN = 6
    PRECISION = 7
    HALF_BIN = 8


class VlbColumn(IntEnum):
    """The columns of ``vlb_terms``'s float32 table, [T + 1, len(VlbColumn)].

    There is one row for each timestep, and the last row is that of the prior's term L_T. v is the
    second C of 2C channels of the network, 0 without them.

    Attributes:
        X0: the factor k0 of x_0 in the output of a perfect network, k0 x_0 + k1 eps.
        EPS: the factor k1 of the noise eps in it.
        OUT: 1 where the network's output is used, 0 where there is none (the prior).
        X0_OUT: the error of the predicted x_0 for a unit error of the output.
        EPS_OUT: the error of the predicted eps for a unit error of the output.
        CLIP: the bound of the predicted |x_0|; 0 does not clip.
        OFFSET, SLOPE: the model's log variance over the posterior's is offset + slope v.
        GAIN: the error of the model's mean for a unit error of x_0, divided by the posterior's
            standard deviation.
        HALF_BIN: half the width of a pixel's bin (the interval of x_0 that is rounded to the
            pixel's value), divided by the posterior's standard deviation, where the term is the
            decoder's negative log likelihood of that bin; else 0.
    """

    X0 = 0
    EPS = 1
    OUT = 2
    X0_OUT = 3
    EPS_OUT = 4
    CLIP = 5
    OFFSET = 6
    SLOPE = 7
    GAIN = 8
    HALF_BIN = 9


LOSSES = ("mse", "l1", "huber")
"""The penalties of an error e: "mse" is e^2, "l1" is |e|, and "huber" is e^2 / 2 where |e| <= delta
and delta (|e| - delta / 2) beyond.
"""


class Purpose(IntEnum):
    """What a noise draw is for: the second 32-bit word of the Philox counter.

    Draws for different purposes are independent. Append members, but never renumber them: that
    would change the noise.

    Attributes:
        INITIAL: the noise that sampling starts from.
        REVERSE_STEP: the noise of a step of sampling.
        TRAINING: the noise that training and evaluation add to images.
        TIMESTEP: the draw of a training image's timestep.
        LABEL_DROPOUT: the draw that decides whether a training image loses its label.
        INPAINTING: the noise of known pixels while inpainting (reserved: nothing draws it yet).
        FLIP: the draw that decides whether a training image is mirrored.
    """

    INITIAL = 0
    REVERSE_STEP = 1
    TRAINING = 2
    TIMESTEP = 3
    LABEL_DROPOUT = 4
    INPAINTING = 5
    FLIP = 6
