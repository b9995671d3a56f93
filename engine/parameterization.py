r"""What the network predicts (S7): epsilon, sample (x_0) or v_prediction.

With a = sqrt(abar_t) and b = sqrt(1 - abar_t), x_t = a x_0 + b eps (S4) and
v = a eps - b x_0 (Salimans & Ho 2022, section 4 and appendix D). So each of x_0 and eps is affine
in (x_t, out), and each training target is affine in (x_0, eps): four small tables of coefficients.

Every function returns float64 arrays of shape [len(abar), 2] unless it says otherwise.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashddpm import arguments
from flashddpm.schedule import NoiseSchedule

Table = NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
LOSS_WEIGHTINGS = ("constant", "min_snr")


def _signal_noise(abar: ArrayLike) -> tuple[Table, Table]:
    abar = np.asarray(abar, np.float64)
    return np.sqrt(abar), np.sqrt(1 - abar)


def x0_rows(abar: ArrayLike, prediction_type: str) -> Table:
    """Coefficients (of x_t, of out) in x_0.

    Raises:
        ValueError: an unknown prediction type, or epsilon where abar = 0: x_t then is pure noise,
            and no x_0 follows from it (zero-terminal-SNR schedules need v_prediction or sample).
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
    """Coefficients (of x_t, of out) in eps."""
    arguments.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    a, b = _signal_noise(abar)
    if prediction_type == "epsilon":
        return np.stack([np.zeros_like(a), np.ones_like(a)], -1)
    if prediction_type == "v_prediction":
        return np.stack([b, a], -1)
    return np.stack([1 / b, -a / b], -1)


def noising_rows(schedule: NoiseSchedule) -> Table:
    """Coefficients (of x_0, of eps) in x_t, [T, 2]   (S4)."""
    return np.stack(_signal_noise(schedule.alphas_cumprod), -1)


def forward_step_rows(schedule: NoiseSchedule) -> Table:
    """Coefficients (of x_{t-1}, of z) in x_t for one forward step, [T, 2]   (S2)."""
    return np.stack(_signal_noise(schedule.alphas), -1)


def loss_weights(
    schedule: NoiseSchedule, prediction_type: str, weighting: str = "constant", gamma: float = 5.0
) -> Table:
    """Weight of the squared error on the network's own target, [T].

    constant: 1. min_snr: min(SNR, gamma) times (1/SNR, 1, 1/(SNR + 1)) for (epsilon, sample,
    v_prediction) (Hang et al. 2023); warns where that weight is 0.
    """
    arguments.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    arguments.one_of("loss_weighting", weighting, LOSS_WEIGHTINGS)
    if weighting == "constant":
        return np.ones(len(schedule))
    snr = schedule.snr
    if snr[-1] == 0:
        if prediction_type == "epsilon":
            raise ValueError("prediction_type='epsilon': cannot train where alphas_cumprod = 0")
        warnings.warn("min_snr gives the last timestep no weight: its SNR is 0", stacklevel=2)
    clipped = np.minimum(snr, arguments.number("gamma", gamma, 0))
    if prediction_type == "sample":
        return clipped
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return clipped / snr


def target_rows(
    schedule: NoiseSchedule,
    prediction_type: str,
    weighting: str = "constant",
    gamma: float = 5.0,
) -> Table:
    """Coefficients (of x_0, of eps) in the training target, and the loss weight, [T, 3]   (S7)."""
    weights = loss_weights(schedule, prediction_type, weighting, gamma)
    a, b = _signal_noise(schedule.alphas_cumprod)
    target = {
        "epsilon": (np.zeros_like(a), np.ones_like(a)),
        "sample": (np.ones_like(a), np.zeros_like(a)),
        "v_prediction": (-b, a),
    }[prediction_type]
    return np.stack([*target, weights], -1)
