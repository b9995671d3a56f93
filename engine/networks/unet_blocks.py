"""The building blocks of the DDPM U-Net, keyed like those of diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashddpm.networks.unet_config import UNetConfig


def sinusoids(t: Tensor, channels: int, freq_shift: int, flip_sin_to_cos: bool) -> Tensor:
    """Return the sinusoidal embeddings of timesteps, float32 [B, channels].

    With half = channels // 2, they are the sines and then the cosines of
    t 10^(-4 i / (half - freq_shift)), i = 0..half-1, and a last column of 0 if channels is odd.

    Args:
        t: integer or floating-point [B].
        channels: the number of columns.
        freq_shift: 0 or, in the DDPM paper's code, 1; must be below half, which is not checked.
        flip_sin_to_cos: whether the cosines come before the sines.
    """
    half = channels // 2
    # In diffusers' order of operations: any other moves the angles at t = 999 by up to 6e-5.
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponent / (half - freq_shift))
    pair = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(pair, -1), (0, channels % 2))


class TimestepEmbedding(nn.Module):
    """The time embedding's network: two linear layers with a SiLU between them.

    Args:
        channels: the number of channels of the sinusoids.
        width: the width of the time embedding.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return time embeddings, [B, width], of sinusoids ``x``, float [B, channels]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """A residual block: norm, SiLU, conv, time projection, norm, SiLU, conv, plus a shortcut.

    The time projection is added before the second norm with resnet_time_scale_shift "default"; with
    "scale_shift" it is a scale and a shift after it: norm(h) (1 + scale) + shift. The shortcut is
    the input, through a 1 x 1 convolution where c_in and c_out differ. The last convolution begins
    at 0.

    Args:
        c_in, c_out: the number of channels before and after, multiples of config.norm_num_groups.
        config: the settings of the network, of which norms, dropout and time scale are read.
        width: the width of the time embedding.
        scale: the number by which the sum of block and shortcut is divided, not 0.
        resize: "down" or "up" for half or twice the size, before the first convolution and in the
            shortcut, by means of 2 x 2 pixels or by repeating pixels; None for the same size.

    Attributes:
        time_emb_proj: the linear layer, of the SiLU of the time embedding, whose output `forward`
            takes; the network calls it, or one packed layer in place of all blocks'.
        c_in, c_out, scale: the arguments of these names.
        scale_shift: whether resnet_time_scale_shift is "scale_shift".
        resize: the function that changes the size, `halve` or `double`, or None.

    Raises:
        KeyError: if ``resize`` is another string.
        ValueError: if c_in or c_out is no multiple of config.norm_num_groups.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        config: UNetConfig,
        width: int,
        scale: float = 1.0,
        resize: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(config.norm_num_groups, c_in, config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, 2 * c_out if self.scale_shift else c_out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)
        self.c_in, self.c_out, self.scale = c_in, c_out, scale
        self.resize = {None: None, "down": halve, "up": double}[resize]
        zero_(self.conv2)

    def forward(self, x: Tensor, projection: Tensor) -> Tensor:
        """Return the block's output.

        Args:
            x: floating-point [B, c_in, H, W].
            projection: the output of ``time_emb_proj``, [B, c_out], or [B, 2 c_out], scales before
                shifts, with scale_shift.

        Returns:
            [B, c_out, H, W], with half or twice H and W where the block changes the size.
        """
        h = F.silu(self.norm1(x))
        if self.resize is not None:
            x, h = self.resize(x), self.resize(h)
        h = self.conv1(h)
        projection = projection[:, :, None, None]
        if self.scale_shift:
            scale, shift = projection.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + projection)
        h = self.conv2(self.dropout(F.silu(h)))
        shortcut = x if self.c_in == self.c_out else self.conv_shortcut(x)
        return (shortcut + h) / self.scale if self.scale != 1 else shortcut + h


class Attention(nn.Module):
    """Self-attention over pixels, softmax(q k^T / sqrt(head_dim)) v, added to its input.

    The layers of q, k and v are one packed linear layer, to_qkv; `state_dict` and `load_state_dict`
    have it as three, to_q, to_k and to_v, as diffusers does. The output layer begins at 0.

    Args:
        channels: the number of channels C of the input and output.
        head_dim: the number of channels of a head; None for one head of C channels.
        groups: the groups of the group norm before the attention; None for no norm.
        eps: the epsilon of the norm.
        scale: the number by which the sum of attention and input is divided, not 0.

    Attributes:
        heads: the number of heads, C / head_dim.
        scale: the argument of this name.

    Raises:
        ValueError: if head_dim or groups does not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int | None,
        groups: int | None,
        eps: float,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()
        self.to_qkv = nn.Linear(channels, 3 * channels)
        out = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([out])
        head_dim = head_dim or channels
        if channels % head_dim:
            raise ValueError(f"attention_head_dim={head_dim}: must divide {channels} channels")
        self.heads = channels // head_dim
        self.scale = scale
        zero_(out)
        self.register_state_dict_post_hook(_split_qkv)
        self.register_load_state_dict_pre_hook(_pack_qkv)

    def forward(self, x: Tensor) -> Tensor:
        """Return (x + attention of x) / scale, in the shape of ``x``, floating [B, C, H, W]."""
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


