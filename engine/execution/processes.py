"""Other processes: forked from this one, or sent what is pickled here.

A forked child has no thread but its own, and a lock that another thread of its parent held would
never be released there: so what holds locks or threads is renewed in it.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor


class Renewable(Protocol):
    """What is renewed in a forked child."""

    def after_fork(self) -> None:
        """Make locks anew and end what the parent's threads were to finish; take no lock."""


_RENEWABLE: WeakSet[Renewable] = WeakSet()


def renewed_in_child(it: Renewable) -> None:
    """Have ``it.after_fork()`` called in every child forked from this process, while it lives."""
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
    """Refuse what cannot be pickled.

    Args:
        name: of the argument.
        value: it.
        instead: what to do instead.

    Raises:
        TypeError: it cannot be pickled.
    """
    try:
        _WithoutTensors(io.BytesIO()).dump(value)
    except Exception as error:  # pickle raises three kinds, and a module's own code any
        shown = " ".join(repr(value).split())
        raise TypeError(f"{name}={shown:.80}: cannot be pickled ({error}); {instead}") from error
