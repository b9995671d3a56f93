"""`locate`: the folder of a model, on this machine or downloaded from the Hugging Face Hub."""

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
    """Return the path of a model's folder; a Hugging Face repository is downloaded.

    Args:
        source: a folder; or, where there is none of this name, OWNER/NAME on the hub, as a string.
        allow_pickle: whether .bin weights (a pickle) are downloaded where there are no safetensors.
        revision: a branch, tag or commit on the hub; None for the default branch.

    Raises:
        CheckpointError: if the source is neither a folder nor OWNER/NAME, huggingface_hub is not
            installed, the download failed, or the repository has no safetensors and
            ``allow_pickle`` is false.
        ValueError: if the source is no path.
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
