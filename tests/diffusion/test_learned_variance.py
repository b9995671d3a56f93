"""Learned variances: rows of the hybrid loss and of ddpm, each against the long way round."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

import flashddpm as fd
from flashddpm.diffusion.loss_tables import hybrid_rows, target_rows
from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.parameterization import LEARNED_VARIANCES, PREDICTION_TYPES
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.solvers import ddpm
from flashddpm.diffusion.timesteps import timesteps
from flashddpm.kernels import reference
from flashddpm.kernels.step_arguments import StepSlots, StepState, StepStatistics, StepTable
from flashddpm.kernels.tables import IDLE, Column, LossColumn, Purpose

LINEAR = NoiseSchedule.create()
COSINE = NoiseSchedule.create("squaredcos_cap_v2", 200)
ZERO_SNR = NoiseSchedule.create("linear", 100, rescale_betas_zero_snr=True)

every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_variance = pytest.mark.parametrize("variance_type", LEARNED_VARIANCES)


# The hybrid loss ------------------------------------------------------------------------------


class Case:
    """One image of one element for each of B draws, at timestep t; all in float64, [B]."""

    def __init__(self, schedule, t, prediction_type, variance_type, B=64, scale=0.1):
        random = np.random.default_rng(t)
        self.x0 = np.round(random.uniform(0, 255, B)) / 127.5 - 1
        self.x0[:4] = -1, 1, -1, 1  # the first and the last bin
        self.seeds, self.keys = torch.arange(B), torch.full((B,), t)
        eps = reference.philox(self.seeds, self.keys, (1, 1, 1), Purpose.TRAINING)
        eps = eps.double().numpy().ravel()
        abar = schedule.alphas_cumprod[t]
        a, b = np.sqrt(abar), np.sqrt(1 - abar)
        x_t = a * self.x0 + b * eps
        # A network near the truth, else the bin of t = 0 is never hit.
        eps_out = eps + scale * random.standard_normal(B)
        x0_out = self.x0 + scale * random.standard_normal(B)
        if prediction_type == "epsilon":
            self.prediction, x0_out = eps_out, (x_t - b * eps_out) / a
        elif prediction_type == "sample":
            self.prediction = x0_out
        else:
            self.prediction = a * eps_out - b * self.x0
            x0_out = a * x_t - b * self.prediction
        self.v = random.uniform(-1, 1, B)

        # S5, with alpha, beta and both abar written out.
        before = schedule.alphas_cumprod[t - 1] if t else 1.0
        beta, alpha = schedule.betas[t], 1 - schedule.betas[t]
        self.small = beta * (1 - before) / (1 - abar)
        if t == 0:
            first, second = schedule.alphas_cumprod[:2]
            self.small = schedule.betas[1] * (1 - first) / (1 - second)

        def posterior_mean(x0):
            own = math.sqrt(before) * beta / (1 - abar) * x0
            return own + math.sqrt(alpha) * (1 - before) / (1 - abar) * x_t

        self.mean, self.mean_out = posterior_mean(self.x0), posterior_mean(x0_out)
        share = (self.v + 1) / 2
        self.log_variance = share * np.log(beta) + (1 - share) * np.log(self.small)
        if variance_type == "learned":
            self.v = self.v * 3 - 6
            self.log_variance = self.v
        self.t = torch.full((B,), t)

    def bound(self, rows):
        """The bound's term as ``hybrid_loss`` has it, in nats."""
        out = np.stack([self.prediction, self.v], 1)[..., None, None]
        x0 = self.x0[:, None, None, None]
        loss = reference.hybrid_loss(
            torch.tensor(out), torch.tensor(x0), self.t, self.seeds, self.keys, torch.tensor(rows)
        )
        return loss.numpy()


def bound_rows(schedule, prediction_type, variance_type):
    """Rows that leave nothing but the bound's term."""
    nothing = np.zeros(len(schedule))
    return hybrid_rows(schedule, prediction_type, variance_type, nothing, bound_weight=1.0)


