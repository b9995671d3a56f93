r"""The DDPM U-Net (Ho et al. 2020, appendix B), configured and keyed like diffusers' UNet2DModel.

The forward pass is split at the time embedding, since that half depends on (t, label) alone:

    emb         = time_embedding(sinusoids(t)) + class_embedding(label)      [B, E]
    projections = silu(emb) W + b, all residual blocks' projections packed   [B, P]
    out         = body(x_t, projections)                                     [B, C_out, H, W]

so a sampler computes ``emb`` once for the rows (steps) of a plan, and does one matrix product a
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashddpm.networks.customized import touched
from flashddpm.networks.unet_blocks import (
    Attention,
    Downsample,
    Level,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    sinusoids,
    zero_,
)
from flashddpm.networks.unet_config import NETWORK_T, UNetConfig


class UNet(nn.Module):
    """The DDPM U-Net. ``unet(x_t, t, labels)`` predicts what the model was trained to predict.

    Args:
        config: the settings.

    Attributes:
        config: the settings.
        checkpoint_activations: whether the backward pass computes the inside of residual blocks and
            attentions again, those in the middle apart, which saves the memory of it; a bool that
            may be set, False when the network is made.

    Raises:
        ValueError: if attention_head_dim does not divide the channels of a level with attention, or
            of the last.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        channels = config.block_out_channels
        width = config.time_embedding_dim or channels[0] * 4
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(config.time_channels, width)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, width)
        skips = self._build_down(config, width)
        self.mid_block = self._mid_block(config, width)
        self._build_up(config, width, skips)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        zero_(self.conv_out)

    def _build_down(self, config: UNetConfig, width: int) -> list[int]:
        """Make the down blocks; return the channels that each skip connection carries."""
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        skips = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for i, (c, kind) in enumerate(zip(channels, config.down_block_types, strict=True)):
            pairs = [(channels[max(i - 1, 0)], c)] + [(c, c)] * (config.layers_per_block - 1)
            down: nn.Module | None = None
            if i < last and config.resizes_in_resnet(kind):
                down = ResnetBlock(c, c, config, width, resize="down")
            elif i < last:
                down = Downsample(c, config.downsample_padding)
            resnets, attentions = _layers(config, width, pairs, i, kind)
            self.down_blocks.append(Level(resnets, attentions, down=down))
            skips += [c] * (len(pairs) + (i < last))
        return skips

    def _mid_block(self, config: UNetConfig, width: int) -> Level:
        c, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        attention = Attention(c, config.head_dim(-1), config.mid_groups, config.norm_eps, scale)
        return Level(
            [ResnetBlock(c, c, config, width, scale) for _ in range(2)],
            [attention] if config.add_attention else [],
        )

    def _build_up(self, config: UNetConfig, width: int, skips: list[int]) -> None:
        c = config.block_out_channels[-1]
        self.up_blocks = nn.ModuleList()
        levels = list(enumerate(config.block_out_channels))[::-1]
        for (i, c_out), kind in zip(levels, config.up_block_types, strict=True):
            pairs = []
            for _ in range(config.layers_per_block + 1):
                pairs.append((c + skips.pop(), c_out))
                c = c_out
            up: nn.Module | None = None
            if i > 0 and config.resizes_in_resnet(kind):
                up = ResnetBlock(c, c, config, width, resize="up")
            elif i > 0:
                up = Upsample(c)
            resnets, attentions = _layers(config, width, pairs, i, kind)
            self.up_blocks.append(Level(resnets, attentions, up=up))

    def resnets(self) -> Iterator[ResnetBlock]:
        """Yield the residual blocks in the order in which the forward pass meets them."""
        for block in cast(Iterable[Level], [*self.down_blocks, self.mid_block, *self.up_blocks]):
            yield from block.residual()

    def embed_time(self, t: Tensor) -> Tensor:
        """Return the time embeddings of timesteps, without those of class labels.

        Args:
            t: integer or floating-point [B]; the range is not checked.

        Returns:
            [B, E], E the width of the embedding, in the dtype of the network's weights.
        """
        config = self.config
        if config.time_embedding_type == "rescaled":
            t = t.float() * (NETWORK_T / cast(int, config.num_train_timesteps))
        waves = sinusoids(t, config.time_channels, config.freq_shift, config.flip_sin_to_cos)
        return self.time_embedding(waves.to(self.conv_in.weight.dtype))

    def packed_projection(self) -> tuple[Tensor, Tensor]:
        """Return the weight [P, E] and bias [P] of all residual blocks' time projections.

        The blocks' own are concatenated in the order of `resnets`, in the dtype of the network's
        weights; P is the sum of their outputs, E the width of the time embedding.
        """
        layers = [block.time_emb_proj for block in self.resnets()]
        return torch.cat([m.weight for m in layers]), torch.cat([m.bias for m in layers])

    def project(self, emb: Tensor) -> Tensor:
        """Return the time projections of all residual blocks, concatenated.

        Args:
            emb: the sums of the embeddings of time and label, floating-point [B, E].

        Returns:
            [B, P], P the sum of their widths, in the dtype of ``emb`` and the order of `resnets`.
        """
        emb, layers = F.silu(emb), [block.time_emb_proj for block in self.resnets()]
        if any(touched(layer, nn.Linear) for layer in layers):  # hooks, say, which are to run
            return torch.cat([layer(emb) for layer in layers], 1)
        return F.linear(emb, *self.packed_projection())

    def body(self, x: Tensor, projections: Tensor) -> Tensor:
        """Return the network's output, from the noisy images and the time projections.

        Args:
            x: the noisy images, [B, C_in, H, W], in the dtype of the weights; H and W multiples of
                ``config.multiple``, which is not checked.
            projections: all residual blocks' time projections, concatenated in the order of
                `resnets`, [B, P], in the same dtype, as `project` returns them.

        Returns:
            [B, C_out, H, W].
        """
        sizes = [block.time_emb_proj.out_features for block in self.resnets()]
        rows = iter(projections.split(sizes, dim=1))
        if self.config.center_input_sample:
            x = 2 * x - 1
        layer = self._layer
        x = self.conv_in(x)
        skips = [x]
        for block in cast(Iterable[Level], self.down_blocks):
            for i in range(len(block.resnets)):
                x = layer(block, i, x, next(rows))
                skips.append(x)
            if block.resize is not None:
                x = block.resized(x, rows)
                skips.append(x)
        x = self.mid_block.resnets[0](x, next(rows))
        if self.mid_block.attentions is not None:
            x = self.mid_block.attentions[0](x)
        x = self.mid_block.resnets[1](x, next(rows))
        for block in cast(Iterable[Level], self.up_blocks):
            for i in range(len(block.resnets)):
                x = layer(block, i, torch.cat([x, skips.pop()], 1), next(rows))
            if block.resize is not None:
                x = block.resized(x, rows)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _layer(self, block: Level, i: int, x: Tensor, projection: Tensor) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return block.layer(i, x, projection)
        random = self.config.dropout > 0  # whose generator's state need not be kept otherwise
        return checkpoint(
            block.layer, i, x, projection, use_reentrant=False, preserve_rng_state=random
        )

    def forward(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Predict from noisy images what the model was trained to predict.

        Args:
            x_t: the noisy images, [B, C_in, H, W], in the dtype of the weights; H and W multiples
                of ``config.multiple``.
            t: timesteps [B], [1] or [], or one number; integer or float.
            labels: int64 [B], in 0..num_class_embeds-1 (not checked), for a class-conditional
                network, else None.

        Returns:
            [B, C_out, H, W].

        Raises:
            ValueError: if x_t, t or labels is of a wrong shape, or labels are given to an
                unconditional network or missing for a conditional one.
        """
        dtype = torch.float32 if isinstance(t, float) else None
        t = torch.as_tensor(t, dtype=dtype, device=x_t.device)
        self._check(x_t, t, labels)
        emb = self.embed_time(t.expand(len(x_t)))
        if labels is not None:
            emb = emb + self.class_embedding(labels)
        return self.body(x_t, self.project(emb))

    def _check(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> None:
        multiple = self.config.multiple
        if (
            x_t.ndim != 4
            or x_t.shape[1] != self.config.in_channels
            or any(side % multiple for side in x_t.shape[2:])
        ):
            raise ValueError(
                f"x_t of shape {tuple(x_t.shape)}: must be [B, {self.config.in_channels}, H, W] "
                f"with H and W multiples of {multiple}"
            )
        if tuple(t.shape) not in ((), (1,), (len(x_t),)):
            raise ValueError(f"t of shape {tuple(t.shape)}: must be one or [{len(x_t)}]")
        if (labels is None) != (self.config.num_class_embeds is None):
            wanted = "missing" if labels is None else "given"
            kind = "class-conditional" if labels is None else "unconditional"
            raise ValueError(f"labels: {wanted}, but this network is {kind}")
        if labels is not None and tuple(labels.shape) != (len(x_t),):
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be [{len(x_t)}]")


def _layers(
    config: UNetConfig, width: int, pairs: list[tuple[int, int]], level: int, kind: str
) -> tuple[list[ResnetBlock], list[Attention]]:
    """Return a level's residual blocks, of these pairs of channels, and its attentions."""
    resnets = [ResnetBlock(a, b, config, width) for a, b in pairs]
    if not kind.startswith("Attn"):
        return resnets, []
    groups, head_dim = config.norm_num_groups, config.head_dim(level)
    return resnets, [Attention(b, head_dim, groups, config.norm_eps) for _, b in pairs]
