"""Joining of several cubins (compiled kernels) into one file, so that nvdisasm runs only once.

nvdisasm takes longer to start than to disassemble.
A cubin is a 64-bit little-endian ELF file. The code of its one kernel is the section
``.text.<kernel>``, in which symbols say where subroutines begin. Nothing else is carried over. The
low half of the header's flags names the architecture.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

_HEADER, _FUNCTION, _GLOBAL = 64, 2, 1
_SECTION, _SYMBOL = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")
_SYMBOL_TABLE, _STRING_TABLE = 2, 3


class _Section(NamedTuple):
    """An entry of the section header table (Elf64_Shdr)."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class _Symbol(NamedTuple):
    """An entry of the symbol table (Elf64_Sym)."""

    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


def _string(file: bytes, start: int) -> bytes:
    """Return the string that begins here, with the zero that ends it."""
    return file[start : file.index(b"\0", start) + 1]


class _Kernel:
    """The one kernel of a cubin.

    Attributes:
        section: of its code.
        code: the instructions.
        functions: symbols of the kernel and of its subroutines, and their names.
    """

    def __init__(self, cubin: bytes) -> None:
        (start,), (count, names) = (
            struct.unpack_from("<Q", cubin, 0x28),
            struct.unpack_from("<HH", cubin, 0x3C),
        )
        sections = [
            _Section(*_SECTION.unpack_from(cubin, start + i * _SECTION.size)) for i in range(count)
        ]
        named = {_string(cubin, sections[names].offset + s.name): i for i, s in enumerate(sections)}
        (text,) = [i for name, i in named.items() if name.startswith(b".text.")]
        self.section = sections[text]
        self.code = cubin[self.section.offset :][: self.section.size]
        table, strings = sections[named[b".symtab\0"]], sections[named[b".strtab\0"]].offset
        symbols = _SYMBOL.iter_unpack(cubin[table.offset :][: table.size])
        self.functions = [
            (symbol, _string(cubin, strings + symbol.name))
            for symbol in (_Symbol(*fields) for fields in symbols)
            if symbol.section == text and symbol.info & 15 == _FUNCTION
        ]


def join(cubins: Sequence[bytes]) -> bytes:
    """Join the code of several cubins (compiled kernels) into one ELF file and return its bytes.

    Its sections .text.0, .text.1, ... hold the code of the cubins, in order.

    Args:
        cubins: ELF files of one kernel each, all of the same architecture; at least one.

    Raises:
        ValueError: if there are no cubins, they are of several architectures, or one does not have
            exactly one kernel.
    """
    if len({struct.unpack_from("<H", cubin, 0x30) for cubin in cubins}) != 1:
        raise ValueError(f"{len(cubins)} cubins: must be one or more, of one architecture")
    kernels = [_Kernel(cubin) for cubin in cubins]
    first = 4  # sections: none, names of sections, names of symbols, symbols, code of each cubin
    names, strings = bytearray(b"\0"), bytearray(b"\0")
    symbols = [_Symbol(0, 0, 0, 0, 0, 0)]
    entries = []
    file = bytearray(_HEADER)

    def append(content: bytes, align: int) -> int:
        file.extend(bytes(-len(file) % align) + content)
        return len(file) - len(content)

    for i, kernel in enumerate(kernels):
        for symbol, name in kernel.functions:
            if symbol.info >> 4 == _GLOBAL:
                entry = len(symbols)
            symbols.append(symbol._replace(name=len(strings), section=first + i))
            strings += name
        section = kernel.section
        entries.append(
            section._replace(
                name=len(names),
                offset=append(kernel.code, section.align),
                link=first - 1,
                info=section.info & 0xFF000000 | entry,
            )
        )
        names += b".text.%d\0" % i
    table = b"".join(_SYMBOL.pack(*symbol) for symbol in symbols)
    tables = [
        _Section(0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        _Section(0, _STRING_TABLE, 0, 0, append(bytes(names), 1), len(names), 0, 0, 1, 0),
        _Section(0, _STRING_TABLE, 0, 0, append(bytes(strings), 1), len(strings), 0, 0, 1, 0),
        _Section(
            0, _SYMBOL_TABLE, 0, 0, append(table, 8), len(table), 2, 1, 8, _SYMBOL.size
        ),  # fmt: skip
    ]
    headers = [_SECTION.pack(*section) for section in (*tables, *entries)]
    start = append(b"".join(headers), 8)
    file[:_HEADER] = cubins[0][:_HEADER]
    struct.pack_into("<QQ", file, 0x20, 0, start)  # no program headers; where the sections' are
    struct.pack_into("<HHHHH", file, 0x36, 0, 0, _SECTION.size, len(headers), 1)
    return bytes(file)
