"""Timesteps and noise levels: spacings of both, abar in between, lists of one's own, keys."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

from flashddpm.diffusion.make_plan import make_plan
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.solvers import SOLVERS
from flashddpm.diffusion.timesteps import (
    SIGMA_SPACINGS,
    SPACINGS,
    Steps,
    noise_keys,
    sigma_grid,
    spaced,
    timesteps,
)

LINEAR = NoiseSchedule.create()
COSINE = NoiseSchedule.create("squaredcos_cap_v2")
ZERO_SNR = NoiseSchedule.create(rescale_betas_zero_snr=True)
SIGMA = np.sqrt((1 - LINEAR.alphas_cumprod) / LINEAR.alphas_cumprod)

every_spacing = pytest.mark.parametrize("spacing", SPACINGS)
every_kind = pytest.mark.parametrize("kind", SIGMA_SPACINGS)


def sigmas_of(steps):
    return np.sqrt((1 - steps.abar) / steps.abar)


def test_whole_timesteps_have_the_schedules_abar():
    for schedule in (LINEAR, COSINE, ZERO_SNR):
        for given in (np.arange(999, -1, -1), np.arange(999.0, -1, -1), [7], [999, 3.0, 0]):
            steps = Steps.at(schedule, given)
            np.testing.assert_array_equal(steps.timesteps, given)
            abar = schedule.alphas_cumprod[np.array(given, int)]
            np.testing.assert_array_equal(steps.abar, abar)


def test_between_timesteps_sigma_is_linear():
    t = np.array([998.5, 640.25, 640.0, 3.75, 0.125])
    steps = Steps.at(LINEAR, t)
    np.testing.assert_allclose(sigmas_of(steps), np.interp(t, np.arange(1000), SIGMA), rtol=1e-12)
    np.testing.assert_array_equal(steps.timesteps, t)
    assert steps.abar[2] == LINEAR.alphas_cumprod[640]


def test_timesteps_are_float32():
    """332.99999999999994 is 333, in what the network is told, in abar and in the noise key."""
    steps = Steps.at(LINEAR, [500.1, np.nextafter(333.0, 0)])
    np.testing.assert_array_equal(steps.timesteps, [float(np.float32(500.1)), 333])
    assert steps.abar[1] == LINEAR.alphas_cumprod[333]
    for n in range(2, 200):
        t = spaced(LINEAR, n, "linspace", fractional=True).timesteps
        want = np.linspace(0, 999, n, dtype=np.float32)[::-1]
        np.testing.assert_array_equal(t, want)
        np.testing.assert_array_equal(noise_keys(t), np.floor(want))


@every_kind
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_sigma_grid_by_definition(kind, n):
    high, low = 157.4, 0.01
    u = np.linspace(0, 1, n)
    got = sigma_grid(kind, high, low, n)
    if kind == "beta":
        want = low + scipy.stats.beta.ppf(1 - u, 0.6, 0.6) * (high - low)
    elif kind == "karras":
        want = ((1 - u) * high ** (1 / 7) + u * low ** (1 / 7)) ** 7
    else:
        want = np.exp(np.log(high) + u * (np.log(low) - np.log(high)))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert got[0] == pytest.approx(high) and (n == 1 or got[-1] == pytest.approx(low))
    assert (np.diff(got) < 0).all()


def test_beta_quantile_at_every_scale():
    """Against scipy, near both ends too."""
    n = 10_001
    got = sigma_grid("beta", 1, 0, n)[1:-1]
    want = scipy.stats.beta.ppf(1 - np.linspace(0, 1, n)[1:-1], 0.6, 0.6)
    np.testing.assert_allclose(got, want, rtol=1e-9)


@every_kind
@every_spacing
def test_sigmas_span_the_spacings_ends_or_the_schedule(kind, spacing):
    plain, steps = (
        spaced(LINEAR, 12, spacing, 2 if spacing == "leading" else 0, sigmas=k, fractional=True)
        for k in (None, kind)
    )
    ends = [0, -1]
    np.testing.assert_allclose(sigmas_of(steps)[ends], sigmas_of(plain)[ends], rtol=1e-9)
    whole = spaced(LINEAR, 12, spacing, sigmas=kind, drop_last=True)
    np.testing.assert_allclose(sigmas_of(whole)[ends], SIGMA[[-1, 0]], rtol=1e-9)
    np.testing.assert_array_equal(whole.timesteps[ends], [999, 0])


@every_kind
def test_the_timestep_of_a_sigma(kind):
    """Linear in log sigma, or the nearest whole one; x is as noisy as sigma says in either case."""
    exact = spaced(LINEAR, 20, "trailing", sigmas=kind, fractional=True)
    whole = spaced(LINEAR, 20, "trailing", sigmas=kind)
    np.testing.assert_array_equal(whole.abar, exact.abar)
    np.testing.assert_array_equal(whole.timesteps, exact.timesteps.round())
    assert (exact.timesteps % 1 != 0).any()
    t = np.interp(np.log(sigmas_of(exact)), np.log(SIGMA), np.arange(1000))
    np.testing.assert_allclose(exact.timesteps, t, atol=1e-4)


@every_kind
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("n", [1, 5, 25, 60])
def test_sigmas_of_dpm_solver_are_diffusers(kind, beta_schedule, n):
    """Timesteps too, but where diffusers cuts the fraction off instead of rounding."""
    config = {"beta_schedule": beta_schedule, f"use_{kind}_sigmas": True}
    theirs = DPMSolverMultistepScheduler(**config)
    theirs.set_timesteps(n)
    schedule = NoiseSchedule.create(beta_schedule)
    ours = spaced(schedule, n, sigmas=kind, drop_last=True)
    # diffusers has float32 tables, wrong by 1e-4 in 1 - abar_0, and by more at the cosine's end.
    np.testing.assert_allclose(sigmas_of(ours), theirs.sigmas[:-1], rtol=2e-3)
    cut = spaced(schedule, n, sigmas=kind, drop_last=True, fractional=True).timesteps
    if kind == "karras" and beta_schedule == "linear":
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
    else:
        fraction = cut - theirs.timesteps.numpy()
        assert (fraction > -0.01).all() and (fraction < 1.01).all()
        assert n < 25 or (fraction > 0.9).any()
        assert (abs(ours.timesteps - cut) <= 0.5).all()


def test_timesteps_repeat_where_sigmas_are_denser():
    steps = spaced(LINEAR, 100, sigmas="karras", drop_last=True)
    assert (np.diff(steps.timesteps) == 0).any() and (np.diff(steps.abar) > 0).all()
    keys = noise_keys(steps.timesteps)
    assert len(set(keys)) == 100 and (keys >= 2**32).any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_list_of_ones_own(solver):
    options = {"prediction_type": "v_prediction", "solver": solver}
    plain = make_plan(LINEAR, num_steps=6, **options)
    for same in (plain.timesteps, plain.timesteps.astype(int), list(plain.timesteps)):
        own = make_plan(LINEAR, timesteps=same, **options)
        np.testing.assert_array_equal(own.rows, plain.rows)
        np.testing.assert_array_equal(own.noise_keys, plain.noise_keys)
        assert own.initial == plain.initial
    plan = make_plan(LINEAR, timesteps=[900.5, 900.25, 31, 0.5], **options)
    np.testing.assert_array_equal(plan.timesteps, [900.5, 900.25, 31, 0.5])
    np.testing.assert_array_equal(plan.noise_keys, [900, 900 + 2**32, 31, 0])
    want = 1 / (1 + ((SIGMA[900] + SIGMA[901]) / 2) ** 2)
    assert plan.abar[0] == pytest.approx(want, rel=1e-12)


def test_a_list_of_ones_own_is_eulers_of_diffusers():
    own = [950.0, 700.5, 333.25, 1.0]
    theirs = EulerDiscreteScheduler()
    theirs.set_timesteps(timesteps=own)
    plan = make_plan(LINEAR, "euler", timesteps=own, prediction_type="epsilon", spacing="linspace")
    np.testing.assert_array_equal(plan.timesteps, theirs.timesteps)
    np.testing.assert_allclose(sigmas_of(plan), theirs.sigmas[:-1], rtol=1e-4)
    sigma = float(theirs.init_noise_sigma)
    assert plan.initial[1] == pytest.approx(sigma / (sigma**2 + 1) ** 0.5, rel=1e-6)


def plan_with(schedule=LINEAR, **options):
    return make_plan(schedule, **{"prediction_type": "v_prediction"} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_with(timesteps=[]), "timesteps: must be a list of at least one number"),
        (lambda: plan_with(timesteps=5), "at least one number"),
        (lambda: plan_with(timesteps=[[5, 3]]), "at least one number"),
        (lambda: plan_with(timesteps=[[5], [3, 2]]), "at least one number"),
        (lambda: plan_with(timesteps=[True]), "at least one number"),
        (lambda: plan_with(timesteps="ddim50"), "at least one number"),
        (lambda: plan_with(timesteps=[5, 5]), r"strictly decrease within 0..999"),
        (lambda: plan_with(timesteps=[3, 5]), r"strictly decrease within 0..999"),
        (lambda: plan_with(timesteps=[999.5]), r"within 0..999"),
        (lambda: plan_with(timesteps=[3, -0.5]), r"within 0..999"),
        (lambda: plan_with(timesteps=[np.nan]), r"within 0..999"),
        (lambda: plan_with(timesteps=[np.inf, 1]), r"within 0..999"),
        (lambda: plan_with(timesteps=[3], sigmas="karras"), "sigmas='karras'.*None beside"),
        (lambda: plan_with(timesteps=[3], spacing="even"), "spacing='even'"),
        (lambda: plan_with(sigmas="lu"), "sigmas='lu'.*karras, exponential, beta"),
        (lambda: plan_with(sigmas=True), "sigmas=True"),
        (lambda: plan_with(solver="dpmpp_2m", sigmas="karras", num_steps=0), "num_steps=0"),
        (lambda: plan_with(solver="dpmpp_2m", sigmas="karras", num_steps=1001), "num_steps=1001"),
        (lambda: plan_with(ZERO_SNR, timesteps=[998.5, 3]), "zero-terminal-SNR"),
        (lambda: plan_with(ZERO_SNR, sigmas="karras", spacing="trailing"), "sigmas='karras'"),
        (lambda: plan_with(ZERO_SNR, sigmas="beta", solver="dpmpp_2m"), "sigmas='beta'.*infinite"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    # Leading spacing never comes near abar = 0, and a list may begin there.
    assert len(plan_with(ZERO_SNR, sigmas="karras")) == 50
    assert plan_with(ZERO_SNR, timesteps=[999, 997.5, 3]).abar[0] == 0


def test_steps_must_go_towards_x0():
    with pytest.raises(ValueError, match="must not rise"):
        Steps(np.array([3.0, 5.0]), np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="must not rise"):
        Steps(np.array([5.0, 3.0]), np.array([0.2, 0.2]))


def peer_timesteps(cls, n, T, spacing, offset=0):
    scheduler = cls(num_train_timesteps=T, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(n)
    return scheduler.timesteps.numpy()


@every_spacing
@pytest.mark.parametrize(
    ("cls", "drop_last"),
    [(DDPMScheduler, False), (DDIMScheduler, False), (DPMSolverMultistepScheduler, True)],
)
def test_timesteps_are_diffusers(cls, drop_last, spacing):
    cases = [(n, 1000) for n in (1, 2, 3, 7, 10, 15, 30, 50, 64, 100, 333, 999, 1000)]
    for n, T in [*cases, (1, 1), (5, 7), (6, 7), (7, 7)]:
        if drop_last and n == T > 1 and spacing != "trailing":
            continue  # repeated timesteps: refused, see below
        for offset in (0, 1) if n < T / 2 else (0,):
            ours = timesteps(n, T, spacing, offset, drop_last=drop_last)
            assert ours.dtype == np.int64
            np.testing.assert_array_equal(ours, peer_timesteps(cls, n, T, spacing, offset))


def test_timesteps_as_documented():
    """interop.md's examples: n = 10 of 1000."""
    np.testing.assert_array_equal(timesteps(10, 1000), np.arange(900, -1, -100))
    np.testing.assert_array_equal(timesteps(10, 1000, "linspace"), np.arange(999, -1, -111))
    np.testing.assert_array_equal(timesteps(10, 1000, "trailing"), np.arange(999, 98, -100))
    np.testing.assert_array_equal(
        timesteps(10, 1000, "linspace", drop_last=True),
        [999, 899, 799, 699, 599, 500, 400, 300, 200, 100],
    )


