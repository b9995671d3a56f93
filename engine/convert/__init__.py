"""Conversion of other projects' checkpoints to model folders of ours.

improved, guided    improved-diffusion's and guided-diffusion's, as a UNet2DModel
ddpt                denoising-diffusion-pytorch's, as an RMSUNet
"""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from flashddpm import arguments
from flashddpm.checkpoints.model_folder import save_model
from flashddpm.checkpoints.pickles import read_pickled
from flashddpm.convert import lucidrains, openai_flags
from flashddpm.errors import CheckpointError
from flashddpm.host import isolated
from flashddpm.io.files import read_tensors
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.registry import NetworkConfig

SOURCES = (*openai_flags.PROJECTS, "ddpt")


@isolated
def convert(
    checkpoint: str | PathLike[str],
    out: str | PathLike[str],
    source: str,
    allow_pickle: bool = False,
    **flags: Any,
) -> str:
    """Write another project's checkpoint as a model folder, and return a description of the model.

    Args:
        checkpoint: a .safetensors file, or one that torch.save wrote.
        out: the folder to write; made if it does not exist.
        source: the project of the checkpoint: improved, guided or ddpt.
        allow_pickle: whether a file that is not .safetensors may be read.
        flags: the model's flags in that project's own scripts, by name: for improved and guided the
            fields of openai_flags.OpenAIFlags (but ``project``), for ddpt those of
            lucidrains.LucidrainsFlags. image_size must be given; all others have defaults.

    Returns:
        Two lines of text: the number of parameters, timesteps, schedule, prediction and variance
        type; and the flags that were taken as given because the weights do not say them.

    Raises:
        CheckpointError: if a file is missing, broken or of another network, or is a pickle that was
            not allowed.
        ValueError: if the source is unknown, image_size is missing, or a flag is none of the
            project's, is not allowed or contradicts the weights.
        OSError: if the folder cannot be written.
    """
    arguments.one_of("source", source, SOURCES)
    path = Path(checkpoint)
    ours = lucidrains.LucidrainsFlags if source == "ddpt" else openai_flags.OpenAIFlags
    names = [field.name for field in dataclasses.fields(ours)]
    for name, value in flags.items():
        if name not in names or name == "project":
            raise ValueError(f"{name}={value!r}: must not be given, {source} has no such flag")
    if "image_size" not in flags:
        raise ValueError("image_size: must be given, as no checkpoint says it")
    settings: openai_flags.OpenAIFlags | lucidrains.LucidrainsFlags
    if source == "ddpt":
        settings = lucidrains.LucidrainsFlags(**flags)
    else:
        settings = openai_flags.OpenAIFlags(project=source, **flags)
    state = read_checkpoint(path, allow_pickle)
    config: NetworkConfig
    try:
        if isinstance(settings, lucidrains.LucidrainsFlags):
            config, weights, scheduler = lucidrains.convert(state, settings)
            given = f"theta={settings.sinusoidal_pos_emb_theta:g}"
        else:
            config, weights, scheduler = openai_flags.convert(state, settings)
            given = openai_flags.describe(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    save_model(out, config, weights, scheduler, Conditioning(config.num_class_embeds))
    count = sum(value.numel() for value in weights.values())
    schedule = scheduler.get("beta_schedule", "trained_betas")
    return (
        f"{count:,} parameters, {scheduler['num_train_timesteps']} timesteps ({schedule}), "
        f"{scheduler['prediction_type']}, {scheduler['variance_type']} -> {out}\n"
        f"the weights do not say, so taken as given or by default: {given}"
    )


def read_checkpoint(path: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name, on the CPU.

    Args:
        path: a .safetensors file, or one that torch.save wrote; the names of nested dicts are
            joined by dots.
        allow_pickle: whether a file that is not .safetensors may be read.

    Raises:
        CheckpointError: if the file is missing or broken, or is a pickle that was not allowed.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if not allow_pickle:
        raise CheckpointError(
            f"{path}: is taken for a pickle, as its name does not end in .safetensors; pass "
            "--allow-pickle (allow_pickle=True) to read it"
        )
    return read_pickled(path, nested=True)
