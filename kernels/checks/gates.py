"""Gates, checks of a kernel's intermediate code and assembly (compiled.py says why they must hold).

Each check returns what is wrong, in words, and nothing if all is well. What a check does not
understand it reports: silence means that the code was read.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100)
"""The compute capabilities that kernels are compiled for, times 10."""

EXACT = re.compile(
    r"""(add|sub|mul)\.rn\.f32(x2)?        # rounded to nearest, subnormals kept
    | (div|sqrt)\.rn\.f32
    | cvt\.rn\.f32\.[su](32|64)
    | cvt\.f32\.(bf16|f16)                 # exact
    | cvt\.rn\.(bf16|f16)(x2)?\.f32
    | (abs|neg)\.(f32|f16|bf16)(x2)?
    | (min|max)\.NaN(\.xorsign\.abs)?\.f32  # of a clip that keeps NaN
    | setp\.[a-z]+(\.and|\.or)?\.(f32|f16|bf16) | selp\.f32 | mov\.f32""",
    re.VERBOSE,
)
FLOATING = re.compile(r"\.(e\dm\d|t?b?f\d+)|^call|^(fma|ex2|lg2|sin|cos|tanh|rcp|rsqrt)\b")
ROUNDING = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "approx", "full", "ftz")


def _instructions(ptx: str) -> Iterator[tuple[str, str]]:
    """Yield the instructions of PTX: (name with modifiers, operands)."""
    for match in re.finditer(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s(.*)", ptx, re.M):
        yield match[1], match[2]


def inexact_operations(ptx: str) -> list[str]:
    """Return the calls and the inexact floating-point instructions in an assembly text.

    An instruction is exact if it is a correctly rounded float32 operation. With ``.rn`` written
    out, the assembler may not fuse a product into a sum (PTX, 9.7.3). A fused one passes where a
    factor is a constant 1, 1/2, 1/4, ...: its product is exact (unless it is subnormal), so that
    nothing is left for the fusion to round.

    Args:
        ptx: assembly of one kernel.

    Returns:
        "COUNT x NAME" for each such instruction, in alphabetical order of names.
    """
    counts = Counter[str]()
    moved: dict[str, list[str] | None] = {}  # constants by register; None if it has had another
    instructions = list(_instructions(ptx))
    for name, operands in instructions:
        target, *values = re.findall(r"%\w+|\b0f[0-9A-Fa-f]{8}\b|\d+", operands) or [""]
        moved[target] = values if name.startswith("mov.") and target not in moved else None

    def halves(value: str) -> bool:
        if value.startswith("0f"):
            bits = int(value[2:], 16)
            return bits & 0x7FFFFF == 0 and 1 <= bits >> 23 & 0xFF <= 127
        constants = moved.get(value)
        return bool(constants) and all(halves(constant) for constant in constants or ())

    for name, operands in instructions:
        if FLOATING.search(name) and not EXACT.fullmatch(name):
            factors = [value.strip() for value in operands.split(",")][1:3]
            fused = re.fullmatch(r"fma\.rn\.f32(x2)?", name)
            if not (fused and any(map(halves, factors))):
                counts[name] += 1
    return [f"{count} x {name}" for name, count in sorted(counts.items())]


def rounding_modes(ptx: str) -> list[str]:
    """Return the rounding modes that floating-point instructions name, in alphabetical order.

    Args:
        ptx: assembly of one kernel.

    Returns:
        Modes such as "rn" (to nearest), "approx" or "ftz" (subnormals flushed to zero).
    """
    names = {name for name, _ in _instructions(ptx) if FLOATING.search(name)}
    return sorted({part for name in names for part in name.split(".")} & set(ROUNDING))


def wide_operations(ptx: str) -> list[str]:
    """Return the float64 instructions and the calls in an assembly text: "COUNT x NAME".

    They are slow on every GPU, whether the kernel is exact (the same bits everywhere) or not.

    Args:
        ptx: assembly of one kernel.
    """
    counts = Counter(name for name, _ in _instructions(ptx))
    slow = re.compile(r"\.f64|^call")
    return [f"{count} x {name}" for name, count in sorted(counts.items()) if slow.search(name)]


GROWS = ("arith.addi", "arith.subi", "arith.muli", "arith.shli")
LEAVES = (
    *("argument", "loop variable", "arith.constant"),
    *("tt.get_program_id", "tt.get_num_programs", "tt.load", "tt.make_range"),
)
SHAPED = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")
FOLLOWED = (
    *("arith.extsi", "arith.extui", *SHAPED),
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
    """Return the operations in address offsets that may overflow since they have under 64 bits.

    Every offset of every address is followed back to arguments, constants, program ids, ranges,
    loop variables and loaded values; between them may stand 64-bit sums and products, and
    operations of any width that do not grow a value. Anything else is a fault, so that what the
    check does not know it refuses.

    Args:
        ttir: Triton's intermediate code of one kernel.

    Returns:
        A sentence for each kind of operation, in alphabetical order; none if all is well.
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


