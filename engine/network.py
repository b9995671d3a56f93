"""The network as the sampler calls it: the time half of our U-Net hoisted out of the loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashddpm.networks import NetworkConfig, on_meta
from flashddpm.unet import UNet


class HoistedUNet(nn.Module):
    """A U-Net whose time embeddings are looked up and whose time projections are one product.

    Args:
        unet: the network, in evaluation mode.
        num_timesteps: timesteps are 0..num_timesteps-1.
    """

    table: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, unet: UNet, num_timesteps: int) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("table", unet.time_table(num_timesteps), persistent=False)
        weight, bias = unet.packed_projection()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def refresh(self) -> None:
        """Derive table, weight and bias again, in place, after the U-Net's weights changed."""
        self.table.copy_(self.unet.time_table(len(self.table)))
        for buffer, value in zip(
            (self.weight, self.bias), self.unet.packed_projection(), strict=True
        ):
            buffer.copy_(value)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """[L, C, H, W], int64 or float32 [L], int64 [L] or None -> [L, C or 2C, H, W]."""
        emb = self.unet.embed_time(t) if t.is_floating_point() else self.table[t]
        if labels is not None:
            emb = emb + self.unet.class_embedding(labels)
        return self.unet.body(x_t, F.linear(F.silu(emb), self.weight, self.bias))


def flops_per_image(config: NetworkConfig, shape: tuple[int, int, int]) -> int:
    """Return the floating-point operations of one evaluation of one image, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        labels = None if config.num_class_embeds is None else torch.zeros(1).long()
        on_meta(config)(torch.zeros(1, *shape), torch.zeros(1), labels)
    return counter.get_total_flops()
