"""The example: the right kernel passes, and each planted bug is found by the check it is for."""

import importlib.util
from pathlib import Path

import pytest
import torch

from flashddpm.kernels.launch import INTERPRETED
from flashddpm.testing import CHECKS, KernelCode, check_op, code_faults

FILE = Path(__file__).parents[2] / "docs" / "examples" / "foreign_kernel.py"
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("foreign_kernel", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_right_one_passes_every_check(example):
    found = check_op(
        example.OPERATIONS["right"],
        example.reference,
        example.arguments,
        differentiable=("x", "out"),
        examples=5,
        kernels=[example.CODE],
    )
    assert found == dict.fromkeys(CHECKS, "ran")


@pytest.mark.parametrize(
    ("bug", "checks"),
    [
        ("no mask", {"red_zones"}),
        # What one call of the three leaves in memory is what the next may be given.
        ("adds to its output", {"former_content", "opcheck", "compiled"}),
        ("forgets the skip", {"gradients"}),
    ],
)
def test_each_bug_is_found(example, bug, checks):
    found = example.failures(example.OPERATIONS[bug], examples=5, dtypes=[torch.bfloat16])
    assert found.keys() == checks
    assert {
        "no mask": "allocation 0: a red zone was written",
        "adds to its output": "result: NaN",
        "forgets the skip": "gradient of x",
    }[bug] in found[min(checks - {"compiled", "opcheck"})]


@pytest.mark.skipif(not INTERPRETED, reason="the child process is for the interpreter")
def test_code_of_a_kernel_is_checked_in_a_child(example):
    """Fused products and sums, and pointers that are not aligned, are seen."""
    code = example.CODE
    fused = KernelCode(code.fn, code.signature, code.constants, (), {"enable_fp_fusion": True})
    found = code_faults(fused, [90])
    assert all(fault.startswith("for 90: ") for fault in found)
    assert any("fma.rn.f32" in fault for fault in found)
    unaligned = KernelCode(
        code.fn, dict(code.signature) | {"x": "*fp32"}, code.constants, code.images, code.options
    )
    assert any("x" in fault for fault in code_faults(unaligned, [80]))


@pytest.mark.skipif(not INTERPRETED, reason="the child process is for the interpreter")
def test_a_kernel_that_the_child_cannot_find_is_refused(example):
    class Kernel:
        @staticmethod
        def fn():
            pass

    with pytest.raises(ValueError, match="^fn="):
        code_faults(KernelCode(Kernel, {}, {}))
    named = KernelCode(example.CODE.fn, {}, {"BLOCK": 16})
    with pytest.raises(RuntimeError, match="compiling _precondition_kernel failed"):
        code_faults(named, [90])
