"""The flags of improved-diffusion's and guided-diffusion's scripts, and conversion by them.

Some flags only the user knows; the others are read from the weights, and checked where they are
given. Flags of training alone (use_kl, rescale_learned_sigmas, ..) have nothing to say here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.convert.openai import Layout, convert_state, read_layout, unet_config
from flashddpm.diffusion.schedule import MAX_TIMESTEPS, NoiseSchedule
from flashddpm.diffusion.timesteps import respaced, timesteps
from flashddpm.errors import CheckpointError
from flashddpm.networks.registry import on_meta
from flashddpm.networks.state_dict import mismatches
from flashddpm.networks.unet_config import UNetConfig

PROJECTS = ("improved", "guided")
NOISE_SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class OpenAIFlags:
    """The flags of the projects' scripts, under their names, with their defaults.

    Attributes:
        project: the project: improved or guided.
        image_size: the side of the square images, in pixels.
        num_heads: the number of heads of every attention, at least 1.
        num_head_channels: the number of channels of a head, at least 1, in place of num_heads; -1
            for channels / num_heads.
        num_heads_upsample: must be -1 or num_heads.
        use_new_attention_order: whether the rows of attention's packed weight are q of all heads,
            then k, then v, not q, k, v of one head after the other.
        diffusion_steps: the number of timesteps T, in 1..100000.
        noise_schedule: the schedule of the betas: linear or cosine.
        rescale_timesteps: whether the network is told t * 1000 / T; None for the project's default,
            which is true for improved only.
        predict_xstart: whether the network predicts x_0, not epsilon.
        sigma_small: whether the variance, if not learned, is the posterior's, not beta.
        timestep_respacing: the timesteps at which the model is sampled, as "250" or "ddim50"; ""
            for all (`timesteps.respaced`).
        num_channels, num_res_blocks: the channels of the finest level, and the residual blocks of a
            level on the way down. For these and all that follow but dropout, None stands for what
            the weights say; a given one is checked against them by `check`.
        channel_mult: numbers with commas between, each level's channels over num_channels.
        attention_resolutions: numbers with commas between, the sides, in pixels, of levels with
            attention.
        class_cond: whether the network takes class labels.
        learn_sigma: whether the network learns the variance.
        use_scale_shift_norm: whether the time embedding scales features, besides shifting them.
        resblock_updown: whether the size is changed in residual blocks.
        dropout: the probability of dropout, in [0, 1], for further training; checked by `convert`.

    Raises:
        ValueError: if project, image_size, num_heads, num_head_channels, num_heads_upsample,
            diffusion_steps or noise_schedule is out of its range; others are not checked here.
    """

    project: str
    image_size: int
    num_heads: int = 4
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_new_attention_order: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    rescale_timesteps: bool | None = None
    predict_xstart: bool = False
    sigma_small: bool = False
    timestep_respacing: str = ""
    num_channels: int | None = None
    num_res_blocks: int | None = None
    channel_mult: str | None = None
    attention_resolutions: str | None = None
    class_cond: bool | None = None
    learn_sigma: bool | None = None
    use_scale_shift_norm: bool | None = None
    resblock_updown: bool | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        arguments.one_of("project", self.project, PROJECTS)
        arguments.integer("image_size", self.image_size, 1, 65536)
        arguments.integer("num_heads", self.num_heads, 1)
        arguments.integer("diffusion_steps", self.diffusion_steps, 1, MAX_TIMESTEPS)
        arguments.one_of("noise_schedule", self.noise_schedule, NOISE_SCHEDULES)
        if self.num_head_channels != -1:
            arguments.integer("num_head_channels", self.num_head_channels, 1)
        if self.num_heads_upsample not in (-1, self.num_heads):
            raise ValueError(
                f"num_heads_upsample={self.num_heads_upsample}: must be -1 or num_heads="
                f"{self.num_heads}"
            )

    @property
    def rescales(self) -> bool:
        """Whether the network is told timesteps times 1000 / T, a bool."""
        given = self.rescale_timesteps
        return self.project == "improved" if given is None else given

    def head_dims(self, layout: Layout) -> tuple[int, ...]:
        """Return the number of channels of an attention head at each level, finest first.

        Args:
            layout: the layout of the checkpoint, whose last level counts as one with attention, as
                the middle has it.

        Raises:
            ValueError: if num_heads or num_head_channels does not divide the channels of a level
                with attention.
        """
        last, dims = len(layout.channels) - 1, []
        for i, channels in enumerate(layout.channels):
            by_count = self.num_head_channels == -1
            divisor = self.num_heads if by_count else self.num_head_channels
            if channels % divisor and (layout.attention[i] or i == last):
                name = "num_heads" if by_count else "num_head_channels"
                raise ValueError(f"{name}={divisor}: must divide a level's {channels} channels")
            dims.append(max(channels // divisor, 1) if by_count else divisor)
        return tuple(dims)

    def check(self, layout: Layout) -> None:
        """Refuse flags that the weights contradict.

        Args:
            layout: the layout of the checkpoint.

        Raises:
            ValueError: if a given flag is not what the layout says, channel_mult or
                attention_resolutions is no list of numbers, or the network is one for
                super-resolution.
        """
        learns = layout.out_channels == 2 * layout.in_channels
        if layout.in_channels == 6 or not (learns or layout.out_channels == layout.in_channels):
            raise ValueError(
                f"checkpoint: takes {layout.in_channels} channels and gives {layout.out_channels}: "
                "must be a network of images; those for super-resolution are not supported"
            )
        found = {
            "num_channels": layout.num_channels,
            "num_res_blocks": layout.num_res_blocks,
            "class_cond": layout.num_classes is not None,
            "learn_sigma": learns,
            "use_scale_shift_norm": layout.scale_shift,
            "resblock_updown": layout.updown,
        }
        for name, value in found.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise ValueError(f"{name}={given}: must be {value}, as the weights say")
        if self.channel_mult:
            mult = _numbers("channel_mult", self.channel_mult)
            if tuple(int(m * layout.num_channels) for m in mult) != layout.channels:
                raise ValueError(
                    f"channel_mult={self.channel_mult!r}: must give the channels "
                    f"{','.join(map(str, layout.channels))}, as the weights say"
                )
        if self.attention_resolutions is not None:
            sides = _numbers("attention_resolutions", self.attention_resolutions)
            factors = {self.image_size // side for side in sides if side >= 1}
            asked = [2**i in factors for i in range(len(layout.channels))]
            if tuple(asked) != layout.attention:
                there = [self.image_size >> i for i, a in enumerate(layout.attention) if a]
                raise ValueError(
                    f"attention_resolutions={self.attention_resolutions!r}: must name of "
                    f"image_size={self.image_size} and its halves just "
                    f"{','.join(map(str, there)) or 'none'}, as the weights say"
                )

    def scheduler(self, learns: bool) -> dict[str, Any]:
        """Return the keys of a diffusers scheduler_config.json for these flags.

        Args:
            learns: whether the network learns the variance.

        Raises:
            ValueError: if the betas are not allowed (beta_end above 1 for few timesteps, say),
                timestep_respacing is no respacing of T timesteps, or neither linspace nor leading
                spacing makes its timesteps.
        """
        T = self.diffusion_steps
        scale = 1000 / T
        variance = "fixed_small" if self.sigma_small else "fixed_large"
        config = {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": T,
            "beta_schedule": "linear" if self.noise_schedule == "linear" else "squaredcos_cap_v2",
            "beta_start": scale * 0.0001,
            "beta_end": scale * 0.02,
            "variance_type": "learned_range" if learns else variance,
            "prediction_type": "sample" if self.predict_xstart else "epsilon",
            "clip_sample": True,
            "timestep_spacing": self._spacing(),
        }
        NoiseSchedule.from_config(config)
        return config

    def _spacing(self) -> str:
        """Return the spacing that makes the timesteps of timestep_respacing."""
        T = self.diffusion_steps
        wanted = respaced(self.timestep_respacing, T)
        for spacing in ("linspace", "leading"):
            if np.array_equal(wanted, timesteps(len(wanted), T, spacing)):
                return spacing
        raise ValueError(
            f"timestep_respacing={self.timestep_respacing!r}: no spacing makes these timesteps; "
            "must be left out here, and given to sample as timesteps="
            f"flashddpm.diffusion.timesteps.respaced({self.timestep_respacing!r}, {T})"
        )


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text!r}: must be numbers with commas between") from None


def convert(
    state: Mapping[str, Tensor], flags: OpenAIFlags
) -> tuple[UNetConfig, dict[str, Tensor], dict[str, Any]]:
    """Return the config, state dict and scheduler config of an OpenAI checkpoint.

    Args:
        state: the checkpoint's tensors by name.
        flags: the flags of the project's scripts.

    Returns:
        The U-Net's config; its state dict, tensors by a UNet2DModel's names; and the keys of a
        scheduler_config.json.

    Raises:
        CheckpointError: if it is no checkpoint of these projects; every tensor out of place is
            listed.
        ValueError: if flags are not allowed, or the weights contradict them.
    """
    layout = read_layout(state)
    flags.check(layout)
    dims = flags.head_dims(layout)
    rescaled_from = flags.diffusion_steps if flags.rescales else None
    config = unet_config(layout, flags.image_size, dims, rescaled_from, flags.dropout)
    converted = convert_state(state, layout, dims, flags.use_new_attention_order)
    wrong = mismatches(on_meta(config), converted, torch.float32)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    scheduler = flags.scheduler(layout.out_channels == 2 * layout.in_channels)
    return config, converted, scheduler


def describe(flags: OpenAIFlags) -> str:
    """Return, as one line of text "name=value, ..", the flags that no weights can confirm.

    They are image_size, num_heads or num_head_channels, use_new_attention_order, diffusion_steps,
    noise_schedule, predict_xstart and rescale_timesteps.

    Args:
        flags: the flags.
    """
    heads = "num_heads" if flags.num_head_channels == -1 else "num_head_channels"
    names = ("image_size", heads, "use_new_attention_order", "diffusion_steps", "noise_schedule")
    said = [f"{name}={getattr(flags, name)}" for name in (*names, "predict_xstart")]
    return ", ".join([*said, f"rescale_timesteps={flags.rescales}"])
