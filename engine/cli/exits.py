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
    """Print one line of error on stderr, and end the process.

    Args:
        message: the line, without "flashddpm: error: ", which is put before it.
        code: the exit code.

    Raises:
        SystemExit: always, unless the process is one of several of torchrun, which ends at once.
    """
    print(f"flashddpm: error: {message}", file=sys.stderr)
    leave_torchrun(code)
    sys.exit(code)


def leave_torchrun(code: int) -> None:
    """End this process at once if it is one of several of torchrun; else return.

    At a normal exit the threads of gloo, by which the processes communicate, sometimes abort a
    process.

    Args:
        code: the exit code.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