def needed_bytes(ttir: str, threads: int) -> dict[str, int] | None:
    """Return the bytes that a thread needs to move for each pointer argument.

    A number that is the same for all threads is read by each.

    Args:
        ttir: Triton's intermediate code of one kernel.
        threads: the threads of a program (a thread block).

    Returns:
        {argument: bytes}; None if the code has a loop, whose accesses are not counted.
    """
    needed: dict[str, int] = defaultdict(int)
    for value in _lines(ttir):
        if value.operation in ("scf.for", "scf.while"):
            return None
        if value.operation in ("tt.load", "tt.store"):
            base = value.operands[0]
            while base.operation in ("tt.addptr", *SHAPED):
                base = base.operands[0]
            match = re.fullmatch(r"(?:tensor<([\dx]+)x)?!tt\.ptr<[a-z]+(\d+)>+", value.type)
            elements = math.prod(map(int, match[1].split("x"))) if match and match[1] else 1
            size = int(match[2]) // 8 if match else 0
            name = base.type if base.operation == "argument" else base.operation
            needed[name] += max(elements // threads, 1) * size
    return dict(needed)


def accesses(ptx: str, arguments: Sequence[str]) -> dict[str, Counter[int]]:
    """Count the accesses of global memory in a kernel's assembly by pointer argument and width.

    An address is followed back through all that it is computed from, loaded values excepted, to the
    parameter that holds its base; one that comes from none or several stands under "?".

    Args:
        ptx: assembly of one kernel.
        arguments: names of its parameters in order.

    Returns:
        {argument: {bytes that a thread moves at once: number of such instructions}}.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    found: dict[str, Counter[int]] = defaultdict(Counter)
    reached = []
    for name, operands in _instructions(ptx):
        if match := re.fullmatch(r"(?:ld|st)\.global(?:[.:]+\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", name):
            base = re.search(r"\[\s*(%\w+)", operands)
            width = int(match[1] or 1) * int(match[2]) // 8
            reached.append((base[1] if base else "?", width))
        elif not re.match(r"(ld|st|red|atom)\.(?!param)", name):  # what is loaded is no address
            target, *rest = re.findall(r"%\w+|param_\d+(?=\])", operands) or [""]
            sources[target] |= set(rest)
    pointers = {f"param_{i}" for i in re.findall(r"\.ptr \.global .*param_(\d+)", ptx)}
    for address, width in reached:
        seen, todo = set[str](), {address}
        while todo:
            seen |= todo
            todo = set().union(*(sources[name] for name in todo)) - seen
        bases = [arguments[int(name[6:])] for name in seen & pointers]
        found[bases[0] if len(bases) == 1 else "?"][width] += 1
    return dict(found)


def narrow_accesses(
    found: dict[str, Counter[int]], needed: dict[str, int] | None, images: Sequence[str]
) -> list[str]:
    """Return what is wrong with a kernel's accesses of global memory, in words.

    Wrong are accesses of images in less than 16 bytes, bytes moved beyond what a thread needs,
    accesses of unknown origin, and arguments of which no access is seen. Less may be moved than is
    needed: the compiler merges equal loads. The list is empty if all is well.

    Args:
        found: accesses by pointer argument and bytes (``accesses``).
        needed: bytes that a thread needs by pointer argument (``needed_bytes``); None, for code
            with a loop, leaves the bytes moved unchecked.
        images: names of the arguments that must be accessed 16 bytes at a time.
    """
    faults = []
    for name, widths in sorted(found.items()):
        text = f"{name} accessed by bytes {dict(sorted(widths.items()))}"
        if name == "?":
            faults.append(f"{text}: of unknown origin")
        elif name in images and min(widths) < 16:
            faults.append(f"{text}: an image moves 16 at a time")
        elif needed and (moved := sum(w * n for w, n in widths.items())) > needed.get(name, 0):
            faults.append(f"{text}: {moved} for a thread, {needed.get(name, 0)} needed")
    missing = dict.fromkeys((*images, *(needed or {}))).keys() - found.keys()
    return faults + [f"no access of {name} is seen" for name in sorted(missing)]
