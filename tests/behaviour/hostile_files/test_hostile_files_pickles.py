"""Named cases of pickles, and any change of one in its archive."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.checkpoints.pickles import MAX_PICKLE
from flashddpm.checkpoints.weights import PICKLED


def pickled(value: Any) -> Callable[[Path], None]:
    return lambda root: torch.save(value, root / "unet" / PICKLED)


def plain(value: Any) -> Callable[[Path], Any]:
    """Put a pickle in the place of the archive."""
    return lambda root: (root / "unet" / PICKLED).write_bytes(pickle.dumps(value))


def program(text: bytes) -> Callable[[Path], None]:
    """Put another pickle in the place of the one in the archive."""
    return lambda root: rezip(root, lambda name, data: text if name == "data.pkl" else data)


def rezip(root: Path, change: Callable[[str, bytes], bytes], method: int = 0) -> None:
    path = root / "unet" / PICKLED
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in entries.items():
            new.writestr(name, change(name.split("/", 1)[1], data))


def twice(root: Path) -> None:
    with zipfile.ZipFile(root / "unet" / PICKLED, "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        archive.writestr(name, b"N.")


def many_entries(root: Path) -> None:
    with zipfile.ZipFile(root / "unet" / PICKLED, "w") as archive:
        for i in range(20_000):
            archive.writestr(zipfile.ZipInfo(f"a/data/{i:05}"), b"")


def two_directories(root: Path) -> None:
    """Let the 32-bit end of the archive point elsewhere than its 64-bit one."""
    path = root / "unet" / PICKLED
    data = bytearray(path.read_bytes())
    data[-6:-2] = (int.from_bytes(data[-6:-2], "little") - 46).to_bytes(4, "little")
    path.write_bytes(data)


def append(root: Path) -> None:
    path = root / "unet" / PICKLED
    path.write_bytes(path.read_bytes() + b"more")


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


EVIL = "evil-was-here"
DEEP_TUPLE = b"\x80\x02}q\x00)" + b"\x85" * (MAX_PICKLE - 100) + b"K\x01s."
SHARED_TUPLE = (
    b"\x80\x02})" + b"".join(b"\x85q%c" % i + b"h%c\x86" % i for i in range(100)) + b"K\x01s."
)
CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a pickle that runs a command": (
        "pickled",
        pickled({"conv_in.bias": Touch(os.system, f"touch {EVIL}")}),
        "it asks for 'posix system'",
    ),
    "a pickle that opens a file": ("pickled", pickled(Touch(open, EVIL, "w")), "it asks for '"),
    "a pickle that evaluates": (
        "pickled",
        pickled(Touch(eval, "1")),
        "it asks for '__builtin__ eval'",
    ),
    "a pickle that takes memory": ("pickled", pickled(Touch(bytearray, 10**11)), "bytearray"),
    "a pickle without a zip": (
        "pickled",
        plain(Touch(os.system, f"touch {EVIL}")),
        "does not end as a zip file",
    ),
    "a pickle of a list": ("pickled", pickled([torch.zeros(2)]), "opcode EMPTY_LIST"),
    "a pickle of a number": ("pickled", pickled({"a": 1}), "names and tensors only"),
    "a pickle of numbered tensors": ("pickled", pickled({1: torch.zeros(2)}), "names and tensors"),
    "a pickle of a whole module": (
        "pickled",
        pickled(torch.nn.Linear(1, 1)),
        "it asks for 'torch.nn",
    ),
    "a tensor that shows more than there is": (
        "pickled",
        pickled({"conv_in.bias": torch.zeros(1).expand(10**9)}),
        "must be contiguous",
    ),
    "a tensor that shows less than there is": (
        "pickled",
        pickled({"conv_in.bias": torch.arange(100.0)[:4]}),
        "all of its storage",
    ),
    "a tensor that is turned": (
        "pickled",
        pickled({"conv_in.bias": torch.zeros(2, 3).t()}),
        "must be contiguous",
    ),
    "a sparse tensor": (
        "pickled",
        pickled({"conv_in.bias": torch.eye(3).to_sparse()}),
        "it asks for 'torch._utils _rebuild_sparse",
    ),
    "a record that is short": (
        "pickled",
        lambda root: rezip(root, lambda name, data: data[:-4] if name == "data/0" else data),
        "state dict",
    ),
    "an archive that is compressed": (
        "pickled",
        lambda root: rezip(root, lambda _, data: data, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "an archive with other files": (
        "pickled",
        lambda root: zipfile.ZipFile(root / "unet" / PICKLED, "a").writestr("x/run.py", ""),
        "'x/run.py' is not one of torch.save's",
    ),
    "an archive with an entry twice": ("pickled", twice, "twice"),
    "an archive of many entries": ("pickled", many_entries, "directory"),
    "an archive of two directories": ("pickled", two_directories, "two zip directories"),
    "an archive with bytes after it": (
        "pickled",
        append,
        "does not end as a zip file",
    ),
    "a pickle that is long": ("pickled", program(b"\x80\x02" + b"N" * MAX_PICKLE), "at most"),
    "a pickle of a million constants": (
        "pickled",
        program(b"\x80\x02" + b"N" * (MAX_PICKLE - 3) + b"."),
        "state dict",
    ),
    "a tuple as deep as the stack": ("pickled", program(DEEP_TUPLE), "nests tuples"),
    "a tuple of shared tuples": ("pickled", program(SHARED_TUPLE), "one tuple in two places"),
    "a pickle that ends early": ("pickled", program(b"\x80\x02}q"), "state dict"),
    "a pickle that takes from nothing": ("pickled", program(b"\x80\x02\x86."), "pickle is broken"),
    "a pickle of no value": ("pickled", program(b"\x80\x02."), "state dict"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_named_cases(assert_refused: Any, tmp_path: Path, case: str) -> None:
    assert_refused(*CASES[case])
    assert not list(tmp_path.rglob(EVIL))


@settings(max_examples=120)
@given(data=st.data())
def test_any_change_of_a_pickle_in_its_archive(
    scratch: dict[str, Path], data: st.DataObject, changed: Any, judge: Any, mangle: Any
) -> None:
    """The archive stays whole, so that the changed program is reached."""
    path = scratch["pickled"] / "unet" / PICKLED
    before = path.read_bytes()
    opcodes = st.lists(st.sampled_from(b").]}(tusbRQN\x85\x86\x87q\x00h\x00K\x01"), max_size=30)
    text = data.draw(st.none() | opcodes.map(lambda codes: b"\x80\x02" + bytes(codes) + b"."))
    with changed(path, before):
        rezip(
            scratch["pickled"],
            lambda name, old: (
                old if name != "data.pkl" else mangle(data, old) if text is None else text
            ),
        )
        judge(scratch["pickled"])
