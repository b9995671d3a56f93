r"""Conversion of the U-Net of improved-diffusion and guided-diffusion to a UNet2DModel.

    theirs                              ours
    time_embed.{0,2}                    time_embedding.linear_{1,2}
    label_emb                           class_embedding
    input_blocks.0.0                    conv_in
    input_blocks.n.{0,1}                down_blocks.i.{resnets,attentions}.j, or downsamplers.0
    middle_block.{0,1,2}                mid_block.{resnets.0,attentions.0,resnets.1}
    output_blocks.n.{0,1,..}            up_blocks.i.{resnets,attentions}.j, upsamplers.0 at the end
    out.{0,2}                           conv_norm_out, conv_out

The sinusoids are [cos, sin], norms have 32 groups and eps 1e-5, and attention's q, k and v are one
convolution: the rows of its weight are q, k, v of the first head, q, k, v of the second and so on,
or, in the "new order", q of all heads, k of all heads, v of all heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from flashddpm.errors import CheckpointError
from flashddpm.networks.unet_config import UNetConfig

GROUPS = 32
EPS = 1e-5

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class Layout:
    """The structure of a checkpoint's network, as the names and shapes of its tensors say it.

    Attributes:
        in_channels, out_channels: the number of channels of the images and of the output.
        num_channels: the number of channels of the timestep's sinusoids.
        time_dim: the width of the time embedding.
        num_classes: the number of class labels; None for an unconditional network.
        num_res_blocks: the number of residual blocks of a level on the way down; on the way up
            there is one more.
        channels: the number of channels of each level, finest first.
        attention: whether each level has attention, finest first; the middle always has.
        scale_shift: whether the time embedding scales features, besides shifting them.
        updown: whether the size is changed in residual blocks, not in convolutions.
    """

    in_channels: int
    out_channels: int
    num_channels: int
    time_dim: int
    num_classes: int | None
    num_res_blocks: int
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    scale_shift: bool
    updown: bool


def read_layout(state: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a U-Net's state dict, by its names and shapes.

    Args:
        state: tensors by name, by the names of improved-diffusion and guided-diffusion.

    Raises:
        CheckpointError: if it is no state dict of a U-Net of these projects.
    """
    outputs = _count(state, "output_blocks.{}.0.in_layers.0.weight")
    ends = [
        n
        for n in range(outputs)
        for layer in (1, 2)
        if f"output_blocks.{n}.{layer}.conv.weight" in state
        or f"output_blocks.{n}.{layer}.in_layers.0.weight" in state
    ]
    levels = len(ends) + 1
    each, rest = divmod(outputs, levels)
    if rest or each < 2 or ends != [each * (i + 1) - 1 for i in range(levels - 1)]:
        raise CheckpointError(
            f"{outputs} output_blocks, those of {ends} with an upsampling layer: not a U-Net of "
            "improved-diffusion or guided-diffusion"
        )
    first = [1 + each * i for i in range(levels)]
    channels = tuple(_shape(state, f"input_blocks.{n}.0.in_layers.2.weight", 4)[0] for n in first)
    time_dim, num_channels = _shape(state, "time_embed.0.weight", 2)
    labels = "label_emb.weight"
    projected = _shape(state, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    return Layout(
        in_channels=_shape(state, "input_blocks.0.0.weight", 4)[1],
        out_channels=_shape(state, "out.2.weight", 4)[0],
        num_channels=num_channels,
        time_dim=time_dim,
        num_classes=_shape(state, labels, 2)[0] if labels in state else None,
        num_res_blocks=each - 1,
        channels=channels,
        attention=tuple(f"input_blocks.{n}.1.qkv.weight" in state for n in first),
        scale_shift=projected == 2 * channels[0],
        updown=f"input_blocks.{each}.0.in_layers.0.weight" in state,
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    n = 0
    while pattern.format(n) in state:
        n += 1
    return n


def _shape(state: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if key not in state or state[key].ndim != ndim:
        found = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
        raise CheckpointError(
            f"{key} {found}: not a U-Net of improved-diffusion or guided-diffusion"
        )
    return tuple(state[key].shape)


def unet_config(
    layout: Layout,
    image_size: int,
    head_dims: tuple[int, ...],
    rescaled_from: int | None = None,
    dropout: float = 0.0,
) -> UNetConfig:
    """Return the settings of the UNet2DModel that a layout describes.

    Args:
        layout: the layout of the checkpoint.
        image_size: the side of the square images, in pixels.
        head_dims: the number of channels of an attention head at each level, finest first, as many
            as the layout has levels; not checked.
        rescaled_from: the number of timesteps T, if the network is told timesteps times 1000 / T,
            else None.
        dropout: the probability of dropout, in [0, 1], for further training.

    Raises:
        ValueError: if no such network can be built.
    """
    first, last = layout.channels[0], len(layout.channels) - 1
    used = {dim for i, dim in enumerate(head_dims) if layout.attention[i] or i == last}
    single = layout.channels == head_dims
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = plain if layout.updown else ("DownBlock2D", "UpBlock2D")
    resize = "resnet" if layout.updown else "conv"
    rescaled = rescaled_from not in (None, 1000)
    return UNetConfig(
        sample_size=image_size,
        in_channels=layout.in_channels,
        out_channels=layout.out_channels,
        time_embedding_type="rescaled" if rescaled else "positional",
        num_train_timesteps=rescaled_from if rescaled else None,
        time_embedding_dim=layout.time_dim if layout.time_dim != 4 * first else None,
        time_embedding_channels=layout.num_channels if layout.num_channels != first else None,
        down_block_types=tuple("AttnDownBlock2D" if a else down for a in layout.attention),
        up_block_types=tuple("AttnUpBlock2D" if a else up for a in layout.attention[::-1]),
        block_out_channels=layout.channels,
        layers_per_block=layout.num_res_blocks,
        downsample_type=resize,
        upsample_type=resize,
        dropout=dropout,
        attention_head_dim=None if single else used.pop() if len(used) == 1 else head_dims,
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        norm_eps=EPS,
        resnet_time_scale_shift="scale_shift" if layout.scale_shift else "default",
        num_class_embeds=layout.num_classes,
    )


def convert_state(
    state: Mapping[str, Tensor], layout: Layout, head_dims: tuple[int, ...], new_order: bool
) -> dict[str, Tensor]:
    """Return the state dict under the names of a UNet2DModel, with q, k and v apart.

    Args:
        state: the checkpoint's tensors by the project's names.
        layout: the layout of the checkpoint.
        head_dims: the number of channels of an attention head at each level, finest first.
        new_order: whether q, k and v are in the "new order": q of all heads first, then k, then v.

    Returns:
        Tensors by name, in their dtypes; weights of attention are two-dimensional.

    Raises:
        CheckpointError: if a tensor has no place, or the rows of q, k and v are not those of whole
            heads.
    """
    places, packed = dict(ENDS), {}
    for theirs, ours, level in _blocks(layout):
        if ".attentions." in ours:
            places[f"{theirs}.norm"] = f"{ours}.group_norm"
            places[f"{theirs}.proj_out"] = f"{ours}.to_out.0"
            packed[f"{theirs}.qkv"] = ours, head_dims[level]
        elif ours.endswith(".conv"):
            places[theirs] = ours
        else:
            places.update({f"{theirs}.{a}": f"{ours}.{b}" for a, b in RESNET.items()})
    result, unknown = {}, []
    for key, value in state.items():
        prefix, _, kind = key.rpartition(".")
        if value.ndim == 3:  # attention's are convolutions over one dimension
            value = value.flatten(1)
        if prefix in places:
            result[f"{places[prefix]}.{kind}"] = value
        elif prefix in packed:
            ours, head_dim = packed[prefix]
            for name, part in zip("qkv", _split(key, value, head_dim, new_order), strict=True):
                result[f"{ours}.to_{name}.{kind}"] = part
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError("; ".join(f"{key} is not expected" for key in unknown))
    return result


def _blocks(layout: Layout) -> Iterator[tuple[str, str, int]]:
    """Yield each block's prefix in their names and in ours, and its level; resizing layers too.

    Where residual blocks resize, theirs stand between the others and look the same.
    """
    last, resnets = len(layout.channels) - 1, layout.num_res_blocks
    tail = "" if layout.updown else ".conv"
    for i, attends in enumerate(layout.attention):
        for j in range(resnets):
            n = 1 + i * (resnets + 1) + j
            yield f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", i
            if attends:
                yield f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}", i
        if i < last:
            theirs = f"input_blocks.{(i + 1) * (resnets + 1)}.0" + ("" if layout.updown else ".op")
            yield theirs, f"down_blocks.{i}.downsamplers.0{tail}", i
    for n, ours in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{n}", f"mid_block.{ours}", last
    for k, attends in enumerate(layout.attention[::-1]):
        for j in range(resnets + 1):
            n = k * (resnets + 1) + j
            yield f"output_blocks.{n}.0", f"up_blocks.{k}.resnets.{j}", last - k
            if attends:
                yield f"output_blocks.{n}.1", f"up_blocks.{k}.attentions.{j}", last - k
        if k < last:
            yield f"output_blocks.{n}.{1 + attends}{tail}", f"up_blocks.{k}.upsamplers.0{tail}", k


def _split(key: str, value: Tensor, head_dim: int, new_order: bool) -> tuple[Tensor, ...]:
    """Return the rows of q, of k and of v, heads in order, from [3 C, ..]."""
    rows = len(value) if value.ndim else 0
    if rows == 0 or rows % (3 * head_dim):
        raise CheckpointError(
            f"{key} has shape {tuple(value.shape)}: its rows must be a multiple of 3 times the "
            f"{head_dim} channels of a head"
        )
    if new_order:
        return value.chunk(3)
    heads = value.unflatten(0, (-1, 3, head_dim))
    return heads.transpose(0, 1).flatten(1, 2).unbind(0)
