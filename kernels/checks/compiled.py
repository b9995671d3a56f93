"""The kernels compiled for any NVIDIA GPU, on any machine, and what must hold of the code.

Equal bits on every device need machine code of exact float32 operations only; images past 2^31
elements need 64-bit offsets; memory-bound kernels need 16-byte accesses. ``faults`` reads all three
from what the compiler wrote, without a GPU. None of this is evidence of speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashddpm.kernels.add_noise import _add_noise_kernel
from flashddpm.kernels.advance import _advance_kernel
from flashddpm.kernels.contract import Purpose
from flashddpm.kernels.denoise_step import _denoise_step_kernel
from flashddpm.kernels.diffusion_loss import (
    _diffusion_loss_bwd_kernel,
    _diffusion_loss_fwd_kernel,
    _diffusion_loss_sum_kernel,
)
from flashddpm.kernels.launch import BLOCK, INTERPRETED, OPTIONS
from flashddpm.kernels.philox import _philox_kernel

ARCHITECTURES = (80, 90, 100)
REGISTERS = 64
"""The most a kernel may use: with 128 threads a program, half of a GPU's threads stay resident."""


@dataclass(frozen=True)
class Kernel:
    """A kernel and how it is compiled.

    Attributes:
        name: of the variant.
        fn: the Triton function.
        signature: type of each argument, "*fp32:16" for a pointer or int divisible by 16;
            "image" stands for a pointer to the dtype under test.
        constants: value of each constexpr argument.
        images: pointer arguments that must be accessed 16 bytes at a time.
    """

    name: str
    fn: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, int]
    images: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """A kernel's intermediate code, its assembly and the resources of its machine code."""

    ttir: str
    ptx: str
    registers: int
    stack: int
    shared: int
    local: int
    num_warps: int


TYPES = dict.fromkeys(("x_t", "x0", "out", "d_out", "net_in"), "image")
TYPES |= dict.fromkeys(("x", "hist", "noise", "guidance", "rows"), "*fp32:16")
TYPES |= dict.fromkeys(("partial", "loss", "d_loss"), "*fp32:16")
TYPES |= dict.fromkeys(("t", "seeds", "keys", "idx", "next"), "*i64:16")
TYPES |= dict.fromkeys(("nonfinite", "lane_cond", "lane_uncond"), "*i32:16")
TYPES |= dict.fromkeys(("n", "x_stride", "hist_stride"), "i32:16")
TYPES |= dict.fromkeys(("S", "blocks"), "i32")


def _kernel(name: str, fn, images: tuple[str, ...], types: dict[str, str], **constants) -> Kernel:
    constants.setdefault("BLOCK", BLOCK)
    arguments = [argument for argument in fn.arg_names if argument not in constants]
    signature = {argument: (TYPES | types)[argument] for argument in arguments}
    return Kernel(name, fn, signature, constants, images)


_STEP = ("x", "hist", "net_in", "out")
_kernels = (
    _kernel("philox", _philox_kernel, ("out",), {"out": "*fp32:16"}, PURPOSE=Purpose.INITIAL),
    _kernel("add_noise", _add_noise_kernel, ("x_t", "x0"), {}, PURPOSE=Purpose.TRAINING),
    _kernel("diffusion_loss", _diffusion_loss_fwd_kernel, ("out", "x0"), {}),
    _kernel("diffusion_loss_sum", _diffusion_loss_sum_kernel, (), {}),
    _kernel("diffusion_loss_backward", _diffusion_loss_bwd_kernel, ("d_out", "out", "x0"), {}),
    _kernel("denoise_step", _denoise_step_kernel, _STEP, {}, HAS_NOISE=False),
    _kernel("denoise_step_given", _denoise_step_kernel, (*_STEP, "noise"), {}, HAS_NOISE=True),
    _kernel("advance", _advance_kernel, (), {}, BLOCK=128),
)
KERNELS = {kernel.name: kernel for kernel in _kernels}


