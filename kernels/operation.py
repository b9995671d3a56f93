"""What an operation says of itself: the record ``OP`` that its file ends with, and the parts of it.

Tests, gates, the scorecard and benchmarks loop over these records (``flashddpm.kernels.OPS``) and
name no operation themselves.
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
    """The most that a kernel may use on any architecture, for images of one size of element.

    A budget is what the pinned version of Triton gives (checks/budgets.py), the worst of the
    architectures, instructions rounded up to a half: one that is raised needs a reason.

    Attributes:
        registers: of a thread; a multiprocessor has 65,536 for at most 2048 threads, so that 64
            let half of them stay resident, 96 a third.
        shared: bytes of a program.
        instructions: an element, slow paths apart; None where a loop makes them no total.
        reason: what it is spent on.
        width: bytes of the narrowest access of an image, foreign ones included.
        memory_bound: whether moving its bytes must take longest on the reference card.
    """

    registers: int
    shared: int
    instructions: float | None
    reason: str
    width: int = 16
    memory_bound: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel and how it is compiled: one variant, of every dtype.

    Attributes:
        name: of the variant.
        fn: the Triton function.
        signature: type of each argument, "*fp32:16" for a pointer or int divisible by 16;
            "image" stands for a pointer to the dtype under test.
        constants: value of each constexpr argument.
        budgets: by the bytes of an image's element, 4 and, where the dtype matters, 2.
        images: pointer arguments that must be accessed 16 bytes at a time.
        foreign: images of a layout that is not ours: as wide as their budget says.
        exact: whether every floating-point operation must be correctly rounded.
        options: of the launch.
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
        """Of the images; "fp32" alone where no argument depends on it."""
        return DTYPES if "image" in self.signature.values() else DTYPES[:1]


TYPES = dict.fromkeys(("x_t", "x0", "out", "d_out", "net_in"), "image")
TYPES |= dict.fromkeys(("x", "hist", "noise", "guidance", "rows"), "*fp32:16")
TYPES |= dict.fromkeys(("dynamic_threshold", "rescale_factor"), "*fp32:16")
TYPES |= dict.fromkeys(("partial", "loss", "d_loss"), "*fp32:16") | {"delta": "fp32"}
TYPES |= dict.fromkeys(("t", "seeds", "keys", "idx", "next"), "*i64:16")
TYPES |= dict.fromkeys(("nonfinite", "lane_cond", "lane_uncond"), "*i32:16")
TYPES |= dict.fromkeys(("n", "x_stride", "hist_stride"), "i32:16")
TYPES |= dict.fromkeys(("S", "blocks"), "i32")
"""Type of a kernel's argument by its name."""


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
    """Return a kernel's variant, with what most share: ``TYPES``, a block's size, ``OPTIONS``.

    Arguments are those of ``Kernel``; ``types`` replaces some of ``TYPES``.
    """
    constants.setdefault("BLOCK", BLOCK)
    arguments = [argument for argument in fn.arg_names if argument not in constants]
    signature = {argument: (TYPES | (types or {}))[argument] for argument in arguments}
    options = OPTIONS | ({} if num_warps is None else {"num_warps": num_warps})
    foreign = tuple(argument for argument in foreign if argument in signature)
    return Kernel(name, fn, signature, constants, budgets, images, foreign, exact, options)


LEARNED: dict[str, Any] = {"foreign": ("out", "d_out"), "num_warps": WARPS_2C, "C": 3}
"""What variants for a network of 2C channels have in common: arguments of ``variant``."""


@dataclass(frozen=True)
class ByteCase:
    """An operation with rows that use certain terms, whose bytes are counted.

    Attributes:
        name: of the case, which begins with the operation's.
        change: example arguments -> those that differ.
        kernels: names of the variants that move the bytes. A variant's first case is the one that
            moves least: its bytes stand in the variant's bound.
        plain: the same work as a user writes it in eager PyTorch, after diffusers' schedulers and
            training scripts, with ``torch.randn`` for the noise; None where there is no such code.
            It takes the operation's arguments and ignores what it has no use for.
        backward: whether the gradient is counted, not the operation.
    """

    name: str
    change: Callable[[Arguments], Arguments]
    kernels: tuple[str, ...]
    plain: Callable[..., Any] | None = None
    backward: bool = False


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        name: of the public function, of its file, its reference and its test.
        fast, reference: the two functions, of one signature.
        example: (device, dtype, shape (C, H, W), batch, seed) -> arguments by name; the same
            numbers on every device.
        bytes_moved: arguments -> bytes of images that one call reads and writes (for ``advance``,
            of slots); the few numbers of each image are left out.
        kernels: the variants that are compiled and held to the gates and their budgets.
        cases: what bytes are counted of.
        mutates: names of the arguments that are changed in place.
        differentiable: names of the arguments that have a gradient.
        dtypes: of the images.
        index: the argument that holds each image's row, "" where there is none.
        all_work: columns none of which is 0 in a row that asks for all the work: benchmarks give
            every image the first such row of the example, so that all cost the same.
        alike: values of other arguments that benchmarks give every image, to that end.
        read_again: names of the images that several passes read, all of them. Memory must hand
            them over once; whether a cache holds them for the others is the kernel's affair.
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


def collected(*functions: Callable[..., Any]) -> dict[str, Op]:
    """Return the records of these public functions, by name: ``OP`` of the file of each."""
    ops = [sys.modules[function.__module__].OP for function in functions]
    return {op.name: op for op in ops}
