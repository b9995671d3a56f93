"""Where a model is: a folder, or a repository of the Hugging Face Hub, which is then downloaded."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from flashddpm.checkpoints.weights import INDEX, PICKLED, WEIGHTS
from flashddpm.errors import CheckpointError

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{,95}/[A-Za-z0-9][A-Za-z0-9_.-]{,95}")

CONFIGS = [
    "model_index.json",
    "flashddpm.json",
    "config.json",
    "scheduler_config.json",
    "unet/config.json",
    "scheduler/scheduler_config.json",
]


def locate(
    source: str | PathLike[str], allow_pickle: bool = False, revision: str | None = None
) -> Path:
    """Return the folder of a model.

    Args:
        source: a folder; or, where there is none of this name, OWNER/NAME on the hub.
        allow_pickle: download .bin weights too, where there are no others.
        revision: a branch, tag or commit on the hub.

    Raises:
        CheckpointError: neither, huggingface_hub is not installed, or the download failed.
        ValueError: the source is no path.
    """
    try:
        path = Path(source)
    except TypeError:
        raise ValueError(f"source={source!r}: must be a folder or OWNER/NAME") from None
    if path.is_dir():
        return path
    if not isinstance(source, str) or not REPOSITORY.fullmatch(source):
        raise CheckpointError(f"{path}: no such folder")
    weights = [INDEX, WEIGHTS, "diffusion_pytorch_model-*-of-*.safetensors"]
    folder = _download(source, revision, weights)
    found = [folder / sub / name for sub in ("unet", ".") for name in (INDEX, WEIGHTS)]
    if any(file.exists() for file in found):
        return folder
    if not allow_pickle:
        raise CheckpointError(
            f"{source}: has no {WEIGHTS}; pass allow_pickle=True to load {PICKLED}, a pickle, if "
            "it has one"
        )
    return _download(source, revision, [PICKLED])


def _download(repository: str, revision: str | None, weights: list[str]) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{repository}: no such folder; to load it from the Hugging Face Hub, "
            "pip install huggingface_hub"
        ) from None
    patterns = CONFIGS + [sub + name for sub in ("", "unet/") for name in weights]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns
            )
        )
    # Offline, no such repository, no permission, a full disk: errors of five libraries.
    except Exception as error:
        raise CheckpointError(
            f"{repository}: no such folder, and it cannot be downloaded from the Hugging Face Hub: "
            f"{type(error).__name__}: {error}"
        ) from error
