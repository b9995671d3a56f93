"""Who draws images with a sampler over many of its calls, and must not mix two networks in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol
from weakref import WeakSet


class Guest(Protocol):
    """Who draws images with a sampler over many of its calls."""

    def emptied(self) -> AbstractContextManager[None]:
        """Finish the images under way; within the context start no others."""


class Guests:
    """The guests of a sampler, while they live."""

    def __init__(self) -> None:
        self._all: WeakSet[Guest] = WeakSet()

    def add(self, guest: Guest) -> None:
        """Take in a guest."""
        self._all.add(guest)

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Let every guest finish the images under way; within the context none starts others."""
        with ExitStack() as emptied:
            for guest in list(self._all):
                emptied.enter_context(guest.emptied())
            yield
