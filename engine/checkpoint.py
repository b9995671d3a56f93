"""Model folders in diffusers' layout: read, checked key by key, and written atomically.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json
    flashddpm.json        ours: {"num_classes": 10, "null_label": 10, "class_names": [...]}

A flat folder (config.json, scheduler_config.json and weights in one place) is read too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.defaults import SCHEDULERS
from flashddpm.errors import CheckpointError
from flashddpm.unet import UNet
from flashddpm.unet_config import UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_JSON = 1 << 20
MAX_HEADER = 4 << 20
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Conditioning:
    """What labels a model takes: 0..num_classes-1, and null_label for "no label"."""

    num_classes: int | None = None
    null_label: int | None = None
    class_names: tuple[str, ...] | None = None


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: missing, larger than 1 MiB, not JSON, not an object, or with a key twice.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path}: is larger than {MAX_JSON} bytes")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: missing, broken, or with a header larger than 4 MiB.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise ValueError(f"its header claims {header} bytes, more than {MAX_HEADER}")
        return safetensors.torch.load_file(path, device)
    # Shapes and dtypes that torch has not end in errors of its own.
    except (OSError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def _find(folder: Path, sub: str, name: str) -> Path:
    """Return folder/sub/name, or folder/name in a flat folder."""
    return folder / sub / name if (folder / sub).is_dir() else folder / name


def load_unet(folder: str | PathLike[str], device: torch.device, dtype: torch.dtype) -> UNet:
    """Load the U-Net of a pipeline's folder or of its own.

    Raises:
        CheckpointError: files missing or broken, a config that cannot be built, keys or shapes
            that do not match it (every mismatch is listed), or weights that are not finite.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder")
    path = _find(root, "unet", "config.json")
    try:
        config = UNetConfig.from_dict(read_json(path))
        with torch.device("meta"):
            unet = UNet(config)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error

    weights = path.with_name(WEIGHTS)
    state = read_tensors(weights)
    wrong = mismatches(unet, state, dtype)
    if wrong:
        raise CheckpointError(f"{weights}: does not match config.json: " + "; ".join(wrong))
    # A copy: what safetensors returns is the mapped file, which another program may change.
    state = {key: value.to(device, dtype, copy=True) for key, value in state.items()}
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


def mismatches(
    unet: UNet, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> list[str]:
    """Return all that keeps a state dict from being this U-Net's, in words; [] if nothing does.

    Args:
        unet: only its keys and shapes are read, and its dtype if none is given.
        state: keys, shapes and finiteness are checked.
        dtype: in which the numbers must be finite.
    """
    dtype = dtype or unet.conv_in.weight.dtype
    expected = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    wrong = [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is not expected" for key in state if key not in expected]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, must be {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    for key, value in state.items():
        if value.dtype not in STORED:
            wrong.append(f"{key} holds {value.dtype}, must hold floating-point numbers")
        elif not bool(value.to(dtype).isfinite().all()):
            wrong.append(f"{key} holds numbers that are not finite in {dtype}")
    return wrong


def load_scheduler_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return the scheduler's config; its class must be one that we have the solver of."""
    path = _find(Path(folder), "scheduler", "scheduler_config.json")
    config = read_json(path)
    name = config.get("_class_name", "DDPMScheduler")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise CheckpointError(
            f"{path}: _class_name={name!r}: must be one of {', '.join(SCHEDULERS)}"
        )
    return config


def load_conditioning(folder: str | PathLike[str], config: UNetConfig) -> Conditioning:
    """Return what flashddpm.json says of labels; without it, every embedding is a class."""
    path = Path(folder) / "flashddpm.json"
    if not path.exists():
        return Conditioning(config.num_class_embeds)
    value = read_json(path)
    embeds = config.num_class_embeds or 0
    try:
        classes, null = value.get("num_classes"), value.get("null_label")
        if classes is not None:
            arguments.integer("num_classes", classes, 1, embeds)
        if null is not None:
            arguments.integer("null_label", null, 0, embeds - 1)
        names = value.get("class_names")
        if names is not None and (not isinstance(names, list) or len(names) != classes):
            raise ValueError(f"class_names={names!r}: must be a list of {classes} names")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Conditioning(classes, null, tuple(map(str, names)) if names is not None else None)


def save_model(
    folder: str | PathLike[str],
    config: UNetConfig,
    state: Mapping[str, Tensor],
    scheduler: Mapping[str, Any],
    conditioning: Conditioning,
) -> None:
    """Write a folder that diffusers loads; the weights go last, each file atomically.

    Args:
        folder: made if it does not exist.
        config: the U-Net's.
        state: its state dict, in the dtype to be stored.
        scheduler: the keys of scheduler_config.json.
        conditioning: written to flashddpm.json.
    """
    root = Path(folder)
    write_json(root / "scheduler" / "scheduler_config.json", dict(scheduler))
    write_json(root / "unet" / "config.json", config.to_dict())
    write_json(root / "flashddpm.json", vars(conditioning))
    name = scheduler.get("_class_name", "DDPMScheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", name],
        "unet": ["diffusers", "UNet2DModel"],
    }
    write_json(root / "model_index.json", index)
    # q, k and v are views of one tensor, and safetensors refuses shared storage: clone.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomic(root / "unet" / WEIGHTS, content)
