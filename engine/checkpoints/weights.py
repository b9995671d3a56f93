"""The weights of a U-Net's folder: found, read, and renamed to diffusers' present parameter names.

In order of preference, as diffusers has it:

    diffusion_pytorch_model.safetensors.index.json   names shards: plain files in the same folder
    diffusion_pytorch_model.safetensors
    diffusion_pytorch_model.bin                      a pickle: only if asked for
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from flashddpm.checkpoints.pickles import read_pickled
from flashddpm.errors import CheckpointError
from flashddpm.io.files import read_json, read_tensors, require_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
PICKLED = "diffusion_pytorch_model.bin"

SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,200}\.safetensors")
MAX_SHARDS = 1000

LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The names of attention's layers before diffusers 0.15, each with today's name."""
LEGACY_KEY = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def read_weights(folder: Path, allow_pickle: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """Read the weights of a U-Net's folder, under the parameter names of today's diffusers.

    Args:
        folder: the folder with the weights.
        allow_pickle: whether diffusion_pytorch_model.bin is read where there are no safetensors.

    Returns:
        The path of the file that was read (the index, for shards), and the state dict: tensors by
        name, on the CPU, in their stored dtypes; not yet compared with a network.

    Raises:
        CheckpointError: if files are missing or broken, shards do not match their index, a name
            occurs in its old and its new form, or there is only a pickle and ``allow_pickle`` is
            false.
    """
    index, single, pickled = (folder / name for name in (INDEX, WEIGHTS, PICKLED))
    if index.exists():
        path, state = index, _read_shards(index)
    elif single.exists() or not pickled.exists():
        path, state = single, read_tensors(single)
    elif not allow_pickle:
        raise CheckpointError(
            f"{pickled}: is a pickle, and there is no {WEIGHTS} beside it; pass allow_pickle=True "
            "to read it, or convert it to safetensors"
        )
    else:
        path, state = pickled, read_pickled(pickled)
    return path, _rename(path, state)


def shards(index: Path) -> dict[str, str]:
    """Return an index of shards: a dictionary from a tensor's name to the name of its file.

    Args:
        index: the file diffusion_pytorch_model.safetensors.index.json.

    Raises:
        CheckpointError: if it is missing, broken or no index, names more than 1000 files, or
            anything but .safetensors files that exist in the same folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map must be an object of tensors and files")
    files = {name if isinstance(name, str) else repr(name) for name in names.values()}
    if len(files) > MAX_SHARDS:
        raise CheckpointError(f"{index}: names {len(files)} files; at most {MAX_SHARDS}")
    for name in sorted(files):
        if not SHARD.fullmatch(name):
            raise CheckpointError(
                f"{index}: names {name!r}: must be a plain name that ends in .safetensors"
            )
        shard = index.with_name(name)
        require_file(shard)
        if not _inside(shard):
            raise CheckpointError(f"{index}: names {name!r}, which is a link out of the folder")
    return names


def _inside(path: Path) -> bool:
    """Return whether a file really is in its folder and not a link elsewhere.

    A link from snapshots/REVISION to blobs, as in the hub's cache, counts as in it.
    """
    real, folder = path.resolve(), path.parent.resolve()
    if real.parent == folder:
        return True
    snapshots = [up.parent for up in (folder, folder.parent) if up.parent.name == "snapshots"]
    return any(real.parent == up.with_name("blobs") for up in snapshots)


def _read_shards(index: Path) -> dict[str, Tensor]:
    names = shards(index)
    state: dict[str, Tensor] = {}
    wrong = []
    for name in sorted(set(names.values())):
        for key, value in read_tensors(index.with_name(name)).items():
            if names.get(key) != name:
                wrong.append(f"{name} holds {key}, which is not said to be there")
            state[key] = value
    wrong += [f"{names[key]} does not hold {key}" for key in names if key not in state]
    if wrong:
        raise CheckpointError(f"{index}: does not match its shards: " + "; ".join(wrong))
    return state


def _rename(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with old names of attention's layers replaced by today's."""
    result = {}
    for key, value in state.items():
        match = LEGACY_KEY.fullmatch(key)
        name = f"{match[1]}.{LEGACY[match[2]]}.{match[3]}" if match else key
        if name in result or (name != key and name in state):
            raise CheckpointError(f"{path}: holds {name} under its old name and its new one")
        result[name] = value
    return result
