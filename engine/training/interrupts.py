"""Ctrl-C and SIGTERM, held back until a block has ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Hold back SIGINT and SIGTERM until the block ends, then raise the first that came.

    Yields the list of the numbers of the signals that came so far. An interrupt inside a step would
    leave weights, averages and position of two different steps. Outside of the main thread, where
    Python allows no handlers, nothing is held back. SIG_IGN handlers are kept, such as the one for
    SIGINT of a shell's background jobs.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if came:
        signal.raise_signal(came[0])
