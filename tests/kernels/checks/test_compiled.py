"""The gates of compiled code (compiled.py, gates.py): planted faults, odd sizes.

Compiling needs a process without the interpreter: this file runs itself as a child, once. Every
kernel in every dtype for every architecture: test_scorecard.py.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from flashddpm.kernels import OPS
from flashddpm.kernels.checks import compiled, gates, sass
from flashddpm.kernels.launch import OPTIONS

pytestmark = pytest.mark.timeout(900)

MODULES = [module for name, module in sys.modules.items() if name.startswith("flashddpm.kernels.")]
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

ALONE = [f"{name} fp32 90 not by 16" for name in ("philox", "hybrid_loss", "sample_stats")]


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
def _element_mask_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) % 3 != 0
    tl.store(out + offsets, tl.load(x + offsets, mask=mask, other=0))


@triton.jit
def _fma_kernel(out, x, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * n
    offsets = start + tl.arange(0, BLOCK)
    a = tl.load(x + offsets)
    tl.store(out + offsets, tl.fma(a, SCALE / 6, a * a))


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
    "unaligned pointer": (_sound_kernel, {"x": "*fp32"}, OPTIONS, "x accessed by bytes {4: "),
    "unaligned size": (_sound_kernel, {"n": "i32"}, OPTIONS, "out accessed by bytes {4: "),
    "per-element mask": (_element_mask_kernel, {}, OPTIONS, "x accessed by bytes {4: "),
    "half of a product": (_fma_kernel, {}, OPTIONS, None),
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
        if hasattr(module, "runs_triton"):
            module.runs_triton = lambda tensor: True
    for op in OPS.values():
        args = op.example("cpu", op.dtypes[-1], (3, 32, 48), 3, 0)
        for name in op.differentiable:
            args[name].requires_grad_()
        result = op.fast(**args)
        if op.differentiable:
            result.sum().backward()
    return found


def of_size(kernel: compiled.Kernel, change: dict) -> compiled.Kernel:
    """Return the kernel as the launcher compiles it for images and slots of another size."""
    types = {k: v for k, v in change.items() if isinstance(v, str) and k in kernel.signature}
    ones = {k: v for k, v in change.items() if v == 1 and k in kernel.signature}
    signature = {k: v for k, v in (kernel.signature | types).items() if k not in ones}
    return dataclasses.replace(kernel, signature=signature, constants=kernel.constants | ones)


def child() -> dict:
    """Return faults by case, machine code that is read in two ways, what the launchers ask for."""
    report, cubins = {}, []
    for case in ODD_CASES:
        name, dtype, arch, size = case.split(maxsplit=3)
        kernel = of_size(compiled.KERNELS[name], ODD_SIZES[size])
        images = kernel.images if size == "past 2^31" else ()
        code = compiled.compile_for(kernel, dtype, int(arch))
        report[case] = compiled.faults(code, images, kernel.exact, registers=None)
        cubins.append(code.cubin)
    for fault, (fn, change, options, _) in PLANTED.items():
        code = compiled.compile_kernel(
            fn, POINTERS | change, {"SCALE": 3, "BLOCK": 1024}, 90, options
        )
        report[fault] = compiled.faults(code, ("out", "x"))
    some = [ODD_CASES.index(case) for case in ALONE]
    together = sass.disassemble(cubins)
    report["together"] = [counts(together[i]) for i in some]
    report["alone"] = [counts(disassembled(cubins[i])) for i in some]
    return report | {"launches": launches()}


def disassembled(cubin: bytes) -> str:
    """Return what nvdisasm makes of the file as the compiler wrote it."""
    return sass._run(triton.knobs.nvidia.nvdisasm.path, ["-c", "-ndf"], cubin)


def counts(text: str) -> dict:
    """Return what is read of machine code."""
    code = sass.read(text)
    return {"opcodes": code.opcodes, "slow": code.slow, "loops": code.loops}


@pytest.fixture(scope="module")
def report():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", __file__], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", ODD_CASES)
def test_compiled_kernel_of_other_sizes(report, case):
    """Sizes that the launcher compiles for apart: the same, but accesses one element wide where
    an image is not a multiple of 16 elements."""
    assert report[case] == []


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(report, fault):
    expected = PLANTED[fault][3]
    assert any(expected in found for found in report[fault]) if expected else not report[fault]


def test_kernels_are_disassembled_together_as_alone(report):
    """With subroutines, and with loops."""
    assert report["together"] == report["alone"]
    assert [code["loops"] for code in report["alone"]] == [False, False, True]
    assert all(code["slow"] and code["opcodes"] for code in report["alone"])


def variant(name: str, arguments: dict) -> compiled.Kernel:
    """Return the kernel of the table that has the constants of a launch, sizes apart."""

    def fits(kernel):
        constants = kernel.constants.keys() - {"BLOCK", "PURPOSE"}
        return kernel.fn.__name__ == name and all(
            arguments[constant][1] == kernel.constants[constant] for constant in constants
        )

    return next(kernel for kernel in compiled.KERNELS.values() if fits(kernel))


def test_launchers_ask_for_what_is_tested(report):
    """Types, alignment, constants and options of real launches, against the table of kernels."""
    assert report["launches"].keys() == {k.fn.__name__ for k in compiled.KERNELS.values()}
    for name, (arguments, options) in report["launches"].items():
        kernel = variant(name, arguments)
        assert options == kernel.options
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


def test_accesses_are_compared_with_what_is_needed():
    """Twice the bytes, a narrow access, an unknown address, an argument that is never reached."""
    needed, images = {"x": 32, "seeds": 8}, ("x",)
    sound = {"x": Counter({16: 2}), "seeds": Counter({8: 1})}
    assert gates.narrow_accesses(sound, needed, images) == []
    for change, expected in (
        ({"x": Counter({16: 4})}, "64 for a thread, 32 needed"),
        ({"x": Counter({16: 1, 8: 2})}, "an image moves 16 at a time"),
        ({"seeds": Counter({8: 2})}, "16 for a thread, 8 needed"),
        ({"?": Counter({16: 1})}, "of unknown origin"),
    ):
        (found,) = gates.narrow_accesses(sound | change, needed, images)
        assert expected in found
    assert gates.narrow_accesses({}, None, images) == ["no access of x is seen"]
    assert gates.narrow_accesses({"x": sound["x"]}, needed, images) == [
        "no access of seeds is seen"
    ]


PTX = """
.visible .entry k(
\t.param .u64 .ptr .global .align 1 k_param_0,
\t.param .u32 k_param_1,
\t.param .u64 .ptr .global .align 1 k_param_2
)
\tld.param.b64 \t%rd1, [k_param_0];
\tld.param.b64 \t%rd2, [k_param_2];
\tld.param.b32 \t%r1, [k_param_1];
\tmul.wide.s32 \t%rd3, %r1, 4;
\tadd.s64 \t%rd4, %rd1, %rd3;
\t@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
\tcvt.s64.s32 \t%rd5, %r2;
\tadd.s64 \t%rd6, %rd2, %rd5;
\tst.global.L1::evict_last.b16 [ %rd6 + 0 ], { %rs1 };
\tselp.b64 \t%rd7, %rd1, %rd2, %p1;
\tld.global.b64 { %rd8 }, [ %rd7 + 8 ];
"""


def test_addresses_are_followed_to_their_argument():
    """Through arithmetic, not through what was loaded; two bases are none."""
    found = gates.accesses(PTX, ["x", "n", "out"])
    assert found == {"x": {16: 1}, "out": {2: 1}, "?": {8: 1}}


def test_a_fusion_passes_only_where_its_product_is_exact():
    constant = "mov.b32 %r9, 0fBF000000;\nmov.b64 %rd9, {%r9, %r9};\n"
    for line, sound in (
        ("fma.rn.f32 %r1, %r2, 0fBF000000, %r3;", True),
        ("fma.rn.f32 %r1, 0f3F800000, %r2, %r3;", True),
        ("fma.rn.f32x2 %rd1, %rd2, %rd9, %rd3;", True),
        ("fma.rn.f32 %r1, %r2, 0f40000000, %r3;", False),  # by 2: may overflow before the sum
        ("fma.rn.f32 %r1, %r2, 0f3F400000, %r3;", False),
        ("fma.rn.f32 %r1, %r2, %r3, 0fBF000000;", False),
        ("fma.rn.ftz.f32 %r1, %r2, 0fBF000000, %r3;", False),
        ("mov.b32 %r9, 0f3F400000;\nfma.rn.f32 %r1, %r2, %r9, %r3;", False),
    ):
        assert (gates.inexact_operations(constant + line) == []) == sound, line


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert Path(__file__).exists() and not compiled.INTERPRETED
    print(json.dumps(child()))
