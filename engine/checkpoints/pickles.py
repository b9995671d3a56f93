"""PyTorch's .bin weights, read only when asked for: a zip of one pickle and all tensors' bytes.

A pickle is a program. torch.load(weights_only=True) runs a small part of its language, and the
pickle is first run here without values, so that only what torch.save writes for a state dict
reaches it: zip entries that are not compressed and fit in the file, the names in ``GLOBALS``, and
tuples that are neither deep nor shared, as the hash of such a tuple takes forever or overflows the
stack.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flashddpm.errors import CheckpointError
from flashddpm.io.files import require_file

MAX_DIRECTORY = 1 << 20
MAX_PICKLE = 1 << 20
MAX_TUPLES = 3

ENTRY = re.compile(
    r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id)"
)
GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch FloatStorage",
    "torch DoubleStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
}
CONSTANTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "NEWTRUE", "NEWFALSE", "NONE",
    "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_LIST", "BINFLOAT",
}  # fmt: skip
POPS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "BINPERSID": 1, "SETITEM": 2,
        "BUILD": 1, "APPEND": 1}  # fmt: skip
"""The number of values that an opcode takes from the stack; opcodes that are not listed here take
all values above the latest mark."""


NESTED = {"EMPTY_LIST", "APPEND", "APPENDS", "BINFLOAT"}
NESTED_GLOBALS = {"torch LongStorage", "torch BoolStorage"}
"""The opcodes and names that a file of a training run needs besides: those of numbers and lists,
such as an optimizer's settings."""
MAX_DICTS = 8


def read_pickled(path: Path, nested: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a state dict that torch.save wrote, by name, on the CPU, as stored.

    Args:
        path: the .bin file.
        nested: whether dicts of dicts, at most 8 deep, are read too: their names are joined by
            dots, and what is no tensor is left out.

    Raises:
        CheckpointError: if the file is missing or broken, is not a dict of names and tensors, if a
            tensor is not contiguous or a storage is not filled from end to end by tensors, or if
            PyTorch is older than 2.10, whose loader can be made to read and write outside of its
            memory.
    """
    require_file(path)
    if torch.__version__ < "2.10":  # a TorchVersion, compared as a version
        raise CheckpointError(
            f"{path}: needs torch 2.10 or newer to be read safely, not {torch.__version__}; "
            "convert it to safetensors"
        )
    try:
        with open(path, "rb") as file:
            _check_zip(file, nested)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        return _check_state(dict(_flatten(state, MAX_DICTS, set())) if nested else state)
    except Exception as error:  # what torch.load may raise on a broken file is without end
        raise CheckpointError(f"{path}: cannot be read as a state dict: {error}") from error


def _check_directory(file: BinaryIO) -> None:
    """Refuse a zip unless it has one short directory, at its very end.

    Two readers could otherwise find two different directories.
    """
    size = file.seek(0, 2)
    file.seek(max(size - 98, 0))
    record, locator, end = struct.unpack("56s20s22s", file.read().rjust(98, b"\0"))
    signature, *_, length, start, comment = struct.unpack("<4s4H2IH", end)
    if signature != b"PK\5\6" or comment:
        raise ValueError("it does not end as a zip file: cut short, or of PyTorch before 1.6")
    stop = size - len(end)
    if locator.startswith(b"PK\6\7"):  # the 64-bit form, which torch.save always adds
        stop = size - 98
        small = length, start
        signature, *_, length, start = struct.unpack("<4sQ2H2I4Q", record)
        if (
            signature != b"PK\6\6"
            or struct.unpack("<4sIQI", locator)[2] != stop
            or any(a not in (b, 2**32 - 1) for a, b in zip(small, (length, start), strict=True))
        ):
            raise ValueError("its two zip directories differ")
    if start + length != stop or length > MAX_DIRECTORY:
        raise ValueError(f"its zip directory is not at its end, or above {MAX_DIRECTORY} bytes")


def _check_zip(file: BinaryIO, nested: bool) -> None:
    """Refuse an archive that is not one of torch.save's, whose entries are stored and fit in it."""
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        for entry in entries:
            if not ENTRY.fullmatch(entry.filename):
                raise ValueError(f"its entry {entry.filename!r} is not one of torch.save's")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"its entry {entry.filename!r} is compressed, must be stored")
        if len(names) != len(entries) or len({name.split("/")[0] for name in names}) != 1:
            raise ValueError("an entry stands twice in it, or in two folders")
        if sum(entry.file_size for entry in entries) > file.seek(0, 2):
            raise ValueError("its entries are larger than the file")
        program = next((e for e in entries if e.filename.endswith("/data.pkl")), None)
        if program is None or program.file_size > MAX_PICKLE:
            raise ValueError(f"it must have a data.pkl of at most {MAX_PICKLE} bytes")
        _check_program(archive.read(program), nested)


