r"""The DDPM U-Net (Ho et al. 2020, appendix B), configured and keyed like diffusers' UNet2DModel.

The forward pass is split at the time embedding, since that half depends on (t, label) alone:

    emb         = time_embedding(sinusoids(t)) + class_embedding(label)      [B, E]
    projections = silu(emb) W + b, all residual blocks' projections packed   [B, P]
    out         = body(x_t, projections)                                     [B, C_out, H, W]

so a sampler looks ``emb`` up in a table over t and does one matrix product a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.unet_config import UNetConfig


def sinusoids(t: Tensor, channels: int, freq_shift: int, flip_sin_to_cos: bool) -> Tensor:
    """Return [sin, cos] of t 10^(-4 i / (half - freq_shift)), float32 [B, channels].

    Args:
        t: [B], integer or float.
        channels: twice ``half``; if odd, the last column is 0.
        freq_shift: 0 or, in the DDPM paper's code, 1.
        flip_sin_to_cos: return [cos, sin].
    """
    half = channels // 2
    # In diffusers' order of operations: any other moves the angles at t = 999 by up to 6e-5.
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponent / (half - freq_shift))
    pair = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(pair, -1), (0, channels % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels] -> [B, width]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, + projected time embedding, norm, SiLU, conv, + shortcut."""

    def __init__(
        self, c_in: int, c_out: int, config: UNetConfig, width: int, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, c_in, config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, c_out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)
        self.c_in, self.c_out, self.scale = c_in, c_out, scale
        zero_(self.conv2)

    def forward(self, x: Tensor, projection: Tensor) -> Tensor:
        """[B, c_in, H, W], [B, c_out] -> [B, c_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + projection[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        shortcut = x if self.c_in == self.c_out else self.conv_shortcut(x)
        return (shortcut + h) / self.scale if self.scale != 1 else shortcut + h


class Attention(nn.Module):
    """Self-attention over pixels; q, k and v are one packed projection, three in the state dict."""

    def __init__(self, channels: int, config: UNetConfig, scale: float = 1.0) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        out = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([out])
        head_dim = config.attention_head_dim or channels
        if channels % head_dim:
            raise ValueError(f"attention_head_dim={head_dim}: must divide {channels} channels")
        self.heads = channels // head_dim
        self.scale = scale
        zero_(out)
        self.register_state_dict_post_hook(_split_qkv)
        self.register_load_state_dict_pre_hook(_pack_qkv)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        B, C, H, W = x.shape
        h = self.group_norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        qkv = self.to_qkv(h).reshape(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out[0](h.transpose(1, 2).reshape(B, H * W, C))
        x = x + h.reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x / self.scale if self.scale != 1 else x


def _split_qkv(module: nn.Module, state: dict, prefix: str, _metadata: Any) -> None:
    for kind in ("weight", "bias"):
        packed = state.pop(f"{prefix}to_qkv.{kind}")
        for name, part in zip(("to_q", "to_k", "to_v"), packed.chunk(3), strict=True):
            state[f"{prefix}{name}.{kind}"] = part


def _pack_qkv(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    for kind in ("weight", "bias"):
        keys = [f"{prefix}{name}.{kind}" for name in ("to_q", "to_k", "to_v")]
        if all(key in state for key in keys):
            state[f"{prefix}to_qkv.{kind}"] = torch.cat([state.pop(key) for key in keys])


class Downsample(nn.Module):
    """A stride-2 convolution; padding 0 means one row and column at the far edges."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour times 2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each if asked, then a change of size."""

    def __init__(
        self, resnets: list[ResnetBlock], attentions: list[Attention], resize: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers = nn.ModuleList([resize]) if isinstance(resize, Downsample) else None
        self.upsamplers = nn.ModuleList([resize]) if isinstance(resize, Upsample) else None

    def layer(self, i: int, x: Tensor, projection: Tensor) -> Tensor:
        """Residual block i and its attention."""
        x = self.resnets[i](x, projection)
        return self.attentions[i](x) if self.attentions is not None else x


class UNet(nn.Module):
    """The U-Net. ``unet(x_t, t, labels)`` predicts what the model was trained to predict.

    Raises:
        ValueError: a config that cannot be built, labels given to an unconditional network or
            missing for a conditional one, or an input of a wrong shape.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        width = config.time_embedding_dim or channels[0] * 4
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], width)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, width)

        def level(pairs: list[tuple[int, int]], attend: bool, resize: nn.Module | None) -> Level:
            resnets = [ResnetBlock(a, b, config, width) for a, b in pairs]
            attentions = [Attention(b, config) for _, b in pairs] if attend else []
            return Level(resnets, attentions, resize)

        last = len(channels) - 1
        skips = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for i, c in enumerate(channels):
            pairs = [(channels[max(i - 1, 0)], c)] + [(c, c)] * (config.layers_per_block - 1)
            down = Downsample(c, config.downsample_padding) if i < last else None
            attend = config.down_block_types[i] == "AttnDownBlock2D"
            self.down_blocks.append(level(pairs, attend, down))
            skips += [c] * (len(pairs) + (i < last))

        c, scale = channels[-1], config.mid_block_scale_factor
        self.mid_block = Level(
            [ResnetBlock(c, c, config, width, scale) for _ in range(2)],
            [Attention(c, config, scale)] if config.add_attention else [],
            None,
        )

        self.up_blocks = nn.ModuleList()
        for i, (c_out, kind) in enumerate(zip(channels[::-1], config.up_block_types, strict=True)):
            pairs = []
            for _ in range(config.layers_per_block + 1):
                pairs.append((c + skips.pop(), c_out))
                c = c_out
            up = Upsample(c_out) if i < last else None
            self.up_blocks.append(level(pairs, kind == "AttnUpBlock2D", up))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        zero_(self.conv_out)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
    ) -> UNet:
        """Load a diffusers folder: a pipeline's (with unet/ in it) or a U-Net's own.

        Raises:
            CheckpointError: files or keys are missing, broken or do not match the config.
        """
        from flashddpm.checkpoint import load_unet

        return load_unet(
            folder, arguments.resolve_device(device), arguments.resolve_dtype(dtype, torch.float32)
        )

    def resnets(self) -> Iterator[ResnetBlock]:
        """Residual blocks in the order in which the forward pass meets them."""
        for block in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            yield from block.resnets

    def time_table(self, num_timesteps: int) -> Tensor:
        """Return the time embedding of t = 0..num_timesteps-1, [num_timesteps, E]."""
        device = self.conv_in.weight.device
        return self.embed_time(torch.arange(num_timesteps, device=device))

    def embed_time(self, t: Tensor) -> Tensor:
        """[B] -> [B, E]."""
        config = self.config
        waves = sinusoids(
            t, config.block_out_channels[0], config.freq_shift, config.flip_sin_to_cos
        )
        return self.time_embedding(waves.to(self.conv_in.weight.dtype))

    def packed_projection(self) -> tuple[Tensor, Tensor]:
        """Return the weight [P, E] and bias [P] of all residual blocks' time projections."""
        layers = [block.time_emb_proj for block in self.resnets()]
        return torch.cat([m.weight for m in layers]), torch.cat([m.bias for m in layers])

    def body(self, x: Tensor, projections: Tensor) -> Tensor:
        """The convolutional half: [B, C_in, H, W], [B, P] -> [B, C_out, H, W]."""
        rows = iter(projections.split([block.c_out for block in self.resnets()], dim=1))
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = self.conv_in(x)
        skips = [x]
        for block in cast(Iterable[Level], self.down_blocks):
            for i in range(len(block.resnets)):
                x = block.layer(i, x, next(rows))
                skips.append(x)
            if block.downsamplers is not None:
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block.resnets[0](x, next(rows))
        if self.mid_block.attentions is not None:
            x = self.mid_block.attentions[0](x)
        x = self.mid_block.resnets[1](x, next(rows))
        for block in cast(Iterable[Level], self.up_blocks):
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], 1), next(rows))
            if block.upsamplers is not None:
                x = block.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def forward(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Predict from the noisy image.

        Args:
            x_t: [B, C_in, H, W].
            t: [B] or one timestep, integer or float.
            labels: int64 [B] for a class-conditional network, else None.

        Returns:
            [B, C_out, H, W].
        """
        t = torch.as_tensor(t, device=x_t.device)
        self._check(x_t, t, labels)
        emb = self.embed_time(t.expand(len(x_t)))
        if labels is not None:
            emb = emb + self.class_embedding(labels)
        return self.body(x_t, F.linear(F.silu(emb), *self.packed_projection()))

    def _check(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> None:
        levels = len(self.config.block_out_channels) - 1
        if (
            x_t.ndim != 4
            or x_t.shape[1] != self.config.in_channels
            or any(side % 2**levels for side in x_t.shape[2:])
        ):
            raise ValueError(
                f"x_t of shape {tuple(x_t.shape)}: must be [B, {self.config.in_channels}, H, W] "
                f"with H and W multiples of {2**levels}"
            )
        if tuple(t.shape) not in ((), (1,), (len(x_t),)):
            raise ValueError(f"t of shape {tuple(t.shape)}: must be one or [{len(x_t)}]")
        if (labels is None) != (self.config.num_class_embeds is None):
            wanted = "missing" if labels is None else "given"
            kind = "class-conditional" if labels is None else "unconditional"
            raise ValueError(f"labels: {wanted}, but this network is {kind}")
        if labels is not None and tuple(labels.shape) != (len(x_t),):
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be [{len(x_t)}]")


def zero_(module: nn.Conv2d | nn.Linear) -> None:
    """Zero a layer, so that its block starts as the identity (Ho et al. 2020's code)."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
