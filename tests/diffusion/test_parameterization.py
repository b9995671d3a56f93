"""Prediction types (S7): conversions invert, targets, and loss weights by their meaning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashddpm.diffusion.loss_tables import loss_weights, target_rows
from flashddpm.diffusion.parameterization import (
    PREDICTION_TYPES,
    eps_rows,
    noising_rows,
    x0_rows,
)
from flashddpm.diffusion.schedule import BETA_SCHEDULES, NoiseSchedule

every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
ABAR = np.array([1 - 1e-9, 0.9999, 0.7, 0.5, 0.04, 4e-5, 1e-8])


def output(prediction_type, x0, eps, abar):
    """What a perfect network says, from the papers' definitions."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    return np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0


@every_type
@given(
    x0=st.floats(-3, 3),
    eps=st.floats(-5, 5),
    abar=st.floats(1e-6, 1 - 1e-6),
)
def test_rows_recover_x0_and_eps(prediction_type, x0, eps, abar):
    x_t = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps
    pair = np.array([x_t, output(prediction_type, x0, eps, abar)])
    assert x0_rows(abar, prediction_type) @ pair == pytest.approx(x0, abs=1e-11)
    assert eps_rows(abar, prediction_type) @ pair == pytest.approx(eps, abs=1e-11)


@every_type
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_rows_invert_noising_and_target(name, prediction_type):
    """[x0; eps] rows times [noising; target] rows are the identity, at every timestep."""
    schedule = NoiseSchedule.create(name, 100)
    abar = schedule.alphas_cumprod
    back = np.stack([x0_rows(abar, prediction_type), eps_rows(abar, prediction_type)], 1)
    forth = np.stack([noising_rows(schedule), target_rows(schedule, prediction_type)[:, :2]], 1)
    identity = np.broadcast_to(np.eye(2), (100, 2, 2))
    np.testing.assert_allclose(back @ forth, identity, rtol=0, atol=1e-12)
    np.testing.assert_allclose(forth @ back, identity, rtol=0, atol=1e-10)


@every_type
def test_exact_zeros_and_shapes(prediction_type):
    """A column that plays no part is exactly 0, for the kernels skip it."""
    x0, eps = x0_rows(ABAR, prediction_type), eps_rows(ABAR, prediction_type)
    assert x0.shape == eps.shape == (len(ABAR), 2)
    assert x0.dtype == eps.dtype == np.float64
    assert (x0[:, 0] == 0).all() == (prediction_type == "sample")
    assert (eps[:, 0] == 0).all() == (prediction_type == "epsilon")


def test_target_rows():
    schedule = NoiseSchedule.create("linear", 10)
    a, b = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
    zero, one = np.zeros(10), np.ones(10)
    for prediction_type, k0, k1 in (
        ("epsilon", zero, one),
        ("sample", one, zero),
        ("v_prediction", -b, a),
    ):
        expected = np.stack([k0, k1, one], -1)
        np.testing.assert_array_equal(target_rows(schedule, prediction_type), expected)


def test_noising_rows():
    """The square roots of alpha and beta of each step (S2), and of abar and 1 - abar (S4)."""
    schedule = NoiseSchedule([0.19, 0.75])
    np.testing.assert_allclose(
        np.sqrt(np.stack([schedule.alphas, schedule.betas], -1)),
        [[0.9, np.sqrt(0.19)], [0.5, 0.75**0.5]],
    )
    np.testing.assert_allclose(
        noising_rows(schedule), [[0.9, np.sqrt(0.19)], [0.45, np.sqrt(1 - 0.2025)]]
    )


def test_zero_terminal_snr():
    """At abar = 0, x_t is noise: v is -x_0, sample is x_0, and epsilon says nothing of x_0."""
    np.testing.assert_array_equal(x0_rows([0.0], "v_prediction"), [[0, -1]])
    np.testing.assert_array_equal(x0_rows([0.0], "sample"), [[0, 1]])
    for prediction_type in ("v_prediction", "sample"):
        np.testing.assert_array_equal(eps_rows([0.0], prediction_type), [[1, 0]])
    with pytest.raises(ValueError, match="epsilon.*alphas_cumprod = 0.*v_prediction or sample"):
        x0_rows([0.5, 0.0], "epsilon")


WEIGHTINGS = [
    ("min_snr", {}, lambda snr: np.minimum(snr, 5)),
    ("min_snr", {"gamma": 0.5}, lambda snr: np.minimum(snr, 0.5)),
    ("min_snr", {"gamma": 1e9}, lambda snr: snr),
    ("truncated_snr", {}, lambda snr: np.maximum(snr, 1)),
    ("p2", {}, lambda snr: snr / (1 + snr)),
    ("p2", {"gamma": 0.5, "k": 2.0}, lambda snr: snr / np.sqrt(2 + snr)),
]
every_weighting = pytest.mark.parametrize(("weighting", "options", "of_x0"), WEIGHTINGS)


