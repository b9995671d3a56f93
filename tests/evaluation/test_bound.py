"""The variational bound: its rows, its parts and its sum, against the long way round in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import flashddpm as fd
from flashddpm.data import to_float
from flashddpm.diffusion.loss_tables import vlb_rows
from flashddpm.diffusion.parameterization import PREDICTION_TYPES, VARIANCE_TYPES
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.evaluation.bound import KEYS, variational_bound
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Purpose, VlbColumn

LINEAR = NoiseSchedule.create()
SHORT = NoiseSchedule.create("linear", 20, 1e-3, 0.5)
COSINE = NoiseSchedule.create("squaredcos_cap_v2", 50)
ZERO_SNR = NoiseSchedule.create("linear", 100, rescale_betas_zero_snr=True)
TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}

every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_variance = pytest.mark.parametrize("variance_type", VARIANCE_TYPES)


def nats(schedule, x0, eps, out, v, t, prediction_type, variance_type, clip):
    """The three values of each element the long way: by x_t, x_0 as predicted, and both means.

    All float64 and of one shape; the output and v are the network's at (x_t, t).
    """
    abar, beta = schedule.alphas_cumprod[t], schedule.betas[t]
    before = schedule.alphas_cumprod[t - 1] if t else 1.0
    a, b = math.sqrt(abar), math.sqrt(1 - abar)
    x_t = a * x0 + b * eps
    predicted, eps_hat = {
        "epsilon": lambda: ((x_t - b * out) / a, out),
        "sample": lambda: (out, (x_t - a * out) / b),
        "v_prediction": lambda: (a * x_t - b * out, b * x_t + a * out),
    }[prediction_type]()
    if clip:
        predicted = np.clip(predicted, -clip, clip)
    small = beta * (1 - before) / (1 - abar)
    if t == 0:
        second = schedule.alphas_cumprod[1]
        small = schedule.betas[1] * (1 - abar) / (1 - second)
    share = (v + 1) / 2
    log_variance = {
        "fixed_small": np.full_like(x0, math.log(small)),
        "fixed_large": np.full_like(x0, math.log(beta if t else small)),
        "learned_range": share * math.log(beta) + (1 - share) * math.log(small),
        "learned": v,
    }[variance_type]

    def mean(x):
        own = math.sqrt(before) * beta / (1 - abar) * x
        return own + math.sqrt(1 - beta) * (1 - before) / (1 - abar) * x_t

    variance = np.exp(log_variance)
    if t:
        ratio = small / variance
        term = (ratio - 1 - np.log(ratio) + (mean(x0) - mean(predicted)) ** 2 / variance) / 2
    else:
        term = pixel_nll(x0, mean(predicted), np.sqrt(variance))
    return term, (predicted - x0) ** 2, (eps_hat - eps) ** 2


def pixel_nll(x0, mean, deviation):
    """-ln of the mass of a pixel's bin, the first and the last open; tails by their logarithms."""
    low = np.where(x0 < -0.999, -np.inf, (x0 - 1 / 255 - mean) / deviation)
    high = np.where(x0 > 0.999, np.inf, (x0 + 1 / 255 - mean) / deviation)
    low, high = np.where(low + high > 0, -high, low), np.where(low + high > 0, -low, high)
    above = stats.norm.logcdf(high)
    return -(above + np.log1p(-np.exp(stats.norm.logcdf(low) - above)))


def prior_nats(schedule, x0):
    abar = schedule.alphas_cumprod[-1]
    return (abar * x0**2 + (1 - abar) - 1 - math.log1p(-abar)) / 2


def draw(seed, N, t, shape):
    """The noise of images 0..N-1 at a timestep."""
    keys = t * KEYS + torch.arange(N)
    eps = reference.philox(torch.full((N,), seed), keys, shape, Purpose.TRAINING)
    return eps.double().numpy()


def levels(N, shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (N, *shape), generator=draws).to(torch.uint8)


