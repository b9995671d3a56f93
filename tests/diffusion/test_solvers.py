"""Solvers: identities of their rows, rows by hand, the kernel that reads them, and arguments."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from flashddpm.checkpoints.pretrained import scheduler_config
from flashddpm.diffusion.make_plan import OPTIONS, make_plan
from flashddpm.diffusion.parameterization import PREDICTION_TYPES
from flashddpm.diffusion.plan_options import with_defaults
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import KEYS, SamplingDefaults
from flashddpm.diffusion.solvers import (
    SOLVERS,
    Solver,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler,
    euler_ancestral,
)
from flashddpm.diffusion.timesteps import SPACINGS, timesteps
from flashddpm.kernels import reference
from flashddpm.kernels.step_arguments import StepSlots, StepState, StepStatistics, StepTable
from flashddpm.kernels.tables import IDLE, Column, Purpose

LINEAR = NoiseSchedule.create()
ZERO_SNR = NoiseSchedule.create(rescale_betas_zero_snr=True)
SHAPE = (1, 2, 3, 3)
DROP_LAST = ("dpmpp_2m", "dpmpp_2m_sde")
NOISY = ("ddpm", "dpmpp_2m_sde", "euler_ancestral")
BY_EPS = ("ddim", "euler", "euler_ancestral")

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


@every_type
@pytest.mark.parametrize("n", [1000, 50, 7])
def test_ddim_eta_1_is_ddpm_unclipped(prediction_type, n, assert_same_map):
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
def test_prediction_types_agree(solver, spacing, clip, apply):
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
def test_reference_kernel_applies_a_plan(solver, options, apply):
    """Rows 1..S of a float32 table behind the idle row, noise drawn by the rows' keys."""
    plan = make_plan(LINEAR, solver, 9, prediction_type="v_prediction", **options)
    S, shape = len(plan), (3, 5, 5)
    rows = torch.zeros(S + 1, len(Column))
    rows[1:] = torch.tensor(plan.rows)
    keys = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(plan.noise_keys)])
    follow = torch.tensor([IDLE, *range(2, S + 1), IDLE])
    seeds, lanes = torch.tensor([5, -7]), torch.tensor([0, 1], dtype=torch.int32)
    idx = torch.tensor([1, 1])
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((2, *shape))).float()
    hist, net_in = torch.full_like(x, torch.nan), torch.zeros_like(x)
    flags = torch.zeros(2, dtype=torch.int32)
    ours, ours_hist = x.double().numpy(), None
    state = StepState(x, hist, net_in, flags)
    slots = StepSlots(idx, seeds, torch.ones(2), lanes, torch.full_like(lanes, -1))
    groups = slots, StepStatistics(torch.ones(2), torch.ones(2)), StepTable(rows, keys, follow)
    for i in range(S):
        out = torch.from_numpy(np.random.default_rng(i).standard_normal((2, *shape))).float()
        z = reference.philox(seeds, keys[idx], shape, Purpose.REVERSE_STEP).double().numpy()
        reference.denoise_step(state, out, *groups)
        reference.advance(slots, groups[-1])
        ours, ours_hist = apply(plan.rows[i], ours, out.double().numpy(), ours_hist, z)
        np.testing.assert_allclose(x.numpy(), ours, rtol=0, atol=2e-6 * np.abs(ours).max())
        assert torch.equal(net_in, x)
    assert idx.tolist() == [IDLE, IDLE]
    assert not flags.any()
    before = x.clone()
    reference.denoise_step(state, out, *groups)
    assert torch.equal(x, before)


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
        SOLVERS[solver].rows(LINEAR, steps)
    unsigned = SOLVERS[solver].rows(LINEAR, np.array([5, 3], np.uint8))
    np.testing.assert_array_equal(unsigned.rows, SOLVERS[solver].rows(LINEAR, [5, 3]).rows)


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


# Records --------------------------------------------------------------------------------------


@every_solver
def test_a_record_says_what_its_function_takes(solver):
    record = SOLVERS[solver]
    taken = set(inspect.signature(record.rows).parameters)
    assert record.name == solver == record.rows.__name__
    assert set(record.options) == taken & set(OPTIONS)
    assert record.noise_alone == ("noise_alone" in taken)
    assert record.scheduler_class is None or record.scheduler_class in KEYS
    keys = KEYS.get(record.scheduler_class, ())
    assert (record.algorithm_type is None) == ("algorithm_type" not in keys)


def test_options_that_say_nothing_are_those_of_make_plan():
    parameters = inspect.signature(make_plan).parameters
    assert {name: parameters[name].default for name in OPTIONS} == OPTIONS


def test_a_solver_is_its_record(monkeypatch):
    """A new one needs nothing else: plans, defaults, refusals; here ddim's rows by another name."""
    record = Solver(name="new", rows=ddim, options=("eta",), default_steps=7, fractional=True)
    monkeypatch.setitem(SOLVERS, "new", record)
    ask = {"prediction_type": "v_prediction", "spacing": "linspace", "eta": 0.5}
    plan = make_plan(LINEAR, "new", 12, **ask)
    fractional = make_plan(LINEAR, "ddim", timesteps=np.linspace(999, 0, 12), **ask)
    assert plan.fractional and plan.content == fractional.content
    assert plan.content == make_plan(LINEAR, "new", 12, match_diffusers=True, **ask).content
    with pytest.raises(ValueError, match="use_clipped_model_output=True.*new has no such option"):
        make_plan(LINEAR, "new", 12, use_clipped_model_output=True, **ask)
    assert with_defaults({}, "new", 1000) == {"solver": "new", "num_steps": 7}
    assert with_defaults({"solver": "new"}, "ddpm", 5)["num_steps"] == 5
    own = SamplingDefaults(solver="new", spacing="linspace", variance_type="fixed_large")
    assert own.plan(LINEAR, "v_prediction", "new", 12, {"eta": 0.5}).content == plan.content
    with pytest.raises(ValueError, match="diffusers has no class for new"):
        scheduler_config(LINEAR, "epsilon", own)
