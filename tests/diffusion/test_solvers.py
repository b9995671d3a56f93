"""Solvers, row by row against diffusers; test_solver_orders.py has whole plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.solvers import (
    DROP_LAST,
    SOLVERS,
    SPACINGS,
    Plan,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler,
    euler_ancestral,
    make_plan,
    noise_keys,
    timesteps,
)
from flashddpm.kernels import reference
from flashddpm.kernels.tables import REST, Column, Purpose

LINEAR = NoiseSchedule.create()
ZERO_SNR = NoiseSchedule.create(rescale_betas_zero_snr=True)
SHORT = {"num_train_timesteps": 20, "beta_start": 0.001, "beta_end": 0.3}
SHAPE = (1, 2, 3, 3)
NOISY = ("ddpm", "dpmpp_2m_sde", "euler_ancestral")
BY_EPS = ("ddim", "euler", "euler_ancestral")

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def apply(row, x, out, hist, z):
    """Return x_next and x0 of one row, in float64 (contract.py)."""
    x0 = row[Column.X0_XT] * x + row[Column.X0_OUT] * out
    if row[Column.CLIP]:
        x0 = np.clip(x0, -row[Column.CLIP], row[Column.CLIP])
    x_next = row[Column.C_X0] * x0 + row[Column.C_XT] * x + row[Column.C_OUT] * out
    if row[Column.C_HIST]:
        x_next = x_next + row[Column.C_HIST] * hist
    return x_next + row[Column.SIGMA] * z, x0


# Timesteps ------------------------------------------------------------------------------------


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


# Parity with diffusers ------------------------------------------------------------------------


def peer(cls, config, n, schedule=None):
    """Return a diffusers scheduler, its tables replaced by the float64 ones of ``schedule``."""
    scheduler = cls(**config)
    if schedule is not None:
        one = torch.ones((), dtype=torch.float64)
        scheduler.one = scheduler.final_alpha_cumprod = one
        scheduler.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
    scheduler.set_timesteps(n)
    if schedule is not None and cls is DPMSolverMultistepScheduler:
        abar = schedule.alphas_cumprod[scheduler.timesteps.numpy()]
        scheduler.sigmas = torch.tensor(np.append(np.sqrt((1 - abar) / abar), 0))
    return scheduler


def worst_difference(plan, scheduler, step):
    """Return the largest difference of a step, relative to that step's largest value."""
    np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps.numpy())
    random, hist, worst = np.random.default_rng(0), None, 0.0
    for i, row in enumerate(plan.rows):
        x, out, z = random.standard_normal((3, *SHAPE))
        z = z if i < len(plan) - 1 else 0 * z
        ours, hist = apply(row, x, out, hist, z)
        theirs = step(scheduler, *map(torch.from_numpy, (out, x, z)), scheduler.timesteps[i])
        worst = max(worst, np.abs(ours - theirs.numpy()).max() / np.abs(ours).max())
    return worst


def with_diffusers_tables(config):
    """A schedule of diffusers' float32 abar: float32 is wrong by 1.7e-4 in 1 - abar_0, say."""
    abar = DDPMScheduler(**config).alphas_cumprod.double().numpy()
    return NoiseSchedule(1 - abar / np.append(1, abar[:-1]))


def cases(solver, spacing, prediction_type, clip, **options):
    """Yield a plan, the config and tables of its peer, and the tolerance, for many settings.

    As shipped, diffusers computes in float32; on float64 tables it shows what its formulas are.
    """
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    if solver not in DROP_LAST:
        config |= {"clip_sample": clip > 0, "clip_sample_range": clip or 1.0}
    settings = [({}, n, 1e-5) for n in (1, 2, 10, 50)] + [({}, 25, 1e-10)]
    settings += [({"beta_schedule": "squaredcos_cap_v2"}, n, 1e-10) for n in (1, 5)]
    settings += [({"beta_schedule": "scaled_linear", "steps_offset": 1}, 10, 1e-10)]
    settings += [(SHORT, n, 1e-10) for n in (7, 13, 20)]
    if prediction_type != "epsilon" and solver not in DROP_LAST:
        settings += [({"rescale_betas_zero_snr": True}, n, 1e-7) for n in (1, 5)]
    for changes, n, tolerance in settings:
        changed = config | changes
        T = changed.get("num_train_timesteps", 1000)
        if solver in DROP_LAST and n == T and spacing != "trailing":
            continue  # repeated timesteps: refused
        if solver == "ddim" and spacing == "trailing" and T % n:
            continue  # diffusers takes t - T // n for the next timestep
        stock = tolerance == 1e-5
        schedule = with_diffusers_tables(changed) if stock else NoiseSchedule.from_config(changed)
        plan = make_plan(
            schedule,
            solver,
            n,
            prediction_type=prediction_type,
            spacing=spacing,
            steps_offset=changed.get("steps_offset", 0),
            clip=clip,
            **options,
        )
        yield plan, changed, None if stock else schedule, tolerance