@every_type
@every_variance
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_rows_are_the_long_way(prediction_type, variance_type, clip):
    """Every kind of row in float64: the posterior and the model, in terms of x_t and both means."""
    random = np.random.default_rng(0)
    shape, B = (2, 3, 3), 8
    for schedule in (LINEAR, COSINE, ZERO_SNR):
        if schedule is ZERO_SNR and prediction_type == "epsilon":
            continue
        T = len(schedule)
        rows = vlb_rows(schedule, prediction_type, variance_type, clip)
        assert rows.shape == (T + 1, len(VlbColumn)) and np.isfinite(rows.astype(np.float32)).all()
        x0 = random.integers(0, 256, (B, *shape)) / 127.5 - 1
        x0.flat[:4] = -1, 1, -1, 1
        for t in (0, 1, 2, T // 2, T - 2, T - 1):
            eps = draw(3, B, t, shape)
            a = math.sqrt(schedule.alphas_cumprod[t])
            b = math.sqrt(1 - a**2)
            target = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}
            error = 0.3 if t else 0.003
            out = target[prediction_type] + error * random.standard_normal(x0.shape)
            v = random.uniform(-1, 1, x0.shape)
            if variance_type == "learned":
                v = np.log(schedule.betas[t]) + v
            expected = nats(schedule, x0, eps, out, v, t, prediction_type, variance_type, clip)
            found = reference.vlb_terms(
                torch.tensor(np.concatenate([out, v], 1)),
                torch.tensor(x0),
                torch.full((B,), t),
                torch.full((B,), 3),
                t * KEYS + torch.arange(B),
                torch.tensor(rows),
            )
            wanted = np.stack([value.reshape(B, -1).mean(1) for value in expected], 1)
            np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)


