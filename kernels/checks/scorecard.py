"""A scorecard of the compiled kernels: resources, instructions, bytes, and what bounds their time.

``scorecard`` compiles every kernel for every architecture and counts bytes in a second process;
``Scorecard.faults`` is what fails. No GPU is used, and nothing here is evidence of speed: the times
are those that the counts alone would take on the reference card, an H100 SXM.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import triton

from flashddpm.kernels.checks import budgets, compiled, counting, gates, sass

MULTIPROCESSORS = 132
CLOCK = 1.755e9
"""The clock of a multiprocessor in Hz, the lowest boost clock of an H100.

The PCIe card's 51.2 TFLOP/s in float32 are 114 multiprocessors x 256 x 1.755 GHz. The SXM card
boosts to 1.98 GHz and falls below it under load, so that arithmetic is not made to look cheaper
than it is.
"""
BANDWIDTH = 3.0e12
"""Bytes of memory a second, read and written together: a large copy, measured on an H100 SXM."""
REFERENCE = 90
ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Entry:
    """What one kernel uses, compiled for images of one dtype and for one architecture.

    Attributes:
        kernel: the name of the kernel's variant.
        dtype: the dtype of the images, "fp32", "fp16" or "bf16".
        arch: the compute capability times 10: 80, 90 or 100.
        images: whether the code depends on the dtype of images.
        registers, stack, local: registers, bytes of stack and bytes of local memory of one thread.
        shared: bytes of shared memory of a program (a thread block).
        accesses: {pointer argument: {bytes of an access of global memory: how many a thread
            makes}}.
        instructions: instructions for each element of an image, slow paths left out; None where a
            loop makes them no total.
        slow: instructions of a thread in the rare paths (roots and divisions of subnormal, infinite
            and NaN operands), which the other counts leave out.
        pipes: instructions for each element by pipe (part of a multiprocessor), empty with loops.
        opcodes: instructions of a thread by opcode, the most frequent first.
        unknown: opcodes of no known pipe, sorted.
        rounding: rounding modes that floating-point instructions of the assembly name, such as
            "rn", sorted.
        clocks: clock cycles of a multiprocessor for each element, by "issue" (all instructions) and
            by pipe of limited rate; empty with loops.
        faults: gates (checks of compiled code) that fail, in words.
        over: budgets (the most that a kernel may use) that are exceeded, in words.
    """

    kernel: str
    dtype: str
    arch: int
    images: bool
    registers: int
    stack: int
    local: int
    shared: int
    accesses: dict[str, dict[int, int]]
    instructions: float | None
    slow: int
    pipes: dict[str, float]
    opcodes: dict[str, int]
    unknown: list[str]
    rounding: list[str]
    clocks: dict[str, float]
    faults: list[str]
    over: list[str]

    @property
    def name(self) -> str:
        """The kernel, the dtype and the architecture as one string: "KERNEL DTYPE sm_ARCH"."""
        return f"{self.kernel} {self.dtype} sm_{self.arch}"


Variant = tuple[compiled.Kernel, str, int]
"""A kernel, the dtype of its images ("fp32", "fp16" or "bf16") and the compute capability times 10.
"""


def measure(variants: Sequence[Variant]) -> list[Entry]:
    """Compile variants of kernels, read their machine code and return what each uses.

    nvdisasm runs once for each architecture.

    Args:
        variants: the kernels to compile, each with the dtype of its images and its architecture.

    Returns:
        An entry for each variant, in order.

    Raises:
        RuntimeError: if TRITON_INTERPRET is set, since the interpreter compiles nothing.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, (_, _, arch) in enumerate(variants):
        groups[arch].append(i)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(lambda variant: compiled.compile_for(*variant), variants))
        files = [[codes[i].cubin for i in group] for group in groups.values()]
        texts = dict[int, str]()
        for group, found in zip(groups.values(), pool.map(sass.disassemble, files), strict=True):
            texts |= zip(group, found, strict=True)
    return [
        _entry(*variant, code, sass.read(texts[i]))
        for i, (variant, code) in enumerate(zip(variants, codes, strict=True))
    ]


