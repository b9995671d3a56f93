"""Files: written whole or not at all, and read with caps, whoever made them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from flashddpm.errors import CheckpointError

MAX_JSON = 1 << 20
MAX_DEPTH = 16
MAX_HEADER = 4 << 20

UNBOUNDED = {"lambda_min_clipped"}
"""Where diffusers writes -Infinity, which is no JSON: its way to say that nothing is clipped."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must reach the disk; Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def require_file(path: Path) -> None:
    """Refuse what is no plain file: to read a pipe or a device may never end.

    Raises:
        CheckpointError: missing, or a folder, pipe, socket or device.
    """
    try:
        plain = path.is_file()
        missing = not plain and not path.exists()
    except (OSError, ValueError) as error:  # names that no file can have
        raise CheckpointError(f"{str(path)!r}: cannot be read: {error}") from None
    if missing:
        raise CheckpointError(f"{path}: is missing")
    if not plain:
        raise CheckpointError(f"{path}: cannot be read: it is no plain file")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: missing, larger than 1 MiB, nested more than 16 deep, not JSON, not an
            object, with a key twice, or with NaN or an infinity (but diffusers' own -Infinity).
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise CheckpointError(f"{path}: is larger than {MAX_JSON} bytes")
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        _check_values("", value, MAX_DEPTH)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _check_values(key: str, value: Any, depth: int) -> None:
    """Refuse numbers that are not finite, and more than ``depth`` levels."""
    if isinstance(value, float) and not math.isfinite(value):
        if key not in UNBOUNDED or value != -math.inf:
            raise ValueError(f"{key}={value}: must be finite")
    elif isinstance(value, (dict, list)):
        if not depth:
            raise ValueError(f"is nested more than {MAX_DEPTH} deep")
        for name, part in value.items() if isinstance(value, dict) else ((key, v) for v in value):
            _check_values(name, part, depth - 1)


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: missing, broken, or with a header larger than 4 MiB.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise ValueError(f"its header claims {header} bytes, more than {MAX_HEADER}")
        return safetensors.torch.load_file(path, device)
    # Shapes and dtypes that torch has not end in errors of its own.
    except (OSError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
