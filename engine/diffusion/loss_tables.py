r"""Tables of the losses, one row a timestep: targets, weights, hybrid loss and variational bound.

The training target is affine in (x_0, eps), the weight of its penalty is a function of the
signal-to-noise ratio (S7), and a term of the bound (S10) is one divergence of two normals. All in
float64, to be rounded to float32 once. S1 to S10 are the equations of docs/math.md.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashddpm import arguments
from flashddpm.diffusion.parameterization import (
    LEARNED_VARIANCES,
    PREDICTION_TYPES,
    VARIANCE_TYPES,
    eps_rows,
    out_rows,
    squared_error,
    x0_rows,
)
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.kernels.tables import LossColumn, VlbColumn

Table = NDArray[np.float64]

LOSS_WEIGHTINGS = ("constant", "min_snr", "truncated_snr", "p2")

_PARAMETERS = {"min_snr": {"gamma": 5.0}, "p2": {"gamma": 1.0, "k": 1.0}}
"""Parameters of the weightings that have some, with their defaults."""


def loss_weights(
    schedule: NoiseSchedule,
    prediction_type: str,
    weighting: str | ArrayLike = "constant",
    gamma: float | None = None,
    k: float | None = None,
) -> Table:
    r"""Return the weight of the loss at each timestep, float64 [T]   (S7).

    It multiplies the penalty on the network's own target. An error e of x_0 is the error -(a/b) e
    of eps and -(1/b) e of v. So with S = SNR the squares of the errors of (eps, x_0, v) are as S :
    1 : S + 1, and a weight of the error of x_0 is divided by these for the network's own error:

        min_snr        min(S, gamma) (1/S, 1, 1/(S + 1))           Hang et al. 2023
        truncated_snr  max(S, 1) (1/S, 1, 1/(S + 1))               Salimans & Ho 2022
        p2             (1, S, S/(S + 1)) / (k + S)^gamma           Choi et al. 2022

    constant is 1 for every target (Ho et al. 2020, eq. 14).

    Args:
        schedule: the forward process, T timesteps.
        prediction_type: epsilon, sample or v_prediction.
        weighting: constant, min_snr, truncated_snr, p2, or the weights themselves: T numbers in a
            row, finite in float32 and none negative, which are returned as they are.
        gamma: the gamma of min_snr, above 0, by default 5, or of p2, at least 0, by default 1; None
            for the default, and for all other weightings.
        k: the k of p2, at least 0, by default 1; None for the default, and for all other
            weightings.

    Raises:
        ValueError: if an argument is out of its range, if gamma or k is given for a weighting that
            has none, or if a weight is not finite (epsilon where S = 0, say).

    Warns:
        UserWarning: if the last timestep has S = 0 and min_snr or p2 gives it a weight of 0, as
            they do for sample and v_prediction.
    """
    arguments.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    if not isinstance(weighting, str):
        _check_unused("an array", gamma=gamma, k=k)
        return _custom_weights(weighting, len(schedule))
    arguments.one_of("loss_weighting", weighting, LOSS_WEIGHTINGS)
    parameters = _parameters(weighting, gamma=gamma, k=k)
    if weighting == "constant":
        return np.ones(len(schedule))
    weights = _snr_weights(schedule.snr, prediction_type, weighting, **parameters)
    if not np.isfinite(weights).all():
        raise ValueError(
            f"prediction_type={prediction_type!r}: {weighting} has no finite weight where "
            "alphas_cumprod = 0"
        )
    if schedule.snr[-1] == weights[-1] == 0:
        warnings.warn(f"{weighting} gives the last timestep no weight: its SNR is 0", stacklevel=2)
    return weights


def _parameters(weighting: str, **given: float | None) -> dict[str, float]:
    """Return the parameters of a weighting, with its defaults for those that are None."""
    defaults = _PARAMETERS.get(weighting, {})
    _check_unused(weighting, **{name: given[name] for name in given if name not in defaults})
    values = {
        name: arguments.number(name, default if given[name] is None else given[name], 0)
        for name, default in defaults.items()
    }
    if weighting == "min_snr" and values["gamma"] == 0:
        raise ValueError("gamma=0: must be above 0 for min_snr, whose weights are all 0 otherwise")
    return values


def _snr_weights(
    S: Table, prediction_type: str, weighting: str, gamma: float = 0.0, k: float = 0.0
) -> Table:
    """Return weights that depend on the SNR, [T], as `loss_weights` says; perhaps not finite."""
    square = squared_error(S, prediction_type)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if weighting == "p2":
            of_eps = np.ones_like(S) if prediction_type == "epsilon" else S / square
            return of_eps / (k + S) ** gamma
        of_x0 = np.minimum(S, gamma) if weighting == "min_snr" else np.maximum(S, 1)
        return of_x0 / square


def _check_unused(weighting: str, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r}: must not be given where loss_weighting={weighting}"
            )


def _custom_weights(weighting: ArrayLike, T: int) -> Table:
    try:
        weights = np.array(weighting, np.float64)
    except (TypeError, ValueError):
        weights = np.array(np.nan)
    with np.errstate(over="ignore"):
        finite = np.isfinite(weights.astype(np.float32)).all()
    if weights.shape != (T,) or not finite or (weights < 0).any():
        raise ValueError(
            f"loss_weighting={weighting!r}: must be one of {', '.join(LOSS_WEIGHTINGS)}, or {T} "
            "numbers, finite in float32 and not negative"
        )
    return weights


def target_rows(
    schedule: NoiseSchedule,
    prediction_type: str,
    weighting: str | ArrayLike = "constant",
    gamma: float | None = None,
    k: float | None = None,
) -> Table:
    """Return the table that the kernel ``diffusion_loss`` reads, one row a timestep   (S7).

    Args:
        schedule: the forward process, T timesteps.
        prediction_type: what the network predicts: epsilon, sample or v_prediction.
        weighting: the name of a loss weighting: constant (1), or, of the SNR S, min_snr
            (min(S, gamma)) or truncated_snr (max(S, 1)), both for the error of x_0, or p2
            ((k + S)^-gamma, for the error of eps; `loss_weights` has them for each prediction
            type); or the weights themselves, [T] numbers, finite in float32, none negative.
        gamma: for min_snr, above 0, by default 5; for p2, at least 0, by default 1; None for the
            default, and for every other weighting.
        k: for p2, at least 0, by default 1; None for the default, and for every other weighting.

    Returns:
        float64 [T, 3]: the coefficients of x_0 and of eps in the training target, and the weight.

    Raises:
        ValueError: if a name is unknown, weights are not such an array, gamma or k is out of its
            range or given for a weighting that has none, or a named weighting has no finite weight
            at some timestep (epsilon with min_snr or truncated_snr where SNR = 0, say).

    Warns:
        UserWarning: if the last timestep's SNR is 0 and min_snr or p2 gives it a weight of 0, as
            they do for sample and v_prediction.
    """
    weights = loss_weights(schedule, prediction_type, weighting, gamma, k)
    return np.column_stack([out_rows(schedule.alphas_cumprod, prediction_type), weights])


def hybrid_rows(
    schedule: NoiseSchedule,
    prediction_type: str,
    variance_type: str = "learned_range",
    weighting: str | ArrayLike = "constant",
    gamma: float | None = None,
    k: float | None = None,
    bound_weight: float | None = None,
) -> Table:
    r"""Return the table that ``hybrid_loss`` reads, for training with a learned variance (S10).

    Nichol & Dhariwal 2021, section 3.1. The first C channels of the output predict as ever; the
    second C are v, and with beta~ the posterior's variance (S5) the logarithm of the model's is

        learned_range   (v + 1)/2 log beta_t + (1 - v)/2 log beta~_t    (eq. 15, its v in [0, 1])
        learned         v

    Over log beta~_t that is offset + slope v: offset = slope = (log beta_t - log beta~_t) / 2, or
    -log beta~_t and 1. An error e of the output is one of x0_out e in x_0 and of c_x0 x0_out e in
    the model's mean, c_x0 being the posterior's coefficient of x_0: the gain. beta~_0 = 0, so
    beta~_1 stands in for it; at t = 0 the term is that of the decoder, whose mean is x_0 as
    predicted (c_x0 = 1) and whose bins are those of 8-bit pixels, 2/255 wide.

    Args:
        schedule: the forward process, of T >= 2 timesteps.
        prediction_type: epsilon, sample or v_prediction.
        variance_type: learned_range or learned.
        weighting: that of the squared error: constant, min_snr, truncated_snr, p2, or T numbers,
            finite in float32 and none negative.
        gamma: for min_snr (above 0, default 5) and p2 (at least 0, default 1) only; else None.
        k: for p2 (at least 0, default 1) only; else None.
        bound_weight: the weight, at least 0, of the bound's term, which is a mean over elements, in
            nats: lambda T / ln 2. None for lambda = 0.001 (eq. 16 there): the bound is the sum of T
            terms, in bits, of which a step of training draws one.

    Returns:
        float64 [T, len(LossColumn)], with the columns of kernels.tables.LossColumn.

    Raises:
        ValueError: if an argument is out of its range, T is 1, gamma or k is given for a weighting
            that has none, or for epsilon where abar = 0.

    Warns:
        UserWarning: if the last SNR is 0 and min_snr or p2 gives that timestep a weight of 0.
    """
    arguments.one_of("variance_type", variance_type, LEARNED_VARIANCES)
    T, variance = len(schedule), _posterior_variance(schedule)
    if bound_weight is None:
        bound_weight = 0.001 * T / math.log(2)

    rows = np.zeros((T, len(LossColumn)))
    rows[:, : LossColumn.WEIGHT + 1] = target_rows(schedule, prediction_type, weighting, gamma, k)
    rows[:, LossColumn.BOUND_WEIGHT] = arguments.number("bound_weight", bound_weight, 0)
    rows[:, [LossColumn.OFFSET, LossColumn.SLOPE]] = _log_variance(schedule, variance_type)
    x0_out = x0_rows(schedule.alphas_cumprod, prediction_type)[:, 1]
    rows[:, LossColumn.GAIN] = schedule.posterior_mean_coef_x0 * x0_out
    rows[:, LossColumn.PRECISION] = 1 / np.sqrt(variance)
    rows[0, LossColumn.HALF_BIN] = 1 / 255
    return rows


def _posterior_variance(schedule: NoiseSchedule) -> Table:
    """Return beta~_t, [T], with beta~_1 at t = 0, where beta~ is 0 and has no logarithm."""
    if len(schedule) < 2:
        raise ValueError("schedule: must have at least 2 timesteps, for beta~_0 = 0")
    variance = schedule.posterior_variance.copy()
    variance[0] = variance[1]
    return variance


def _log_variance(schedule: NoiseSchedule, variance_type: str) -> Table:
    """Return (offset, slope), [T, 2]: the model's log variance is log beta~_t + offset + slope v.

    Fixed variances have no slope; fixed_large is beta~_1 at t = 0, as in Ho et al. 2020.
    """
    log_small = np.log(_posterior_variance(schedule))
    over = np.log(schedule.betas) - log_small
    nothing = np.zeros_like(over)
    if variance_type == "fixed_large":
        over[0] = 0
    offset, slope = {
        "fixed_small": (nothing, nothing),
        "fixed_large": (over, nothing),
        "learned_range": (over / 2, over / 2),
        "learned": (-log_small, nothing + 1),
    }[variance_type]
    return np.stack([offset, slope], -1)


def vlb_rows(
    schedule: NoiseSchedule,
    prediction_type: str,
    variance_type: str = "fixed_small",
    clip: float = 0.0,
) -> Table:
    r"""Return the table that ``vlb_terms`` reads: a row for each of L_0, .., L_{T-1}, L_T (S10).

    They are the terms of the variational bound. Row t < T is of the step from t: at t = 0 the
    decoder's, whose mean is x_0 as predicted and whose bins are those of 8-bit pixels, 2/255 wide;
    at t >= 1 the divergence of the posterior (S5) from the model's normal distribution. Their means
    have the same term c_xt x_t, so that they differ by c_x0 times the error of x_0. An error of 1
    in the output is one of x0_out in x_0 and of eps_out in eps (`x0_rows`, `eps_rows`).

    Row T is of the prior, L_T = KL(N(a x_0, b^2) to N(0, 1)) at the last timestep: the same
    divergence, of a network that says x_0 = 0 where c_x0 = a and beta~ = b^2.

    Args:
        schedule: the forward process, of T >= 2 timesteps.
        prediction_type: epsilon, sample or v_prediction.
        variance_type: fixed_small (beta~_t), fixed_large (beta_t), or learned_range or learned (of
            a network of 2C output channels; formulas at `hybrid_rows`).
        clip: the bound of the predicted |x_0|, at least 0; 0 for none.

    Returns:
        float64 [T + 1, len(VlbColumn)], with the columns of kernels.tables.VlbColumn.

    Raises:
        ValueError: if an argument is out of its range, T is 1, or for epsilon where abar = 0.
    """
    arguments.one_of("variance_type", variance_type, VARIANCE_TYPES)
    T, deviation = len(schedule), np.sqrt(_posterior_variance(schedule))
    abar = schedule.alphas_cumprod
    rows = np.zeros((T + 1, len(VlbColumn)))
    steps, prior = rows[:T], rows[T]
    steps[:, [VlbColumn.X0, VlbColumn.EPS]] = out_rows(abar, prediction_type)
    steps[:, VlbColumn.OUT] = 1
    steps[:, VlbColumn.X0_OUT] = x0_rows(abar, prediction_type)[:, 1]
    steps[:, VlbColumn.EPS_OUT] = eps_rows(abar, prediction_type)[:, 1]
    steps[:, VlbColumn.CLIP] = arguments.number("clip", clip, 0)
    steps[:, [VlbColumn.OFFSET, VlbColumn.SLOPE]] = _log_variance(schedule, variance_type)
    steps[:, VlbColumn.GAIN] = schedule.posterior_mean_coef_x0 / deviation
    steps[0, VlbColumn.HALF_BIN] = 1 / 255 / deviation[0]

    prior[[VlbColumn.X0, VlbColumn.X0_OUT]] = 1
    prior[VlbColumn.OFFSET] = -np.log1p(-abar[-1])
    prior[VlbColumn.GAIN] = np.sqrt(abar[-1] / (1 - abar[-1]))
    return rows
