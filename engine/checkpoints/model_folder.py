"""Model folders in diffusers' layout: read, checked key by key, and written file by file.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json
    flashddpm.json        our own: {"num_classes": 10, "null_label": 10, "class_names": [...]}

A flat folder (config.json, scheduler_config.json and weights in one place) is read too. Nothing
that a file names is imported or run: classes are strings, looked up in lists of allowed ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.checkpoints.weights import INDEX, WEIGHTS, read_weights, shards
from flashddpm.diffusion.scheduler_config import SCHEDULERS
from flashddpm.errors import CheckpointError
from flashddpm.host import isolated
from flashddpm.io.files import read_json, write_atomic, write_json
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.registry import LIBRARIES, Network, NetworkConfig, on_meta, read_config
from flashddpm.networks.state_dict import mismatches

UNETS = ("UNet2DModel",)
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
MAX_PARAMETERS = 4_000_000_000


def fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model folder, "sha256:...": a hash of the files it is read from.

    These are unet/config.json, all unet/*.safetensors, scheduler/scheduler_config.json and
    flashddpm.json, as far as they exist; in a flat folder they lie in the folder itself. Pickled
    weights and model_index.json are left out.

    Args:
        folder: the model folder; of one that is missing or has none of the files, the hash is that
            of nothing.
    """
    unet, scheduler = (
        folder / sub if (folder / sub).is_dir() else folder for sub in ("unet", "scheduler")
    )
    files = [unet / "config.json", *sorted(unet.glob("*.safetensors"))]
    files += [scheduler / "scheduler_config.json", folder / "flashddpm.json"]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def find(folder: Path, sub: str, name: str) -> Path:
    """Return the path folder/sub/name, or folder/name where only that file exists (a flat folder).

    Args:
        folder: the model folder.
        sub: the subfolder in diffusers' layout, "unet" or "scheduler".
        name: the name of the file.
    """
    nested, flat = folder / sub / name, folder / name
    return flat if flat.exists() and not nested.exists() else nested


@isolated
def load_unet(
    folder: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
) -> Network:
    """Load the U-Net of a model folder, in evaluation mode and without gradients.

    Args:
        folder: a pipeline's folder, with unet/ in it, or a U-Net's own, with config.json and
            weights.
        device: the device of the weights: "cpu", "cuda", "cuda:N", a torch.device, or "auto" for
            CUDA where there is a GPU, else the CPU.
        dtype: the dtype of the weights: float32, bfloat16 or float16, as a name or a torch.dtype;
            None for float32.
        allow_pickle: whether diffusion_pytorch_model.bin is read where there are no safetensors.

    Returns:
        A UNet or an RMSUNet, whichever config.json names.

    Raises:
        CheckpointError: if files are missing or broken, the config cannot be built or asks for more
            than 4e9 parameters, keys or shapes do not match it (every mismatch is listed), weights
            are not finite in ``dtype``, or there is only a pickle and ``allow_pickle`` is false.
        ValueError: if the device or dtype is not allowed.
    """
    device = arguments.resolve_device(device)
    dtype = arguments.resolve_dtype(dtype, torch.float32)
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder")
    path = find(root, "unet", "config.json")
    unet = _plan_unet(path)
    source, state = read_weights(path.parent, allow_pickle)
    wrong = mismatches(unet, state, dtype)
    if wrong:
        raise CheckpointError(f"{source}: does not match config.json: " + "; ".join(wrong))
    # A copy: what safetensors returns is the mapped file, which another program may change.
    state = {key: value.to(device, dtype, copy=True) for key, value in state.items()}
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


def _plan_unet(path: Path) -> Network:
    """Return the U-Net of a config, without memory for its weights."""
    value = read_json(path)
    try:
        unet = on_meta(read_config(value))
        count = sum(parameter.numel() for parameter in unet.parameters())
        if count > MAX_PARAMETERS:
            raise ValueError(f"it asks for {count} parameters; at most {MAX_PARAMETERS}")
    # torch refuses sizes that no tensor can have with a RuntimeError.
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return unet