@every_type
@every_weighting
def test_weights_are_those_of_the_error_of_x0(prediction_type, weighting, options, of_x0):
    """Whatever is predicted, the loss is the paper's weight times |x0 - predicted x0|^2.

    p2 weighs the error of eps by 1 / (k + SNR)^gamma, and that is SNR times the error of x0.
    """
    schedule = NoiseSchedule.create("squaredcos_cap_v2", 100)
    abar = schedule.alphas_cumprod
    x0_error = x0_rows(abar, prediction_type)[:, 1] ** 2
    expected = of_x0(abar / (1 - abar)) * x0_error
    weights = loss_weights(schedule, prediction_type, weighting, **options)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    np.testing.assert_array_equal(
        target_rows(schedule, prediction_type, weighting, **options)[:, 2], weights
    )


@pytest.mark.parametrize(
    ("weighting", "prediction_type", "expected"),
    [
        # SNR 9, 1 and 1/3.
        ("min_snr", "epsilon", [5 / 9, 1, 1]),
        ("min_snr", "sample", [5, 1, 1 / 3]),
        ("min_snr", "v_prediction", [5 / 10, 1 / 2, 1 / 4]),
        ("truncated_snr", "epsilon", [1, 1, 3]),
        ("truncated_snr", "sample", [9, 1, 1]),
        ("truncated_snr", "v_prediction", [9 / 10, 1 / 2, 3 / 4]),
        ("p2", "epsilon", [1 / 10, 1 / 2, 3 / 4]),
        ("p2", "sample", [9 / 10, 1 / 2, 1 / 4]),
        ("p2", "v_prediction", [9 / 100, 1 / 4, 3 / 16]),
        ("constant", "v_prediction", [1, 1, 1]),
    ],
)
def test_loss_weights_by_hand(weighting, prediction_type, expected):
    abar = np.array([0.9, 0.5, 0.25])
    schedule = NoiseSchedule(1 - abar / np.append(1, abar[:-1]))
    weights = loss_weights(schedule, prediction_type, weighting)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


@every_type
def test_constant_weights(prediction_type):
    schedule = NoiseSchedule.create("linear", 10, rescale_betas_zero_snr=True)
    np.testing.assert_array_equal(loss_weights(schedule, prediction_type), np.ones(10))


@every_type
def test_weights_of_ones_own(prediction_type):
    schedule = NoiseSchedule.create("linear", 3)
    for weights in ([0, 1, 2.5], np.array([0, 1, 2.5], np.float32)):
        rows = target_rows(schedule, prediction_type, weights)
        np.testing.assert_array_equal(rows[:, 2], [0, 1, 2.5])
    for wrong in ([1, 2], [[1, 2, 3]], [1, 2, -1], [1, 2, np.nan], [1, 2, 1e39], ["a"] * 3, None):
        with pytest.raises(ValueError, match="loss_weighting=.*or 3 numbers"):
            loss_weights(schedule, prediction_type, wrong)


@every_weighting
@every_type
def test_weights_at_zero_terminal_snr(weighting, options, of_x0, prediction_type):
    """Where SNR = 0: no weight is warned of, an infinite one refused, and a finite one kept."""
    schedule = NoiseSchedule.create("linear", 10, rescale_betas_zero_snr=True)
    arguments = (schedule, prediction_type, weighting)
    if prediction_type == "epsilon" and weighting != "p2":
        with pytest.raises(ValueError, match=f"epsilon.*{weighting}.*alphas_cumprod = 0"):
            loss_weights(*arguments, **options)
    elif prediction_type == "epsilon":
        last = loss_weights(*arguments, **options)[-1]
        assert last == pytest.approx(options.get("k", 1.0) ** -options.get("gamma", 1.0))
    elif weighting == "truncated_snr":
        assert loss_weights(*arguments, **options)[-1] == 1
    else:
        with pytest.warns(UserWarning, match="no weight"):
            weights = loss_weights(*arguments, **options)
        assert weights[-1] == 0
        assert (weights[:-1] > 0).all()


def test_unknown_names():
    schedule = NoiseSchedule.create("linear", 10)
    for call in (
        lambda: x0_rows(0.5, "eps"),
        lambda: eps_rows(0.5, "eps"),
        lambda: loss_weights(schedule, "eps"),
        lambda: target_rows(schedule, "eps"),
    ):
        with pytest.raises(
            ValueError, match="prediction_type='eps'.*epsilon, sample, v_prediction"
        ):
            call()
    with pytest.raises(ValueError, match="loss_weighting='snr'.*constant, min_snr"):
        loss_weights(schedule, "epsilon", "snr")
    for wrong in (-1, np.nan, True, "x"):
        for weighting, name in (("min_snr", "gamma"), ("p2", "gamma"), ("p2", "k")):
            with pytest.raises(ValueError, match=f"{name}="):
                loss_weights(schedule, "epsilon", weighting, **{name: wrong})
    with pytest.raises(ValueError, match="gamma=0: must be above 0"):
        loss_weights(schedule, "epsilon", "min_snr", gamma=0.0)
    for weighting, option in (
        ("constant", {"gamma": 1.0}),
        ("truncated_snr", {"gamma": 1.0}),
        ("min_snr", {"k": 1.0}),
        (np.ones(10), {"k": 1.0}),
    ):
        with pytest.raises(ValueError, match="=1.0: must not be given where loss_weighting="):
            loss_weights(schedule, "epsilon", weighting, **option)
