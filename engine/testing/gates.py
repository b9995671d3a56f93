"""The gates (checks) of compiled code for any Triton kernel, also from a process that interprets.

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
    """A Triton kernel whose machine code is to be checked, and how it is compiled.

    Attributes:
        fn: the Triton function, a global of a module or file under its own name.
        signature: the Triton type of each run-time argument by name, such as "*fp32:16" or "i32";
            the suffix ":16" marks a pointer or int divisible by 16.
        constants: the value of each constexpr argument, by name.
        images: the names of the pointer arguments to large tensors, such as batches of images: a
            load or store through them of less than 16 bytes is a fault. Through other pointers a
            narrow access is none, but moving more bytes than a thread needs is.
        options: the options of the launch by name, such as num_warps; None for those of this
            project's kernels: 2 warps, no fused multiply-add.
        foreign: the names of the pointer arguments whose accesses, wide or many, are not checked.
        exact: whether every floating-point operation must be correctly rounded; if not, float64 and
            function calls are still faults.
        registers: the most registers that a thread may use; None for no limit.

    Raises:
        ValueError: if a name in ``images`` or ``foreign`` is not in the signature.
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
    """Compile a kernel, without a GPU, and return the faults of its machine code, as strings.

    The list is empty if all is well. Faults are memory for spilt registers, too many registers,
    operations that are not correctly rounded, offsets of addresses that may wrap, accesses of
    ``images`` in less than 16 bytes, and more bytes moved through other pointers than a thread
    needs. The file of the kernel must not set TRITON_INTERPRET where it is set already.

    Args:
        kernel: the kernel and how it is compiled.
        architectures: the GPUs to compile for: compute capabilities times 10, such as 90.

    Raises:
        ImportError: if Triton is not installed.
        ValueError: if Triton's interpreter is on and the kernel is defined inside a function.
        RuntimeError: if Triton's interpreter is on and the child process failed, for example
            because the kernel was not found by its name in its file, or Triton cannot compile
            it; the text has the child's error. Without the interpreter Triton's own is raised.
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
        """Return the faults of the kernel that the request describes."""
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
    """Return the child process of this process; a forked process gets a child of its own."""
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
    """Answer each request, a line of JSON on stdin, with the kernel's faults or an error."""
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
    """Return the module of this name; load it from its file if it cannot be imported."""
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
