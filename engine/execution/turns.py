"""`Turns`: one caller of an executor at a time, with their work on a GPU in the same order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from flashddpm.execution.processes import renewed_in_child


class Turns:
    """Lets callers use a device one at a time: a lock on the host and, on a GPU, an ordering event.

    Who is in an `exclusive` context has the turn. Turns are those of one executor.

    Args:
        device: the device on which the callers launch their work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launched: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._launched = torch.cuda.Event()
            with self.on_device():
                self._launched.record()
        self.after_fork()
        renewed_in_child(self)

    def after_fork(self) -> None:
        """Make a new lock in a forked child, where the old one's holder may not exist."""
        self._lock = threading.Lock()
        self._owner: int | None = None

    def on_device(self) -> AbstractContextManager[Any]:
        """Return a context in which the device, if a CUDA one, is the current one."""
        return nullcontext() if self._launched is None else torch.cuda.device(self._device)

    def check_not_within(self) -> None:
        """Raise if this thread has the turn, as where a callback calls the sampler that called it.

        Raises:
            RuntimeError: if this thread has the turn.
        """
        if self._owner == threading.get_ident():
            raise RuntimeError("a callback called the sampler that it is called by")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Take a turn for the length of this context; other threads wait for theirs.

        On a GPU, work that is launched in it runs after that of the last turn, on whatever stream.
        If the block raises, the turn ends and the error goes on.

        Raises:
            RuntimeError: if this thread has the turn already, as in a callback.
        """
        self.check_not_within()
        with self._lock:
            self._owner = threading.get_ident()
            try:
                with self._in_order():
                    yield
            finally:
                self._owner = None

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Have the GPU run what is launched in this context after the work of the last turn."""
        if self._launched is None:
            yield
            return
        with self.on_device():
            self._launched.wait()
            try:
                yield
            finally:
                self._launched.record()
