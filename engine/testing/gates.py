"""The gates of compiled code for anybody's kernel, from a process that may not compile.

Triton's interpreter and its compiler cannot share a process, so where the interpreter is on, the
kernel is compiled in a child process, which imports the kernel's file again. The first kernel
starts it, and it lives as long as this process: importing PyTorch takes longer than compiling.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flashddpm.kernels.checks.gates import ARCHITECTURES


@dataclass(frozen=True)
class KernelCode:
    """A Triton kernel and how it is compiled.

    Attributes:
        fn: the function, by its own name in a module or file.
        signature: type of each argument, "*fp32:16" for a pointer or int divisible by 16, in the
            dtype to test.
        constants: value of each constexpr argument.
        images: pointer arguments that must be accessed 16 bytes at a time; the others may be
            accessed by any bytes, but a thread moves no more of them than it needs.
        options: of the launch.
        foreign: pointer arguments of which neither the widths nor the amount is judged.
        exact: whether every floating-point operation must be correctly rounded; without, float64
            and calls are faults still.
        registers: the most that a thread may use; None if they are not judged.

    Raises:
        ValueError: an image or a foreign argument that is not in the signature.
    """

    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, int]
    images: Sequence[str] = ()
    options: Mapping[str, int | bool] | None = None
    foreign: Sequence[str] = ()
    exact: bool = True
    registers: int | None = None

    def __post_init__(self) -> None:
        for argument, names in (("images", self.images), ("foreign", self.foreign)):
            for name in names:
                if name not in self.signature:
                    allowed = ", ".join(self.signature)
                    raise ValueError(f"{argument}={name!r}: must be among {allowed}")


def code_faults(kernel: KernelCode, architectures: Sequence[int] = ARCHITECTURES) -> list[str]:
    """Return what is wrong with the kernel's machine code, nothing if all is well; no GPU needed.

    What is looked for stands in ``flashddpm.kernels.checks``. The file of the kernel must not set
    TRITON_INTERPRET where it is set already.

    Raises:
        ImportError: without Triton.
        ValueError: under the interpreter, a kernel that is not found by its name in its file.
        RuntimeError: the child process failed; with what it said.
    """
    from flashddpm.kernels.launch import INTERPRETED

    if not INTERPRETED:
        return _faults(kernel, architectures)
    function = kernel.fn.fn
    if "<locals>" in function.__qualname__:
        raise ValueError(f"fn={function.__qualname__}: must be a function of a module")
    request = {
        "file": inspect.getsourcefile(function),
        "module": function.__module__,
        "name": function.__name__,
        "architectures": list(architectures),
        "kernel": asdict(replace(kernel, fn=None)),
    }
    return _compiler(os.getpid()).faults(request)


class _Compiler:
    """A child process without the interpreter, that answers requests until this process ends."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import _serve; _serve()"],
            env=os.environ | {"TRITON_INTERPRET": "0"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )

    def faults(self, request: Mapping[str, Any]) -> list[str]:
        """Return the faults of the kernel that is asked for."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._turn:
            try:
                print(json.dumps(request), file=self._process.stdin, flush=True)
                answer = json.loads(self._process.stdout.readline())
            except (OSError, json.JSONDecodeError):  # it has ended
                _compiler.cache_clear()
                self._said.seek(0)
                answer = {"error": self._said.read()}
        if "error" in answer:
            raise RuntimeError(f"compiling {request['name']} failed:\n{answer['error']}")
        return answer["faults"]


@functools.cache
def _compiler(process: int) -> _Compiler:
    """Return the child of this process: one that is forked has a child of its own."""
    return _Compiler()


def _faults(kernel: KernelCode, architectures: Sequence[int]) -> list[str]:
    from flashddpm.kernels.checks.compiled import compile_kernel, faults
    from flashddpm.kernels.launch import OPTIONS

    signature, constants = dict(kernel.signature), dict(kernel.constants)
    options = OPTIONS if kernel.options is None else dict(kernel.options)
    allowed = tuple(f"{name} accessed by bytes " for name in kernel.foreign)
    found = []
    for arch in architectures:
        code = compile_kernel(kernel.fn, signature, constants, arch, options)
        for fault in faults(code, tuple(kernel.images), kernel.exact, kernel.registers):
            if not fault.startswith(allowed):
                found.append(f"for {arch}: {fault}")
    return found


def _serve() -> None:
    """Answer requests, a line each, with the faults of a kernel or with what went wrong."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a kernel's file prints is no answer
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"faults": _requested(json.loads(line))}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _requested(request: Mapping[str, Any]) -> list[str]:
    """Return the faults of the kernel that a request names."""
    fn = getattr(_module(request["module"], request["file"]), request["name"], None)
    if fn is None:
        raise ValueError(f"fn={request['name']}: not found in {request['file']}")
    kernel = KernelCode(**request["kernel"] | {"fn": fn})
    return _faults(kernel, request["architectures"])


def _module(name: str, file: str) -> Any:
    """Return the module; from its file, where it cannot be imported by name."""
    try:
        found = None if name == "__main__" else importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is not None and found.origin == file:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("kernel_under_test", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
