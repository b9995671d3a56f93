"""What a step may touch and what may touch it: slots, lanes, history, flags, NaN and zeros."""

import pytest
import torch

from flashddpm import kernels
from flashddpm.kernels import Column, reference

# The interpreter computes with NumPy, which warns where Inf - Inf is tried.
PER_SLOT = (
    *("nonfinite", "idx", "seeds", "guidance"),
    *("lane_cond", "lane_uncond", "dynamic_threshold", "rescale_factor"),
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_idle_and_finished_slots_are_never_written(State, device, rules, which):
    """Whatever their lanes hold, and even if they have none."""

    def spoil(args):
        args["out"][1:3] = torch.nan
        args["lane_cond"][2] = -1

    state = State(
        device if which == "fast" else "cpu",
        names=("ancestral", "idle", "idle", "finished"),
        cond=(0, 1, 2, 2),
        uncond=(-1, -1, -1, 3),
        change=spoil,
    )
    results = state.step(kernels.denoise_step if which == "fast" else reference.denoise_step)
    for name in ("x", "hist", "nonfinite"):
        rules.same(results[name][1:], state.before[name][1:])
    rules.same(results["net_in"][1:], state.before["net_in"][1:])
    assert (results["x"][0] != state.before["x"][0].cpu()).any()


def test_lanes_of_no_slot_are_never_written(State, device, rules):
    state = State(device, names=("ancestral", "last"), cond=(4, 1), uncond=(2, -1))
    results = state.step()
    for lane in (0, 3, 5):
        rules.same(results["net_in"][lane], state.before["net_in"][lane])
    for lane, slot in ((4, 0), (2, 0), (1, 1)):
        rules.same(results["net_in"][lane], results["x"][slot])


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [3, 2, 1, 0]])
def test_permuted_slots_give_permuted_results(fast_step, rules, order):
    def permute(args):
        for name in ("x", "hist"):
            args[name].copy_(args[name][order].clone())
        for name in PER_SLOT:
            args[name] = args[name][order]

    plain, permuted = fast_step(), fast_step(change=permute)
    for name in ("x", "hist", "nonfinite"):
        rules.same(permuted[name], plain[name][order])
    rules.same(permuted["net_in"], plain["net_in"])


def test_slots_are_independent(fast_step, rules):
    """A slot alone gives the bits that it gives among others."""
    together = fast_step()
    for slot in range(4):

        def alone(args, slot=slot):
            for name in PER_SLOT:
                args[name] = args[name][slot : slot + 1]
            for name in ("x", "hist"):
                args[name] = args[name][slot : slot + 1]

        result = fast_step(change=alone)
        rules.same(result["x"], together["x"][slot : slot + 1])
        rules.same(result["hist"], together["hist"][slot : slot + 1])


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_history_is_written_only_where_the_next_row_reads_it(State, device, rules, which):
    names = ("ancestral", "second order", "clipped", "last")  # followed by 2, 3, 5, 6
    state = State(device if which == "fast" else "cpu", names=names)
    results = state.step(kernels.denoise_step if which == "fast" else reference.denoise_step)
    written = (results["hist"] != state.before["hist"].cpu()).flatten(1).any(1)
    assert written.tolist() == [True, True, False, False]
    assert results["hist"][0].abs().max() <= 1  # x0 after the clip
    assert (results["hist"][0].abs() == 1).any()


