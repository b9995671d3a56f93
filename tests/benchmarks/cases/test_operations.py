"""What the benchmark of kernels computes and chooses, with times made up."""

import dataclasses
import importlib
import math
import types

import pytest
import torch

from flashddpm.benchmarks.cases import operations
from flashddpm.benchmarks.cases.operations import LARGE, SMALLEST, Card, KernelWork
from flashddpm.benchmarks.measure import harness
from flashddpm.benchmarks.peers import compiled_ops
from flashddpm.kernels import OPS, Column, LossColumn, examples
from flashddpm.kernels.checks import counting, scorecard
from flashddpm.kernels.launch import INTERPRETED

SIZE = (3, (3, 4, 4))
CLOCKS = 4e-3  # of the card, an element: 4 ps at 1 GHz
CARD = Card(copy=1e12, empty=2e-6, cache=1000, instructions={("op", torch.float32): CLOCKS})
each_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])


@each_op
def test_only_equal_operations_are_timed(op):
    arguments = op.example("cpu", torch.float32, (3, 4, 4), 3, 0)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    operations.check(op, arguments)
    for key, value in before.items():
        torch.testing.assert_close(arguments[key], value, rtol=0, atol=0, equal_nan=True)
        assert not arguments[key].requires_grad

    def off(**kwargs):
        result = op.fast(**kwargs)
        for value in [result, *(kwargs[name] for name in op.mutates)]:
            if value is not None:
                value += 1
        return result

    with pytest.raises(AssertionError):
        operations.check(dataclasses.replace(op, fast=off), arguments)


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
def test_only_equal_gradients_are_timed(name):
    op = OPS[name]
    arguments = op.example("cpu", torch.float32, (3, 4, 4), 3, 0)

    def off(**kwargs):
        result = op.fast(**kwargs)
        return result.detach() + 1.01 * (result - result.detach())

    with pytest.raises(AssertionError, match=r"item \[1\]"):
        operations.check(dataclasses.replace(op, fast=off), arguments)


@each_op
def test_every_image_costs_the_same(op):
    """Twice the images move twice the bytes, and all of them draw noise where the op can."""
    sizes = [(batch, (3, 4, 4)) for batch in (2, 4)]
    few, many = (operations.arguments_of(op, torch.float32, size, "cpu") for size in sizes)
    assert op.bytes_moved(many) == 2 * op.bytes_moved(few) > 0
    assert op.index or not {"t", "idx"} & set(few) or op.name == "advance"
    if op.name in ("add_noise", "diffusion_loss", "hybrid_loss"):
        assert (few["rows"][few["t"], 1] != 0).all()
    if op.name == "denoise_step":
        assert (few["rows"][few["idx"], Column.SIGMA] != 0).all()
    if op.name == "sample_stats":
        asked = few["rows"][few["idx"]][:, [Column.THRESHOLD, Column.RESCALE]]
        assert (asked != 0).all() and (few["next"][few["idx"]] != few["idx"]).all()


NOISE = {
    "add_noise": (0, 1),
    "diffusion_loss": (LossColumn.EPS,),
    "hybrid_loss": (LossColumn.EPS,),
    "denoise_step": (Column.SIGMA,),
    "sample_stats": (Column.THRESHOLD, Column.RESCALE),
}


@pytest.mark.parametrize("name", NOISE)
def test_the_row_is_the_lightest_that_does_the_work(name):
    op, size = OPS[name], (2, (3, 4, 4))
    arguments = operations.arguments_of(op, torch.float32, size, "cpu")
    index, bytes_moved = arguments["idx" if "idx" in arguments else "t"], op.bytes_moved(arguments)
    others = 0
    for row, values in enumerate(arguments["rows"]):
        if (values[list(NOISE[name])] != 0).all():
            others += 1
            assert bytes_moved <= op.bytes_moved(arguments | {"idx": index, "t": index.fill_(row)})
    assert others


def test_rows_are_found_wherever_they_stand(monkeypatch):
    """The tables of the examples may be put in another order."""
    steps = [examples.STEPS[i] for i in (0, 3, 4, 2, 1)]
    monkeypatch.setattr(examples, "STEPS", steps)
    hybrid = importlib.import_module("flashddpm.kernels.hybrid_loss").ROWS
    for name, rows in (
        ("add_noise", [[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]]),
        ("diffusion_loss", [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]),
        ("hybrid_loss", [[1.0, 0.0, *hybrid[0][2:]], *hybrid]),
    ):
        monkeypatch.setattr(importlib.import_module(f"flashddpm.kernels.{name}"), "ROWS", rows)
    for name, columns in NOISE.items():
        arguments = operations.arguments_of(OPS[name], torch.float32, (2, (3, 4, 4)), "cpu")
        rows = arguments["rows"][arguments["idx" if "idx" in arguments else "t"]]
        assert (rows[:, list(columns)] != 0).all(), name
    with pytest.raises(ValueError, match=r"must have no 0 in columns \[0, 1\]"):
        operations.first_row(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), (0, 1))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in OPS if name != "advance"])
