"""Files: atomic writing, and reading of JSON and safetensors with limits, for files of anyone."""

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
"""Keys for which diffusers writes -Infinity (which is no JSON): nothing is clipped."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old content or the new, never a part.

    The bytes go to a temporary file in the same folder, which then replaces the file and is on disk
    when this returns. The folder is made if it is missing.

    Args:
        path: the file to write.
        content: all of its bytes.

    Raises:
        OSError: if the folder or the file cannot be written.
    """
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
    """Write a value as indented JSON: all of it or, at a kill or an error, the old file stays.

    Args:
        path: the file to write; its folder is made if it is missing.
        value: what the json module can write; NaN and infinities are written as it does, although
            `read_json` refuses them.

    Raises:
        TypeError: if the value holds an object that JSON has no form for.
        ValueError: if it holds itself.
        OSError: if the folder or the file cannot be written.
    """
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def require_file(path: Path) -> None:
    """Raise unless the path is a plain file: reading a pipe or a device might never end.

    Args:
        path: the file, or a link to one.

    Raises:
        CheckpointError: if it is missing, a folder, pipe, socket or device, or no name a file can
            have.
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
    """Return the JSON object in a file as a dict.

    Args:
        path: the file, in UTF-8.

    Raises:
        CheckpointError: if the file is missing or no plain file, larger than 1 MiB, not JSON, or
            not an object; if it is nested more than 16 deep, has a key twice in one object, or has
            NaN or an infinity (but -Infinity where diffusers writes it, for "lambda_min_clipped").
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
    """Refuse numbers that are not finite, and values nested more than ``depth`` levels deep."""
    if isinstance(value, float) and not math.isfinite(value):
        if key not in UNBOUNDED or value != -math.inf:
            raise ValueError(f"{key}={value}: must be finite")
    elif isinstance(value, (dict, list)):
        if not depth:
            raise ValueError(f"is nested more than {MAX_DEPTH} deep")
        for name, part in value.items() if isinstance(value, dict) else ((key, v) for v in value):
            _check_values(name, part, depth - 1)


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, in their stored shapes and dtypes.

    Args:
        path: the file.
        device: the torch device that the tensors are put on, such as "cpu" or "cuda:0".

    Raises:
        CheckpointError: if the file is missing or no plain file, is broken, has a header larger
            than 4 MiB, or has a dtype that torch lacks.
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
