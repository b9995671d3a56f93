"""Where compiled code is kept: a folder of the user's own, for it is executed as it is found.

Never a model's folder, and not the shared temporary folder that torch would take.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def folder() -> Path:
    """Return $XDG_CACHE_HOME/flashddpm, by default ~/.cache/flashddpm."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "flashddpm"


def keep_compiled_code(root: Path | None = None) -> Path | None:
    """Point torch and Triton to a private folder, unless the user has said where; return it.

    None where no private folder can be had: torch's own choice then stays.

    Raises:
        ValueError: the folder is another user's, or others may write to it.
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