@every_type
@every_spacing
@pytest.mark.parametrize("clip", [0.0, 1.7])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_is_diffusers(monkeypatch, prediction_type, spacing, clip, variance_type):
    """All but the noise that diffusers leaves in where the last timestep is not 0 (below)."""

    def step(scheduler, out, x, z, t):
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **options: z
        )
        return scheduler.step(out, t, x).prev_sample

    options = {"variance_type": variance_type}
    for plan, config, schedule, tolerance in cases(
        "ddpm", spacing, prediction_type, clip, **options
    ):
        scheduler = peer(DDPMScheduler, config | options, len(plan), schedule)
        assert worst_difference(plan, scheduler, step) < tolerance, (config, len(plan))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_last_step_adds_no_noise(monkeypatch, variance_type):
    """diffusers gates noise on t > 0, so fixed_large with trailing spacing ends noisy; ours not."""
    z = torch.ones(SHAPE, dtype=torch.float64)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: z)
    options = {"variance_type": variance_type}
    scheduler = peer(DDPMScheduler, options | {"timestep_spacing": "trailing"}, 10, LINEAR)
    theirs = scheduler.step(0 * z, scheduler.timesteps[-1], 0 * z).prev_sample
    expected = np.sqrt(1 - LINEAR.alphas_cumprod[99]) if variance_type == "fixed_large" else 0
    np.testing.assert_allclose(theirs.numpy(), np.full(SHAPE, expected), atol=2e-10)
    plan = make_plan(LINEAR, "ddpm", 10, prediction_type="epsilon", spacing="trailing", **options)
    assert plan.rows[-1, Column.SIGMA] == 0
    assert (plan.rows[:-1, Column.SIGMA] > 0).all()


@every_type
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [0.0, 1.7])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers(prediction_type, spacing, clip, eta):
    """Where diffusers is right: it takes t - T // n for the next entry of the list (see below)."""

    def step(scheduler, out, x, z, t):
        return scheduler.step(out, t, x, eta=eta, variance_noise=z).prev_sample

    for plan, config, schedule, tolerance in cases("ddim", spacing, prediction_type, clip, eta=eta):
        scheduler = peer(DDIMScheduler, config, len(plan), schedule)
        assert worst_difference(plan, scheduler, step) < tolerance, (config, len(plan))


@pytest.mark.parametrize(("spacing", "n"), [("linspace", 10), ("trailing", 7)])
def test_ddim_where_diffusers_is_wrong(spacing, n):
    """Its arithmetic previous t misses the list: 999 - 100 is not 888, nor 999 - 142 856.

    Ours is right by the list: a_s is that of the next entry, and eta = 1 is ddpm, whose parity with
    diffusers holds for these spacings.
    """

    def step(scheduler, out, x, z, t):
        return scheduler.step(out, t, x).prev_sample

    options = {"prediction_type": "epsilon", "spacing": spacing, "clip": 0.0}
    plan = make_plan(LINEAR, "ddim", n, **options)
    config = {"timestep_spacing": spacing, "clip_sample": False}
    assert worst_difference(plan, peer(DDIMScheduler, config, n, LINEAR), step) > 1e-3
    abar_s = np.append(LINEAR.alphas_cumprod[timesteps(n, 1000, spacing)[1:]], 1)
    np.testing.assert_array_equal(plan.rows[:, Column.C_X0], np.sqrt(abar_s))
    noisy = make_plan(LINEAR, "ddim", n, eta=1.0, **options)
    assert_same_map(noisy, make_plan(LINEAR, "ddpm", n, **options), rtol=1e-9)


