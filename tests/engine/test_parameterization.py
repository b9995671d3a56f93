"""Prediction types (S7): conversions invert, targets, and loss weights by their meaning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashddpm.parameterization import (
    PREDICTION_TYPES,
    eps_rows,
    forward_step_rows,
    loss_weights,
    noising_rows,
    target_rows,
    x0_rows,
)
from flashddpm.schedule import BETA_SCHEDULES, NoiseSchedule

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


def test_noising_and_forward_rows():
    schedule = NoiseSchedule([0.19, 0.75])
    np.testing.assert_allclose(
        forward_step_rows(schedule), [[0.9, np.sqrt(0.19)], [0.5, 0.75**0.5]]
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


@every_type
@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
def test_min_snr_weighs_the_error_of_x0(prediction_type, gamma):
    """Hang et al. 2023: whatever is predicted, the loss is min(SNR, gamma) |x0 - prediction|^2."""
    schedule = NoiseSchedule.create("squaredcos_cap_v2", 100)
    abar = schedule.alphas_cumprod
    x0_error = x0_rows(abar, prediction_type)[:, 1] ** 2
    expected = np.minimum(abar / (1 - abar), gamma) * x0_error
    weights = loss_weights(schedule, prediction_type, "min_snr", gamma)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    np.testing.assert_array_equal(
        target_rows(schedule, prediction_type, "min_snr", gamma)[:, 2], weights
    )


def test_min_snr_formulas():
    schedule = NoiseSchedule([0.1, 0.5, 0.5])
    snr = np.array([0.9 / 0.1, 0.45 / 0.55, 0.225 / 0.775])
    least = np.array([5, snr[1], snr[2]])
    for prediction_type, factor in (
        ("epsilon", 1 / snr),
        ("sample", 1),
        ("v_prediction", 1 / (snr + 1)),
    ):
        np.testing.assert_allclose(
            loss_weights(schedule, prediction_type, "min_snr"), least * factor, rtol=1e-12
        )


@every_type
def test_constant_weights(prediction_type):
    schedule = NoiseSchedule.create("linear", 10, rescale_betas_zero_snr=True)
    np.testing.assert_array_equal(loss_weights(schedule, prediction_type), np.ones(10))


def test_min_snr_at_zero_terminal_snr():
    schedule = NoiseSchedule.create("linear", 10, rescale_betas_zero_snr=True)
    for prediction_type in ("sample", "v_prediction"):
        with pytest.warns(UserWarning, match="no weight"):
            weights = loss_weights(schedule, prediction_type, "min_snr")
        assert weights[-1] == 0
        assert (weights[:-1] > 0).all()
    with pytest.raises(ValueError, match="epsilon.*alphas_cumprod = 0"):
        loss_weights(schedule, "epsilon", "min_snr")


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
    for gamma in (-1, np.nan, True, "x"):
        with pytest.raises(ValueError, match="gamma="):
            loss_weights(schedule, "epsilon", "min_snr", gamma)