def _entry(
    kernel: compiled.Kernel,
    dtype: str,
    arch: int,
    code: compiled.Compiled,
    machine: sass.MachineCode,
) -> Entry:
    """Return what the scorecard says of one variant."""
    elements = kernel.constants["BLOCK"] / code.threads
    instructions = None if machine.loops else machine.instructions / elements
    widths = {name: dict(sorted(counts.items())) for name, counts in code.accesses.items()}
    images = [min(widths[name]) for name in (*kernel.images, *kernel.foreign) if name in widths]
    budget = kernel.budgets.get(ITEMSIZES[dtype])
    return Entry(
        kernel=kernel.name,
        dtype=dtype,
        arch=arch,
        images=len(kernel.dtypes) > 1,
        registers=code.registers,
        stack=code.stack,
        local=code.local,
        shared=code.shared,
        accesses=widths,
        instructions=instructions,
        slow=machine.slow,
        pipes={} if machine.loops else {k: n / elements for k, n in machine.pipes.items()},
        opcodes=dict(machine.opcodes.most_common()),
        unknown=machine.unknown,
        rounding=gates.rounding_modes(code.ptx),
        clocks={} if machine.loops else {k: n / elements for k, n in machine.clocks().items()},
        faults=compiled.faults(code, kernel.images, kernel.exact, registers=None),
        over=budgets.exceeded(
            budget, code.registers, code.shared, instructions, min(images, default=None)
        ),
    )


@dataclass(frozen=True)
class TimeBound:
    """The time that one kernel takes on the reference card (an H100 SXM) by its counts alone.

    It is computed, not measured: ``times[by]`` is the time for one element of an image if all parts
    of the GPU work at full rate and at once. A measured time is as a rule longer, but no strict
    lower bound is meant: branches that a row leaves out are counted, and the clock is a low one.

    Attributes:
        kernel: the name of the kernel's variant.
        dtype: the dtype of the images, "fp32", "fp16" or "bf16".
        times: picoseconds (float) for each element of an image, by what takes them: "memory", for
            the bytes of the kernel's lightest counted case (``ByteCase``); "issue" and each pipe
            (part of a multiprocessor, a key of ``sass.PIPES``) that has a rate, for every
            instruction in the code, terms that a row (coefficients of one step) skips included.
    """

    kernel: str
    dtype: str
    times: dict[str, float]

    @property
    def by(self) -> str:
        """The key of ``times`` that takes longest."""
        return max(self.times, key=lambda name: self.times[name])