@every_type
@every_spacing
@pytest.mark.parametrize(
    ("solver", "algorithm"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")]
)
def test_dpmpp_2m_is_diffusers(solver, algorithm, prediction_type, spacing):
    """diffusers casts x to float32 whatever its tables are, whence 1e-6."""

    def step(scheduler, out, x, z, t):
        return scheduler.step(out, t, x, variance_noise=z).prev_sample

    for plan, config, schedule, tolerance in cases(solver, spacing, prediction_type, 0.0):
        config["algorithm_type"] = algorithm
        scheduler = peer(DPMSolverMultistepScheduler, config, len(plan), schedule)
        worst = worst_difference(plan, scheduler, step)
        assert worst < max(tolerance, 1e-6), (config, len(plan))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_dpmpp_2m_zero_snr_is_diffusers(prediction_type):
    """diffusers puts 2^-24 for abar = 0: on a schedule that has it, ours agrees."""

    def step(scheduler, out, x, z, t):
        return scheduler.step(out, t, x).prev_sample

    steps = timesteps(10, 1000, "trailing")
    abar = ZERO_SNR.alphas_cumprod[steps[::-1]]
    abar[-1] = 2**-24  # above abar[998]: only the timesteps in use make a schedule
    short = NoiseSchedule(1 - abar / np.append(1, abar[:-1]))
    rows = dpmpp_2m(short, np.arange(9, -1, -1), prediction_type=prediction_type).rows.copy()
    rows[:, Column.TIMESTEP] = steps
    config = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = peer(DPMSolverMultistepScheduler, config | {"prediction_type": prediction_type}, 10)
    assert worst_difference(Plan(rows, steps), scheduler, step) < 1e-5


# Identities of the rows -----------------------------------------------------------------------


def unclipped_map(rows):
    """Coefficients of (x_t, out, hist, z) in x_next, [S, 4]."""
    c = rows[:, Column.C_X0]
    return np.stack(
        [
            c * rows[:, Column.X0_XT] + rows[:, Column.C_XT],
            c * rows[:, Column.X0_OUT] + rows[:, Column.C_OUT],
            rows[:, Column.C_HIST],
            rows[:, Column.SIGMA],
        ],
        -1,
    )


def assert_same_map(a, b, rtol):
    a, b = unclipped_map(a.rows), unclipped_map(b.rows)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@every_type
@pytest.mark.parametrize("n", [1000, 50, 7])
def test_ddim_eta_1_is_ddpm_unclipped(prediction_type, n):
    for schedule in (LINEAR, NoiseSchedule.create("squaredcos_cap_v2")):
        options = {"prediction_type": prediction_type, "clip": 0.0}
        a = make_plan(schedule, "ddim", n, eta=1.0, **options)
        assert_same_map(a, make_plan(schedule, "ddpm", n, **options), rtol=1e-9)


@every_type
def test_full_ddpm_rows_are_the_posterior(prediction_type):
    """S5 at stride 1: the schedule's own tables."""
    plan = make_plan(LINEAR, "ddpm", 1000, prediction_type=prediction_type)
    for column, table in (
        (Column.C_X0, LINEAR.posterior_mean_coef_x0),
        (Column.C_XT, LINEAR.posterior_mean_coef_xt),
        (Column.SIGMA, np.sqrt(LINEAR.posterior_variance)),
    ):
        np.testing.assert_allclose(plan.rows[:, column], table[::-1], rtol=1e-10)
    large = make_plan(
        LINEAR, "ddpm", 1000, prediction_type=prediction_type, variance_type="fixed_large"
    )
    np.testing.assert_allclose(
        large.rows[:-1, Column.SIGMA], np.sqrt(LINEAR.betas[:0:-1]), rtol=1e-10
    )


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_variance(eta):
    """Eq. 12: direction^2 + sigma^2 = 1 - abar_s, and sigma is eq. 16's."""
    steps = timesteps(20, 1000, "trailing")
    rows = ddim(LINEAR, steps, eta=eta).rows
    abar = LINEAR.alphas_cumprod[steps]
    abar_s = np.append(abar[1:], 1)
    total = rows[:, Column.C_OUT] ** 2 + rows[:, Column.SIGMA] ** 2
    np.testing.assert_allclose(total, 1 - abar_s, rtol=1e-12)
    expected = eta * np.sqrt((1 - abar_s) / (1 - abar)) * np.sqrt(1 - abar / abar_s)
    np.testing.assert_allclose(rows[:, Column.SIGMA], expected, rtol=1e-12)


@every_solver
@every_spacing
@pytest.mark.parametrize("clip", [0.0, 0.6])
def test_prediction_types_agree(solver, spacing, clip):
    """Outputs that say the same x_0 and eps give the same x_next."""
    plans = [
        make_plan(LINEAR, solver, 12, prediction_type=p, spacing=spacing, clip=clip)
        for p in PREDICTION_TYPES
    ]
    random, hist = np.random.default_rng(1), [None] * 3
    for i, abar in enumerate(plans[0].abar):
        x0, eps, z = random.standard_normal((3, *SHAPE))
        a, b = np.sqrt(abar), np.sqrt(1 - abar)
        results = []
        for j, out in enumerate((eps, x0, a * eps - b * x0)):
            x_next, hist[j] = apply(plans[j].rows[i], a * x0 + b * eps, out, hist[j], z)
            results.append(x_next)
            np.testing.assert_allclose(hist[j], np.clip(x0, -(clip or 99), clip or 99), atol=1e-12)
        np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=0, atol=1e-11)


