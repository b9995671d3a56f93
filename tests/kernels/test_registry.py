"""What holds of every operation."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from hypothesis import strategies as st

from flashddpm import kernels
from flashddpm.kernels import OPS, Column, reference
from flashddpm.kernels.launch import INTERPRETED
from flashddpm.testing import check_op, rules, strategies
from flashddpm.testing.battery import Recorder

SHAPE, BATCH = (3, 8, 10), 4
CASES = [
    pytest.param(op, dtype, id=f"{op.name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS.values()
    for dtype in op.dtypes
]
each_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
each_case = pytest.mark.parametrize(("op", "dtype"), CASES)


def scaled(actual, plain, r64):
    """Within 1e-6 (16 u) of its sample's largest gradient, and half a unit of the dtype.

    For gradients with exponentials in them, which cancel; the bound that is derived, element by
    element, is test_hybrid_loss.py's.
    """
    assert actual.shape == plain.shape and actual.dtype == plain.dtype
    largest = r64.abs().amax((1, 2, 3), keepdim=True) if r64.numel() else r64
    rules.close(actual, r64, largest.expand_as(r64), n=16)


RULES = {  # sums in another order; the others equal the reference bit for bit
    "diffusion_loss": {"result": rules.relative},
    "hybrid_loss": {"result": rules.relative, "gradient of out": scaled},
}


def exactly(actual, plain, r64):
    rules.same(actual, plain)


def battery(op, fast=None, dtypes=None, example=None, **options):
    """Run checks of flashddpm.testing on an operation; the first draw has every row of a table."""
    options.setdefault("rule", RULES.get(op.name, {}))
    check_op(
        fast or op.fast,
        op.reference,
        example or op.example,
        mutates=op.mutates,
        differentiable=op.differentiable,
        dtypes=dtypes or op.dtypes,
        shapes=st.one_of(st.just(SHAPE), strategies.shapes(block=64)),
        batches=st.sampled_from([BATCH, 1, 2]),
        **options,
    )


@pytest.fixture
def example(device):
    return lambda op, dtype, shape=SHAPE, batch=BATCH, place=device: op.example(
        place, dtype, shape, batch, 1
    )


def test_every_operation_is_registered():
    public = {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))}
    assert set(OPS) == public
    for name, op in OPS.items():
        assert (op.name, op.fast, op.reference) == (
            name,
            getattr(kernels, name),
            getattr(reference, name),
        )


@each_op
def test_signatures_agree(op):
    """Names, order and defaults; keyword-only arguments of the reference aside."""

    def positional(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(op.fast) == positional(op.reference)
    assert inspect.signature(op.fast).return_annotation == (
        inspect.signature(op.reference).return_annotation
    )


@each_op
def test_battery(op):
    """Every check of flashddpm.testing but two, and but that of the code: checks/."""
    battery(op, examples=3, skip=("opcheck", "compiled", "compiled_code"))


@each_op
def test_operators_and_tracing(op, example):
    """The two checks that cost most, in one dtype; and a call uses its own operators only."""
    battery(op, examples=1, dtypes=op.dtypes[-1:], checks=("opcheck", "compiled"))
    args = example(op, op.dtypes[-1])
    for name in op.differentiable:
        args[name].requires_grad_()
    with Recorder() as recorder:
        result = op.fast(**args)
        if op.differentiable:
            result.sum().backward()
    names = {operator.name().removeprefix("flashddpm::") for operator, _, _ in recorder.calls}
    assert names == {op.name} | ({f"{op.name}_backward"} & set(dir(torch.ops.flashddpm)))


@each_op
def test_reference_keeps_to_its_arguments(op):
    checks = ("arguments_unchanged", "random_state", "repeatable", "zero_batch", "batch_order")
    battery(op, fast=op.reference, device="cpu", examples=4, checks=checks)


@each_op
def test_on_the_cpu_the_operators_run_the_reference(op, monkeypatch):
    """What CPU tensors get where the interpreter is off, gradients included."""
    module = importlib.import_module(f"flashddpm.kernels.{op.name}")
    monkeypatch.setattr(module, "runs_triton", lambda tensor: False)
    purpose = {"purpose": 5} if "purpose" in inspect.signature(op.fast).parameters else {}
    gradients = [f"gradient of {name}" for name in op.differentiable]
    own = {name: rule for name, rule in RULES.get(op.name, {}).items() if name in gradients}
    battery(
        op,
        example=lambda *case: op.example(*case) | purpose,
        device="cpu",
        examples=6,
        rule=dict.fromkeys([*(op.mutates or ["result"]), *gradients], exactly) | own,
        checks=("equals_reference", "gradients"),
    )


@each_op
def test_images_in_any_layout_are_taken(op, example):
    """That they give the same is checked by the battery, which lets them be refused too."""
    for name in {"x0", "out"} & set(inspect.signature(op.fast).parameters):
        args = example(op, op.dtypes[0])
        op.fast(**(args | {name: strategies.strided(args[name])}))


@each_case
def test_examples_are_reproducible(op, dtype, example):
    args, again = example(op, dtype), example(op, dtype, place="cpu")
    assert list(args) == list(inspect.signature(op.fast).parameters)[: len(args)]
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            rules.same(value, again[name])
            if value.ndim == 4 and name in ("x0", "out", "net_in"):
                assert value.dtype is dtype and value.shape[2:] == SHAPE[1:]
                assert value.shape[1] in (SHAPE[0], 2 * SHAPE[0])  # with the variance's


@each_case
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts")
def test_bytes_moved(op, dtype, example, counted):
    """The formula against the masked loads and stores that the kernel really makes."""
    args = example(op, dtype, shape=(1, 5, 7))
    expected = op.bytes_moved(args)
    op.fast(**args)
    assert counted["loaded"] + counted["stored"] == expected > 0


def test_bytes_moved_by_a_step_with_given_noise(example, counted):
    op = OPS["denoise_step"]
    args = example(op, torch.float16)
    drawn = op.bytes_moved(args)
    args["noise"] = torch.zeros_like(args["x"])
    with_sigma = (args["rows"][args["idx"], Column.SIGMA] != 0).sum().item()
    assert op.bytes_moved(args) == drawn + with_sigma * 4 * args["x"][0].numel() > drawn
    if INTERPRETED:
        op.fast(**args)
        assert counted["loaded"] + counted["stored"] == op.bytes_moved(args)


def without_triton() -> str:
    code = (
        "import sys; sys.modules['triton'] = None; from flashddpm import kernels as k; "
        "assert not hasattr(k, 'OPS'); "
        "assert all(getattr(k, n) is getattr(k.reference, n) for n in sys.argv[1:]); print('ok')"
    )
    command = [sys.executable, "-P", "-c", code, *OPS]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_without_triton_the_reference_takes_over():
    assert without_triton() == "ok\n"
