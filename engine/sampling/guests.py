"""`Guests`: those who draw images with a sampler over many calls, and must not mix two networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol
from weakref import WeakSet


class Guest(Protocol):
    """The protocol of a guest: an object, such as an `Engine`, that draws images with a sampler.

    A guest keeps images under way (at some step of their plan) from one call of the sampler's
    network to the next, so the sampler enters its `emptied` before the weights change.
    """

    def emptied(self) -> AbstractContextManager[None]:
        """Return a context manager within which no image of the guest is under way; it gives None.

        Entering it waits until the images under way are finished, and raises an error where that
        cannot be. Until it is left, at the end of the block or by an error, none is started.
        """


class Guests:
    """The guests of a sampler: the objects that keep images under way with it, such as engines.

    ``Sampler.update_weights`` has all of them finish those images before it changes the weights, so
    that no image is drawn by two networks. Guests are held by weak references: one that nobody else
    holds any more is forgotten.
    """

    def __init__(self) -> None:
        self._all: WeakSet[Guest] = WeakSet()

    def add(self, guest: Guest) -> None:
        """Add a guest, whose ``emptied`` is entered whenever the sampler's weights are to change.

        Adding it again has no effect.
        """
        self._all.add(guest)

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Have every guest finish its images under way; within this context none starts others.

        When the block ends, or raises, all may start images again. Whatever a guest's own
        ``emptied`` raises is raised before the block is entered, such as RuntimeError where a
        callback of an engine calls this.
        """
        with ExitStack() as emptied:
            for guest in list(self._all):
                emptied.enter_context(guest.emptied())
            yield