@every_solver
@every_type
@every_spacing
@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_last_step_is_x0_and_zeros_are_exact(solver, prediction_type, spacing, n):
    """The last row returns x0 alone, by exact zeros: the kernel then skips those terms."""
    plan = make_plan(LINEAR, solver, n, prediction_type=prediction_type, spacing=spacing)
    assert len(plan) == plan.num_steps == n
    assert plan.rows[-1, Column.C_X0] == 1
    for column in (Column.C_XT, Column.C_OUT, Column.C_HIST, Column.SIGMA):
        assert plan.rows[-1, column] == 0
    assert (plan.rows[:, Column.CLIP] == 1).all()
    assert (plan.rows[:-1, Column.SIGMA] != 0).all() == (solver in NOISY or n == 1)
    assert (plan.rows[:, Column.C_HIST] != 0).sum() == (max(n - 2, 0) if solver in DROP_LAST else 0)
    if prediction_type == "epsilon":
        assert (plan.rows[:-1, Column.C_XT] == 0).all() == (solver in BY_EPS or n == 1)
    assert (plan.rows[:, Column.C_OUT] == 0).all() == (solver not in BY_EPS or n == 1)


@every_solver
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr(solver, prediction_type):
    """At abar = 0 every coefficient is finite, and x0 does not depend on x_t."""
    for options in ({}, {"variance_type": "fixed_large"}) if solver == "ddpm" else ({},):
        plan = make_plan(
            ZERO_SNR, solver, 10, prediction_type=prediction_type, spacing="trailing", **options
        )
        assert plan.timesteps[0] == 999
        assert np.isfinite(plan.rows).all()
        assert plan.rows[0, Column.X0_XT] == 0
        assert plan.rows[0, Column.X0_OUT] == (1 if prediction_type == "sample" else -1)
        abar_s = ZERO_SNR.alphas_cumprod[int(plan.timesteps[1])]
        np.testing.assert_allclose(plan.rows[0, Column.C_X0], np.sqrt(abar_s), rtol=1e-14)
    with pytest.raises(ValueError, match="epsilon.*alphas_cumprod = 0"):
        make_plan(ZERO_SNR, solver, 10, prediction_type="epsilon", spacing="trailing")
    # Leading spacing never visits the last timestep, so epsilon is well defined there.
    assert len(make_plan(ZERO_SNR, solver, 10, prediction_type="epsilon")) == 10


def test_dpmpp_2m_after_infinite_step_is_first_order():
    """lambda = -inf at abar = 0: 1 / 2r = 0 in the second row, and rows are the limit abar -> 0."""
    steps = timesteps(10, 1000, "trailing")
    plan = dpmpp_2m(ZERO_SNR, steps, prediction_type="sample")
    assert plan.rows[1, Column.C_HIST] == 0
    assert (plan.rows[2:-1, Column.C_HIST] < 0).all()
    near = ZERO_SNR.betas.copy()
    near[-1] = 1 - 1e-16
    limit = dpmpp_2m(NoiseSchedule(near), steps, prediction_type="sample")
    others = [i for i in range(10) if i != 1]
    np.testing.assert_allclose(plan.rows[others], limit.rows[others], atol=1e-8)
    assert 0 < -limit.rows[1, Column.C_HIST] < 0.05  # vanishes like 1 / log(1 / abar)


def test_dpmpp_2m_by_hand():
    """Algorithm 2 written out for three steps, with lambda by logarithms."""
    steps = np.array([900, 500, 200])
    a = np.sqrt(LINEAR.alphas_cumprod[steps])
    b = np.sqrt(1 - LINEAR.alphas_cumprod[steps])
    lam = np.log(a / b)
    rows = dpmpp_2m(LINEAR, steps, prediction_type="sample").rows
    h0, h1 = lam[1] - lam[0], lam[2] - lam[1]
    r = h0 / h1
    first, second = -a[1] * np.expm1(-h0), -a[2] * np.expm1(-h1)
    expected = [
        [first, b[1] / b[0], 0],
        [second * (1 + 1 / (2 * r)), b[2] / b[1], -second / (2 * r)],
        [1, 0, 0],
    ]
    columns = [Column.C_X0, Column.C_XT, Column.C_HIST]
    np.testing.assert_allclose(rows[:, columns], expected, rtol=1e-12)


