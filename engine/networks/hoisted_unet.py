"""The network as the sampler calls it: the time half of our U-Net hoisted out of the loop."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashddpm.host import plain_factories
from flashddpm.networks.customized import touched
from flashddpm.networks.registry import NetworkConfig, on_meta
from flashddpm.networks.unet import UNet
from flashddpm.networks.unet_blocks import TimestepEmbedding


class HoistedUNet(nn.Module):
    """A U-Net that is given time embeddings, and whose time projections are one product.

    The embeddings are computed once for the rows of a plan (`embed`), not once a step. The packed
    projections are copies of the U-Net's: call `refresh` before the first use, and after any change
    of `sources`.

    Args:
        unet: the network.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        layers = [block.time_emb_proj for block in unet.resnets()]
        P, one = sum(layer.out_features for layer in layers), layers[0].weight
        self.register_buffer("weight", one.new_empty(P, one.shape[1]), persistent=False)
        self.register_buffer("bias", one.new_empty(P), persistent=False)

    def sources(self) -> Iterator[Tensor]:
        """Yield the parameters that embeddings and packed projections are computed from."""
        yield from self.unet.time_embedding.parameters()
        for block in self.unet.resnets():
            yield from block.time_emb_proj.parameters()

    def refresh(self) -> None:
        """Pack the projections again, in place."""
        weight, bias = self.unet.packed_projection()
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def embed(self, t: Tensor) -> Tensor:
        """Return the time embedding of integer or fractional timesteps, [B] -> [B, E]."""
        return self.unet.embed_time(t)

    def forward(
        self, x_t: Tensor, emb: Tensor, labels: Tensor | None, index: Tensor | None = None
    ) -> Tensor:
        """[L, C, H, W], [L, E] from `embed`, int64 [L] or None -> [L, C or 2C, H, W].

        The images' places among those that were asked for, ``index``, are of no use to it.
        """
        if labels is not None:
            emb = emb + self.unet.class_embedding(labels)
        return self.unet.body(x_t, F.linear(F.silu(emb), self.weight, self.bias))


def unhoistable(unet: UNet) -> str | None:
    """Return what a `HoistedUNet` would skip of a U-Net: a hook, say; None for nothing."""
    bypassed: list[tuple[str, nn.Module, type[nn.Module]]] = [("the U-Net", unet, UNet)]
    if type(unet) is UNet:
        mlp = unet.time_embedding
        bypassed.append(("time_embedding", mlp, TimestepEmbedding))
        bypassed += [(f"time_embedding.{name}", m, nn.Linear) for name, m in mlp.named_children()]
        bypassed += [("time_emb_proj", block.time_emb_proj, nn.Linear) for block in unet.resnets()]
    for name, module, kind in bypassed:
        problem = touched(module, kind)
        if problem is not None:
            return f"{name} {problem}"
    return None


def flops_per_image(config: NetworkConfig, shape: tuple[int, int, int]) -> int:
    """Return the floating-point operations of one evaluation of one image, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    network = on_meta(config)
    with plain_factories("meta"), FlopCounterMode(display=False) as counter:
        labels = None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64)
        network(torch.zeros(1, *shape), torch.zeros(1), labels)
    return counter.get_total_flops()
