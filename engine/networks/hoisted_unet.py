"""`HoistedUNet`: our U-Net as samplers run it, its time embeddings computed outside of the loop."""

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
    """A U-Net that takes time embeddings for timesteps, and packs all its time projections as one.

    The embeddings are computed once for the rows (steps) of a plan by `embed`, not once a step, and
    the time projections of all residual blocks are one matrix product. The packed weights are
    copies of the U-Net's, uninitialised at first: call `refresh` before the first use, and after
    any change of the parameters that `sources` yields.

    Args:
        unet: the network, which is used, not copied.

    Attributes:
        unet: the network.
        weight: [P, E], the packed weights, in the U-Net's dtype; P is the sum of the projections'
            outputs and E the width of the time embedding.
        bias: [P], the packed biases.
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
        """Copy the U-Net's time projections into ``weight`` and ``bias``, in place."""
        weight, bias = self.unet.packed_projection()
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def embed(self, t: Tensor) -> Tensor:
        """Return the time embeddings of timesteps.

        Args:
            t: integer or floating-point [B], in 0..T-1 (T timesteps of training); not checked.

        Returns:
            [B, E], in the dtype of the U-Net's weights.
        """
        return self.unet.embed_time(t)

    def forward(
        self, x_t: Tensor, emb: Tensor, labels: Tensor | None, index: Tensor | None = None
    ) -> Tensor:
        """Predict from L noisy images and their time embeddings.

        Args:
            x_t: the noisy images, [L, C, H, W], in the dtype of the U-Net's weights.
            emb: the time embeddings from `embed`, [L, E].
            labels: int64 [L], class labels for a class-conditional network; None for others. Not
                checked.
            index: not used; samplers pass the images' places among those that were asked for.

        Returns:
            What the model was trained to predict, [L, C or 2C, H, W].
        """
        if labels is not None:
            emb = emb + self.unet.class_embedding(labels)
        return self.unet.body(x_t, F.linear(F.silu(emb), self.weight, self.bias))


def unhoistable(unet: UNet) -> str | None:
    """Return what a `HoistedUNet` would skip of this U-Net, in words; None for nothing.

    `HoistedUNet` calls neither the forward of the U-Net nor of its time projections. What is
    returned names the first of these modules, and those of the time embedding, that has a hook or
    a forward of its own or is of another class: "time_emb_proj has hooks", say.

    Args:
        unet: the network; for one of a subclass X of `UNet` the answer is "the U-Net is a X".
    """
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
    """Return the floating-point operations of one evaluation of one image, as PyTorch counts them.

    Nothing is computed: the network is built on the meta device. Matrix products and convolutions
    are counted, a multiplication and addition as two.

    Args:
        config: the settings of the network.
        shape: (C, H, W) of the image, in pixels.

    Raises:
        ValueError: if the network cannot be built, or takes no images of that shape.
    """
    from torch.utils.flop_counter import FlopCounterMode

    network = on_meta(config)
    with plain_factories("meta"), FlopCounterMode(display=False) as counter:
        labels = None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64)
        network(torch.zeros(1, *shape), torch.zeros(1), labels)
    return counter.get_total_flops()
