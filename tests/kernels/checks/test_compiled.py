"""The compiled kernels, for three GPU generations, on any machine (kernels/compiled.py).

Compiling needs a process without the interpreter: this file runs itself as a child, once.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from flashddpm.kernels import OPS, compiled
from flashddpm.kernels.launch import OPTIONS

pytestmark = pytest.mark.timeout(900)

MODULES = [importlib.import_module(f"flashddpm.kernels.{name}") for name in OPS]
CASES = [
    f"{name} {dtype} {arch}"
    for name, kernel in compiled.KERNELS.items()
    for dtype in ("fp32", "bf16", "fp16")
    for arch in compiled.ARCHITECTURES
    if (dtype == "fp32" or "image" in kernel.signature.values()) and (dtype != "fp16" or arch == 90)
]
ODD_SIZES = {  # what the launcher makes of images and slots of other sizes
    "one element": {"n": 1, "blocks": 1, "S": 1, "x_stride": 1, "hist_stride": 1},
    "not by 16": {"n": "i32", "x_stride": "i32", "hist_stride": "i32"},
    "past 2^31": {"n": "i64:16", "x_stride": "i64:16", "hist_stride": "i64:16"},
}
ODD_CASES = [
    f"{name} fp32 90 {size}"
    for name, kernel in compiled.KERNELS.items()
    for size, types in ODD_SIZES.items()
    if not types.keys().isdisjoint(kernel.signature)
]


@triton.jit
def _sound_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, BLOCK)
    a = tl.load(x + offsets)
    tl.store(out + offsets, a * SCALE + a)


@triton.jit
def _log_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.log(tl.load(x + offsets)))


@triton.jit
def _divide_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, BLOCK)
    a = tl.load(x + offsets)
    tl.store(out + offsets, SCALE / a)


@triton.jit
def _double_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, BLOCK)
    a = tl.load(x + offsets).to(tl.float64)
    tl.store(out + offsets, (a * SCALE + a * a).to(tl.float32))


@triton.jit
def _narrow_product_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * n + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets))


@triton.jit
def _widened_product_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = (tl.program_id(0) * n).to(tl.int64)
    offsets = start + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets))


@triton.jit
def _conditional_offset_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    if tl.load(x) > 0:
        start = (tl.program_id(0) * n).to(tl.int64)
    offsets = start + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets))


@triton.jit
def _holding_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, 16 * BLOCK)
    a = tl.load(x + offsets)
    tl.store(out + offsets, a + tl.sum(a))


@triton.jit
def _spilling_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, 64 * BLOCK)
    a = tl.load(x + offsets)
    tl.store(out + offsets, tl.cumsum(a, axis=0) * a + tl.sum(a * a))


POINTERS = {"out": "*fp32:16", "x": "*fp32:16", "n": "i32:16"}
FUSED = {**OPTIONS, "enable_fp_fusion": True}
# fault: (kernel, changed types, options, what the gate must say; nothing if all is well)
PLANTED = {
    "none": (_sound_kernel, {}, OPTIONS, None),
    "fused": (_sound_kernel, {}, FUSED, "fma.rn.f32"),
    "tl.log": (_log_kernel, {}, OPTIONS, "fma.rn.ftz.f32"),
    "division": (_divide_kernel, {}, OPTIONS, "div.full.f32"),
    "float64": (_double_kernel, {}, OPTIONS, "f64"),
    "32-bit product": (_narrow_product_kernel, {}, OPTIONS, "arith.muli of i32"),
    "widened product": (_widened_product_kernel, {}, OPTIONS, "arith.muli of i32"),
    "conditional": (_conditional_offset_kernel, {}, OPTIONS, "scf.if in the offset"),
    "unaligned pointer": (
        _sound_kernel,
        {"x": "*fp32"},
        OPTIONS,
        "accesses by bytes {4: 8, 16: 2}",
    ),
    "unaligned size": (_sound_kernel, {"n": "i32"}, OPTIONS, "accesses by bytes {4: 16}"),
    "registers": (_holding_kernel, {}, OPTIONS, "registers"),
    "stack": (_spilling_kernel, {}, OPTIONS, "stack of"),
}


def launches() -> dict[str, list]:
    """Return, by kernel, types and constants with which the launchers call it, and options."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    found = {}

    def run(self, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        found[self.__name__] = [dict(zip(bound, specialization, strict=True)), options]

    JITFunction.run = run
    for module in MODULES:
        module.runs_triton = lambda tensor: True
    for op in OPS.values():
        args = op.example("cpu", op.dtypes[-1], (3, 32, 48), 3, 0)
        for name in op.differentiable:
            args[name].requires_grad_()
        result = op.fast(**args)
        if op.differentiable:
            result.sum().backward()
    return found


def child() -> dict:
    """Return faults by case, and what the launchers ask for."""
    report = {}
    for case in CASES + ODD_CASES:
        name, dtype, arch, *size = case.split(maxsplit=3)
        kernel = compiled.KERNELS[name]
        images = kernel.images if size in ([], ["past 2^31"]) else ()
        if size:
            change = ODD_SIZES[size[0]]
            types = {
                k: v for k, v in change.items() if isinstance(v, str) and k in kernel.signature
            }
            ones = {k: v for k, v in change.items() if v == 1 and k in kernel.signature}
            signature = {k: v for k, v in (kernel.signature | types).items() if k not in ones}
            kernel = compiled.Kernel(name, kernel.fn, signature, kernel.constants | ones, images)
        report[case] = compiled.faults(compiled.compile_for(kernel, dtype, int(arch)), images)
    for fault, (fn, change, options, _) in PLANTED.items():
        code = compiled.compile_kernel(
            fn, POINTERS | change, {"SCALE": 3, "BLOCK": 1024}, 90, options
        )
        report[fault] = compiled.faults(code, ("out", "x"))
    return report | {"launches": launches()}


@pytest.fixture(scope="module")
def report():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", __file__], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_compiled_kernel(report, case):
    """Exact float32 operations, 64-bit offsets, 16-byte accesses, no spills, few registers."""
    assert report[case] == []


@pytest.mark.parametrize("case", ODD_CASES)
def test_compiled_kernel_of_other_sizes(report, case):
    """Sizes that the launcher compiles for apart: the same, but accesses one element wide where
    an image is not a multiple of 16 elements."""
    assert report[case] == []


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(report, fault):
    expected = PLANTED[fault][3]
    assert any(expected in found for found in report[fault]) if expected else not report[fault]


def test_launchers_ask_for_what_is_tested(report):
    """Types, alignment, constants and options of real launches, against the table of kernels."""
    table = {kernel.fn.__name__: kernel for kernel in compiled.KERNELS.values()}
    assert report["launches"].keys() == table.keys()
    for name, (arguments, options) in report["launches"].items():
        kernel = table[name]
        assert options == OPTIONS
        for argument, (type, detail) in arguments.items():
            wanted = kernel.signature.get(argument, "constexpr").replace("image", "*bf16:16")
            if type == "constexpr":
                assert wanted == "constexpr" or detail == 1, argument
            else:
                given = type + (":16" if detail == "D" else "")
                assert given in (wanted, f"{wanted}:16"), argument
        assert arguments["BLOCK"][1] == kernel.constants["BLOCK"] or not kernel.images


def test_every_kernel_is_in_the_table():
    kernels = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }
    assert kernels == {kernel.fn.__name__ for kernel in compiled.KERNELS.values()}


@pytest.mark.skipif(not compiled.INTERPRETED, reason="compiles where the interpreter is off")
def test_the_interpreter_compiles_nothing():
    kernel = compiled.KERNELS["philox"]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled.compile_for(kernel, "fp32", 90)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert Path(__file__).exists() and not compiled.INTERPRETED
    print(json.dumps(child()))
