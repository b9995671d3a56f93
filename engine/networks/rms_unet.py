r"""The U-Net of denoising-diffusion-pytorch, under its names: RMS norms, linear attention.

    emb = W2 gelu(W1 sinusoids(t))                                             [B, 4 dim]
    residual block:  h = silu((s + 1) norm(conv x) + b), (s, b) = W silu(emb)
                     x' = silu(norm(conv h)) + (x or conv x)

with norm(x) = g sqrt(C) x / |x| over channels, and x' = x + attention(x) after every second block.
Attention's keys and values begin with a few learned ones, the same for every image. Linear
attention (Shen et al. 2021) is softmax_d(q) (softmax_n(k) v^T), linear in the n pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashddpm import arguments


@dataclass(frozen=True)
class RMSUNetConfig:
    """The settings of an `RMSUNet`, checked when it is made.

    Attributes:
        sample_size: the side of square images, or (H, W), in pixels, 1..65536.
        in_channels, out_channels: the number of channels of the images and of the output, 1..1024.
        dim: the number of channels of the timestep's sinusoids, even, 4..65536; the time embedding
            has four times as many.
        dims: the number of channels at the beginning and after each level, finest level first: 2 to
            11 integers, 1..65536, for 1 to 10 levels.
        full_attention: for each level, whether its attention is quadratic, not linear; in the
            middle it always is.
        attention_heads, attention_head_dim: for each level, the number of attention heads and the
            channels of one, 1..65536; the middle has those of the last level.
        num_mem_kv: the number of learned keys, and of learned values, of each head, 1..65536.
        theta: the longest period of the sinusoids, divided by 2 pi; at least 1.
        dropout: the probability, in [0, 1], of dropout in a residual block's first half.

    Raises:
        ValueError: if a setting is out of its range, or a list does not have an entry for each
            level.
    """

    sample_size: int | tuple[int, int]
    in_channels: int
    out_channels: int
    dim: int
    dims: tuple[int, ...]
    full_attention: tuple[bool, ...]
    attention_heads: tuple[int, ...]
    attention_head_dim: tuple[int, ...]
    num_mem_kv: int = 4
    theta: float = 10000.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        size = self.sample_size
        sides = size if isinstance(size, (list, tuple)) else [size]
        if len(sides) not in (1, 2):
            raise ValueError(f"sample_size={size!r}: must be one int or two")
        for side in sides:
            arguments.integer("sample_size", side, 1, 65536)
        if isinstance(size, list):
            object.__setattr__(self, "sample_size", tuple(size))
        for name in ("in_channels", "out_channels"):
            arguments.integer(name, getattr(self, name), 1, 1024)
        if arguments.integer("dim", self.dim, 4, 65536) % 2:
            raise ValueError(f"dim={self.dim}: must be even")
        arguments.integer("num_mem_kv", self.num_mem_kv, 1, 65536)
        arguments.number("theta", self.theta, 1)
        arguments.number("dropout", self.dropout, 0, 1)
        self._check_lists()

    def _check_lists(self) -> None:
        for name in ("dims", "full_attention", "attention_heads", "attention_head_dim"):
            value = getattr(self, name)
            low = 2 if name == "dims" else 1
            if not isinstance(value, (list, tuple)) or not low <= len(value) <= 11:
                raise ValueError(f"{name}={value!r}: must be a list of {low}..11 entries")
            if name != "dims" and len(value) != len(self.dims) - 1:
                raise ValueError(f"{name}={value!r}: must have {len(self.dims) - 1} entries")
            for entry in value:
                if name == "full_attention":
                    arguments.boolean(name, entry)
                else:
                    arguments.integer(name, entry, 1, 65536)
            object.__setattr__(self, name, tuple(value))

    @property
    def multiple(self) -> int:
        """The number, in pixels, of which both sides of images must be multiples."""
        return 2 ** (len(self.dims) - 2)

    @property
    def num_class_embeds(self) -> None:
        """None, for no such network takes labels."""
        return None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> RMSUNetConfig:
        """Read the settings from a dict such as ``to_dict`` returns.

        Args:
            config: the settings by name; num_mem_kv, theta and dropout may be left out (4, 10000,
                0), and keys that start with an underscore are skipped.

        Raises:
            ValueError: if a key is unknown or missing, or a value is not allowed.
        """
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(f"{key}={values[key]!r}: unknown key of an RMSUNet config")
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise ValueError(f"{name}: is missing from an RMSUNet config")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name, with "_class_name", as config.json holds them."""
        return {"_class_name": "RMSUNet", **dataclasses.asdict(self)}


