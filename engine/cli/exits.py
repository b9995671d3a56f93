"""How the command ends: its exit codes, its one line of error, and its end under torchrun."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

USAGE = 2
"""The exit code after bad input."""
INTERRUPTED = 130
"""The exit code after Ctrl-C, as a shell has it."""


def fail(message: str, code: int) -> NoReturn:
    """Print one line of error on stderr, and exit with this code."""
    print(f"flashddpm: error: {message}", file=sys.stderr)
    leave_torchrun(code)
    sys.exit(code)


def leave_torchrun(code: int) -> None:
    """End at once if torchrun started this: at exit gloo's threads abort a process now and then."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