# The consumer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddpm", {"clip": 1.0}),
        ("ddpm", {"clip": 0.0, "variance_type": "fixed_large"}),
        ("ddim", {"clip": 1.0, "eta": 0.5}),
        ("ddim", {"clip": 1.0}),
        ("dpmpp_2m", {"clip": 0.0}),
        ("dpmpp_2m", {"clip": 0.8}),
        ("dpmpp_2m_sde", {"clip": 0.8}),
        ("euler_ancestral", {"clip": 0.0, "sigmas": "karras"}),
    ],
)
def test_reference_kernel_applies_a_plan(solver, options):
    """Rows 1..S of a float32 table behind the row of rest, noise drawn by the rows' keys."""
    plan = make_plan(LINEAR, solver, 9, prediction_type="v_prediction", **options)
    S, shape = len(plan), (3, 5, 5)
    rows = torch.zeros(S + 1, len(Column))
    rows[1:] = torch.tensor(plan.rows)
    keys = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(plan.noise_keys)])
    follow = torch.tensor([REST, *range(2, S + 1), REST])
    seeds, lanes = torch.tensor([5, -7]), torch.tensor([0, 1], dtype=torch.int32)
    idx = torch.tensor([1, 1])
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((2, *shape))).float()
    hist, net_in = torch.full_like(x, torch.nan), torch.zeros_like(x)
    flags = torch.zeros(2, dtype=torch.int32)
    ours, ours_hist = x.double().numpy(), None
    for i in range(S):
        out = torch.from_numpy(np.random.default_rng(i).standard_normal((2, *shape))).float()
        z = reference.philox(seeds, keys[idx], shape, Purpose.REVERSE_STEP).double().numpy()
        reference.denoise_step(
            x, hist, net_in, flags, out, idx, seeds, torch.ones(2), lanes,
            torch.full_like(lanes, -1), torch.ones(2), torch.ones(2), rows, keys, follow,
        )  # fmt: skip
        reference.advance(idx, follow)
        ours, ours_hist = apply(plan.rows[i], ours, out.double().numpy(), ours_hist, z)
        np.testing.assert_allclose(x.numpy(), ours, rtol=0, atol=2e-6 * np.abs(ours).max())
        assert torch.equal(net_in, x)
    assert idx.tolist() == [REST, REST]
    assert not flags.any()
    before = x.clone()
    reference.denoise_step(
        x, hist, net_in, flags, out, idx, seeds, torch.ones(2), lanes,
        torch.full_like(lanes, -1), torch.ones(2), torch.ones(2), rows, keys, follow,
    )  # fmt: skip
    assert torch.equal(x, before)


# Plans and arguments --------------------------------------------------------------------------


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