class RMSNorm(nn.Module):
    """RMS normalization over the C channels of a pixel: g sqrt(C) x / |x|.

    Args:
        channels: the number of channels C.

    Attributes:
        g: the learned factors, [1, C, 1, 1].
        scale: sqrt(C).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, floating-point [B, C, H, W], normalized, in the same shape."""
        return F.normalize(x, dim=1) * self.g * self.scale


class Block(nn.Module):
    """A 3 x 3 convolution, RMS norm, scale and shift if given, SiLU and dropout.

    Args:
        c_in, c_out: the number of channels before and after.
        dropout: the probability of dropout.
    """

    def __init__(self, c_in: int, c_out: int, dropout: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm = RMSNorm(c_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        """Return the block's output, [B, c_out, H, W].

        Args:
            x: floating-point [B, c_in, H, W].
            scale_shift: [B, 2 c_out, 1, 1], c_out scales and c_out shifts: h (scale + 1) + shift;
                None for neither.
        """
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift.chunk(2, 1)
            x = x * (scale + 1) + shift
        return self.dropout(F.silu(x))


class RMSResnetBlock(nn.Module):
    """A residual block: two `Block` layers and a shortcut; the first takes the embedding.

    Args:
        c_in, c_out: the number of channels before and after.
        width: the width of the time embedding.
        dropout: the probability of dropout in the first block.
    """

    def __init__(self, c_in: int, c_out: int, width: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * c_out))
        self.block1 = Block(c_in, c_out, dropout)
        self.block2 = Block(c_out, c_out, 0.0)
        self.res_conv = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return the block's output, [B, c_out, H, W].

        Args:
            x: floating-point [B, c_in, H, W].
            emb: the time embeddings, [B, width].
        """
        h = self.block1(x, self.mlp(emb)[:, :, None, None])
        return self.block2(h) + self.res_conv(x)


class FullAttention(nn.Module):
    """Quadratic self-attention over pixels and learned keys and values: softmax(q k^T / sqrt(d)) v.

    Args:
        channels: the number of channels C of the input.
        heads: the number of attention heads.
        head_dim: the number of channels d of a head.
        memories: the number of learned keys and values of each head.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, memories: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, memories, head_dim))
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is to be added to ``x``, floating-point [B, C, H, W], in the same shape."""
        B, _, H, W = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(B, 3, self.heads, -1, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # [B, heads, pixels, d]
        mem_k, mem_v = self.mem_kv.expand(B, *self.mem_kv.shape).unbind(1)
        k, v = torch.cat([mem_k, k], -2), torch.cat([mem_v, v], -2)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(-1, -2).reshape(B, -1, H, W))


class LinearAttention(nn.Module):
    """Linear self-attention (Shen et al. 2021): v softmax(k)^T softmax(q) / sqrt(d).

    The softmax of q is over channels, that of k over the pixels and the learned keys.

    Args:
        channels: the number of channels C of the input.
        heads: the number of attention heads.
        head_dim: the number of channels d of a head.
        memories: the number of learned keys and values of each head.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, memories: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm = RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, head_dim, memories))
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(inner, channels, 1), RMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is to be added to ``x``, floating-point [B, C, H, W], in the same shape."""
        B, _, H, W = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(B, 3, self.heads, -1, H * W)
        q, k, v = qkv.unbind(1)  # [B, heads, d, pixels]
        mem_k, mem_v = self.mem_kv.expand(B, *self.mem_kv.shape).unbind(1)
        k, v = torch.cat([mem_k, k], -1), torch.cat([mem_v, v], -1)
        q = q.softmax(-2) * q.shape[-2] ** -0.5
        h = v @ k.softmax(-1).transpose(-1, -2) @ q
        return self.to_out(h.reshape(B, -1, H, W))


class RMSUNet(nn.Module):
    """The U-Net of denoising-diffusion-pytorch, which is unconditional.

    ``unet(x_t, t)`` predicts what the model was trained to predict.

    Args:
        config: the settings.

    Attributes:
        config: the settings.
    """

    def __init__(self, config: RMSUNetConfig) -> None:
        super().__init__()
        self.config = config
        dims, width, dropout = config.dims, 4 * config.dim, config.dropout
        self.init_conv = nn.Conv2d(config.in_channels, dims[0], 7, padding=3)
        self.time_mlp = nn.Sequential(
            nn.Identity(), nn.Linear(config.dim, width), nn.GELU(), nn.Linear(width, width)
        )

        def resnet(c_in: int, c_out: int) -> RMSResnetBlock:
            return RMSResnetBlock(c_in, c_out, width, dropout)

        def attention(channels: int, level: int, full: bool) -> nn.Module:
            kind = FullAttention if full else LinearAttention
            heads, head_dim = config.attention_heads[level], config.attention_head_dim[level]
            return kind(channels, heads, head_dim, config.num_mem_kv)

        last = len(dims) - 2
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, full in enumerate(config.full_attention):
            a, b = dims[i], dims[i + 1]
            shrink = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 1))
            resize = shrink if i < last else nn.Conv2d(a, b, 3, padding=1)
            layers = [resnet(a, a), resnet(a, a), attention(a, i, full), resize]
            self.downs.append(nn.ModuleList(layers))
        self.mid_block1 = resnet(dims[-1], dims[-1])
        self.mid_attn = attention(dims[-1], last, True)
        self.mid_block2 = resnet(dims[-1], dims[-1])
        for i in range(last, -1, -1):
            a, b = dims[i], dims[i + 1]
            conv = nn.Conv2d(b, a, 3, padding=1)
            grow = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv)
            attend = attention(b, i, config.full_attention[i])
            layers = [resnet(a + b, b), resnet(a + b, b), attend, grow if i > 0 else conv]
            self.ups.append(nn.ModuleList(layers))
        self.final_res_block = resnet(2 * dims[0], dims[0])
        self.final_conv = nn.Conv2d(dims[0], config.out_channels, 1)

    def embed_time(self, t: Tensor) -> Tensor:
        """Return the time embeddings of timesteps.

        Args:
            t: integer or floating-point [B], not checked.

        Returns:
            [B, 4 dim], in the dtype of the network's weights.
        """
        half = self.config.dim // 2
        step = math.log(self.config.theta) / (half - 1)
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) * -step
        angles = t.float()[:, None] * torch.exp(exponent)
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        return self.time_mlp(waves.to(self.final_conv.weight.dtype))

    def forward(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Predict from noisy images what the model was trained to predict.

        Args:
            x_t: the noisy images, [B, C_in, H, W], in the dtype of the weights; H and W multiples
                of ``config.multiple``.
            t: timesteps [B], [1] or [], or one number; integer or float.
            labels: must be None.

        Returns:
            [B, C_out, H, W].

        Raises:
            ValueError: if x_t or t is of a wrong shape, or labels are given.
        """
        dtype = torch.float32 if isinstance(t, float) else None
        t = torch.as_tensor(t, dtype=dtype, device=x_t.device)
        self._check(x_t, t, labels)
        emb = self.embed_time(t.expand(len(x_t)))
        x = first = self.init_conv(x_t)
        skips = []
        for layers in cast(Iterable[nn.ModuleList], self.downs):
            block1, block2, attend, resize = layers
            x = block1(x, emb)
            skips.append(x)
            x = block2(x, emb)
            x = attend(x) + x
            skips.append(x)
            x = resize(x)
        x = self.mid_block1(x, emb)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, emb)
        for layers in cast(Iterable[nn.ModuleList], self.ups):
            block1, block2, attend, resize = layers
            x = block1(torch.cat([x, skips.pop()], 1), emb)
            x = block2(torch.cat([x, skips.pop()], 1), emb)
            x = resize(attend(x) + x)
        return self.final_conv(self.final_res_block(torch.cat([x, first], 1), emb))

    def _check(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> None:
        multiple, C = self.config.multiple, self.config.in_channels
        if x_t.ndim != 4 or x_t.shape[1] != C or any(side % multiple for side in x_t.shape[2:]):
            raise ValueError(
                f"x_t of shape {tuple(x_t.shape)}: must be [B, {C}, H, W] with H and W multiples "
                f"of {multiple}"
            )
        if tuple(t.shape) not in ((), (1,), (len(x_t),)):
            raise ValueError(f"t of shape {tuple(t.shape)}: must be one or [{len(x_t)}]")
        if labels is not None:
            raise ValueError("labels: given, but this network is unconditional")