def test_the_prior_is_its_closed_form():
    x0 = torch.rand(4, 3, 5, 5, dtype=torch.float64) * 2 - 1
    for schedule in (LINEAR, SHORT, ZERO_SNR):
        T = len(schedule)
        rows = torch.tensor(vlb_rows(schedule, "v_prediction"))
        where = (torch.full((4,), T), torch.arange(4), torch.arange(4))
        found = reference.vlb_terms(torch.full_like(x0, torch.nan), x0, *where, rows)
        expected = prior_nats(schedule, x0.numpy()).reshape(4, -1).mean(1)
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-12, atol=1e-16)
        normal = torch.distributions.Normal
        abar = schedule.alphas_cumprod[-1]
        kl = torch.distributions.kl_divergence(
            normal(abar**0.5 * x0, (1 - abar) ** 0.5), normal(0.0, 1.0)
        )
        np.testing.assert_allclose(found[:, 0], kl.flatten(1).mean(1), rtol=1e-9, atol=1e-15)
    assert (found[:, 0] == 0).all()  # nothing of x_0 is left where abar = 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vlb_rows(LINEAR, "epsilon", "fixed"), "variance_type='fixed'"),
        (lambda: vlb_rows(LINEAR, "eps"), "prediction_type='eps'"),
        (lambda: vlb_rows(NoiseSchedule([0.5]), "epsilon"), "at least 2 timesteps"),
        (lambda: vlb_rows(ZERO_SNR, "epsilon"), "epsilon.*alphas_cumprod = 0"),
        (lambda: vlb_rows(LINEAR, "sample", clip=-1), "clip=-1"),
    ],
)
def test_bad_rows(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def expected_bound(sampler, images, labels, steps, variance_type, clip, seed):
    """Terms [steps, N] in bits, total [N] and both errors [steps], from the network's output."""
    schedule, N = sampler.schedule, len(images)
    x0 = to_float(images).double().numpy()
    label = None if labels is None else torch.tensor(labels)
    found = []
    for t in steps:
        eps = draw(seed, N, t, tuple(images.shape[1:]))
        abar = schedule.alphas_cumprod[t]
        x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
        out = sampler.predict(torch.tensor(x_t).float(), torch.full((N,), t), label)
        out = out.double().numpy()
        C = x0.shape[1]
        v = out[:, C:] if out.shape[1] == 2 * C else np.zeros_like(x0)
        kind = sampler.prediction_type
        found.append(nats(schedule, x0, eps, out[:, :C], v, t, kind, variance_type, clip))
    terms, x0_error, eps_error = (
        np.stack([part[i].reshape(N, -1).mean(1) for part in found]) for i in range(3)
    )
    terms = terms / math.log(2)
    prior = prior_nats(schedule, x0).reshape(N, -1).mean(1) / math.log(2)
    total = prior + terms[0] + (len(schedule) - 1) * terms[1:].mean(0)
    return terms, prior, total, x0_error.mean(1), eps_error.mean(1)


def agrees(bound, expected, rtol=1e-5):
    terms, prior, total, x0_mse, eps_mse = expected
    N = terms.shape[1]
    for found, values in (
        ((bound.total, bound.total_stderr), total),
        ((bound.prior, bound.prior_stderr), prior),
        ((bound.decoder, bound.decoder_stderr), terms[0]),
    ):
        np.testing.assert_allclose(found[0], values.mean(), rtol=rtol)
        np.testing.assert_allclose(found[1], values.std(ddof=1) / math.sqrt(N), rtol=10 * rtol)
    np.testing.assert_allclose(bound.terms, terms.mean(1), rtol=rtol)
    spread = terms.std(1, ddof=1) / math.sqrt(N)
    np.testing.assert_allclose(bound.terms_stderr, spread, rtol=10 * rtol)
    np.testing.assert_allclose(bound.x0_mse, x0_mse, rtol=rtol)
    np.testing.assert_allclose(bound.eps_mse, eps_mse, rtol=rtol)


def near_truth(prediction_type, schedule, variance=False, off=0.1):
    """A float64 network that is off a little, in a way that is smooth in x_t."""
    abar = torch.tensor(schedule.alphas_cumprod)

    def predict(x_t, t, labels):
        x = x_t.double()
        a, b = (root.reshape(-1, 1, 1, 1) for root in (abar[t].sqrt(), (1 - abar[t]).sqrt()))
        x0 = a * x / (a**2 + 3 * b**2) + off * b * torch.sin(3 * x)
        eps = (x - a * x0) / b
        out = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[prediction_type]
        return torch.cat([out, torch.cos(x)], 1).float() if variance else out.float()

    return predict


@every_type
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_bound_is_the_long_way(prediction_type, variance_type):
    """All timesteps, in float32, against float64: 1e-5 of every part."""
    learns = variance_type == "learned_range"
    network = near_truth(prediction_type, COSINE, learns)
    sampler = fd.Sampler(
        network,
        COSINE,
        shape=(2, 4, 4),
        prediction_type=prediction_type,
        call=network,
        device="cpu",
    )
    images = levels(5, (2, 4, 4))
    images[0] = 0
    images[1] = 255
    found = variational_bound(
        sampler, images, seed=7, batch_size=9, variance_type=variance_type, clip=1.0
    )
    assert found.timesteps == tuple(range(50)) and found.images == 5
    expected = expected_bound(sampler, images, None, range(50), variance_type, 1.0, 7)
    agrees(found, expected)


def test_the_bound_of_a_network_of_ours(tiny_sampler):
    """The reference and the fused path, labels and the null class; settings are the sampler's."""
    images = levels(4, (1, 8, 8))
    for backend in ("reference", "fused"):
        sampler = tiny_sampler(backend=backend)
        for labels in ([0, 2, 1, 1], None):
            found = variational_bound(sampler, images, labels, timesteps=6, batch_size=5)
            known = [3] * 4 if labels is None else labels
            expected = expected_bound(
                sampler, images, known, found.timesteps, "fixed_small", 1.0, 0
            )
            # Networks round batches of other sizes differently.
            agrees(found, expected, rtol=1e-4)
    assert variational_bound(sampler, images, 2, timesteps=2).total == (
        variational_bound(sampler, images, [2] * 4, timesteps=2).total
    )


def test_models_of_others(tiny_unet):
    """A live model of diffusers, and one of 2C channels whose config learns its variance."""
    from diffusers import DDPMScheduler, UNet2DModel

    images = levels(3, (1, 8, 8))
    theirs = UNet2DModel(**TINY).eval()
    scheduler = DDPMScheduler(30, variance_type="fixed_large", prediction_type="sample")
    live = fd.Sampler.from_diffusers(theirs, scheduler)
    learned = fd.Sampler(
        tiny_unet(out_channels=2),
        COSINE,
        shape=(1, 8, 8),
        defaults=fd.SamplingDefaults(variance_type="learned_range"),
        device="cpu",
    )
    for sampler, kind in ((live, "fixed_large"), (learned, "learned_range")):
        found = variational_bound(sampler, images, timesteps=5)
        assert found.variance_type == kind
        expected = expected_bound(sampler, images, None, found.timesteps, kind, 1.0, 0)
        agrees(found, expected, rtol=1e-4)


def gaussian(schedule, mean, deviation):
    """The best predictor of x_0 for data N(mean, deviation^2), in v."""
    abar = torch.tensor(schedule.alphas_cumprod)

    def predict(x_t, t, labels):
        at = abar[t].reshape(-1, 1, 1, 1)
        a, b = at.sqrt(), (1 - at).sqrt()
        slope = a * deviation**2 / (at * deviation**2 + 1 - at)
        x0 = mean + slope * (x_t.double() - a * mean)
        return (a * (x_t - a * x0) / b - b * x0).float()

    return predict


def test_gaussian_data_have_the_analytic_value():
    """The best denoiser's error is known: the spread of x_0 given x_t, in every term.

    Given an image, x_0 as predicted is off by (slope a - 1) (x_0 - m) + slope b eps; over images
    of N(m, s^2) that is b^2 s^2 / (a^2 s^2 + b^2) in the mean of squares, and the decoder's term
    an integral over eps. Each timestep's mean is over 32,768 draws.
    """
    m, s = 0.1, 0.25
    random = np.random.default_rng(0)
    pixels = np.round((random.normal(m, s, (32, 1, 32, 32)) + 1) * 127.5).clip(0, 255)
    images = torch.tensor(pixels).to(torch.uint8)
    x0 = to_float(images).double().numpy()
    network = gaussian(SHORT, m, s)
    sampler = fd.Sampler(
        network,
        SHORT,
        shape=(1, 32, 32),
        prediction_type="v_prediction",
        call=network,
        device="cpu",
    )
    found = variational_bound(sampler, images, clip=0.0)

    abar, before = SHORT.alphas_cumprod, SHORT.alphas_cumprod_prev
    spread = (1 - abar) * s**2 / (abar * s**2 + 1 - abar)
    np.testing.assert_allclose(found.x0_mse, spread, rtol=0.03)
    gain = before * SHORT.betas**2 / (1 - abar) ** 2 / np.maximum(SHORT.posterior_variance, 1e-30)
    analytic = (gain * spread / 2 / math.log(2))[1:]
    np.testing.assert_allclose(found.terms[1:], analytic, rtol=0.03)

    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    a, b = math.sqrt(abar[0]), math.sqrt(1 - abar[0])
    slope = a * s**2 / (abar[0] * s**2 + b**2)
    level = np.unique(x0)
    predicted = m + slope * (a * (level[:, None] - m) + b * nodes)
    deviation = math.sqrt(SHORT.posterior_variance[1])
    nll = pixel_nll(level[:, None] + 0 * nodes, predicted, deviation) @ weights
    nll = nll / math.sqrt(2 * math.pi) / math.log(2)
    decoder = np.interp(x0, level, nll).mean()
    np.testing.assert_allclose(found.decoder, decoder, rtol=0.01)
    total = prior_nats(SHORT, x0).mean() / math.log(2) + decoder + analytic.sum()
    np.testing.assert_allclose(found.total, total, rtol=0.005)
    # No code is shorter than the data's entropy.
    edges = np.append((np.arange(256) - 0.5) / 127.5 - 1, np.inf)
    edges[0] = -np.inf
    mass = np.diff(stats.norm.cdf(edges, m, s))
    assert stats.entropy(mass[mass > 0], base=2) < found.total


def test_the_sum_of_terms_is_the_bound_itself():
    """S9 = S10: E_q[-log p(x_{0:T}) + log q(x_{1:T} given x_0)] along the forward chain.

    For a denoiser that is linear, in closed form and without the posterior: q is the chain of S2,
    whose entropies are those of its steps, and x_{t-1} and x_t are jointly normal given x_0. The
    rows' divergences have that mean to rounding, and what was drawn has it to the draws' error.
    """
    m, s = 0.1, 0.25
    N, shape = 48, (1, 24, 24)
    random = np.random.default_rng(1)
    images = torch.tensor(random.integers(64, 192, (N, *shape))).to(torch.uint8)
    x0 = to_float(images).double().numpy()
    network = gaussian(SHORT, m, s)
    sampler = fd.Sampler(
        network, SHORT, shape=shape, prediction_type="v_prediction", call=network, device="cpu"
    )
    found = variational_bound(sampler, images, clip=0.0, variance_type="fixed_large")

    T, alpha, beta, abar = len(SHORT), SHORT.alphas, SHORT.betas, SHORT.alphas_cumprod
    a, b2 = np.sqrt(abar), 1 - abar

    def log_normal(offset, spread, variance):
        """E[-log N(x; mean, variance)] of a difference to the mean of this mean and variance."""
        return (np.log(2 * np.pi * variance) + (offset**2 + spread) / variance) / 2

    value = log_normal(a[-1] * x0, b2[-1], 1.0)  # -log p(x_T)
    value = value - sum((np.log(2 * np.pi * beta[t]) + 1) / 2 for t in range(T))  # log q
    for t in range(1, T):  # -log p(x_{t-1} given x_t), code's t; x_{t-1} has abar[t-1]
        slope = a[t] * s**2 / (abar[t] * s**2 + b2[t])
        c_x0 = a[t - 1] * beta[t] / b2[t]
        c_xt = math.sqrt(alpha[t]) * b2[t - 1] / b2[t]
        k = c_x0 * slope + c_xt  # the model's mean is k x_t + c
        c = c_x0 * (m - slope * a[t] * m)
        covariance = math.sqrt(alpha[t]) * b2[t - 1]
        spread = b2[t - 1] - 2 * k * covariance + k**2 * b2[t]
        value = value + log_normal(a[t - 1] * x0 - k * a[t] * x0 - c, spread, beta[t])
    closed = (value / math.log(2)).mean()

    rows = vlb_rows(SHORT, "v_prediction", "fixed_large")[1:]
    slope = np.append(a[1:] * s**2 / (abar[1:] * s**2 + b2[1:]), 0)  # the prior's says x_0 = 0
    signal, noise = np.append(a[1:], 0), np.append(b2[1:], 0)
    bias = (slope * signal - 1) * (x0[..., None] - m)
    bias[..., -1] = x0
    wrong = bias**2 + slope**2 * noise
    d, gain = rows[:, VlbColumn.OFFSET], rows[:, VlbColumn.GAIN]
    mean_terms = (d - 1 + np.exp(-d) * (1 + gain**2 * wrong)) / 2
    np.testing.assert_allclose(mean_terms.sum(-1).mean() / math.log(2), closed, rtol=1e-9)

    np.testing.assert_allclose(found.total - found.decoder, closed, rtol=0.01)
    assert abs(found.total - found.decoder - closed) < 5 * found.total_stderr
