"""The U-Net's settings: diffusers' config keys, checked before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashddpm import arguments

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")

# Keys of UNet2DModel that this network has in one form only.
FIXED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "class_embed_type": (None,),
    "num_train_timesteps": (None,),
}


@dataclass(frozen=True)
class UNetConfig:
    """The keys of diffusers' UNet2DModel that may vary, with its defaults."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    add_attention: bool = True
    num_class_embeds: int | None = None

    def __post_init__(self) -> None:
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 10:
                raise ValueError(f"{name}={value!r}: must be a list of 1..10 entries")
            object.__setattr__(self, name, tuple(value))
        size = self.sample_size
        if size is not None:
            for side in size if isinstance(size, (list, tuple)) else [size]:
                arguments.integer("sample_size", side, 1, 65536)
        if isinstance(size, (list, tuple)):
            if len(size) != 2:
                raise ValueError(f"sample_size={size!r}: must be one int or two")
            object.__setattr__(self, "sample_size", tuple(size))
        levels = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ValueError(
                f"block_out_channels={self.block_out_channels}: must have as many entries as "
                f"down_block_types ({len(self.down_block_types)}) and "
                f"up_block_types ({len(self.up_block_types)})"
            )
        for kind in self.down_block_types:
            arguments.one_of("down_block_types", kind, DOWN_BLOCKS)
        for kind in self.up_block_types:
            arguments.one_of("up_block_types", kind, UP_BLOCKS)
        for name in ("in_channels", "out_channels"):
            arguments.integer(name, getattr(self, name), 1, 1024)
        for name in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
            arguments.boolean(name, getattr(self, name))
        arguments.integer("freq_shift", self.freq_shift, 0, 65536)
        arguments.integer("layers_per_block", self.layers_per_block, 1, 16)
        arguments.integer("downsample_padding", self.downsample_padding, 0, 1)
        arguments.integer("norm_num_groups", self.norm_num_groups, 1, 65536)
        for name in ("time_embedding_dim", "attention_head_dim", "num_class_embeds"):
            if getattr(self, name) is not None:
                arguments.integer(name, getattr(self, name), 1, 1_000_000)
        arguments.number("dropout", self.dropout, 0, 1)
        arguments.number("norm_eps", self.norm_eps, 0, 1)
        if arguments.number("mid_block_scale_factor", self.mid_block_scale_factor) == 0:
            raise ValueError("mid_block_scale_factor=0: must not be 0")
        for channels in self.block_out_channels:
            arguments.integer("block_out_channels", channels, 1, 65536)
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels={channels}: must be a multiple of "
                    f"norm_num_groups={self.norm_num_groups}"
                )
        if self.block_out_channels[0] // 2 - self.freq_shift <= 0:
            raise ValueError(
                f"freq_shift={self.freq_shift}: must be below half of "
                f"block_out_channels[0]={self.block_out_channels[0]}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a diffusers config; keys that start with an underscore are its own notes.

        Raises:
            ValueError: an unknown key, or a value that this network does not have.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        known = {}
        for key, value in config.items():
            if key in names:
                known[key] = value
            elif key in FIXED:
                if value not in FIXED[key]:
                    allowed = " or ".join(map(repr, FIXED[key]))
                    raise ValueError(f"{key}={value!r}: must be {allowed}")
            elif not key.startswith("_"):
                raise ValueError(f"{key}={value!r}: unknown key of a UNet2DModel config")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as diffusers writes it."""
        fixed = {key: values[0] for key, values in FIXED.items()}
        return {"_class_name": "UNet2DModel", **fixed, **dataclasses.asdict(self)}