def test_bytes_are_those_that_the_kernels_move(name, dtype):
    """Of the benchmark's own arguments, gradients too: ``add_noise``'s reads one, writes one."""
    op = OPS[name]
    if dtype in op.dtypes:
        arguments = operations.arguments_of(op, dtype, (2, (3, 4, 4)), "cpu")
        for way, make in compiled_ops.directions(op, arguments, op.fast).items():
            call = make()
            with counting.counted() as moved:
                call()
            expected = operations.bytes_of(op, arguments, bool(way))
            numbers = 2 * 48  # what is not images is smaller than they are
            assert 0 <= sum(moved.values()) - expected < numbers, f"{name}{way}"


@pytest.mark.parametrize(("batch", "lanes"), [(1, 1), (2, 3), (5, 7)])
def test_passes_over_an_image_count_once_in_the_bound(batch, lanes):
    """x and the lanes, by hand: the least that memory must hand over; all passes stand apart."""
    op, n = OPS["sample_stats"], 48
    arguments = operations.arguments_of(op, torch.bfloat16, (batch, (3, 4, 4)), "cpu")
    once = operations.once_of(op, arguments, False)
    assert once == 4 * n * batch + 2 * n * lanes < operations.bytes_of(op, arguments, False)
    used = set(arguments["lane_cond"].tolist()) | set(arguments["lane_uncond"].tolist())
    assert used - {-1} == set(range(lanes))
    for name in set(OPS) - {"sample_stats"}:
        args = operations.arguments_of(OPS[name], OPS[name].dtypes[0], (batch, (3, 4, 4)), "cpu")
        ways = (False, True) if OPS[name].differentiable else (False,)
        for way in ways:
            count = operations.bytes_of(OPS[name], args, way)
            assert operations.once_of(OPS[name], args, way) == count


def test_the_plain_chain_of_the_statistics_computes_them():
    """On guided slots, by the coefficients of the example's row: what is counted and timed."""
    args = operations.arguments_of(OPS["sample_stats"], torch.float32, (6, (3, 9, 11)), "cpu")
    draws = torch.Generator().manual_seed(0)
    args["out"] = torch.randn(12, 3, 9, 11, generator=draws)
    sizes = torch.linspace(0.1, 1.6, 6).reshape(-1, 1, 1, 1)  # bounds at 1, between, at 1.5
    args["x"], args["out"] = sizes * args["x"], sizes.repeat(2, 1, 1, 1) * args["out"]
    args["lane_uncond"] = torch.arange(6, 12, dtype=torch.int32)
    bounds, factors = OPS["sample_stats"].cases[0].plain(**args)
    OPS["sample_stats"].reference(**args)
    expected = args["dynamic_threshold"], args["rescale_factor"]
    torch.testing.assert_close((bounds, factors), expected)
    assert (bounds == 1).any() and (bounds == 1.5).any() and ((bounds > 1) & (bounds < 1.5)).any()


def test_bytes_and_elements():
    """By hand, of 2 images of 48 elements in bfloat16."""
    size, n = (2, (3, 4, 4)), 2 * 48
    expected = {
        "philox": (4 * n, None, n),
        "add_noise": (4 * n, 4 * n, n),  # an image read, another written; the gradients likewise
        "diffusion_loss": (2 * n, 4 * n, n),  # out read; and its gradient written
        "hybrid_loss": (4 * n, 8 * n, n),  # two channels of each
        "denoise_step": (12 * n, None, n),
        "advance": (24 * 2, None, 2),
    }
    for name, (forward, backward, elements) in expected.items():
        op = OPS[name]
        arguments = operations.arguments_of(op, torch.bfloat16, size, "cpu")
        assert operations.bytes_of(op, arguments, False) == forward, name
        if backward is not None:
            assert operations.bytes_of(op, arguments, True) == backward, name
        assert compiled_ops.elements_of(arguments) == elements, name
    noise = OPS["philox"]
    arguments = operations.arguments_of(noise, torch.float32, size, "cpu")
    assert operations.memory_of(noise, arguments) == 2 * 16 + 4 * n


