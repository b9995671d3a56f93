r"""Prediction types (S7): what x_0, eps and a network's output are of one another, as coefficients.

A network predicts epsilon, sample (x_0) or v_prediction, and perhaps a variance. With
a = sqrt(abar_t) and b = sqrt(1 - abar_t), x_t = a x_0 + b eps (S4) and v = a eps - b x_0 (Salimans
& Ho 2022, section 4 and appendix D). So each of x_0 and eps is affine in (x_t, out), and both x_t
and the training target, which is what out should be, are affine in (x_0, eps): four tables of two
coefficients, float64 [len(abar), 2]. S4 and S7 are equations of docs/math.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashddpm import arguments
from flashddpm.diffusion.schedule import NoiseSchedule

Table = NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
LEARNED_VARIANCES = ("learned", "learned_range")
"""The variance types of networks of 2C output channels, the second C of which are the variance."""
VARIANCE_TYPES = ("fixed_small", "fixed_large", *LEARNED_VARIANCES)


def _signal_noise(abar: ArrayLike) -> tuple[Table, Table]:
    abar = np.asarray(abar, np.float64)
    return np.sqrt(abar), np.sqrt(1 - abar)


def x0_rows(abar: ArrayLike, prediction_type: str) -> Table:
    """Return the coefficients (of x_t, of the network's output) that make x_0   (S7).

    Args:
        abar: numbers in [0, 1), [N]; the range is not checked.
        prediction_type: epsilon, sample or v_prediction.

    Returns:
        float64 [N, 2].

    Raises:
        ValueError: if the prediction type is unknown, or is epsilon where abar = 0: x_t then is
            pure noise, and no x_0 follows from it (zero-terminal-SNR schedules need v_prediction or
            sample).
    """
    arguments.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    a, b = _signal_noise(abar)
    if prediction_type == "sample":
        return np.stack([np.zeros_like(a), np.ones_like(a)], -1)
    if prediction_type == "v_prediction":
        return np.stack([a, -b], -1)
    if (a == 0).any():
        raise ValueError(
            "prediction_type='epsilon': x_0 is undefined where alphas_cumprod = 0 "
            "(a zero-terminal-SNR schedule); must be v_prediction or sample"
        )
    return np.stack([1 / a, -b / a], -1)


def eps_rows(abar: ArrayLike, prediction_type: str) -> Table:
    """Return the coefficients (of x_t, of the network's output) that make eps   (S7).

    Args:
        abar: numbers in [0, 1), [N]; the range is not checked.
        prediction_type: epsilon, sample or v_prediction.

    Returns:
        float64 [N, 2].

    Raises:
        ValueError: if the prediction type is unknown.
    """
    arguments.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    a, b = _signal_noise(abar)
    if prediction_type == "epsilon":
        return np.stack([np.zeros_like(a), np.ones_like(a)], -1)
    if prediction_type == "v_prediction":
        return np.stack([b, a], -1)
    return np.stack([1 / b, -a / b], -1)


def out_rows(abar: ArrayLike, prediction_type: str) -> Table:
    """Return the coefficients (of x_0, of eps) that make the output of a perfect network   (S7).

    Args:
        abar: numbers in [0, 1], [N]; the range is not checked.
        prediction_type: epsilon, sample or v_prediction.

    Returns:
        float64 [N, 2].

    Raises:
        ValueError: if the prediction type is unknown.
    """
    arguments.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    a, b = _signal_noise(abar)
    if prediction_type == "epsilon":
        return np.stack([np.zeros_like(a), np.ones_like(a)], -1)
    if prediction_type == "sample":
        return np.stack([np.ones_like(a), np.zeros_like(a)], -1)
    return np.stack([-b, a], -1)


def squared_error(snr: Table, prediction_type: str) -> Table:
    """Return the squared error of the network's output for which that of x_0 is 1   (S7).

    An error e of x_0 is the error -(a/b) e of eps and -(1/b) e of v.

    Args:
        snr: the signal-to-noise ratios abar / (1 - abar), float64 of any shape; not checked.
        prediction_type: epsilon (the result is SNR), sample (1) or v_prediction (SNR + 1).

    Returns:
        float64, of the shape of ``snr``.

    Raises:
        ValueError: if the prediction type is unknown.
    """
    arguments.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    return {"epsilon": snr, "sample": np.ones_like(snr), "v_prediction": snr + 1}[prediction_type]


def noising_rows(schedule: NoiseSchedule) -> Table:
    """Return the coefficients (of x_0, of eps) in x_t at each timestep   (S4).

    Rounded to float32, it is the table that the kernel ``add_noise`` reads.

    Args:
        schedule: the forward process, T timesteps.

    Returns:
        float64 [T, 2]; row t is (sqrt(abar_t), sqrt(1 - abar_t)).
    """
    return np.stack(_signal_noise(schedule.alphas_cumprod), -1)