def _check_program(program: bytes, nested: bool) -> None:
    """Run a pickle with each value's depth of tuples in the place of the value."""
    depths = _Depths()
    for opcode, argument, _ in pickletools.genops(program):
        _check_opcode(opcode.name, argument, nested)
        depths.run(opcode.name, argument)


def _check_opcode(name: str, argument: Any, nested: bool) -> None:
    """Refuse an opcode, or a global name, that no state dict needs."""
    globals_ = GLOBALS | NESTED_GLOBALS if nested else GLOBALS
    if name == "GLOBAL" and argument not in globals_:
        raise ValueError(f"it asks for {argument!r}, which a state dict has no need of")
    if name in NESTED and not nested:
        raise ValueError(f"its pickle has the opcode {name}, which no state dict needs")


class _Depths:
    """The pickle machine, with each value's depth of tuples in the place of the value."""

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[Any, int] = {}

    def run(self, name: str, argument: Any) -> None:
        """Run one opcode of a pickle.

        Args:
            name: the opcode's name in pickletools, such as "BININT1".
            argument: its argument as `pickletools.genops` yields it, or None; only that of opcodes
                of the memo, an int, is used.

        Raises:
            ValueError: if torch.save never writes it, or it nests tuples too deep or shares one.
        """
        if name in CONSTANTS or name == "GLOBAL":
            self._stack.append(0)
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if self._memo[argument]:
                raise ValueError("it holds one tuple in two places")
            self._stack.append(0)
        elif name in POPS or name in ("TUPLE", "SETITEMS", "APPENDS"):
            self._reduce(name)
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"its pickle has the opcode {name}, which torch.save does not write")

    def _reduce(self, name: str) -> None:
        """Take values off the stack, and put there what they make."""
        start = len(self._stack) - POPS[name] if name in POPS else self._marks.pop()
        if start < (self._marks[-1] if self._marks else 0):
            raise ValueError("its pickle is broken")
        taken = self._stack[start:]
        del self._stack[start:]
        if name.startswith("TUPLE"):
            self._stack.append(1 + max(taken, default=0))
            if self._stack[-1] > MAX_TUPLES:
                raise ValueError(f"it nests tuples more than {MAX_TUPLES} deep")
        elif name in ("REDUCE", "BINPERSID"):
            self._stack.append(0)


def _check_state(state: Any) -> dict[str, Tensor]:
    """Return a state dict once its tensors are contiguous and fill their storages.

    A view may otherwise show more numbers than the file has.
    """
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, must hold a dict of tensors")
    tiles: dict[int, set[tuple[int, int]]] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"it holds a {type(key).__name__} and a {type(value).__name__}, must hold names "
                "and tensors only"
            )
        if value.layout is not torch.strided or not value.is_contiguous():
            raise ValueError(f"{key} must be contiguous")
        start = value.storage_offset() * value.element_size()
        tiles.setdefault(_storage(value), set()).add((int(start), int(start + value.nbytes)))
    for key, value in state.items():
        if not _fill(tiles[_storage(value)], value.untyped_storage().nbytes()):
            raise ValueError(f"{key} must be all of its storage, or all but other tensors")
    return {key: value.detach() for key, value in state.items()}


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _fill(tiles: set[tuple[int, int]], nbytes: int) -> bool:
    """Return whether tiles (start, stop), in bytes, lie end to end from 0 to nbytes.

    They do where the tensors were one storage when they were saved.
    """
    end = 0
    for start, stop in sorted(tiles):
        if start != end:
            return False
        end = stop
    return end == nbytes


def _flatten(
    value: Any, depth: int, seen: set[int], name: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of dicts of dicts; each dict may occur in one place only."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, must hold a dict of tensors")
    if not depth or id(value) in seen:
        raise ValueError(f"it nests dicts more than {MAX_DICTS} deep, or has one in two places")
    seen.add(id(value))
    for key, part in value.items():
        if isinstance(part, dict):
            yield from _flatten(part, depth - 1, seen, f"{name}{key}.")
        elif isinstance(part, Tensor):
            yield f"{name}{key}", part
