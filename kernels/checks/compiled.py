"""Compilation of kernels for any NVIDIA GPU, on any machine, and what must hold of the code.

Equal bits on every device need machine code of exact float32 operations only; images past 2^31
elements need 64-bit offsets; memory-bound kernels need 16-byte accesses. ``faults`` reads all three
from what the compiler wrote, without a GPU. None of this is evidence of speed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashddpm.kernels import OPS
from flashddpm.kernels.checks import gates, sass
from flashddpm.kernels.checks.gates import ARCHITECTURES as ARCHITECTURES
from flashddpm.kernels.launch import INTERPRETED, OPTIONS
from flashddpm.kernels.operation import DTYPES as DTYPES
from flashddpm.kernels.operation import Kernel

REGISTERS = 64
"""The most registers of a thread that a kernel without a budget may use; with 128 threads a
program, 64 let half of a GPU's threads stay resident.
"""


@dataclass(frozen=True)
class Compiled:
    """The code of one kernel, compiled for one GPU, in three languages, and the resources it takes.

    Attributes:
        arguments: names of the arguments that are left at run time, in order.
        ttir: Triton's intermediate code (TTIR), text.
        ptx: assembly (PTX), text.
        cubin: machine code, an ELF file.
        registers: registers of a thread.
        stack: bytes of stack of a thread.
        shared: bytes of shared memory of a program (a thread block).
        local: bytes of local memory of a thread.
        num_warps: warps of 32 threads in a program.
    """

    arguments: tuple[str, ...]
    ttir: str
    ptx: str
    cubin: bytes
    registers: int
    stack: int
    shared: int
    local: int
    num_warps: int

    @property
    def threads(self) -> int:
        """The number of threads of a program (a thread block)."""
        return 32 * self.num_warps

    @property
    def accesses(self) -> dict[str, Counter[int]]:
        """The accesses of global memory in the code by pointer argument and width.

        A dictionary {argument: {bytes that a thread moves at once: number of such instructions}}.
        An access whose argument is not known stands under "?".
        """
        return gates.accesses(self.ptx, self.arguments)


KERNELS = {kernel.name: kernel for op in OPS.values() for kernel in op.kernels}
"""Every variant of every operation's kernels, by the variant's name."""


def compile_kernel(
    fn: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, int],
    arch: int,
    options: dict[str, int | bool] = OPTIONS,
) -> Compiled:
    """Compile a Triton function for an NVIDIA GPU, and return the code; no GPU is needed.

    Args:
        fn: the function.
        signature: the type of each runtime argument by its name, "*fp32:16" for a pointer to
            float32 (or an int type) that is divisible by 16, or "fp32", "i32".
        constants: the value of each constexpr argument, or of an int argument that is 1.
        arch: the compute capability times 10: 80, 90 or 100; not checked.
        options: options of the compiler and launch, such as {"num_warps": 2}.

    Raises:
        RuntimeError: if TRITON_INTERPRET is set, since the interpreter compiles nothing.
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
    usage = sass.resource_usage(code.asm["cubin"])
    return Compiled(
        arguments=tuple(name for name in names if types[name] != "constexpr"),
        ttir=code.asm["ttir"],
        ptx=code.asm["ptx"],
        cubin=code.asm["cubin"],
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=code.metadata.shared,
        local=usage["LOCAL"],
        num_warps=code.metadata.num_warps,
    )


def compile_for(kernel: Kernel, dtype: str, arch: int) -> Compiled:
    """Compile a variant of a kernel for images of one dtype and one architecture; no GPU is needed.

    Args:
        kernel: the variant's record.
        dtype: the dtype of the images, "fp32", "fp16" or "bf16"; not checked.
        arch: the compute capability times 10: 80, 90 or 100; not checked.

    Raises:
        RuntimeError: if TRITON_INTERPRET is set, since the interpreter compiles nothing.
    """
    signature = {name: type.replace("image", f"*{dtype}:16") for name, type in
                 kernel.signature.items()}  # fmt: skip
    return compile_kernel(kernel.fn, signature, kernel.constants, arch, kernel.options)


def faults(
    code: Compiled,
    images: tuple[str, ...] = (),
    exact: bool = True,
    registers: int | None = REGISTERS,
) -> list[str]:
    """Return what is wrong with compiled code, a phrase each; an empty list if all is well.

    Wrong are memory for spills (stack or local), too many registers, inexact operations, offsets of
    addresses that may wrap, and accesses of images in less than 16 bytes.

    Args:
        code: the compiled kernel.
        images: names of the pointer arguments that must be accessed 16 bytes at a time.
        exact: whether every floating-point operation must be correctly rounded float32; if not,
            only float64 operations and calls are faults.
        registers: the most registers that a thread may use; None leaves them unchecked, for a
            kernel with a budget of its own (``Budget``, which ``budgets.exceeded`` checks).
    """
    found = [
        f"{name} of {size} bytes" for name in ("stack", "local") if (size := getattr(code, name))
    ]
    if registers is not None and code.registers > registers:
        found.append(f"{code.registers} registers")
    found += gates.inexact_operations(code.ptx) if exact else gates.wide_operations(code.ptx)
    found += gates.narrow_offsets(code.ttir)
    needed = gates.needed_bytes(code.ttir, code.threads)
    return found + gates.narrow_accesses(code.accesses, needed, images)