@every_spacing
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_number_of_steps(spacing, drop_last):
    """Strictly decreasing within 0..T-1 for every n, or refused: only where points must repeat."""
    for T in (1, 2, 9, 50, 200):
        for n in range(1, T + 1):
            try:
                steps = timesteps(n, T, spacing, drop_last=drop_last)
            except ValueError as error:
                assert drop_last and n == T and "num_steps=" in str(error)
                continue
            assert steps.shape == (n,)
            assert (np.diff(steps) < 0).all() and steps[0] < T and steps[-1] >= 0


def test_trailing_rounding_fault_of_diffusers():
    """diffusers' arange in floating point takes 62 points for n = 61, the last at -1; ours 61."""
    theirs = peer_timesteps(DDPMScheduler, 61, 1000, "trailing")
    assert len(theirs) == 62 and theirs[-1] == -1
    np.testing.assert_array_equal(timesteps(61, 1000, "trailing"), theirs[:61])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timesteps(0, 1000), "num_steps=0.*1..1000"),
        (lambda: timesteps(1001, 1000), "num_steps=1001.*1..1000"),
        (lambda: timesteps(True, 1000), "num_steps=True"),
        (lambda: timesteps(2.5, 1000), "num_steps=2.5"),
        (lambda: timesteps(10, 1000, "even"), "spacing='even'.*leading, linspace, trailing"),
        (lambda: timesteps(10, 1000, "leading", 100), "steps_offset=100.*at most 99"),
        (lambda: timesteps(1000, 1000, "leading", 1), "steps_offset=1.*at most 0"),
        (lambda: timesteps(10, 1000, "leading", -1), "steps_offset=-1"),
        (lambda: timesteps(1000, 1000, "leading", drop_last=True), "num_steps=1000.*repeat"),
        (lambda: timesteps(1000, 1000, "linspace", drop_last=True), "num_steps=1000.*repeat"),
    ],
)
def test_bad_timesteps(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert timesteps(10, 1000, "leading", 99)[0] == 999


def test_noise_keys():
    """floor(t) + 2^32 (earlier rows with that floor): noise.md."""
    np.testing.assert_array_equal(noise_keys([999, 500, 0]), [999, 500, 0])
    repeated = noise_keys([7.9, 7.2, 7.0, 3.5, 7.1, 3.0, 0.4, 0.2])
    expected = [7, 7 + 2**32, 7 + 2**33, 3, 7 + 3 * 2**32, 3 + 2**32, 0, 2**32]
    np.testing.assert_array_equal(repeated, expected)
    assert repeated.dtype == np.int64
    plan = make_plan(LINEAR, "ddpm", 10, prediction_type="epsilon")
    np.testing.assert_array_equal(plan.noise_keys, np.arange(900, -1, -100))
    np.testing.assert_array_equal(plan.timesteps, np.arange(900, -1, -100))
