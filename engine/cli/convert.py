"""The command ``flashddpm convert``: it converts other projects' checkpoints to model folders.

It takes the flags of those projects' scripts, which may be spelled with dashes or underscores and
take a value, as there: --learn_sigma True.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

YES, NO = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
SWITCHES = (
    "use_new_attention_order",
    "rescale_timesteps",
    "predict_xstart",
    "sigma_small",
    "class_cond",
    "learn_sigma",
    "use_scale_shift_norm",
    "resblock_updown",
)
TRAINING = ("use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas")
"""Flags that say nothing about a checkpoint. They are taken so that a published line of flags, such
as guided-diffusion's MODEL_FLAGS, can be pasted as it stands."""


def _flag(name: str, help: str | None = None) -> Any:
    names = dict.fromkeys(("--" + name.replace("_", "-"), "--" + name))
    return typer.Option(*names, help=help, hidden=help is None, show_default=False)


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors or .pt file.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            help="improved (-diffusion), guided (-diffusion), ddpt (denoising-diffusion-pytorch).",
        ),
    ],
    image_size: Annotated[int, _flag("image_size", "Side of the square images.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a file that is not .safetensors.")
    ] = False,
    num_heads: Annotated[int | None, _flag("num_heads", "Of every attention.  [4]")] = None,
    num_head_channels: Annotated[
        int | None, _flag("num_head_channels", "Of a head, instead of num_heads.")
    ] = None,
    num_heads_upsample: Annotated[int | None, _flag("num_heads_upsample")] = None,
    use_new_attention_order: Annotated[
        str | None, _flag("use_new_attention_order", "True or False.  [False]")
    ] = None,
    diffusion_steps: Annotated[int | None, _flag("diffusion_steps", "T.  [1000]")] = None,
    noise_schedule: Annotated[
        str | None, _flag("noise_schedule", "linear or cosine.  [linear]")
    ] = None,
    rescale_timesteps: Annotated[
        str | None,
        _flag("rescale_timesteps", "True or False.  [True for improved, False for guided]"),
    ] = None,
    predict_xstart: Annotated[
        str | None, _flag("predict_xstart", "True or False.  [False]")
    ] = None,
    sigma_small: Annotated[str | None, _flag("sigma_small", "True or False.  [False]")] = None,
    timestep_respacing: Annotated[
        str | None, _flag("timestep_respacing", "250 or ddim50, say: how it is sampled.")
    ] = None,
    num_channels: Annotated[
        int | None, _flag("num_channels", "Checked, as are the next seven: the weights say it.")
    ] = None,
    num_res_blocks: Annotated[int | None, _flag("num_res_blocks", "Of a level.")] = None,
    channel_mult: Annotated[str | None, _flag("channel_mult", "1,2,3,4, say.")] = None,
    attention_resolutions: Annotated[
        str | None, _flag("attention_resolutions", "32,16,8, say.")
    ] = None,
    class_cond: Annotated[str | None, _flag("class_cond", "True or False.")] = None,
    learn_sigma: Annotated[str | None, _flag("learn_sigma", "True or False.")] = None,
    use_scale_shift_norm: Annotated[
        str | None, _flag("use_scale_shift_norm", "True or False.")
    ] = None,
    resblock_updown: Annotated[str | None, _flag("resblock_updown", "True or False.")] = None,
    dropout: Annotated[float | None, _flag("dropout")] = None,
    timesteps: Annotated[int | None, _flag("timesteps", "Of ddpt: T.")] = None,
    beta_schedule: Annotated[
        str | None, _flag("beta_schedule", "Of ddpt: linear, cosine or sigmoid.")
    ] = None,
    objective: Annotated[
        str | None, _flag("objective", "Of ddpt: pred_noise, pred_x0 or pred_v.")
    ] = None,
    sinusoidal_pos_emb_theta: Annotated[
        float | None, _flag("sinusoidal_pos_emb_theta", "Of ddpt.  [10000]")
    ] = None,
    weights: Annotated[
        str | None, _flag("weights", "Of ddpt: ema or online.  [ema where there is one]")
    ] = None,
    use_fp16: Annotated[str | None, _flag("use_fp16")] = None,
    use_checkpoint: Annotated[str | None, _flag("use_checkpoint")] = None,
    use_kl: Annotated[str | None, _flag("use_kl")] = None,
    rescale_learned_sigmas: Annotated[str | None, _flag("rescale_learned_sigmas")] = None,
) -> None:
    """Convert another project's checkpoint to a model folder.

    What the weights do not tell must be given as it was in training; flags that the weights do tell
    are checked against them.
    """
    given = {
        name: _switch(name, value) if name in SWITCHES else value
        for name, value in locals().items()
        if value is not None and name not in ("checkpoint", "out", "source", *TRAINING)
    }
    from flashddpm.convert import convert as convert_checkpoint

    print(convert_checkpoint(checkpoint, out, source, **given))


def _switch(name: str, value: str) -> bool:
    """Return whether a switch is on, from any of the words that the projects' scripts take."""
    if value.lower() not in (*YES, *NO):
        raise ValueError(f"{name}={value!r}: must be True or False")
    return value.lower() in YES
