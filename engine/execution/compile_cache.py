"""The cache folder of compiled code, which must be the user's alone, since its files are executed.

It is never in a model's folder, and not the shared temporary folder that torch would use.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def folder() -> Path:
    """Return the cache folder of compiled code, which may not exist yet.

    It is $XDG_CACHE_HOME/flashddpm, or ~/.cache/flashddpm if that variable is unset or empty.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "flashddpm"


def keep_compiled_code(root: Path | None = None) -> Path | None:
    """Make torch and Triton keep compiled code in a private folder, which is created and returned.

    That sets the environment variables TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR of this process
    to subfolders, unless they are set already.

    Args:
        root: the folder; None for the one that `folder` returns.

    Returns:
        The folder; or None if it cannot be created, in which case nothing is set.

    Raises:
        ValueError: if, on POSIX, the folder belongs to another user, or its group or others may
            write to it.
    """
    root = folder() if root is None else root
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    if os.name == "posix":
        found = root.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(
                f"{root}: holds compiled code and must be yours alone (chmod 700), or set "
                f"{' and '.join(VARIABLES)}"
            )
    for variable, name in VARIABLES.items():
        os.environ.setdefault(variable, str(root / name))
    return root