def test_figures():
    """40 bytes an element would take 40 ps, its instructions 4 ps: memory is the bound."""
    work = KernelWork("op", torch.float32, 10**6, 40_000_000, 40_000_000)
    light = dataclasses.replace(work, once=10**6)
    assert operations.bound_seconds(CARD, work, 1e9) == pytest.approx(40e-6)
    assert operations.bound_seconds(CARD, light, 1e9) == pytest.approx(4e-6)
    assert operations.bound_seconds(CARD, light, 2e9) == pytest.approx(2e-6)
    other = dataclasses.replace(light, dtype=torch.bfloat16)  # whose instructions are not counted
    assert operations.bound_seconds(CARD, other, 1e9) == pytest.approx(1e-6)

    found = operations.figures(CARD, LARGE[0], work, 50e-6, 1e9, 3000)
    assert found == pytest.approx(
        {"us": 50, "gb_per_s": 800, "of_copy": 0.8, "of_bound": 0.8, "working_set_mb": 0.003}
        | {"sm_clock_mhz": 1000, "goal_met": 0}
    )
    assert operations.figures(CARD, LARGE[0], work, 44e-6, 1e9, 0)["goal_met"] == 1
    middle = operations.figures(CARD, (256, (3, 32, 32)), work, 44e-6, 1e9, 0)
    assert "goal_met" not in middle and "of_empty" not in middle


def test_figures_of_several_passes():
    """As fast as memory hands the images over is all of the bound, however often they are read."""
    work = KernelWork("op", torch.float32, 10**6, 40_000_000, 280_000_000)
    found = operations.figures(CARD, LARGE[0], work, 40e-6, 1e9, 0)
    assert (found["of_bound"], found["of_copy"]) == pytest.approx((1, 1))
    assert found["gb_per_s"] == pytest.approx(1000)
    assert (found["once_mb"], found["all_passes_mb"]) == pytest.approx((40, 280))
    note = operations.note_of(CARD, work, True, 3, 1e9)
    assert "bytes that several passes read count once" in note


def test_figures_of_the_smallest_size():
    for hot, met in ((2.9e-6, 1), (3.1e-6, 0)):
        work = KernelWork("op", torch.float32, 1, 1000, 1000)
        found = operations.figures(CARD, SMALLEST, work, 4e-6, 1e9, 0, hot)
        assert found["of_empty"] == pytest.approx(2) and found["hot_us"] == pytest.approx(hot * 1e6)
        assert found["hot_of_empty"] == pytest.approx(hot / 2e-6) and found["goal_met"] == met


@pytest.mark.parametrize(
    "name", ["philox", "diffusion_loss", "hybrid_loss", "sample_stats", "denoise_step"]
)
def test_choice_of_the_compiled_peer(name):
    op = OPS[name]
    arguments = operations.arguments_of(op, torch.float32, SIZE, "cpu")
    said, peer = compiled_ops.compiled_peer(op, arguments, backend="aot_eager")
    reads_numbers = name in ("sample_stats", "denoise_step")  # their references, on the host
    if reads_numbers or said != "compiled reference":
        assert said.startswith("compiled plain chain; the reference does not compile whole: ")
        result = peer(**arguments)
        for value in result if isinstance(result, tuple) else (result,):
            assert value.shape[0] == SIZE[0]
    else:
        fast = operations.with_gradients(op, op.fast, arguments)
        torch.testing.assert_close(fast, operations.with_gradients(op, peer, arguments))


@each_op
def test_calls_have_arguments_of_their_own(op):
    arguments = operations.arguments_of(op, torch.float32, SIZE, "cpu")
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    for make in compiled_ops.directions(op, arguments, op.fast).values():
        once = make()
        first = once()
        if not op.mutates:
            torch.testing.assert_close(first, once(), rtol=0, atol=0)
    for name, value in before.items():
        assert torch.equal(arguments[name], value) and not arguments[name].requires_grad
    assert len(compiled_ops.directions(op, arguments, op.fast)) == 1 + bool(op.differentiable)


class Timer(types.SimpleNamespace):
    """``kernel_time`` without a GPU: calls are run once, and take what is told."""

    def __init__(self, clock=None):
        self.made, self.clock = [], clock

    def sets_beyond(self, cache, size):
        return math.ceil(2 * cache / size)

    def calls_for(self, size):
        return 8

    def capture(self, make, sets, least):
        self.made.append((make()(), sets))
        return 1e-6 * len(self.made)

    def seconds_a_call(self, replay):
        return replay

    def median_seconds(self, make):
        return 2.5e-6

    def sm_clock(self, replay):
        return self.clock


def measured(monkeypatch, name, said, peer, clock=None, card=CARD):
    monkeypatch.setattr(operations, "compiled_peer", lambda op, arguments: (said, peer))
    timer = Timer(clock)
    arguments = (OPS[name], torch.float32, SMALLEST, card, timer, "cpu")
    return list(operations.measure(*arguments)), timer


