"""The records that describe operations, their kernels, budgets and test cases to tests and tools.

The file of each operation ends with its record, ``OP``. Tests, gates (checks of compiled code), the
scorecard and benchmarks loop over these records (``flashddpm.kernels.OPS``) and name no operation
themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from flashddpm.kernels.launch import BLOCK, OPTIONS, WARPS_2C

Arguments = dict[str, Any]
Shape = tuple[int, int, int]
DTYPES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Budget:
    """The most that a compiled kernel may use on any architecture, for images of one element size.

    A budget is what the pinned version of Triton gives (checks/budgets.py) on the worst of the
    architectures, with instructions rounded up to a half: a budget that is raised needs a reason.

    Attributes:
        registers: 32-bit registers of a thread; a multiprocessor has 65,536 for at most 2048
            threads, so that 64 let half of the threads stay resident and 96 a third.
        shared: bytes of shared memory of a program (a thread block).
        instructions: instructions for each element of an image, without the slow paths of roots and
            divisions (of subnormal, infinite or NaN operands); None where the kernel has a loop,
            whose instructions depend on sizes.
        reason: what the resources are spent on, in words.
        width: the fewest bytes that an access of an image may move, for images of ``Kernel.images``
            and ``Kernel.foreign``.
        memory_bound: whether memory must be what takes longest on the reference card, an H100 SXM,
            by the counted bytes and instructions.
    """

    registers: int
    shared: int
    instructions: float | None
    reason: str
    width: int = 16
    memory_bound: bool = False


@dataclass(frozen=True)
class Kernel:
    """One variant of a Triton kernel: the function with certain values of its constexpr arguments.

    The record says how the variant is compiled, for every dtype of its images, and what it may use.

    Attributes:
        name: the name of the variant.
        fn: the Triton function.
        signature: the type of each runtime argument by its name, in Triton's notation: "fp32",
            "i32", "*fp32:16" for a pointer to float32 (or an int type) that is divisible by 16;
            "image" stands for a 16-byte aligned pointer to the dtype under test.
        constants: the value of each constexpr argument by its name.
        budgets: the budget by the bytes of an image's element: 4, and 2 where the dtype matters.
        images: names of the pointer arguments that must be accessed 16 bytes at a time.
        foreign: names of the pointer arguments to images in a layout that the kernel does not
            choose (2C channels); their accesses may be as narrow as the budget says.
        exact: whether every floating-point operation must be correctly rounded float32, so that the
            result has the same bits on every device.
        options: options of the compiler and launch, such as {"num_warps": 2}.
    """

    name: str
    fn: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, int]
    budgets: Mapping[int, Budget] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    exact: bool = True
    options: dict[str, int | bool] = field(default_factory=lambda: dict(OPTIONS))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of images to compile for, among "fp32", "fp16" and "bf16".

        ("fp32",) alone where no argument depends on the dtype of images.
        """
        return DTYPES if "image" in self.signature.values() else DTYPES[:1]


TYPES = dict.fromkeys(("x_t", "x0", "out", "d_out", "net_in"), "image")
TYPES |= dict.fromkeys(("x", "hist", "noise", "guidance", "rows"), "*fp32:16")
TYPES |= dict.fromkeys(("dynamic_threshold", "rescale_factor"), "*fp32:16")
TYPES |= dict.fromkeys(("partial", "loss", "d_loss"), "*fp32:16") | {"delta": "fp32"}
TYPES |= dict.fromkeys(("t", "seeds", "keys", "idx", "next"), "*i64:16")
TYPES |= dict.fromkeys(("nonfinite", "lane_cond", "lane_uncond"), "*i32:16")
TYPES |= dict.fromkeys(("n", "x_stride", "hist_stride"), "i32:16")
TYPES |= dict.fromkeys(("S", "blocks"), "i32")
"""The type of a kernel's argument (``Kernel.signature``) by its name, unless a variant replaces it.
"""