@dataclass(frozen=True)
class Scorecard:
    """Everything that was measured of compiled kernels, and the bounds and faults that follow.

    Attributes:
        entries: what each compiled variant uses.
        bytes: the bytes that each case (an operation with certain arguments) moves for each element
            of an image: {case: {"fp32" or "bf16": {"counted": in Triton's interpreter, "formula":
            by the operation's record, "plain": by eager PyTorch, or None}}}.
        gated: whether exceeded budgets are faults: whether the installed Triton is the pinned one.
    """

    entries: list[Entry]
    bytes: counting.Bytes
    gated: bool

    @property
    def bounds(self) -> list[TimeBound]:
        """The time bounds of the kernels on the reference card (an H100 SXM), in entries' order.

        There is one for each entry of architecture 90 whose code has no loop and for whose kernel
        bytes were counted: those that Triton's interpreter loaded and stored ("counted" in
        ``bytes``) in the first, lightest, case of the kernel; float16 takes bfloat16's. The times
        are picoseconds for each element; ``TimeBound`` says how far they are lower bounds.
        """
        light: dict[str, str] = {}
        for _, case in counting.CASES.values():
            for name in case.kernels:
                light.setdefault(name, case.name)
        found = []
        for entry in self.entries:
            case_bytes = self.bytes.get(light.get(entry.kernel, ""), {})
            dtype = "fp32" if entry.dtype == "fp32" else "bf16"
            if entry.arch == REFERENCE and entry.clocks and dtype in case_bytes:
                moved = case_bytes[dtype]["counted"] or 0.0
                clock = MULTIPROCESSORS * CLOCK
                times = {"memory": moved / BANDWIDTH * 1e12}
                times |= {name: n / clock * 1e12 for name, n in entry.clocks.items()}
                found.append(TimeBound(entry.kernel, entry.dtype, times))
        return found

    @property
    def faults(self) -> list[str]:
        """What fails, a sentence each; an empty list if all is well.

        A gate (a check of compiled code) that fails and a count of bytes that differs from the
        formula are always faults; an exceeded budget (``excess``) is one only if ``gated``.
        """
        found = [f"{entry.name}: {fault}" for entry in self.entries for fault in entry.faults]
        for case, dtypes in self.bytes.items():
            for dtype, counts in dtypes.items():
                if counts["counted"] != counts["formula"]:
                    found.append(
                        f"{case} {dtype}: {counts['counted']:.4g} bytes an element counted, "
                        f"{counts['formula']:.4g} by the formula"
                    )
        return found + (self.excess if self.gated else [])

    @property
    def excess(self) -> list[str]:
        """The budgets that are exceeded, a sentence each, whichever the version of Triton.

        They include kernels that must be bound by memory (``Budget.memory_bound``) and are not.
        """
        found = [f"{entry.name}: {excess}" for entry in self.entries for excess in entry.over]
        for bound in self.bounds:
            budget = compiled.KERNELS[bound.kernel].budgets.get(ITEMSIZES[bound.dtype])
            if budget and budget.memory_bound and bound.by != "memory":
                found.append(
                    f"{bound.kernel} {bound.dtype}: bound by {bound.by}, must be by memory"
                )
        return found

    def json(self) -> str:
        """Return the scorecard as JSON text.

        An object of "triton" and "pinned" (versions), "reference" (the card's "multiprocessors",
        "clock_hz" and "bandwidth_bytes_per_s"), "kernels" (the entries), "bytes_per_element",
        "bounds_ps_per_element" (time bounds, each with "by"), "faults" and "over_budget".
        """
        return json.dumps(
            {
                "triton": triton.__version__,
                "pinned": budgets.PINNED,
                "reference": {
                    "multiprocessors": MULTIPROCESSORS,
                    "clock_hz": CLOCK,
                    "bandwidth_bytes_per_s": BANDWIDTH,
                },
                "kernels": [asdict(entry) for entry in self.entries],
                "bytes_per_element": self.bytes,
                "bounds_ps_per_element": [asdict(b) | {"by": b.by} for b in self.bounds],
                "faults": self.faults,
                "over_budget": self.excess,
            },
            indent=2,
        )


def scorecard(
    kernels: Iterable[str] | None = None, archs: Sequence[int] = compiled.ARCHITECTURES
) -> Scorecard:
    """Compile kernels, count the bytes that they move, and return the scorecard.

    Args:
        kernels: names of variants (keys of ``compiled.KERNELS``); None for all.
        archs: compute capabilities times 10; there are time bounds only if 90 is one of them.

    Returns:
        The scorecard, with an entry for each variant, dtype of its images and architecture, in that
        order, and the bytes of every case that uses one of the variants.

    Raises:
        KeyError: if a name is not in ``compiled.KERNELS``.
        RuntimeError: if TRITON_INTERPRET is set, or if the counting process fails.
    """
    names = list(compiled.KERNELS if kernels is None else kernels)
    variants: list[Variant] = [
        (compiled.KERNELS[name], dtype, arch)
        for name in names
        for dtype in compiled.KERNELS[name].dtypes
        for arch in archs
    ]
    cases = counting.CASES.items()
    used = [name for name, (_, case) in cases if not set(names).isdisjoint(case.kernels)]
    child = counting.start(used) if used else None
    try:
        entries = measure(variants)
        moved = counting.result(child) if child else {}
    finally:
        if child:
            child.kill()
    return Scorecard(entries, moved, budgets.pinned())