def test_a_measurement(monkeypatch):
    """Forward and gradient apart, against both peers, in lines that a table can hold."""
    slow = OPS["diffusion_loss"].reference
    results, timer = measured(monkeypatch, "diffusion_loss", "compiled reference", slow)
    assert len(results) == 6 and len(timer.made) == 4
    for way, i in (("", 0), ("-backward", 3)):
        kernel, peer, eager = results[i : i + 3]
        case = f"diffusion_loss{way}-1x3x32x32-float32"
        assert {kernel.case, peer.case, eager.case} == {case}
        assert kernel.values["us"] == pytest.approx(3 if way else 1)
        assert kernel.values["gb_per_s"] == pytest.approx(8.192 if way else 12.288)
        assert kernel.values["hot_of_empty"] == pytest.approx(1.25)
        assert kernel.values["goal_met"] == 1
        assert "L2 flushed" in kernel.note and "without its instructions" in kernel.note
        assert peer.values["ratio"] == pytest.approx((4 / 3) if way else 2)
        assert (peer.peer, eager.peer) == ("compiled reference", "eager reference")
        assert eager.values["ours_seconds"] > 0
        assert kernel.line().startswith(f"{case}: us ") and "goal_met 1" in kernel.line()
        assert f"{case} against compiled" in peer.line()
    forward, backward = (timer.made[i][0] for i in (0, 2))
    assert forward.shape == (1,) and backward[0].shape == (1, 3, 32, 32)


def test_a_measurement_without_a_compiled_peer(monkeypatch):
    results, timer = measured(monkeypatch, "philox", "none; it reads numbers", None)
    assert len(results) == 3 and len(timer.made) == 1
    assert results[1].line() == "philox-1x3x32x32-float32-peer: none; it reads numbers"


@pytest.mark.parametrize("clock", [1.98e9, 1.2e9, None])
def test_instructions_are_timed_by_the_clock_of_the_run(monkeypatch, clock):
    """The one that NVML reads; the scorecard's where it reads none, and the result says so."""
    card = dataclasses.replace(CARD, instructions={("philox", torch.float32): 1.0})
    kernel = measured(monkeypatch, "philox", "none", None, clock, card)[0][0]
    used = clock or scorecard.CLOCK
    assert kernel.values["sm_clock_mhz"] == pytest.approx(used / 1e6)
    assert kernel.values["of_bound"] == pytest.approx(3 * 32 * 32 / used / 1e-6)
    assert ("read by NVML while they ran" in kernel.note) == (clock is not None)
    assert ("assumed, for NVML gives none" in kernel.note) == (clock is None)


def test_clocks_are_those_of_the_whole_card(monkeypatch):
    """The slowest pipe's over the number of multiprocessors; none of an unknown architecture."""

    def measure(variants):
        assert {arch for _, _, arch in variants} == {90}
        for kernel, dtype, _ in variants:
            clocks = {} if kernel.name == "sample_stats" else {"issue": 0.5, "integer": 0.25}
            yield types.SimpleNamespace(kernel=kernel.name, dtype=dtype, clocks=clocks)

    monkeypatch.setattr(scorecard, "measure", measure)
    clocks = operations.instruction_clocks(90, 100)
    assert clocks["philox", torch.float32] == clocks["add_noise", torch.float16] == 0.005
    assert ("sample_stats", torch.float32) not in clocks
    assert operations.instruction_clocks(80, 108) == {}


def test_the_suites():
    (noise,) = operations.operations("cpu")
    assert (noise.name, noise.suite) == ("noise", "kernels")
    cases = operations.operations("cuda")
    names = [case.name for case in cases]
    assert names[0] == "card" and len(set(names)) == len(names)
    for op in OPS.values():
        assert f"kernel-{op.name}-1x3x32x32-{str(op.dtypes[0])[6:]}" in names


def test_a_case_measures_what_it_is_named_after(monkeypatch):
    asked = []
    monkeypatch.setattr(operations, "this_card", lambda: CARD)
    monkeypatch.setattr(operations, "measure", lambda *a: asked.append(a[:4]) or [])
    case = {case.name: case for case in operations.operations("cuda")}
    list(case["kernel-denoise_step-256x3x32x32-bfloat16"].measure("cuda"))
    assert asked == [(OPS["denoise_step"], torch.bfloat16, (256, (3, 32, 32)), CARD)]


def test_another_clock():
    comparison = harness.compare(2.0, 3.0, rounds=1, clock=float)
    assert (comparison.ours_seconds, comparison.peer_seconds, comparison.ratio) == (2.0, 3.0, 1.5)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Unsupported: it\n  Explanation: long", "Unsupported: it"),
        (
            "An exception occurred in a subprocess:\n\nTraceback\nValueError: why\n",
            "ValueError: why",
        ),
        ("", "RuntimeError"),
    ],
)
def test_what_a_compiler_complains_of_is_one_line(message, said):
    assert compiled_ops._said(RuntimeError(message)) == said
