"""`UNetConfig`: the U-Net's settings, diffusers' config keys, checked before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashddpm import arguments

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")

# Keys of UNet2DModel that this network has in one form only.
FIXED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2D",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
}


NETWORK_T = 1000
"""A "rescaled" network is told the timestep t NETWORK_T / num_train_timesteps."""


@dataclass(frozen=True)
class UNetConfig:
    """The settings of a `UNet`: the keys of diffusers' UNet2DModel that may vary, and defaults.

    Three are extended for networks of other projects, and diffusers stops at each with an error:
    the time_embedding_type "rescaled", an attention_head_dim for each level, and
    time_embedding_channels.

    Attributes:
        sample_size: the side of square images, or (H, W), in pixels, 1..65536; None for not known.
        in_channels, out_channels: the number of channels of the images and of the output, 1..1024.
        center_input_sample: whether the input x is replaced by 2 x - 1.
        time_embedding_type: "positional", or "rescaled" for timesteps times 1000 /
            num_train_timesteps, not rounded.
        time_embedding_dim: the width E of the time embedding, 1..65536; None for
            4 block_out_channels[0].
        time_embedding_channels: the number of channels of the sinusoids, 1..65536; None for
            block_out_channels[0].
        num_train_timesteps: the number of timesteps T of the training, 1..100000; must be given for
            "rescaled".
        freq_shift: an integer, at least 0 and below half = time_channels // 2: the frequencies are
            10^(-4 i / (half - freq_shift)), i = 0..half-1.
        flip_sin_to_cos: whether the sinusoids are [cos, sin], not [sin, cos].
        down_block_types: the type of each level on the way down, finest first: "DownBlock2D",
            "AttnDownBlock2D" (with attention) or "ResnetDownsampleBlock2D" (which halves the size
            in a residual block).
        up_block_types: the type of each level on the way up, coarsest first: "UpBlock2D",
            "AttnUpBlock2D" or "ResnetUpsampleBlock2D".
        block_out_channels: the number of channels of each level, finest first, 1 to 10 multiples of
            norm_num_groups.
        layers_per_block: the number of residual blocks of a level on the way down, 1..16; on the
            way up there is one more.
        mid_block_scale_factor: the number by which the sums in the middle are divided; not 0.
        downsample_padding: the padding of downsampling convolutions: 1, or 0 for one row below and
            one column to the right.
        downsample_type, upsample_type: what changes the size in levels with attention: "conv" or
            "resnet".
        dropout: the probability, in [0, 1], of dropout in residual blocks.
        attention_head_dim: the number of channels of an attention head, one for all levels or one
            for each, finest first; None for one head. Whether it divides the channels is checked
            when the network is built.
        norm_num_groups: the number of groups of group norms, 1..65536.
        attn_norm_num_groups: the number of groups of the norm before the middle's attention, a
            divisor of block_out_channels[-1]; None for norm_num_groups, or, with
            resnet_time_scale_shift "scale_shift", for no norm.
        norm_eps: the epsilon of group norms, in [0, 1].
        resnet_time_scale_shift: "default" or "scale_shift": whether the time embedding shifts
            features, or scales and shifts them.
        add_attention: whether the middle has attention.
        num_class_embeds: the number of class labels, that for "no label" included, 1..1000000; None
            for an unconditional network.

    Raises:
        ValueError: if a setting is out of its range, or settings contradict one another.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_channels: int | None = None
    num_train_timesteps: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    attention_head_dim: int | tuple[int, ...] | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    num_class_embeds: int | None = None

    def __post_init__(self) -> None:
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 10:
                raise ValueError(f"{name}={value!r}: must be a list of 1..10 entries")
            object.__setattr__(self, name, tuple(value))
        self._check_size()
        self._check_blocks()
        self._check_time()
        for name in ("in_channels", "out_channels"):
            arguments.integer(name, getattr(self, name), 1, 1024)
        for name in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
            arguments.boolean(name, getattr(self, name))
        if self.num_class_embeds is not None:
            arguments.integer("num_class_embeds", self.num_class_embeds, 1, 1_000_000)
        arguments.number("dropout", self.dropout, 0, 1)
        arguments.number("norm_eps", self.norm_eps, 0, 1)
        if arguments.number("mid_block_scale_factor", self.mid_block_scale_factor) == 0:
            raise ValueError("mid_block_scale_factor=0: must not be 0")

    def _check_size(self) -> None:
        size = self.sample_size
        if size is not None:
            for side in size if isinstance(size, (list, tuple)) else [size]:
                arguments.integer("sample_size", side, 1, 65536)
        if isinstance(size, (list, tuple)):
            if len(size) != 2:
                raise ValueError(f"sample_size={size!r}: must be one int or two")
            object.__setattr__(self, "sample_size", tuple(size))

    def _check_blocks(self) -> None:
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
        for name in ("downsample_type", "upsample_type"):
            arguments.one_of(name, getattr(self, name), ("conv", "resnet"))
        self._check_channels()
        self._check_heads(levels)

    def _check_channels(self) -> None:
        arguments.integer("layers_per_block", self.layers_per_block, 1, 16)
        arguments.integer("downsample_padding", self.downsample_padding, 0, 1)
        arguments.integer("norm_num_groups", self.norm_num_groups, 1, 65536)
        for channels in self.block_out_channels:
            arguments.integer("block_out_channels", channels, 1, 65536)
            self._check_groups("block_out_channels", channels, "norm_num_groups")
        if self.attn_norm_num_groups is not None:
            arguments.integer("attn_norm_num_groups", self.attn_norm_num_groups, 1, 65536)
            self._check_groups("block_out_channels[-1]", channels, "attn_norm_num_groups")

    def _check_heads(self, levels: int) -> None:
        dims = self.attention_head_dim
        if isinstance(dims, (list, tuple)):
            if len(dims) != levels:
                raise ValueError(f"attention_head_dim={dims!r}: must have {levels} entries")
            object.__setattr__(self, "attention_head_dim", tuple(dims))
        for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
            if dims is not None:
                arguments.integer("attention_head_dim", dim, 1, 1_000_000)

    def _check_groups(self, name: str, channels: int, groups: str) -> None:
        if channels % getattr(self, groups):
            raise ValueError(
                f"{name}={channels}: must be a multiple of {groups}={getattr(self, groups)}"
            )

    def _check_time(self) -> None:
        modes = ("default", "scale_shift")
        arguments.one_of("resnet_time_scale_shift", self.resnet_time_scale_shift, modes)
        kinds = ("positional", "rescaled")
        arguments.one_of("time_embedding_type", self.time_embedding_type, kinds)
        if self.num_train_timesteps is not None or self.time_embedding_type == "rescaled":
            arguments.integer("num_train_timesteps", self.num_train_timesteps, 1, 100_000)
        for name in ("time_embedding_dim", "time_embedding_channels"):
            if getattr(self, name) is not None:
                arguments.integer(name, getattr(self, name), 1, 65536)
        arguments.integer("freq_shift", self.freq_shift, 0, 65536)
        if self.time_channels // 2 - self.freq_shift <= 0:
            name = (
                "block_out_channels[0]"
                if self.time_embedding_channels is None
                else ("time_embedding_channels")
            )
            raise ValueError(
                f"freq_shift={self.freq_shift}: must be below half of {name}={self.time_channels}"
            )

    @property
    def multiple(self) -> int:
        """The number, in pixels, of which both sides of images must be multiples."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def time_channels(self) -> int:
        """The number of channels of the timestep's sinusoids."""
        return self.time_embedding_channels or self.block_out_channels[0]

    @property
    def mid_groups(self) -> int | None:
        """The groups of the norm before the middle's attention; None for no norm.

        It is attn_norm_num_groups, or else norm_num_groups, but none with scale_shift, as in
        diffusers.
        """
        plain = self.resnet_time_scale_shift == "default"
        return self.attn_norm_num_groups or (self.norm_num_groups if plain else None)

    def head_dim(self, level: int) -> int | None:
        """Return the number of channels of an attention head at a level; None for one head.

        Args:
            level: the number of the level, 0 for the finest; -1 for the last one and the middle.

        Raises:
            IndexError: if attention_head_dim has an entry for each level, and there is no such one.
        """
        dims = self.attention_head_dim
        return dims[level] if isinstance(dims, tuple) else dims

    def resizes_in_resnet(self, kind: str) -> bool:
        """Return whether a level of this type changes the size in a residual block.

        As in diffusers, downsample_type and upsample_type decide it for types with attention only.

        Args:
            kind: the type of a level, an entry of down_block_types or up_block_types; not checked.
        """
        own = {"AttnDownBlock2D": self.downsample_type, "AttnUpBlock2D": self.upsample_type}
        return kind.startswith("Resnet") or own.get(kind) == "resnet"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read the settings from a diffusers config of UNet2DModel.

        Args:
            config: the settings by name; those left out have diffusers' defaults, and keys that
                start with an underscore, diffusers' own notes, are skipped.

        Raises:
            ValueError: if a key is unknown, or a value is not one that this network can have.
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
        """Return the settings by name, with "_class_name", as diffusers' config.json has them."""
        fixed = {key: values[0] for key, values in FIXED.items()}
        settings = dataclasses.asdict(self)
        if self.time_embedding_channels is None:  # ours, so only where it says something
            del settings["time_embedding_channels"]
        return {"_class_name": "UNet2DModel", **fixed, **settings}
