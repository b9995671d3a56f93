"""A context manager that makes Triton's interpreter faster; results are the same bits.

Triton 3.7 and 3.8 spend most of an interpreted kernel's time on three things that change no result:
each call of a device function looks through all of ``triton.language`` for what is to be replaced,
which the launch of the kernel has replaced already; each sum, difference and product of integers
is computed again in 64 bits for an assertion that only a debug run makes; and the NumPy dtype of
a Triton type is looked up in a table that is made anew for each look-up. Other versions of Triton
are left as they are, since what is replaced is no part of Triton's interface.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.runtime import errors, interpreter

TRIED = ("3.7", "3.8")
"""The versions of Triton, "MAJOR.MINOR", with which results were compared."""

_original_call = interpreter.InterpretedFunction.__call__
_original_dtype: Any = getattr(interpreter, "_get_np_dtype", None)
_numpy_dtypes: dict[str, Any] = {}
"""The NumPy dtypes by the name of a Triton scalar or pointer type."""


@functools.cache
def _languages(function: Callable[..., Any]) -> tuple[ModuleType, ...]:
    """Return the modules among ``tl`` and ``tl.core`` that a function's globals hold."""
    seen = function.__globals__.values()
    return tuple(module for module in (tl, tl.core) if any(value is module for value in seen))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function; replace what it sees of the language only if that is not done."""
    languages = _languages(self.fn)
    if not languages or any(tl.core.is_builtin(module.load) for module in languages):
        return _original_call(self, *args, **kwargs)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise errors.InterpreterError(repr(error)) from error


def _numpy_dtype(type: Any) -> Any:
    """Return the NumPy dtype of a Triton type; a block's is that of its elements."""
    name = type.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _original_dtype(type)
    return _numpy_dtypes[name]


@contextmanager
def quick() -> Iterator[None]:
    """Make interpreted kernels faster in a with-statement, with the same results.

    With a version of Triton that is not in ``TRIED`` it does nothing. It replaces attributes of
    ``triton.runtime.interpreter`` and puts them back at the end, also if the block raises, so it is
    not for several threads at once. The value of ``as`` is None.
    """
    if ".".join(triton.__version__.split(".")[:2]) not in TRIED:
        yield
        return
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    replaced = (
        (interpreter.InterpretedFunction, "__call__", _call),
        (interpreter, "_get_np_dtype", _numpy_dtype),
        (builder, "options", options),
    )
    before = [getattr(owner, name) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before, strict=True):
            setattr(owner, name, value)
