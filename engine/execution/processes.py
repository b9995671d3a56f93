"""Support for other processes: renewal of locks in a forked child, and a check for pickling.

A forked child has only the thread that forked, and a lock that another thread of its parent held
would never be released in it: so objects with locks or threads are renewed there.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor


class Renewable(Protocol):
    """The protocol of objects with locks or threads, which must be renewed in a forked child."""

    def after_fork(self) -> None:
        """Make new locks, and end what the parent's threads were to finish.

        It is called in the child right after the fork, and must not take a lock that it has not
        just made.
        """


_RENEWABLE: WeakSet[Renewable] = WeakSet()


def renewed_in_child(it: Renewable) -> None:
    """Register an object whose ``after_fork()`` is called in each child forked while it lives.

    Only a weak reference is held. On a system without fork this has no effect.
    """
    _RENEWABLE.add(it)


def _after_fork() -> None:
    for it in list(_RENEWABLE):
        it.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _WithoutTensors(pickle.Pickler):
    """Pickles all but the numbers in tensors, which always can be, and may be large."""

    def persistent_id(self, value: Any) -> str | None:
        return "tensor" if isinstance(value, Tensor) else None


def check_picklable(name: str, value: Any, instead: str) -> None:
    """Raise unless an argument can be pickled, which is tried without the contents of its tensors.

    Args:
        name: the argument's name, for the error's text.
        value: the argument.
        instead: what the caller can do instead, which ends the error's text.

    Raises:
        TypeError: if the value cannot be pickled.
    """
    try:
        _WithoutTensors(io.BytesIO()).dump(value)
    except Exception as error:  # pickle raises three kinds, and a module's own code any
        shown = " ".join(repr(value).split())
        raise TypeError(f"{name}={shown:.80}: cannot be pickled ({error}); {instead}") from error
