r"""What the network predicts (S7): epsilon, sample (x_0) or v_prediction; and the loss's rows.

With a = sqrt(abar_t) and b = sqrt(1 - abar_t), x_t = a x_0 + b eps (S4) and
v = a eps - b x_0 (Salimans & Ho 2022, section 4 and appendix D). So each of x_0 and eps is affine
in (x_t, out), and each training target is affine in (x_0, eps): four small tables of coefficients.

Every function returns float64 arrays of shape [len(abar), 2] unless it says otherwise.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashddpm import arguments
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.kernels.tables import LossColumn, VlbColumn

Table = NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
LOSS_WEIGHTINGS = ("constant", "min_snr", "truncated_snr", "p2")
LEARNED_VARIANCES = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_large", *LEARNED_VARIANCES)


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
    schedule: NoiseSchedule,
    prediction_type: str,
    weighting: str | ArrayLike = "constant",
    gamma: float | None = None,
    k: float | None = None,
) -> Table:
    r"""Weight of the penalty on the network's own target, [T]   (S7).

    An error e of x_0 is the error -(a/b) e of eps and -(1/b) e of v. So with S = SNR the squares
    of the errors of (eps, x_0, v) are as S : 1 : S + 1, and a weight of the error of x_0 is divided
    by these for the network's own error:

        min_snr        min(S, gamma) (1/S, 1, 1/(S + 1))           Hang et al. 2023
        truncated_snr  max(S, 1) (1/S, 1, 1/(S + 1))               Salimans & Ho 2022
        p2             (1, S, S/(S + 1)) / (k + S)^gamma           Choi et al. 2022

    constant is 1 for every target (Ho et al. 2020, eq. 14).

    Args:
        schedule: the forward process.
        prediction_type: epsilon, sample or v_prediction.
        weighting: constant, min_snr, truncated_snr, p2, or the weights themselves: T finite
            numbers, none negative.
        gamma: of min_snr, by default 5, and of p2, by default 1; at least 0.
        k: of p2, by default 1; at least 0.

    Raises:
        ValueError: an argument out of its range, or no finite weight where S = 0.

    Warns:
        UserWarning: the last timestep has no weight, for its S is 0.
    """
    arguments.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    if not isinstance(weighting, str):
        _check_unused("an array", gamma=gamma, k=k)
        return _custom_weights(weighting, len(schedule))
    arguments.one_of("loss_weighting", weighting, LOSS_WEIGHTINGS)
    used = {"min_snr": ("gamma",), "p2": ("gamma", "k")}.get(weighting, ())
    given = {"gamma": gamma, "k": k}
    _check_unused(weighting, **{name: given[name] for name in given if name not in used})
    if weighting == "constant":
        return np.ones(len(schedule))
    if gamma is None:
        gamma = 1.0 if weighting == "p2" else 5.0
    gamma = arguments.number("gamma", gamma, 0)
    if gamma == 0 and weighting == "min_snr":
        raise ValueError("gamma=0: must be above 0 for min_snr, whose weights are all 0 otherwise")
    k = arguments.number("k", 1.0 if k is None else k, 0)

    S = schedule.snr
    square = {"epsilon": S, "sample": np.ones_like(S), "v_prediction": S + 1}[prediction_type]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if weighting == "p2":
            of_eps = np.ones_like(S) if prediction_type == "epsilon" else S / square
            weights = of_eps / (k + S) ** gamma
        else:
            of_x0 = np.minimum(S, gamma) if weighting == "min_snr" else np.maximum(S, 1)
            weights = of_x0 / square
    if not np.isfinite(weights).all():
        raise ValueError(
            f"prediction_type={prediction_type!r}: {weighting} has no finite weight where "
            "alphas_cumprod = 0"
        )
    if S[-1] == weights[-1] == 0:
        warnings.warn(f"{weighting} gives the last timestep no weight: its SNR is 0", stacklevel=2)
    return weights


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
    """Coefficients (of x_0, of eps) in the training target, and the loss weight, [T, 3]   (S7).

    The arguments are those of `loss_weights`.
    """
    weights = loss_weights(schedule, prediction_type, weighting, gamma, k)
    a, b = _signal_noise(schedule.alphas_cumprod)
    target = {
        "epsilon": (np.zeros_like(a), np.ones_like(a)),
        "sample": (np.ones_like(a), np.zeros_like(a)),
        "v_prediction": (-b, a),
    }[prediction_type]
    return np.stack([*target, weights], -1)


def hybrid_rows(
    schedule: NoiseSchedule,
    prediction_type: str,
    variance_type: str = "learned_range",
    weighting: str | ArrayLike = "constant",
    gamma: float | None = None,
    k: float | None = None,
    bound_weight: float | None = None,
) -> Table:
    r"""The table of ``hybrid_loss`` for a network that learns its variance, [T, len(LossColumn)].

    Nichol & Dhariwal 2021, section 3.1; S10. The first C channels of the output predict as ever;
    the second C are v, and with beta~ the posterior's variance (S5) the logarithm of the model's is

        learned_range   (v + 1)/2 log beta_t + (1 - v)/2 log beta~_t    (eq. 15, its v in [0, 1])
        learned         v

    Over log beta~_t that is offset + slope v: offset = slope = (log beta_t - log beta~_t) / 2, or
    -log beta~_t and 1. An error e of the output is one of x0_out e in x_0 and of c_x0 x0_out e in
    the model's mean, c_x0 being the posterior's coefficient of x_0: the gain. beta~_0 = 0, so
    beta~_1 stands in for it; at t = 0 the term is that of the decoder, whose mean is x_0 as
    predicted (c_x0 = 1) and whose bins are those of 8-bit pixels, 2/255 wide.

    Args:
        schedule: the forward process, of at least 2 timesteps.
        prediction_type, weighting, gamma, k: as for `loss_weights`.
        variance_type: learned_range or learned.
        bound_weight: lambda T / ln 2 of the mean of a term over elements, in nats. By default
            lambda = 0.001 (eq. 16 there): the bound is the sum of T terms, in bits, of which a
            step of training draws one.

    Raises:
        ValueError: an argument out of its range, or epsilon where abar = 0.
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
    r"""The table of ``vlb_terms``, [T + 1, len(VlbColumn)]: L_0, L_1, .., L_{T-1}, L_T   (S10).

    Row t is of the step from t: at t = 0 the decoder's, whose mean is x_0 as predicted and whose
    bins are those of 8-bit pixels, 2/255 wide; at t >= 1 the divergence of S5's posterior from the
    model's normal, of the variances of `hybrid_rows`, or of fixed ones. Both have the same c_xt
    x_t, so that the means differ by c_x0 times the error of x_0. With a and b of `x0_rows`, an
    error of the output is one of x0_out in x_0 and of eps_out in eps.

    Row T is of the prior, L_T = KL(N(a x_0, b^2) to N(0, 1)) at the last timestep: the same
    divergence, of a network that says x_0 = 0 where c_x0 = a and beta~ = b^2.

    Args:
        schedule: the forward process, of at least 2 timesteps.
        prediction_type: epsilon, sample or v_prediction.
        variance_type: fixed_small (beta~_t), fixed_large (beta_t), learned_range or learned.
        clip: bound of the predicted x_0, 0 for none.

    Raises:
        ValueError: an argument out of its range, or epsilon where abar = 0.
    """
    arguments.one_of("variance_type", variance_type, VARIANCE_TYPES)
    T, deviation = len(schedule), np.sqrt(_posterior_variance(schedule))
    abar = schedule.alphas_cumprod
    rows = np.zeros((T + 1, len(VlbColumn)))
    steps, prior = rows[:T], rows[T]
    steps[:, [VlbColumn.X0, VlbColumn.EPS]] = target_rows(schedule, prediction_type)[:, :2]
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
