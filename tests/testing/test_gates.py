"""KernelCode and code_faults: what may be asked of a kernel's machine code, and what may not."""

import pytest
import triton
import triton.language as tl

from flashddpm.kernels.checks.compiled import KERNELS
from flashddpm.testing import KernelCode, code_faults


@triton.jit
def _exp_kernel(out, x, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.exp(tl.load(x + offsets)))


@triton.jit
def _spilling_kernel(out, x, n, BLOCK: tl.constexpr):
    """Holds more numbers at a time than a thread has registers."""
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, 8 * BLOCK)
    a = tl.exp(tl.load(x + offsets))
    tl.store(out + offsets, tl.cumsum(a, axis=0) * a + tl.sum(a * a))


def code(fn, signature=None, **options) -> KernelCode:
    signature = {"out": "*fp32:16", "x": "*fp32:16", "n": "i32:16"} | (signature or {})
    return KernelCode(fn, signature, {"BLOCK": 1024}, images=("out", "x"), **options)


def test_an_inexact_kernel_passes_if_it_need_not_be_exact():
    faults = code_faults(code(_exp_kernel), [90])
    assert faults and all("x ex2" in fault or "x mul" in fault for fault in faults)
    assert code_faults(code(_exp_kernel, exact=False), [90]) == []


def test_a_spill_is_a_fault_of_an_inexact_kernel_too():
    options = {"num_warps": 1, "enable_fp_fusion": False}
    faults = code_faults(code(_spilling_kernel, exact=False, options=options), [90])
    assert any("stack of" in fault for fault in faults)
    assert not any("ex2" in fault for fault in faults)


def test_registers_are_judged_if_a_limit_is_given():
    needed = code_faults(code(_exp_kernel, exact=False, registers=1), [80])
    assert len(needed) == 1 and needed[0].endswith(" registers")
    count = int(needed[0].split()[-2])
    assert code_faults(code(_exp_kernel, exact=False, registers=count), [80]) == []


def test_of_foreign_pointers_no_width_is_judged():
    unaligned = {"x": "*fp32"}
    (fault,) = code_faults(code(_exp_kernel, unaligned, exact=False), [90])
    assert fault.startswith("for 90: x accessed by bytes {4: ")
    given = {"images": ("out",), "foreign": ("x",), "exact": False}
    kernel = KernelCode(
        _exp_kernel, code(_exp_kernel, unaligned).signature, {"BLOCK": 1024}, **given
    )
    assert code_faults(kernel, [90]) == []


@pytest.mark.parametrize("name", ["denoise_step", "denoise_step_learned"])
def test_our_own_kernels_can_be_said(name):
    """Everything that a row of the table of our kernels says."""
    row = KERNELS[name]
    kernel = KernelCode(
        row.fn,
        {name: type.replace("image", "*bf16:16") for name, type in row.signature.items()},
        row.constants,
        row.images,
        row.options,
        foreign=row.foreign,
        exact=row.exact,
    )
    assert code_faults(kernel, [90]) == []


@pytest.mark.parametrize("argument", ["images", "foreign"])
def test_a_name_that_is_no_argument_is_refused(argument):
    with pytest.raises(ValueError, match=f"^{argument}='y': must be among x, n"):
        KernelCode(_exp_kernel, {"x": "*fp32", "n": "i32"}, {}, **{argument: ("y",)})
