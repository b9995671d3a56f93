"""`Guests`: those who draw images with a sampler over many calls, and must not mix two networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol
from weakref import WeakSet


class Guest(Protocol):
    """The protocol of those who draw images over many calls of a sampler, such as an engine."""

    def emptied(self) -> AbstractContextManager[None]:
        """Finish the images under way, then return a context within which no others are started."""


class Guests:
    """The guests of a sampler, by weak references: each counts as long as it lives."""

    def __init__(self) -> None:
        self._all: WeakSet[Guest] = WeakSet()

    def add(self, guest: Guest) -> None:
        """Add a guest, to be emptied when the sampler's weights are to change."""
        self._all.add(guest)

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Have every guest finish its images under way; within this context none starts others.

        Whatever a guest's own ``emptied`` raises is raised, such as RuntimeError in an engine's
        callback.
        """
        with ExitStack() as emptied:
            for guest in list(self._all):
                emptied.enter_context(guest.emptied())
            yield
