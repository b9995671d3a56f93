"""What the benchmark of kernels computes and chooses, with times made up."""

import dataclasses
import math
import types

import pytest
import torch

from flashddpm.benchmarks import harness, operations, peers
from flashddpm.benchmarks.operations import LARGE, SMALLEST, Card
from flashddpm.kernels import OPS, Column

SIZE = (3, (3, 4, 4))
CARD = Card(copy=1e12, empty=2e-6, cache=1000, instructions={("op", torch.float32): 4e-12})
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
    assert op.name in operations.ROWS or not {"t", "idx"} & set(few) or op.name == "advance"
    if op.name in ("add_noise", "diffusion_loss", "hybrid_loss"):
        assert (few["rows"][few["t"], 1] != 0).all()
    if op.name == "denoise_step":
        assert (few["rows"][few["idx"], Column.SIGMA] != 0).all()
    if op.name == "sample_stats":
        asked = few["rows"][few["idx"]][:, [Column.THRESHOLD, Column.RESCALE]]
        assert (asked != 0).all() and (few["next"][few["idx"]] != few["idx"]).all()


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
        assert peers.elements_of(arguments) == elements, name
    noise = OPS["philox"]
    arguments = operations.arguments_of(noise, torch.float32, size, "cpu")
    assert operations.memory_of(noise, arguments) == 2 * 16 + 4 * n


def test_figures():
    """40 bytes an element would take 40 ps, its instructions 4 ps: memory is the bound."""
    bound = operations.bound_seconds(CARD, 40_000_000, 10**6, "op", torch.float32)
    assert bound == pytest.approx(40e-6)
    assert operations.bound_seconds(CARD, 10**6, 10**6, "op", torch.float32) == pytest.approx(4e-6)
    assert operations.bound_seconds(CARD, 10**6, 10**6, "op", torch.bfloat16) == pytest.approx(1e-6)

    found = operations.figures(CARD, LARGE[0], 50e-6, 40_000_000, bound, 3000)
    assert found == pytest.approx(
        {"us": 50, "gb_per_s": 800, "of_copy": 0.8, "of_bound": 0.8, "working_set_mb": 0.003}
        | {"goal_met": 0}
    )
    assert operations.figures(CARD, LARGE[0], 44e-6, 40_000_000, bound, 0)["goal_met"] == 1
    middle = operations.figures(CARD, (256, (3, 32, 32)), 44e-6, 40_000_000, bound, 0)
    assert "goal_met" not in middle and "of_empty" not in middle


def test_figures_of_the_smallest_size():
    for hot, met in ((2.9e-6, 1), (3.1e-6, 0)):
        found = operations.figures(CARD, SMALLEST, 4e-6, 1000, 1e-9, 0, hot)
        assert found["of_empty"] == pytest.approx(2) and found["hot_us"] == pytest.approx(hot * 1e6)
        assert found["hot_of_empty"] == pytest.approx(hot / 2e-6) and found["goal_met"] == met


@pytest.mark.parametrize(
    "name", ["philox", "diffusion_loss", "hybrid_loss", "sample_stats", "denoise_step"]
)
def test_choice_of_the_compiled_peer(name):
    op = OPS[name]
    arguments = operations.arguments_of(op, torch.float32, SIZE, "cpu")
    said, peer = peers.compiled_peer(op, arguments, backend="aot_eager")
    if name in ("sample_stats", "denoise_step"):  # their references read numbers on the host
        assert said.startswith("compiled plain chain; the reference does not compile whole: ")
        assert peer(**arguments).shape[0] == SIZE[0]
    elif peer is None:
        assert said.startswith("none; the reference does not compile whole: ")
    else:
        assert said == "compiled reference"
        fast = operations.with_gradients(op, op.fast, arguments)
        torch.testing.assert_close(fast, operations.with_gradients(op, peer, arguments))


@each_op
def test_calls_have_arguments_of_their_own(op):
    arguments = operations.arguments_of(op, torch.float32, SIZE, "cpu")
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    for make in peers.directions(op, arguments, op.fast).values():
        once = make()
        first = once()
        if not op.mutates:
            torch.testing.assert_close(first, once(), rtol=0, atol=0)
    for name, value in before.items():
        assert torch.equal(arguments[name], value) and not arguments[name].requires_grad
    assert len(peers.directions(op, arguments, op.fast)) == 1 + bool(op.differentiable)


class Timer(types.SimpleNamespace):
    """``kernel_time`` without a GPU: calls are run once, and take what is told."""

    def __init__(self):
        self.made = []

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


def measured(monkeypatch, name, said, peer):
    monkeypatch.setattr(operations, "compiled_peer", lambda op, arguments: (said, peer))
    timer = Timer()
    arguments = (OPS[name], torch.float32, SMALLEST, CARD, timer, "cpu")
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


def test_the_suites_on_the_cpu():
    assert list(operations.operations_on_a_gpu("cpu")) == []
    assert list(operations.noise_on_the_cpu("cuda")) == []


def test_another_clock():
    comparison = harness.compare(2.0, 3.0, rounds=1, clock=float)
    assert (comparison.ours_seconds, comparison.peer_seconds, comparison.ratio) == (2.0, 3.0, 1.5)