@every_type
@every_variance
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_the_bound_is_the_divergence_of_two_normals(prediction_type, variance_type, scale):
    """KL(N(m, s) to N(m', s')) = (ln s'/s + (s + (m - m')^2) / s' - 1) / 2, s the variances."""
    for schedule in (LINEAR, COSINE, ZERO_SNR):
        if schedule is ZERO_SNR and prediction_type == "epsilon":
            continue
        T = len(schedule)
        rows = bound_rows(schedule, prediction_type, variance_type)
        for t in (1, 2, T // 2, T - 2, T - 1):
            case = Case(schedule, t, prediction_type, variance_type, scale=scale)
            variance = np.exp(case.log_variance)
            ratio = (case.small + (case.mean - case.mean_out) ** 2) / variance
            expected = (case.log_variance - np.log(case.small) + ratio - 1) / 2
            np.testing.assert_allclose(case.bound(rows), expected, rtol=1e-7, atol=1e-10)


@every_type
@every_variance
def test_the_bound_at_0_is_the_decoders(prediction_type, variance_type):
    """-ln of the mass of the pixel's bin under the model's normal; the outer bins are open.

    With the approximation of the distribution function it agrees to rounding; with the function
    itself to the 3e-4 by which the approximation is off at each end of the bin.
    """
    for schedule in (LINEAR, COSINE):
        rows = bound_rows(schedule, prediction_type, variance_type)
        # An error of eps of 0.1 is one of 0.001 in x0 here; let that of x0 be as small.
        scale = 0.002 if prediction_type == "sample" else 0.2
        case = Case(schedule, 0, prediction_type, variance_type, scale=scale)
        np.testing.assert_allclose(case.mean, case.x0, rtol=0, atol=1e-12)  # c_x0 = 1
        deviation = np.exp(case.log_variance / 2)
        upper = np.where(case.x0 == 1, np.inf, (case.x0 + 1 / 255 - case.mean_out) / deviation)
        lower = np.where(case.x0 == -1, -np.inf, (case.x0 - 1 / 255 - case.mean_out) / deviation)
        nll = case.bound(rows)
        exact = stats.norm.cdf(upper) - stats.norm.cdf(lower)
        assert (exact > 0.05).any() and (exact < 0.95).any()
        np.testing.assert_allclose(np.exp(-nll), exact, rtol=0, atol=6e-4)

        with np.errstate(invalid="ignore"):
            high, low = (
                (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
                for y in (upper, lower)
            )
        np.testing.assert_allclose(np.exp(-nll), high - low, rtol=1e-6, atol=1e-12)


@every_type
@every_variance
def test_hybrid_rows_by_column(prediction_type, variance_type):
    rows = hybrid_rows(LINEAR, prediction_type, variance_type, "min_snr", gamma=3.0)
    assert rows.shape == (1000, len(LossColumn)) and np.isfinite(rows.astype(np.float32)).all()
    np.testing.assert_array_equal(rows[:, :3], target_rows(LINEAR, prediction_type, "min_snr", 3.0))
    assert rows[0, LossColumn.HALF_BIN] == 1 / 255
    assert (rows[1:, LossColumn.HALF_BIN] == 0).all()
    assert rows[0, LossColumn.PRECISION] == rows[1, LossColumn.PRECISION]
    large = rows[:, LossColumn.OFFSET] + rows[:, LossColumn.SLOPE]  # v = 1: beta, or e
    log_small = -2 * np.log(rows[:, LossColumn.PRECISION])
    expected = np.log(LINEAR.betas) if variance_type == "learned_range" else 1
    np.testing.assert_allclose(large + log_small, np.full(1000, expected), rtol=1e-12)


def test_weight_of_the_bound():
    """One term of T, in bits, times 0.001: T / 1000 / ln 2 of the mean in nats."""
    for T in (2, 100, 4000):
        schedule = NoiseSchedule.create("squaredcos_cap_v2", T)
        weights = hybrid_rows(schedule, "epsilon")[:, LossColumn.BOUND_WEIGHT]
        np.testing.assert_allclose(weights, T / 1000 * np.log2(np.e), rtol=1e-14)
    assert (
        hybrid_rows(LINEAR, "sample", bound_weight=2.5)[:, LossColumn.BOUND_WEIGHT] == 2.5
    ).all()


@every_type
@every_variance
def test_the_bound_moves_the_variance_only(prediction_type, variance_type):
    """The gradient of the prediction is that of its own loss, the mean in the bound detached."""
    rows = torch.tensor(hybrid_rows(COSINE, prediction_type, variance_type))
    draws = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 2, 3, 3, generator=draws).double() * 2 - 1
    t, seeds, keys = torch.tensor([0, 9, 199]), torch.arange(3), torch.arange(3)
    eps = reference.philox(seeds, keys, (2, 3, 3), Purpose.TRAINING)
    k0, k1 = rows[t, :2].reshape(3, 2, 1, 1, 1).unbind(1)
    prediction = k0 * x0 + k1 * eps + 0.003 * torch.randn(x0.shape, generator=draws)
    v = torch.rand(x0.shape, generator=draws) * 2 - (1 if variance_type == "learned_range" else 9)
    out, where = torch.cat([prediction, v], 1).requires_grad_(), (x0, t, seeds, keys)
    (both,) = torch.autograd.grad(reference.hybrid_loss(out, *where, rows).sum(), out)
    simple = reference.diffusion_loss(out[:, :2], *where, rows[:, :3])
    (own,) = torch.autograd.grad(simple.sum(), out)
    assert torch.equal(both[:, :2], own[:, :2])
    assert (own[:, 2:] == 0).all() and (both[:, 2:] != 0).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hybrid_rows(LINEAR, "epsilon", "fixed_small"), "variance_type='fixed_small'"),
        (lambda: hybrid_rows(LINEAR, "eps"), "prediction_type='eps'"),
        (lambda: hybrid_rows(NoiseSchedule([0.5]), "epsilon"), "at least 2 timesteps"),
        (lambda: hybrid_rows(ZERO_SNR, "epsilon"), "epsilon.*alphas_cumprod = 0"),
        (lambda: hybrid_rows(LINEAR, "sample", bound_weight=-1), "bound_weight=-1"),
        (lambda: hybrid_rows(LINEAR, "sample", bound_weight=math.nan), "bound_weight=nan"),
        (lambda: hybrid_rows(LINEAR, "sample", weighting="snr"), "loss_weighting='snr'"),
    ],
)
def test_bad_hybrid_rows(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Sampling -------------------------------------------------------------------------------------


def peer(config, n, schedule):
    scheduler = DDPMScheduler(**config)
    scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
    scheduler.set_timesteps(n)
    return scheduler


@every_type
@every_variance
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_ddpm_is_diffusers(monkeypatch, prediction_type, variance_type, clip, name):
    """Each step on equal noise: float32 against diffusers on float64 tables and inputs.

    Of "learned", diffusers takes v for the variance, where ours is its logarithm.
    """
    schedule, n, shape = NoiseSchedule.create(name), 12, (2, 3, 5)
    plan = make_plan(
        schedule, "ddpm", n, prediction_type=prediction_type, clip=clip, variance_type=variance_type
    )
    config = {
        "beta_schedule": name,
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_sample": clip > 0,
    }
    theirs = peer(config, n, schedule)
    np.testing.assert_array_equal(plan.timesteps, theirs.timesteps.numpy())
    rows = torch.zeros(n + 1, len(Column))
    rows[1:] = torch.tensor(plan.rows)
    follow = torch.tensor([IDLE, *range(2, n + 1), IDLE])
    S, lanes = 2, torch.arange(2, dtype=torch.int32)
    random = torch.Generator().manual_seed(0)
    for i, t in enumerate(theirs.timesteps):
        x, z = torch.randn(2, S, *shape, generator=random)
        prediction = torch.randn(S, *shape, generator=random)
        v = torch.rand(S, *shape, generator=random) * 2 - 1
        if variance_type == "learned":
            v = 3 * v - 5
        ours, flags = x.clone(), torch.zeros(S, dtype=torch.int32)
        reference.denoise_step(
            StepState(ours, x.clone(), x.clone(), flags),
            torch.cat([prediction, v], 1),
            StepSlots(
                idx=torch.full((S,), i + 1),
                seeds=torch.arange(S),
                guidance=torch.ones(S),
                lane_cond=lanes,
                lane_uncond=torch.full_like(lanes, -1),
            ),
            StepStatistics(torch.ones(S), torch.ones(S)),
            StepTable(rows, torch.tensor([0, *plan.noise_keys]), follow),
            z,
        )
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, z=z, **k: z.double()
        )
        v = v.double().exp() if variance_type == "learned" else v.double()
        out = torch.cat([prediction.double(), v], 1)
        want = theirs.step(out, t, x.double()).prev_sample
        # float32: some ten roundings of 6e-8 of the largest term, x0, whose parts may cancel.
        largest = max(1.0, np.abs(plan.rows[i, [Column.X0_XT, Column.X0_OUT]]).max() * (not clip))
        assert (ours - want).abs().max() <= 2e-6 * max(want.abs().max(), largest)
        assert not flags.any()


