"""The kernels compiled for any NVIDIA GPU, on any machine, and what must hold of the code.

Equal bits on every device need machine code of exact float32 operations only; images past 2^31
elements need 64-bit offsets; memory-bound kernels need 16-byte accesses. ``faults`` reads all three
from what the compiler wrote, without a GPU. None of this is evidence of speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashddpm.kernels.add_noise import _add_noise_kernel
from flashddpm.kernels.advance import _advance_kernel
from flashddpm.kernels.checks import gates, sass
from flashddpm.kernels.denoise_step import _denoise_step_kernel
from flashddpm.kernels.diffusion_loss import (
    _diffusion_loss_bwd_kernel,
    _diffusion_loss_fwd_kernel,
)
from flashddpm.kernels.hybrid_loss import _hybrid_loss_bwd_kernel, _hybrid_loss_fwd_kernel
from flashddpm.kernels.image_means import _mean_kernel
from flashddpm.kernels.launch import BLOCK, INTERPRETED, OPTIONS, WARPS_2C
from flashddpm.kernels.philox import _philox_kernel
from flashddpm.kernels.sample_stats import BLOCK as STATS_BLOCK
from flashddpm.kernels.sample_stats import NUM_WARPS as STATS_WARPS
from flashddpm.kernels.sample_stats import _sample_stats_kernel
from flashddpm.kernels.tables import LOSSES, Purpose
from flashddpm.kernels.vlb_terms import _vlb_terms_kernel

ARCHITECTURES = (80, 90, 100)
DTYPES = ("fp32", "fp16", "bf16")
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
        foreign: images of a layout that is not ours: as wide as their budget says (budgets.py).
        exact: whether every floating-point operation must be correctly rounded.
        options: of the launch.
    """

    name: str
    fn: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, int]
    images: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    exact: bool = True
    options: dict[str, int | bool] = field(default_factory=lambda: dict(OPTIONS))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the images; "fp32" alone where no argument depends on it."""
        return DTYPES if "image" in self.signature.values() else DTYPES[:1]


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


TYPES = dict.fromkeys(("x_t", "x0", "out", "d_out", "net_in"), "image")
TYPES |= dict.fromkeys(("x", "hist", "noise", "guidance", "bounds", "factors", "rows"), "*fp32:16")
TYPES |= dict.fromkeys(("partial", "loss", "d_loss"), "*fp32:16") | {"delta": "fp32"}
TYPES |= dict.fromkeys(("t", "seeds", "keys", "idx", "next"), "*i64:16")
TYPES |= dict.fromkeys(("nonfinite", "lane_cond", "lane_uncond"), "*i32:16")
TYPES |= dict.fromkeys(("n", "x_stride", "hist_stride"), "i32:16")
TYPES |= dict.fromkeys(("S", "blocks"), "i32")


def _kernel(
    name: str,
    fn: triton.JITFunction,
    images: tuple[str, ...] = (),
    types: dict[str, str] | None = None,
    foreign: tuple[str, ...] = (),
    exact: bool = True,
    num_warps: int | None = None,
    **constants: int,
) -> Kernel:
    """Fill in what most kernels share: types by the argument's name, block, options."""
    constants.setdefault("BLOCK", BLOCK)
    arguments = [argument for argument in fn.arg_names if argument not in constants]
    signature = {argument: (TYPES | (types or {}))[argument] for argument in arguments}
    options = OPTIONS | ({} if num_warps is None else {"num_warps": num_warps})
    foreign = tuple(argument for argument in foreign if argument in signature)
    return Kernel(name, fn, signature, constants, images, foreign, exact, options)


def _losses() -> Iterator[Kernel]:
    """Yield forward and backward of each loss; mse goes without a suffix."""
    for kind, loss in enumerate(LOSSES):
        end = f"_{loss}" if kind else ""
        forward, backward = _diffusion_loss_fwd_kernel, _diffusion_loss_bwd_kernel
        yield _kernel(f"diffusion_loss{end}", forward, ("out", "x0"), LOSS=kind)
        images = ("d_out", "out", "x0")
        yield _kernel(f"diffusion_loss_backward{end}", backward, images, LOSS=kind)


_STEP = ("x", "hist", "net_in")
_step, _stats = _denoise_step_kernel, _sample_stats_kernel
_BOTH: dict[str, Any] = {"foreign": ("out", "d_out"), "num_warps": WARPS_2C, "C": 3}
_HYBRID = _BOTH | {"LOSS": 0}
_STATS: dict[str, Any] = {"exact": False, "BLOCK": STATS_BLOCK, "num_warps": STATS_WARPS}
_kernels = (
    _kernel("philox", _philox_kernel, ("out",), {"out": "*fp32:16"}, PURPOSE=Purpose.INITIAL),
    _kernel("add_noise", _add_noise_kernel, ("x_t", "x0"), PURPOSE=Purpose.TRAINING),
    *_losses(),
    _kernel("loss_mean", _mean_kernel),
    _kernel("hybrid_loss", _hybrid_loss_fwd_kernel, ("x0",), **_HYBRID),
    _kernel("hybrid_loss_backward", _hybrid_loss_bwd_kernel, ("x0",), **_HYBRID),
    _kernel("denoise_step", _step, (*_STEP, "out"), HAS_NOISE=0, C=0),
    _kernel("denoise_step_given", _step, (*_STEP, "out", "noise"), HAS_NOISE=1, C=0),
    _kernel("denoise_step_learned", _step, _STEP, HAS_NOISE=0, **_BOTH),
    _kernel("sample_stats", _stats, ("x", "out"), C=0, **_STATS),
    _kernel("sample_stats_learned", _stats, ("x",), **_BOTH | _STATS),
    _kernel("vlb_terms", _vlb_terms_kernel, ("out", "x0"), num_warps=WARPS_2C, C=0),
    _kernel("vlb_terms_learned", _vlb_terms_kernel, ("x0",), **_BOTH),
    _kernel("advance", _advance_kernel, BLOCK=128),
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
