"""The kernels compiled for any NVIDIA GPU, on any machine, and what must hold of the code.

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
"""The most a kernel may use: with 128 threads a program, half of a GPU's threads stay resident."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's code in three languages, and the resources that it takes.

    Attributes:
        arguments: names of the arguments that are left at run time, in order.
        ttir, ptx, cubin: Triton's intermediate code, assembly and machine code.
        registers, stack, local: of a thread, the last two in bytes.
        shared: bytes of a program.
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
        """Of a program."""
        return 32 * self.num_warps

    @property
    def accesses(self) -> dict[str, Counter[int]]:
        """By pointer argument, accesses of global memory by their bytes."""
        return gates.accesses(self.ptx, self.arguments)


KERNELS = {kernel.name: kernel for op in OPS.values() for kernel in op.kernels}
"""Every variant of every operation, by its name."""


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
    """Compile a kernel of the table for images of dtype "fp32", "fp16" or "bf16"."""
    signature = {name: type.replace("image", f"*{dtype}:16") for name, type in
                 kernel.signature.items()}  # fmt: skip
    return compile_kernel(kernel.fn, signature, kernel.constants, arch, kernel.options)


def faults(
    code: Compiled,
    images: tuple[str, ...] = (),
    exact: bool = True,
    registers: int | None = REGISTERS,
) -> list[str]:
    """Return what is wrong with the compiled code, nothing if all is well.

    Args:
        code: the compiled kernel.
        images: pointer arguments that must be accessed 16 bytes at a time.
        exact: whether every floating-point operation must be correctly rounded; without, float64
            and calls are faults still.
        registers: the most that a thread may use; None for a kernel with a budget of its own.
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