def test_a_learned_variance_lies_between_the_fixed_ones():
    """v = -1 is fixed_small and v = 1 is fixed_large, in every step; the last adds no noise."""
    steps = timesteps(25, 1000, "trailing")
    small, large, learned, free = (
        ddpm(LINEAR, steps, variance_type=kind).rows
        for kind in ("fixed_small", "fixed_large", "learned_range", "learned")
    )
    sigma, slope = learned[:, Column.SIGMA], learned[:, Column.LOG_SIGMA]
    np.testing.assert_allclose(sigma * np.exp(-slope), small[:, Column.SIGMA], rtol=1e-13)
    np.testing.assert_allclose(sigma * np.exp(slope), large[:, Column.SIGMA], rtol=1e-13)
    assert (slope[:-1] > 0).all()
    assert (free[:-1, Column.SIGMA] == 1).all() and (free[:-1, Column.LOG_SIGMA] == 0.5).all()
    for rows in (learned, free):
        assert rows[-1, Column.SIGMA] == rows[-1, Column.LOG_SIGMA] == 0
        others = [c for c in Column if c not in (Column.SIGMA, Column.LOG_SIGMA)]
        np.testing.assert_array_equal(rows[:, others], small[:, others])


@every_variance
def test_a_fixed_network_refuses_learned_variances(tiny_sampler, variance_type):
    sampler = tiny_sampler()
    with pytest.raises(ValueError, match="variance_type: must be fixed_small or fixed_large"):
        sampler.sample(0, 0, solver="ddpm", num_steps=5, variance_type=variance_type)
    with pytest.raises(ValueError, match="must be 'fixed_small'; ddim has no such option"):
        make_plan(LINEAR, "ddim", 5, prediction_type="epsilon", variance_type=variance_type)
    assert fd.SamplingDefaults.from_config({"variance_type": variance_type}).variance_type == (
        variance_type
    )
