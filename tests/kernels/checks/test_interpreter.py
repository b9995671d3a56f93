"""The quick interpreter computes what Triton's own does, and leaves Triton as it was."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as tritons

from flashddpm.kernels import OPS
from flashddpm.kernels.checks import interpreter
from flashddpm.kernels.launch import INTERPRETED
from flashddpm.testing import rules

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter is off")


@pytest.fixture
def tritons_own(monkeypatch):
    """Undo what the session replaces; whatever the version of Triton, replace it then."""
    monkeypatch.setattr(triton, "__version__", f"{interpreter.TRIED[-1]}.0")
    options = tritons.InterpreterOptions()
    monkeypatch.setattr(tritons.InterpretedFunction, "__call__", interpreter._original_call)
    monkeypatch.setattr(tritons, "_get_np_dtype", interpreter._original_dtype)
    monkeypatch.setattr(tritons.interpreter_builder, "options", options)


def results(op) -> list[torch.Tensor]:
    """Return what the operation returns or changes, and the gradients."""
    args = op.example("cpu", op.dtypes[-1], (3, 2, 3), 2, 0)
    leaves = [args[name].requires_grad_() for name in op.differentiable]
    result = op.fast(**args)
    if leaves:
        result.sum().backward()
    found = [args[name] for name in op.mutates] + [leaf.grad for leaf in leaves]
    return found if result is None else [result.detach(), *found]


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
def test_results_are_those_of_tritons_own(op, tritons_own):
    expected = results(op)
    with interpreter.quick():
        found = results(op)
    for a, b in zip(found, expected, strict=True):
        rules.same(a, b)


def test_what_is_replaced_is_put_back(tritons_own):
    def replaced():
        builder = tritons.interpreter_builder
        return (tritons.InterpretedFunction.__call__, tritons._get_np_dtype, builder.options)

    before = replaced()
    with pytest.raises(KeyError), interpreter.quick():
        with interpreter.quick():
            assert all(a is not b for a, b in zip(replaced(), before, strict=True))
        assert all(a is not b for a, b in zip(replaced(), before, strict=True))
        raise KeyError
    assert all(a is b for a, b in zip(replaced(), before, strict=True))


def test_a_version_that_was_not_tried_is_left_alone(tritons_own, monkeypatch):
    before = tritons.InterpretedFunction.__call__, tritons._get_np_dtype
    monkeypatch.setattr(triton, "__version__", "9.9.0")
    with interpreter.quick():
        assert before == (tritons.InterpretedFunction.__call__, tritons._get_np_dtype)


@triton.jit
def _fail(x):
    return tl.load(x).no_such_name


@triton.jit
def _failing_kernel(x):
    _fail(x)


def test_an_error_in_a_device_function_is_reported_as_tritons_own(tritons_own):
    x, found = torch.zeros(1), []
    for _ in range(2):  # the second time, all that the function sees is replaced already
        with pytest.raises(triton.runtime.errors.InterpreterError, match="no_such_name") as error:
            _failing_kernel[(1,)](x)
        found.append(str(error.value))
        with interpreter.quick():
            with pytest.raises(triton.runtime.errors.InterpreterError) as error:
                _failing_kernel[(1,)](x)
        found.append(str(error.value))
    assert len(set(found)) == 1