def load_scheduler_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return the config of a model folder's scheduler, with diffusers' keys and "_class_name".

    "_class_name" is the name of diffusers' class, one of `SCHEDULERS`, for which there is a solver
    here; DDPMScheduler where no file names one. Where model_index.json names another class than the
    config, that of model_index.json is returned, as in diffusers; if its pipeline is a
    DDIMPipeline, DDIMScheduler is. The other keys are returned unchecked.

    Args:
        folder: the model folder.

    Raises:
        CheckpointError: if scheduler_config.json is missing, a file is broken, or a class is not
            known: the scheduler's must be one of `SCHEDULERS`, the pipeline's DDPMPipeline or
            DDIMPipeline, the U-Net's UNet2DModel or RMSUNet.
    """
    path = find(Path(folder), "scheduler", "scheduler_config.json")
    config = read_json(path)
    name = config.get("_class_name", "DDPMScheduler")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise CheckpointError(
            f"{path}: _class_name={name!r}: must be one of {', '.join(SCHEDULERS)}"
        )
    index = Path(folder) / "model_index.json"
    named = _read_index(index) if index.exists() else None
    return {**config, "_class_name": named or name}


def _read_index(path: Path) -> str | None:
    """Return the scheduler's class that model_index.json names, or None."""
    index = read_json(path)
    pipeline = index.get("_class_name", PIPELINES[0])
    unet, scheduler = _class(index.get("unet")), _class(index.get("scheduler"))
    try:
        arguments.one_of("_class_name", pipeline, PIPELINES)
        arguments.one_of("unet", UNETS[0] if unet is None else unet, LIBRARIES)
        if scheduler is not None:
            arguments.one_of("scheduler", scheduler, SCHEDULERS)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # This pipeline makes a DDIMScheduler of whatever it is given.
    return "DDIMScheduler" if pipeline == "DDIMPipeline" else scheduler


def _class(entry: Any) -> Any:
    """Return the class in an entry of model_index.json, such as ["diffusers", class].

    An entry of another form is returned as it is.
    """
    well = (
        isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "flashddpm", None)
    )
    return entry[1] if well else entry


def load_conditioning(folder: str | PathLike[str], config: NetworkConfig) -> Conditioning:
    """Return the class labels that a model takes, a `Conditioning`, as flashddpm.json says.

    That file's num_classes, null_label (the label that stands for "no label") and class_names are
    each None where missing. Without the file every class embedding of the network is a class, and
    there is no null label.

    Args:
        folder: the model folder.
        config: the config of its network, whose number of class embeddings limits the labels.

    Raises:
        CheckpointError: if the file is broken, num_classes is not in 1..E or null_label not in
            0..E-1, E being the number of embeddings, or class_names is not a list of num_classes
            names.
    """
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


@isolated
def save_model(
    folder: str | PathLike[str],
    config: NetworkConfig,
    state: Mapping[str, Tensor],
    scheduler: Mapping[str, Any],
    conditioning: Conditioning,
) -> None:
    """Write a model folder that diffusers loads; each file is written atomically, the weights late.

    A kill leaves the old weights or the new ones to be found, whatever layout the old ones had (one
    file, shards, a flat folder), perhaps with the new scheduler beside old weights. Only over a
    network with another config no order of files is safe: write to a new folder then.

    Args:
        folder: the model folder, which is made if it does not exist.
        config: the config of the network.
        state: the state dict of the network: tensors by name, on any device, in the dtype to be
            stored.
        scheduler: the keys and values of scheduler_config.json, which JSON must be able to hold;
            "_class_name" is taken as DDPMScheduler where it is missing.
        conditioning: the class labels that the network takes, written to flashddpm.json.

    Raises:
        OSError: if a file cannot be written.
    """
    root = Path(folder)
    name = scheduler.get("_class_name", "DDPMScheduler")
    unet = config.to_dict()
    write_json(root / "scheduler" / "scheduler_config.json", dict(scheduler))
    write_json(root / "flashddpm.json", vars(conditioning))
    index = {
        "_class_name": "DDIMPipeline" if name == "DDIMScheduler" else "DDPMPipeline",
        "scheduler": ["diffusers", name],
        "unet": [LIBRARIES[unet["_class_name"]], unet["_class_name"]],
    }
    write_json(root / "model_index.json", index)
    # q, k and v are views of one tensor, and safetensors refuses shared storage: clone.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomic(root / "unet" / WEIGHTS, content)
    write_json(root / "unet" / "config.json", unet)
    _remove_shards(root / "unet" / INDEX)


def _remove_shards(index: Path) -> None:
    """Remove the index of an older model's shards, and then the shards.

    The index goes first, since it would be read in preference to the new single file.
    """
    if not index.exists():
        return
    try:
        names = set(shards(index).values())
    except CheckpointError:
        names = set()
    index.unlink()
    for name in names - {WEIGHTS}:
        index.with_name(name).unlink(missing_ok=True)
