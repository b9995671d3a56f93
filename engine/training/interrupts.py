"""`held_signals`: a context manager that holds back Ctrl-C and SIGTERM until its block ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_signals() -> Iterator[list[int]]:
    """Hold back SIGINT and SIGTERM until the block ends, then raise the first one that came.

    An interrupt inside a training step would leave weights, averages and position of two different
    steps. Outside of the main thread, where Python allows no handlers, nothing is held back. A
    signal that is ignored (SIG_IGN), as SIGINT is in a shell's background jobs, stays ignored. The
    handlers from before are put back however the block ends; if it raises, its exception goes on,
    and the signals that came are dropped.

    Yields:
        The list of the numbers of the signals that came so far, ints; it grows within the block.

    Raises:
        KeyboardInterrupt: at the end of a block that raised nothing itself, if SIGINT came first
            and has Python's own handler. If SIGTERM came first, the handler from before the block
            runs; by default it ends the process.
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