def variant(
    name: str,
    fn: triton.JITFunction,
    budgets: Mapping[int, Budget],
    images: tuple[str, ...] = (),
    types: dict[str, str] | None = None,
    foreign: tuple[str, ...] = (),
    exact: bool = True,
    num_warps: int | None = None,
    **constants: int,
) -> Kernel:
    """Return the record of a kernel's variant, with the types and options that most kernels share.

    Args:
        name: the name of the variant.
        fn: the Triton function; its arguments have the types of ``TYPES`` by their names.
        budgets: the budget by the bytes of an image's element: 4, and 2 where the dtype matters.
        images: names of the pointer arguments that must be accessed 16 bytes at a time.
        types: types that replace those of ``TYPES``, by argument.
        foreign: names of the pointer arguments to images of another layout; those that the function
            does not have are left out.
        exact: whether every floating-point operation must be correctly rounded float32.
        num_warps: warps of a program; None for those of ``launch.OPTIONS``.
        constants: values of the constexpr arguments; BLOCK is ``launch.BLOCK`` by default. The
            other arguments of the function are those of run time.

    Raises:
        KeyError: if a runtime argument of the function has no type.
    """
    constants.setdefault("BLOCK", BLOCK)
    arguments = [argument for argument in fn.arg_names if argument not in constants]
    signature = {argument: (TYPES | (types or {}))[argument] for argument in arguments}
    options = OPTIONS | ({} if num_warps is None else {"num_warps": num_warps})
    foreign = tuple(argument for argument in foreign if argument in signature)
    return Kernel(name, fn, signature, constants, budgets, images, foreign, exact, options)


LEARNED: dict[str, Any] = {"foreign": ("out", "d_out"), "num_warps": WARPS_2C, "C": 3}
"""The arguments of ``variant`` that variants for a network of 2C channels have in common (C = 3).
"""


@dataclass(frozen=True)
class ByteCase:
    """One choice of an operation's arguments, for which the bytes that it moves are counted.

    What is moved depends on the terms of the formula that the coefficients use. The count is
    compared with the operation's own (``Op.bytes_moved``) and with that of plain PyTorch.

    Attributes:
        name: the name of the case, which begins with the operation's name.
        change: called with the operation's example arguments by name, on the CPU; returns the
            arguments that differ from them, by name.
        kernels: names of the variants that move these bytes. The first case of a variant is the one
            that moves least: its bytes stand in the variant's bound of time.
        plain: the same work as a user writes it in eager PyTorch, after diffusers' schedulers and
            training scripts, with ``torch.randn`` for the noise; None where there is no such code.
            It is called with the operation's arguments by name and ignores what it has no use for.
        backward: whether the bytes of the gradient are counted instead of those of the operation.
    """

    name: str
    change: Callable[[Arguments], Arguments]
    kernels: tuple[str, ...]
    plain: Callable[..., Any] | None = None
    backward: bool = False


@dataclass(frozen=True)
class Op:
    """The record of an operation: its functions, example arguments, kernels and counted cases.

    ``Arguments`` below are a dictionary from an argument's name to its value.

    Attributes:
        name: the name of the public function, of its file, of its reference and of its test.
        fast: the public function, or ``by_tensor`` of it, which launches Triton kernels.
        reference: the function of the same signature in plain PyTorch.
        example: called with (device, dtype, shape (C, H, W), batch size, seed); returns Arguments
            with the same numbers on every device.
        bytes_moved: called with Arguments; returns the bytes of images (for ``advance``, of
            indices) that one call reads and writes. The few numbers of each image are left out.
        kernels: the variants that are compiled and held to the gates (checks of compiled code) and
            their budgets (the most that each may use).
        cases: the cases whose bytes are counted.
        mutates: names of the arguments that are changed in place.
        differentiable: names of the arguments that have a gradient.
        dtypes: the dtypes that the images may have.
        index: name of the argument that holds the index of each image's row (its coefficients) in
            the argument ``rows``; "" if there is none.
        all_work: indices of the columns of ``rows`` that switch the costly terms on: benchmarks
            give every image the first row of the example in which none of them is 0, so that all
            images cost the same.
        alike: {name of an argument: number}: benchmarks fill these arguments of the example with
            the number, to the same end.
        read_again: names of the images that the operation reads in several passes. A benchmark
            counts their bytes once: whether a cache holds them for the later passes is the kernel's
            affair.
        gradient_bytes: called with Arguments; returns the bytes of images that one call of the
            gradient reads and writes; None if no argument has a gradient.
    """

    name: str
    fast: Callable[..., Tensor | None]
    reference: Callable[..., Tensor | None]
    example: Callable[[str | torch.device, torch.dtype, Shape, int, int], Arguments]
    bytes_moved: Callable[[Arguments], int]
    kernels: tuple[Kernel, ...]
    cases: tuple[ByteCase, ...] = ()
    mutates: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    index: str = ""
    all_work: tuple[int, ...] = ()
    alike: Mapping[str, int] = field(default_factory=dict)
    read_again: tuple[str, ...] = ()
    gradient_bytes: Callable[[Arguments], int] | None = None


def collected(*functions: Callable[..., Any]) -> dict[str, Op]:
    """Return the records of operations, ``Op``, by their names, in the order of the functions.

    Args:
        functions: public functions of operations; each one's module holds its record as ``OP``
            (AttributeError if not).
    """
    ops = [sys.modules[function.__module__].OP for function in functions]
    return {op.name: op for op in ops}