@pytest.mark.parametrize("which", ["fast", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_flag_names_the_row_of_each_slot(State, device, bad, which):
    """Before the clip, which would hide Inf; per slot; and never after it is set."""

    def spoil(args):
        args["out"][3, 2, 4, 6] = bad  # the last element of slot 2, of a clipped row
        args["out"][5, 0, 0, 0] = bad  # the unconditional lane of slot 1

    state = State(device if which == "fast" else "cpu", change=spoil)
    step = kernels.denoise_step if which == "fast" else reference.denoise_step
    results = state.step(step)
    assert results["nonfinite"].tolist() == [0, 2, 4, 0]
    state.args["idx"].fill_(state.names.index("ancestral"))
    assert state.step(step)["nonfinite"].tolist() == [0, 2, 4, 0]
    state.args["out"].fill_(bad)
    assert state.step(step)["nonfinite"].tolist() == [1, 2, 4, 1]


def test_flag_of_a_combination_that_overflows(compared_step):
    def spoil(args):
        args["out"][0], args["out"][5], args["guidance"][:] = 3e38, -3e38, 1.0

    assert compared_step(change=spoil)["nonfinite"].tolist() == [0, 2, 0, 0]


def test_flag_of_a_finite_combination_stays(compared_step):
    def extreme(args):
        args["out"][:] = torch.finfo(torch.float32).max

    assert compared_step(change=extreme)["nonfinite"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("source", ["x", "out", "hist", "noise"])
def test_nonfinite_values_stay_where_they_are(compared_step, rules, source, bad):
    """In that sample only, and NaN passes the clip; out's place in a guided slot included."""
    spec = {"names": ("all",) * 4, "noise": True}
    clean = compared_step(**spec)
    lane = {"out": 1}.get(source, 3)  # slot 3 reads lane 1

    def spoil(args):
        args[source][lane, 2, 3, 4] = bad

    results = compared_step(**spec, change=spoil)
    assert not results["x"][3, 2, 3, 4].isfinite()
    assert not results["net_in"][[1, 4], 2, 3, 4].isfinite().any()
    results["x"][3, 2, 3, 4] = clean["x"][3, 2, 3, 4]
    results["net_in"][[1, 4], 2, 3, 4] = clean["net_in"][[1, 4], 2, 3, 4]
    rules.same(results["x"], clean["x"])
    rules.same(results["net_in"], clean["net_in"])


def test_nan_passes_the_clip(compared_step):
    def spoil(args):
        args["x"][0, 0, 0, 0] = torch.nan
        args["out"][3, 1, 1, 1] = torch.inf

    results = compared_step(names=("ancestral", "last", "clipped", "last"), change=spoil)
    assert results["hist"][0, 0, 0, 0].isnan() and results["x"][0, 0, 0, 0].isnan()
    assert results["x"].isnan().sum() == 1


WITHOUT = {
    "x": dict(x0_out=1.0, c_x0=0.5, c_out=0.5, c_hist=0.3, sigma=0.2),
    "out": dict(x0_xt=1.0, c_x0=0.5, c_xt=0.5, c_hist=0.3, sigma=0.2),
    "hist": dict(x0_xt=1.0, x0_out=0.2, c_x0=0.5, c_xt=0.5, sigma=0.2),
    "noise": dict(x0_xt=1.0, x0_out=0.2, c_x0=0.5, c_xt=0.5, c_hist=0.2),
    "x0": dict(x0_xt=1.0, x0_out=0.2, c_xt=0.5, c_hist=0.2),
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("source", ["x", "out", "hist", "noise"])
def test_zero_coefficient_ignores_nan(compared_step, rules, source, bad):
    """Nothing of a term whose coefficient is 0, or -0, reaches the sum; out's flag still rises."""
    for zero in (0.0, -0.0):
        columns = dict.fromkeys((column.name.lower() for column in Column), zero)
        table = {"without": (columns | WITHOUT[source], 0)}
        spec = {"names": ("without",), "table": table, "noise": True, "cond": (0,), "uncond": (-1,)}
        clean = compared_step(**spec)

        def spoil(args):
            args[source][:] = bad

        results = compared_step(**spec, change=spoil)
        rules.same(results["x"], clean["x"])
        rules.same(results["net_in"][0], clean["net_in"][0])
        assert results["x"].isfinite().all()
        assert results["nonfinite"].tolist() == [int(source == "out")]


def test_an_unused_x0_that_overflows_is_ignored(compared_step):
    """c_x0 = 0: x0 is not added, were it infinite."""

    def large(args):
        args["x"][:] = 2e38
        args["rows"][1, Column.X0_XT] = 100.0

    table = {"without": (WITHOUT["x0"], 0)}
    results = compared_step(names=("without",), table=table, cond=(0,), uncond=(-1,), change=large)
    assert results["x"].isfinite().all()


def test_results_do_not_depend_on_what_the_buffers_held(fast_step, rules):
    """net_in is written whole at the slots' lanes; hist too, where no row reads it."""
    spec = {"names": ("ancestral", "ancestral"), "cond": (0, 1), "uncond": (-1, 2)}

    def nan(args):
        args["net_in"][:] = torch.nan
        args["hist"][:] = torch.nan

    clean, results = fast_step(**spec), fast_step(**spec, change=nan)
    rules.same(results["x"], clean["x"])
    rules.same(results["hist"], clean["hist"])
    rules.same(results["net_in"][:3], clean["net_in"][:3])