def compile_kernel(
    fn: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, int],
    arch: int,
    options: dict[str, int | bool] = OPTIONS,
) -> Compiled:
    """Compile a Triton function for compute capability arch / 10; no GPU is needed.

    Args:
        fn: the function; the process must not run under TRITON_INTERPRET.
        signature: type of each argument, "*fp32:16" for a pointer or int divisible by 16.
        constants: value of each constexpr argument, or of an int argument that is 1.
        arch: 80, 90, 100.
        options: of the launch.

    Raises:
        RuntimeError: under the interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    names = fn.arg_names
    types = {name: signature.get(name, "").removesuffix(":16") or "constexpr" for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(names) if signature.get(name, "").endswith(":16")]
    source = ASTSource(
        fn,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in constants},
    )
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    usage = _resource_usage(code.asm["cubin"])
    return Compiled(
        ttir=code.asm["ttir"],
        ptx=code.asm["ptx"],
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=code.metadata.shared,
        local=usage["LOCAL"],
        num_warps=code.metadata.num_warps,
    )


def compile_for(kernel: Kernel, dtype: str, arch: int) -> Compiled:
    """Compile a kernel of the table for images of dtype "fp32", "fp16" or "bf16"."""
    signature = {name: type.replace("image", f"*{dtype}:16") for name, type in
                 kernel.signature.items()}  # fmt: skip
    return compile_kernel(kernel.fn, signature, kernel.constants, arch)


def faults(code: Compiled, images: tuple[str, ...] = ()) -> list[str]:
    """Return what is wrong with the compiled code, nothing if all is well.

    Args:
        code: the compiled kernel.
        images: pointer arguments that must be accessed 16 bytes at a time.
    """
    found = [
        f"{name} of {size} bytes" for name in ("stack", "local") if (size := getattr(code, name))
    ]
    if code.registers > REGISTERS:
        found.append(f"{code.registers} registers")
    found += inexact_operations(code.ptx)
    found += narrow_offsets(code.ttir)
    return found + narrow_accesses(code, images)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return the sizes REG, STACK, SHARED and LOCAL of the one function in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in re.findall(r"\b([A-Z]+):(\d+)", text)}


EXACT = re.compile(
    r"""(add|sub|mul)\.rn\.f32(x2)?        # rounded to nearest, subnormals kept
    | (div|sqrt)\.rn\.f32
    | cvt\.rn\.f32\.[su](32|64)
    | cvt\.f32\.(bf16|f16)                 # exact
    | cvt\.rn\.(bf16|f16)(x2)?\.f32
    | (abs|neg)\.f32
    | (min|max)\.NaN(\.xorsign\.abs)?\.f32  # of a clip that keeps NaN
    | setp\.[a-z]+(\.and|\.or)?\.f32 | selp\.f32 | mov\.f32""",
    re.VERBOSE,
)


def _instructions(ptx: str) -> Iterator[str]:
    return (match[1] for match in re.finditer(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s", ptx, re.M))


def inexact_operations(ptx: str) -> list[str]:
    """Return the floating-point instructions that are not correctly rounded float32, and calls.

    With ``.rn`` written out, the assembler may not fuse a product into a sum (PTX, 9.7.3).
    """
    counts = Counter(_instructions(ptx))
    floating = re.compile(r"\.(e\dm\d|t?b?f\d+)|^call|^(fma|ex2|lg2|sin|cos|tanh|rcp|rsqrt)\b")
    return [
        f"{count} x {name}"
        for name, count in sorted(counts.items())
        if floating.search(name) and not EXACT.fullmatch(name)
    ]


GROWS = ("arith.addi", "arith.subi", "arith.muli", "arith.shli")
LEAVES = (
    *("argument", "loop variable", "arith.constant"),
    *("tt.get_program_id", "tt.load", "tt.make_range"),
)
FOLLOWED = (
    *("arith.extsi", "arith.extui", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape"),
    *("arith.divsi", "arith.divui", "arith.remsi", "arith.remui", "arith.minsi", "arith.maxsi"),
)


@dataclass(frozen=True, eq=False)
class _Value:
    """A line of intermediate code: its operation, its type as written, the values it reads."""

    operation: str
    type: str
    operands: tuple[_Value, ...] = ()


def _lines(ttir: str) -> Iterator[_Value]:
    """Yield the operations in program order, with operands resolved.

    A name may come back in another region, so names are resolved line by line.
    """
    unknown = _Value("value of unknown origin", "")
    scope: dict[str, _Value] = {}
    for line in ttir.splitlines():
        line = re.sub(r" loc\(#?\w+\)$", "", line)
        if "tt.func" in line:
            names = re.findall(r"(%[\w-]+): !?[\w.<>]+", line)
            scope = {name: _Value("argument", name[1:]) for name in names}
        match = re.match(r"\s*(?:(%[\w-]+)(?::\d+)? = )?\"?([a-z]+\.[a-z_.]+)\"?(.*)", line)
        if match is None or "tt.func" in line:
            continue
        result, operation, text = match.groups()
        read = tuple(scope.get(name, unknown) for name in re.findall(r"%[\w-]+", text))
        value = _Value(operation, text.rpartition(" : ")[2], read)
        if result:
            scope[result] = value
        if operation == "scf.for":
            scope |= dict.fromkeys(re.findall(r"%[\w-]+(?= = )", text), unknown)
            scope[re.findall(r"%[\w-]+", text)[0]] = _Value("loop variable", value.type)
        yield value


def narrow_offsets(ttir: str) -> list[str]:
    """Return what in the offsets of addresses may wrap: sums and products in less than 64 bits.

    Every offset of every address is followed back to arguments, constants, program ids, ranges,
    loop variables and loaded values; between them may stand 64-bit sums and products, and
    operations of any width that do not grow a value. Anything else is a fault, so that what the
    check does not know it refuses.
    """
    found = set()
    todo = [value.operands[1] for value in _lines(ttir) if value.operation == "tt.addptr"]
    while todo:
        value = todo.pop()
        if value.operation in GROWS and not re.fullmatch(r"(tensor<[\dx]+x)?i64>?", value.type):
            found.add(f"{value.operation} of {value.type} in the offset of an address")
        if value.operation in GROWS or value.operation in FOLLOWED:
            todo += value.operands
        elif value.operation not in LEAVES:
            found.add(f"{value.operation} in the offset of an address")
    return sorted(found)


def _accesses(ttir: str) -> Iterator[tuple[str, int, int]]:
    """Yield (pointer argument, elements, bytes an element) of each access, in program order."""
    for value in _lines(ttir):
        if value.operation in ("tt.load", "tt.store"):
            match = re.fullmatch(r"(?:tensor<(\d+)x)?!tt\.ptr<[a-z]+(\d+)>+", value.type)
            base = value.operands[0]
            while base.operation in ("tt.addptr", "tt.splat", "tt.broadcast"):
                base = base.operands[0]
            assert match and base.operation == "argument", value
            yield base.type, int(match[1] or 1), int(match[2]) // 8


def narrow_accesses(code: Compiled, images: tuple[str, ...]) -> list[str]:
    """Return how the accesses differ from 16 bytes each for images, and one each for the rest."""
    wide, narrow = 0, 0
    for pointer, elements, size in _accesses(code.ttir):
        if pointer in images:
            wide += elements * size // (32 * code.num_warps)
        else:
            narrow += max(elements // (32 * code.num_warps), 1)
    counts: Counter[int] = Counter()
    for name in _instructions(code.ptx):
        if match := re.fullmatch(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", name):
            counts[int(match[1] or 1) * int(match[2]) // 8] += 1
    measured = sum(size * count for size, count in counts.items() if size >= 16)
    rest = sum(count for size, count in counts.items() if size < 16)
    if (measured, rest) == (wide, narrow):
        return []
    return [
        f"accesses by bytes {dict(sorted(counts.items()))}: a thread should move {wide} bytes of "
        f"images 16 at a time and the rest by {narrow} accesses"
    ]
