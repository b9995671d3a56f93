"""The machine code (SASS) of kernels: counts of instructions by opcode and by part of the GPU.

Throughputs are those of compute capability 9.0 (H100), in results per clock and multiprocessor:
CUDA C++ Programming Guide, "Performance Guidelines", "Arithmetic Instructions", table of the
throughput of native arithmetic instructions. What that table does not list is marked below.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from flashddpm.kernels.checks import cubins

ISSUE = 128
"""Lanes (threads) a clock that a multiprocessor issues for: its 4 schedulers issue one instruction
each for a warp of 32.
"""


@dataclass(frozen=True)
class Pipe:
    """A part of a multiprocessor that runs certain instructions; its name is its key in ``PIPES``.

    Attributes:
        rate: threads served a clock cycle, or None where issuing the instruction is the only cost.
        opcodes: the instructions that it runs, without the modifiers after the dot.
    """

    rate: int | None
    opcodes: frozenset[str]


def _pipe(rate: int | None, opcodes: str) -> Pipe:
    return Pipe(rate, frozenset(opcodes.split()))


PIPES = {
    # add, multiply, multiply-add; the compiler also makes constants with HFMA2 -RZ, RZ, c, d
    "float": _pipe(128, "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2 FSWZADD"),
    # add, logic, shift, compare, minimum, select, move and byte permutation
    "integer": _pipe(
        64,
        "IADD3 IADD VIADD IABS VIADDMNMX LEA LOP3 LOP PLOP3 SHF SHL SHR ISETP IMNMX VIMNMX VIMNMX3"
        " SEL FSEL FSETP FMNMX FMNMX3 FSET FCHK HSETP2 HMNMX2 MOV MOV32I PRMT SGXT BMSK P2R R2P"
        " CS2R VOTE VABSDIFF LOP32I IADD32I ISCADD",
    ),
    # 32-bit multiply and multiply-add; the compiler also moves, adds and shifts with them
    "multiply": _pipe(64, "IMAD IMUL IDP IMAD32I"),
    "convert": _pipe(64, "I2F I2FP F2I F2F F2FP I2I I2IP F2IP FRND"),
    # reciprocal, root, logarithm and the like; counting bits, reductions over a warp
    "special": _pipe(16, "MUFU POPC FLO BREV REDUX CREDUX"),
    # the load and store unit, 32 lanes a clock (shuffles in the table; the rest alike)
    "access": _pipe(32, "LDG STG LDS STS LD ST LDL STL ATOM ATOMG ATOMS RED SHFL LDSM STSM MATCH"),
    # what is the same for a warp runs once a warp, beside the lanes
    "uniform": _pipe(
        None,
        "UIADD3 UIMAD ULEA USHF ULOP3 UMOV UISETP USEL UPRMT UPLOP3 UIMNMX UVIMNMX ULDC LDC LDCU"
        " UBMSK USGXT UFLO UPOPC UFMUL UFADD UFFMA UFSETP UFSEL UFMNMX UI2F UI2FP UF2FP UF2F UF2I"
        " VOTEU R2UR R2UP S2R S2UR CS2UR UIABS UVIADD UCLEA UP2UR UR2UP",
    ),
    "control": _pipe(
        None,
        "BRA BRX JMP JMX EXIT RET CALL BSSY BSYNC BREAK BAR WARPSYNC DEPBAR NOP NANOSLEEP MEMBAR"
        " FENCE ERRBAR CCTL BMOV ELECT ACQBULK PREEXIT YIELD LEPC BPT KILL RPCMOV GETLMEMBASE"
        " SYNCS WARPGROUP",
    ),
}
_PIPE_OF = {opcode: name for name, pipe in PIPES.items() for opcode in pipe.opcodes}
assert len(_PIPE_OF) == sum(len(pipe.opcodes) for pipe in PIPES.values()), "an opcode in two pipes"


@dataclass(frozen=True)
class MachineCode:
    """The instructions that one thread executes, by opcode without modifiers.

    Attributes:
        opcodes: how many instructions of each opcode stand in the kernel, slow paths left out.
        slow: instructions of the rare paths of roots and divisions: subroutines, and the blocks
            that call them. They run for subnormal, infinite and NaN operands only.
        loops: whether some instructions run more than once, so that ``opcodes`` is no total of what
            runs.
    """

    opcodes: Counter[str]
    slow: int
    loops: bool

    @property
    def instructions(self) -> int:
        """The number of instructions that stand in the kernel, slow paths left out."""
        return self.opcodes.total()

    @property
    def unknown(self) -> list[str]:
        """The opcodes that no pipe (part of a multiprocessor) is known to run, sorted."""
        return sorted(self.opcodes.keys() - _PIPE_OF.keys())

    @property
    def pipes(self) -> dict[str, int]:
        """The number of instructions by the name of their pipe (part of a multiprocessor).

        Those of no known pipe stand under "unknown".
        """
        counts = Counter[str]()
        for opcode, count in self.opcodes.items():
            counts[_PIPE_OF.get(opcode, "unknown")] += count
        return dict(counts)

    def clocks(self) -> dict[str, float]:
        """Return the clock cycles of a multiprocessor that one thread costs, at full rate.

        Returns:
            {"issue": cycles for issuing all instructions, pipe: cycles in that part of the
            multiprocessor}, for the pipes of limited rate that run some. As many threads run at
            once, these are fractions such as instructions / 128.
        """
        clocks = {"issue": self.instructions / ISSUE}
        for name, count in self.pipes.items():
            if name in PIPES and (rate := PIPES[name].rate):
                clocks[name] = count / rate
        return clocks


def _run(tool: str, options: Iterable[str], cubin: bytes) -> str:
    """Run one of the binary tools that come with Triton on a cubin; return what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [tool, *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return the resources of the one function in a cubin (a compiled kernel).

    Args:
        cubin: the ELF file.

    Returns:
        What ``cuobjdump`` reports, by name: "REG", registers of a thread; "STACK" and "LOCAL",
        bytes of a thread; "SHARED", bytes of a thread block; and what else it prints as
        NAME:NUMBER.

    Raises:
        subprocess.CalledProcessError: if ``cuobjdump`` fails, for instance on what is no cubin.
    """
    text = _run(triton.knobs.nvidia.cuobjdump.path, ["--dump-resource-usage"], cubin)
    return {name: int(size) for name, size in re.findall(r"\b([A-Z]+):(\d+)", text)}


def disassemble(files: Sequence[bytes]) -> list[str]:
    """Return the machine code of each cubin (a compiled kernel) as nvdisasm prints it.

    nvdisasm runs once for all of them and leaves out data.

    Args:
        files: cubins of one kernel and the same architecture each, at least one.

    Raises:
        ValueError: if there are no cubins, they are of several architectures, or one does not have
            exactly one kernel.
        subprocess.CalledProcessError: if nvdisasm fails.
    """
    text = _run(triton.knobs.nvidia.nvdisasm.path, ["-c", "-ndf"], cubins.join(files))
    _, *parts = re.split(r"^//-+ \.text\.\d+ +-+$", text, flags=re.MULTILINE)
    assert len(parts) == len(files), f"{len(parts)} kernels of {len(files)} are disassembled"
    return parts


@dataclass(frozen=True)
class _Block:
    """Instructions that run one after the other.

    Attributes:
        label: where it begins, "" without one.
        before: labels up to and with it.
        subroutine: whether it belongs to one.
        code: (opcode, operands).
    """

    label: str
    before: frozenset[str]
    subroutine: bool
    code: list[tuple[str, str]]


def _blocks(sass: str) -> Iterator[_Block]:
    """Yield the basic blocks in program order; some are empty."""
    block = _Block("", frozenset(), False, [])
    for line in sass.splitlines():
        if match := re.match(r"([.$][\w.$]+):", line):
            yield block
            name = match[1]
            subroutine = block.subroutine or name.startswith("$")
            block = _Block(name, block.before | {name}, subroutine, [])
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s*(.*)", line):
            code = re.match(r"\{?\s*(?:@!?U?P\w+\s+)?([A-Z]\w*)[\w.]*\s*([^;]*);", match[1])
            if code is None:
                raise ValueError(f"line of machine code {line.strip()!r}: not understood")
            block.code.append((code[1], code[2]))
            if code[1] in ("BRA", "EXIT", "RET", "BRX"):
                yield block
                block = _Block("", block.before, block.subroutine, [])
    yield block


def read(sass: str) -> MachineCode:
    """Count the instructions in nvdisasm's text of one kernel.

    Padding after the last instruction is left out: NOPs and the branch to itself.

    Args:
        sass: the text (an entry of what ``disassemble`` returns).

    Raises:
        ValueError: if a line looks like an instruction and is not understood.
    """
    opcodes, slow, loops = Counter[str](), 0, False
    for block in _blocks(sass):
        names = [name for name, _ in block.code if name != "NOP"]
        jump = re.search(r"\.L_x_\d+", block.code[-1][1]) if names[-1:] == ["BRA"] else None
        if jump and len(names) == 1 and jump[0] == block.label:
            continue  # it guards what lies behind the kernel's end
        loops = loops or (jump is not None and jump[0] in block.before and not block.subroutine)
        if block.subroutine or "CALL" in names:
            slow += len(names)
        else:
            opcodes.update(names)
    return MachineCode(opcodes, slow, loops)