def halve(x: Tensor) -> Tensor:
    """Return images of half the size, means of 2 x 2 pixels.

    Args:
        x: floating-point [B, C, H, W]; the last row or column of an odd size is left out.

    Returns:
        [B, C, H // 2, W // 2], in the same dtype.
    """
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Return images of twice the size, every pixel four times.

    Args:
        x: floating-point [B, C, H, W].

    Returns:
        [B, C, 2 H, 2 W], in the same dtype.
    """
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """A 3 x 3 convolution of stride 2, which halves the size.

    Args:
        channels: the number of channels before and after.
        padding: 1 for zeros at all four sides, 0 for one row below and one column to the right.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, floating-point [B, C, H, W] with even H and W, as [B, C, H/2, W/2]."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel repeated 2 x 2 times, then a 3 x 3 convolution.

    Args:
        channels: the number of channels before and after.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, floating-point [B, C, H, W], as [B, C, 2 H, 2 W]."""
        return self.conv(double(x))


class Level(nn.Module):
    """One resolution of the U-Net: residual blocks, attention after each or none, a change of size.

    Args:
        resnets: the residual blocks.
        attentions: as many attentions, or an empty list, or, in the middle, one between two
            blocks.
        down: what halves the size at the end, a `Downsample` or a `ResnetBlock`; None for nothing.
        up: what doubles the size at the end, an `Upsample` or a `ResnetBlock`; None for nothing.

    Attributes:
        resnets: the residual blocks, a ModuleList.
        attentions: the attentions, a ModuleList, or None.
        downsamplers, upsamplers: a ModuleList of ``down`` or of ``up`` alone, or None.
    """

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[Attention],
        down: nn.Module | None = None,
        up: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers = nn.ModuleList([down]) if down is not None else None
        self.upsamplers = nn.ModuleList([up]) if up is not None else None

    @property
    def resize(self) -> nn.Module | None:
        """The module that changes the size at the end of the level; None where nothing does."""
        layers = self.downsamplers or self.upsamplers
        return layers[0] if layers is not None else None

    def residual(self) -> Iterator[ResnetBlock]:
        """Yield the residual blocks in the order in which the forward pass meets them."""
        yield from cast(Iterable[ResnetBlock], self.resnets)
        if isinstance(self.resize, ResnetBlock):
            yield self.resize

    def layer(self, i: int, x: Tensor, projection: Tensor) -> Tensor:
        """Return the output of residual block number i and of its attention, if there is one.

        Args:
            i: the number of the block, from 0.
            x: floating-point [B, C_in, H, W].
            projection: the block's time projection, [B, C_out or 2 C_out].

        Returns:
            [B, C_out, H, W].
        """
        x = self.resnets[i](x, projection)
        return self.attentions[i](x) if self.attentions is not None else x

    def resized(self, x: Tensor, rows: Iterator[Tensor]) -> Tensor:
        """Return ``x`` after the level's change of size: the output of the module `resize`.

        Args:
            x: floating-point [B, C, H, W].
            rows: an iterator over the network's time projections, each [B, C] (or [B, 2 C] with
                scale_shift), of which all before this module's are taken. If `resize` is a
                `ResnetBlock`, its own is taken from it; else none is.

        Returns:
            [B, C, H/2, W/2] for a level on the way down, [B, C, 2 H, 2 W] on the way up.

        Raises:
            AssertionError: if `resize` is None.
        """
        assert self.resize is not None
        return (
            self.resize(x, next(rows)) if isinstance(self.resize, ResnetBlock) else (self.resize(x))
        )


def zero_(module: nn.Conv2d | nn.Linear) -> None:
    """Set a layer's weight, and bias if it has one, to 0, in place (Ho et al. 2020).

    It is for the last layer of a residual block, which then adds nothing to its input at first.
    """
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
