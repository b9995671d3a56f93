"""The ends of a command: exit codes, the line of an error, and the end of a process of torchrun."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

USAGE = 2
"""The exit code after bad input: wrong arguments, or files that are missing or broken."""
INTERRUPTED = 130
"""The exit code after Ctrl-C (128 + SIGINT), as shells have it."""


def fail(message: str, code: int) -> NoReturn:
    """Print "flashddpm: error: " and a message on stderr, and end the process.

    Args:
        message: what is wrong, as one line of text (not checked) without a line end.
        code: the exit code, 0 to 255: 2 after bad input, 130 after Ctrl-C.

    Raises:
        SystemExit: with ``code``, in a process that runs alone. One of several processes that
            torchrun started ends at once instead, by `os._exit`, so no ``finally`` runs.
    """
    print(f"flashddpm: error: {message}", file=sys.stderr)
    leave_torchrun(code)
    sys.exit(code)


def leave_torchrun(code: int) -> None:
    """End this process by `os._exit` if it is one of several that torchrun started; else return.

    They are told by the environment's WORLD_SIZE, which is not 1. At a normal exit the threads of
    gloo, by which the processes communicate, sometimes abort a process.

    Args:
        code: the exit code, 0 to 255.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
