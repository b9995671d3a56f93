"""What holds of every operation."""

import importlib
import inspect
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashddpm import kernels
from flashddpm.kernels import OPS, reference
from flashddpm.kernels.launch import INTERPRETED

SHAPE, BATCH = (3, 8, 10), 4
CASES = [
    pytest.param(op, dtype, id=f"{op.name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS.values()
    for dtype in op.dtypes
]
each_op = pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
each_case = pytest.mark.parametrize(("op", "dtype"), CASES)


def call(function, op, args, backward=True):
    """Return every tensor that the call makes or changes, gradients included, by name."""
    for name in op.differentiable if backward else ():
        args[name] = args[name].detach().requires_grad_()
    result = function(**args)
    results = {name: args[name] for name in op.mutates}
    if result is None:
        assert op.mutates
        return results
    results["result"] = result.detach()
    if op.differentiable and backward:
        result.backward(torch.ones_like(result))
        results |= {f"gradient of {name}": args[name].grad for name in op.differentiable}
    return results


@pytest.fixture
def example(device):
    return lambda op, dtype, shape=SHAPE, batch=BATCH, place=device: op.example(
        place, dtype, shape, batch, 1
    )


class Recorder(TorchDispatchMode):
    """Notes every call of an operator of this project."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flashddpm":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


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


@each_case
def test_equals_reference(op, dtype, example, rules):
    fast = call(op.fast, op, example(op, dtype))
    slow = call(op.reference, op, example(op, dtype, place="cpu"))
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        if op.name == "diffusion_loss":  # sums in another order: test_diffusion_loss.py
            torch.testing.assert_close(fast[name].cpu(), value)
        else:
            rules.same(fast[name], value, truncates=True)


@each_case
def test_on_the_cpu_the_operators_run_the_reference(op, dtype, example, rules, monkeypatch):
    """What CPU tensors get where the interpreter is off, gradients included."""
    module = importlib.import_module(f"flashddpm.kernels.{op.name}")
    monkeypatch.setattr(module, "runs_triton", lambda tensor: False)
    purpose = {"purpose": 5} if "purpose" in inspect.signature(op.fast).parameters else {}
    fast = call(op.fast, op, example(op, dtype, place="cpu") | purpose)
    slow = call(op.reference, op, example(op, dtype, place="cpu") | purpose)
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        rules.same(fast[name], value)


@each_case
def test_unchanged_arguments_stay_unchanged(op, dtype, example, rules):
    args, before = example(op, dtype), example(op, dtype)
    call(op.fast, op, args)
    for name in set(before) - set(op.mutates):
        if isinstance(before[name], torch.Tensor):
            rules.same(args[name], before[name])


@each_op
def test_opcheck(op, example):
    """Schema, fakes, autograd registration and tracing of each operator that a call uses."""
    with Recorder() as recorder:
        call(op.fast, op, example(op, op.dtypes[-1]))
    names = {func.name().removeprefix("flashddpm::") for func, _, _ in recorder.calls}
    assert names == {op.name} | ({"diffusion_loss_backward"} & {f"{op.name}_backward"})
    for func, args, kwargs in recorder.calls:
        if func.name().endswith("_backward"):  # has no gradient of its own
            args = [arg.detach() for arg in args]
        torch.library.opcheck(func, args, kwargs)


@each_case
def test_compiled_equals_eager(op, dtype, example, rules):
    torch._dynamo.reset()
    compiled = torch.compile(op.fast, fullgraph=True, backend="aot_eager")
    got = call(compiled, op, example(op, dtype))
    for name, value in call(op.fast, op, example(op, dtype)).items():
        rules.same(got[name], value)


@each_case
def test_two_runs_give_equal_bits(op, dtype, example, rules):
    first, second = (call(op.fast, op, example(op, dtype)) for _ in range(2))
    for name, value in first.items():
        rules.same(second[name], value)


@each_op
@pytest.mark.parametrize("which", ["fast", "reference"])
def test_global_generators_stay_untouched(op, which, example, device):
    args = example(op, op.dtypes[0], place=device if which == "fast" else "cpu")
    devices = [torch.cuda] if device == "cuda" else []

    def states():
        return [
            torch.get_rng_state().tolist(),
            *(module.get_rng_state().tolist() for module in devices),
            random.getstate(),
            [str(part) for part in np.random.get_state()],
            np.random.get_state()[1].tolist(),
        ]

    before = states()
    call(op.fast if which == "fast" else op.reference, op, args)
    assert states() == before


@each_op
@pytest.mark.parametrize("which", ["fast", "reference"])
def test_zero_element_batch(op, which, example):
    function = op.fast if which == "fast" else op.reference
    for value in call(function, op, example(op, op.dtypes[0], batch=0)).values():
        assert value.numel() == 0


@each_case
def test_noncontiguous_arguments(op, dtype, example, rules):
    """Images in any layout give the same; what cannot be taken is refused by its name."""
    expected = call(op.fast, op, example(op, dtype))
    for name, value in example(op, dtype).items():
        if not isinstance(value, torch.Tensor):
            continue
        args = example(op, dtype)
        args[name] = value.repeat_interleave(2, -1)[..., ::2]
        assert not args[name].is_contiguous()
        if value.ndim == 4 and name not in op.mutates:
            got = call(op.fast, op, args)
            for result, bits in expected.items():
                rules.same(got[result], bits)
        else:
            with pytest.raises(ValueError, match=f"^{name}"):
                op.fast(**args)


@each_case
def test_examples_are_reproducible(op, dtype, example, rules):
    args, again = example(op, dtype), example(op, dtype, place="cpu")
    assert list(args) == list(inspect.signature(op.fast).parameters)[: len(args)]
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            rules.same(value, again[name])
            if value.ndim == 4 and name in ("x0", "out", "net_in"):
                assert value.dtype is dtype and value.shape[1:] == SHAPE


@each_case
@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts")
def test_bytes_moved(op, dtype, example, counted):
    """The formula against the masked loads and stores that the kernel really makes."""
    args = example(op, dtype, shape=(1, 5, 7))
    expected = op.bytes_moved(args)
    call(op.fast, op, args, backward=False)
    assert counted["loaded"] + counted["stored"] == expected > 0


def test_bytes_moved_by_a_step_with_given_noise(example, counted):
    op = OPS["denoise_step"]
    args = example(op, torch.float16)
    drawn = op.bytes_moved(args)
    args["noise"] = torch.zeros_like(args["x"])
    with_sigma = (args["rows"][args["idx"], 6] != 0).sum().item()
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
