"""Equations that tie the kernels to one another, with the tables of real schedules (S2 to S6)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm import NoiseSchedule, Plan, kernels
from flashddpm.diffusion.loss_tables import target_rows
from flashddpm.diffusion.parameterization import PREDICTION_TYPES, noising_rows
from flashddpm.diffusion.solvers import ddim, ddpm
from flashddpm.kernels import Purpose
from flashddpm.kernels.launch import channels_last
from flashddpm.kernels.step_arguments import by_tensor

T = 50
SCHEDULE = NoiseSchedule.create("squaredcos_cap_v2", T)
SHAPE = (3, 8, 9)


def table(rows, device):
    return torch.tensor(rows, dtype=torch.float32, device=device)


def ints(values, device):
    return torch.tensor(values, dtype=torch.int64, device=device)


def noised(x0, t, device, rows, keys=None, purpose=Purpose.TRAINING):
    """Return x_t of images that all are at timestep t, from seeds 0, 1, ..."""
    B = len(x0)
    keys = [t] * B if keys is None else keys
    seeds = ints(range(B), device)
    return kernels.add_noise(
        x0, ints([t] * B, device), seeds, ints(keys, device), table(rows, device), purpose
    )


def step(x, out, plan: Plan, i, device, noise=None):
    """Apply row i of a plan to every image; return x_next."""
    B = len(x)
    x = channels_last(x.clone())
    rows = torch.cat([torch.zeros(1, plan.rows.shape[1]).double(), torch.tensor(plan.rows)])
    following = [0, *range(2, len(plan) + 1), 0]
    lanes = torch.arange(B, dtype=torch.int32, device=device)
    by_tensor(kernels.denoise_step)(
        x=x,
        hist=torch.zeros_like(x),
        net_in=torch.zeros_like(x),
        nonfinite=torch.zeros_like(lanes),
        out=channels_last(out),
        idx=ints([i + 1] * B, device),
        seeds=ints(range(B), device),
        guidance=torch.ones(B, device=device),
        lane_cond=lanes,
        lane_uncond=torch.full_like(lanes, -1),
        dynamic_threshold=torch.ones(B, device=device),
        rescale_factor=torch.ones(B, device=device),
        rows=rows.float().to(device),
        keys=ints([0, *plan.noise_keys], device),
        next=ints(following, device),
        noise=noise,
    )
    return x


def images(B, seed=0):
    return torch.rand((B, *SHAPE), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def target(x0, eps, t, prediction_type):
    """Return what a perfect network says."""
    k0, k1, _ = target_rows(SCHEDULE, prediction_type)[t]
    return k0 * x0 + k1 * eps


def test_single_forward_steps_compose_to_the_closed_form(device):
    """S2, 21 times, has the mean and variance of S4 (S3); 8,192 pixels of one value."""
    t = 20
    forward = np.sqrt(np.stack([SCHEDULE.alphas, SCHEDULE.betas], -1))
    x0 = torch.full((2, 1, 64, 64), 0.7, device=device)
    x = x0
    for s in range(t + 1):
        x = noised(x, s, device, forward)
    direct = noised(x0, t, device, noising_rows(SCHEDULE))
    a, b = noising_rows(SCHEDULE)[t]
    n = x.numel()
    for x_t in (x, direct):
        x_t = x_t.double()
        assert abs(x_t.mean() - 0.7 * a) < 4 * b / n**0.5
        assert abs(x_t.var() / b**2 - 1) < 4 * (2 / n) ** 0.5
    assert (x != direct).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [0, 1, 20, T - 2])
def test_x0_is_recovered_from_exact_noise(device, prediction_type, t):
    """add_noise, a perfect network, and a step straight to timestep 0 give x0 back."""
    x0 = images(2).to(device)
    seeds, keys = ints([0, 1], device), ints([t, t], device)
    eps = kernels.philox(seeds, keys, SHAPE, Purpose.TRAINING)
    x_t = noised(x0, t, device, noising_rows(SCHEDULE))
    out = target(x0, eps, t, prediction_type)
    for solve in (ddpm, ddim):
        plan = solve(SCHEDULE, [t], prediction_type=prediction_type, clip=0.0)
        amplified = 4e-7 * (1 + 1 / noising_rows(SCHEDULE)[t, 0])  # x_t's rounding, over a
        assert (step(x_t, out, plan, 0, device) - x0).abs().max() < 2 * amplified


@settings(max_examples=10)
@given(
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    i=st.integers(0, T - 2),
    seed=st.integers(0, 10**6),
)
def test_ddim_with_eta_1_is_unclipped_ddpm(device, prediction_type, i, seed):
    """At stride 1, on the same drawn noise, whatever the network says."""
    x, out = images(2, seed).to(device), images(2, seed + 1).to(device)
    steps = range(T - 1, -1, -1)
    options = {"prediction_type": prediction_type, "clip": 0.0}
    first = step(x, out, ddpm(SCHEDULE, steps, **options), i, device)
    second = step(x, out, ddim(SCHEDULE, steps, eta=1.0, **options), i, device)
    scale = max(1.0, float(first.abs().max()))
    torch.testing.assert_close(first, second, rtol=0, atol=2e-5 * scale)
    assert (first != x).any()


@pytest.mark.parametrize("solve", [ddpm, ddim])
def test_last_step_draws_no_noise(device, rules, solve):
    """Given noise that is NaN, the step to x_0 is finite; the step before it is not."""
    options = {"eta": 1.0} if solve is ddim else {}
    plan = solve(SCHEDULE, [10, 0], **options)
    x, out = images(2).to(device), images(2, 1).to(device)
    nan = torch.full_like(x, torch.nan)
    assert step(x, out, plan, 1, device, noise=nan).isfinite().all()
    assert step(x, out, plan, 0, device, noise=nan).isnan().all()
    rules.same(step(x, out, plan, 1, device, noise=nan), step(x, out, plan, 1, device))


@pytest.mark.parametrize("t", [0, 25, T - 1])
def test_image_to_image_starts_from_the_initial_noise(device, rules, t):
    """Noise of key 0 and purpose initial, the one that x_T is: a x0 + b x_T."""
    x0 = images(3).to(device)
    got = noised(x0, t, device, noising_rows(SCHEDULE), [0] * 3, Purpose.INITIAL)
    x_T = kernels.philox(ints(range(3), device), ints([0] * 3, device), SHAPE)
    a, b = table(noising_rows(SCHEDULE)[t], device)
    rules.same(got, a * x0 + b * x_T)