def test_plan_is_frozen_and_read_only():
    rows, keys = make_rows()
    plan = Plan(rows, keys)
    rows[0, 0] = 5
    keys[0] = 5
    assert plan.rows[0, 0] == 0 and plan.noise_keys[0] == 30
    for array in (plan.rows, plan.noise_keys, plan.timesteps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        plan.rows = rows


def make_rows(*changes):
    rows = np.zeros((3, len(Column)))
    rows[:, Column.C_X0] = 1
    for i, column, value in changes:
        rows[i, column] = value
    return rows, np.array([30, 20, 10])


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        (np.zeros((3, 8)), [1, 2, 3], r"rows of shape \(3, 8\)"),
        (np.zeros(9), [1], r"rows of shape \(9,\)"),
        (np.zeros((0, 9)), [], r"rows of shape \(0, 9\)"),
        (make_rows((1, Column.C_XT, np.nan))[0], [1, 2, 3], r"rows\[1, C_XT\]=nan"),
        (make_rows((2, Column.SIGMA, np.inf))[0], [1, 2, 3], r"rows\[2, SIGMA\]=inf"),
        (make_rows((0, Column.X0_XT, 1e39))[0], [1, 2, 3], r"rows\[0, X0_XT\]=1e\+39.*float32"),
        (make_rows((1, Column.SIGMA, -0.1))[0], [1, 2, 3], "sigma and clip"),
        (make_rows((1, Column.CLIP, -1))[0], [1, 2, 3], "sigma and clip"),
        (make_rows((1, Column.LOG_SIGMA, np.inf))[0], [1, 2, 3], r"rows\[1, LOG_SIGMA\]=inf"),
        (make_rows((1, Column.THRESHOLD, -0.1))[0], [1, 2, 3], r"threshold .* in \[0, 1\]"),
        (make_rows((1, Column.RESCALE, 1.1))[0], [1, 2, 3], r"rescale must be in \[0, 1\]"),
        (make_rows((1, Column.THRESHOLD, 0.5))[0], [1, 2, 3], "clip must be at least 1"),
        (make_rows((0, Column.C_HIST, 0.5))[0], [1, 2, 3], "no previous x0"),
        (make_rows()[0], [1, 2], r"noise_keys of shape \(2,\)"),
        (make_rows()[0], [1.0, 2.0, 3.0], "3 integers"),
        (make_rows()[0], [1, 2, 1], "differ"),
        (make_rows()[0], [1, 2, -1], "2.63-1"),
        (make_rows()[0], np.array([1, 2, 2**63], np.uint64), "2.63-1"),
    ],
)
def test_bad_plans(rows, keys, message):
    with pytest.raises(ValueError, match=message):
        Plan(rows, keys)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "at least one integer"),
        ([5.0, 3.0], "at least one integer"),
        ([[5, 3]], "at least one integer"),
        ([True], "at least one integer"),
        ([5, 5], r"decrease within 0..999"),
        ([3, 5], r"decrease within 0..999"),
        ([1000, 3], r"decrease within 0..999"),
        ([3, -1], r"decrease within 0..999"),
    ],
)
@every_solver
def test_bad_steps(solver, steps, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[solver](LINEAR, steps)
    unsigned = SOLVERS[solver](LINEAR, np.array([5, 3], np.uint8))
    np.testing.assert_array_equal(unsigned.rows, SOLVERS[solver](LINEAR, [5, 3]).rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "heun"}, "solver='heun'.*ddpm, ddim, dpmpp_2m"),
        ({"solver": None}, "solver=None"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1001}, "num_steps=1001"),
        ({"num_steps": 1000, "solver": "dpmpp_2m"}, "num_steps=1000"),
        ({"prediction_type": "eps"}, "prediction_type='eps'.*epsilon, sample, v_prediction"),
        ({"spacing": "karras"}, "spacing='karras'"),
        ({"steps_offset": 20}, "steps_offset=20.*at most 19"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"clip": np.nan}, "clip=nan"),
        ({"clip": True}, "clip=True"),
        ({"eta": 1.5}, r"eta=1.5.*\[0, 1\]"),
        ({"eta": np.nan}, "eta=nan"),
        ({"eta": 0.5, "solver": "ddpm"}, "eta=0.5: must be 0.0; ddpm"),
        ({"eta": 0.5, "solver": "dpmpp_2m"}, "eta=0.5: must be 0.0; dpmpp_2m"),
        ({"variance_type": "fixed", "solver": "ddpm"}, "variance_type='fixed'.*learned_range"),
        (
            {"variance_type": "fixed_large"},
            "variance_type='fixed_large': must be 'fixed_small'; ddim",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(LINEAR, **{"prediction_type": "epsilon"} | arguments)


def test_make_plan_passes_every_argument():
    steps = timesteps(8, 1000, "leading", 3)
    dropped = timesteps(8, 1000, "leading", 3, drop_last=True)
    options = {"prediction_type": "v_prediction", "clip": 1.5}
    for solver, solve, extra, at in (
        ("ddpm", ddpm, {"variance_type": "fixed_large"}, steps),
        ("ddim", ddim, {"eta": 0.3}, steps),
        ("dpmpp_2m", dpmpp_2m, {}, dropped),
        ("dpmpp_2m_sde", dpmpp_2m_sde, {}, dropped),
        ("euler", euler, {}, steps),
        ("euler_ancestral", euler_ancestral, {}, steps),
    ):
        plan = make_plan(LINEAR, solver, 8, steps_offset=3, **options, **extra)
        np.testing.assert_array_equal(plan.rows, solve(LINEAR, at, **options, **extra).rows)
    default = make_plan(LINEAR, prediction_type="epsilon")
    np.testing.assert_array_equal(default.rows, ddim(LINEAR, timesteps(50, 1000)).rows)
