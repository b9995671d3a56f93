"""One caller of an executor at a time, and their work on a GPU in the order of their turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from flashddpm.execution.processes import renewed_in_child


class Turns:
    """Turns on a device: a lock on the host, an event on a GPU.

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
        """Make the lock anew, for whoever held it is not in a forked child."""
        self._lock = threading.Lock()
        self._owner: int | None = None

    def on_device(self) -> AbstractContextManager[Any]:
        """Make the device the current one."""
        return nullcontext() if self._launched is None else torch.cuda.device(self._device)

    def check_not_within(self) -> None:
        """Refuse a call by a callback of the call whose turn it is.

        Raises:
            RuntimeError: this thread has the turn.
        """
        if self._owner == threading.get_ident():
            raise RuntimeError("a callback called the sampler that it is called by")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Take a turn; other threads wait for theirs.

        Raises:
            RuntimeError: this thread has the turn already.
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
        """Order what this caller launches after what the last one did, on whatever stream."""
        if self._launched is None:
            yield
            return
        with self.on_device():
            self._launched.wait()
            try:
                yield
            finally:
                self._launched.record()
