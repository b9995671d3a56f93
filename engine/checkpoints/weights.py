"""The weights of a U-Net's folder: found, read under today's names, and checked against it.

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
"""The names of attention's layers before diffusers 0.15, and today's."""
LEGACY_KEY = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def read_weights(folder: Path, allow_pickle: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """Return the file that says what the weights are, and the state dict under today's names.

    Raises:
        CheckpointError: missing, broken, or a pickle that was not asked for.
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
    """Return the file in which each tensor is, after an index.

    Raises:
        CheckpointError: not an index, or one that names anything but plain files beside it.
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
    """Whether a file is in its folder. The hub's cache links from snapshots/REVISION to blobs."""
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
    """Give attention's layers their names of today."""
    result = {}
    for key, value in state.items():
        match = LEGACY_KEY.fullmatch(key)
        name = f"{match[1]}.{LEGACY[match[2]]}.{match[3]}" if match else key
        if name in result or (name != key and name in state):
            raise CheckpointError(f"{path}: holds {name} under its old name and its new one")
        result[name] = value
    return result
