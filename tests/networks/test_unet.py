from __future__ import annotations

import copy
import dataclasses
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashddpm.networks.unet import UNet
from flashddpm.networks.unet_blocks import sinusoids
from flashddpm.networks.unet_config import DOWN_BLOCKS, FIXED, UP_BLOCKS, UNetConfig

CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
BUNDLED = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 32,
    "num_class_embeds": 11,
}
OURS = {"time_embedding_type", "time_embedding_channels"}  # diffusers has one value or no such key
TINY = {
    "sample_size": (8, 4),
    "in_channels": 2,
    "out_channels": 3,
    "block_out_channels": (8, 12),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "num_class_embeds": 5,
}


def random_config(seed: int) -> dict[str, Any]:
    """Draw a small network; over seeds 0..19 every key takes each of its kinds of value."""
    draw = random.Random(seed)
    levels = 1 + seed % 4
    groups = draw.choice((1, 2, 3, 4))
    channels = [groups * draw.choice(range(math.ceil(4 / groups), 7)) for _ in range(levels)]
    divisor = math.gcd(*channels)
    head_dims = [None, *(d for d in range(1, divisor + 1) if divisor % d == 0)]
    sides = [draw.choice((1, 2)) * 2 ** (levels - 1) for _ in range(2)]
    return {
        "sample_size": draw.choice((sides, None)),
        "in_channels": draw.choice((1, 2, 3)),
        "out_channels": draw.choice((1, 2, 3)),
        "center_input_sample": draw.choice((True, False)),
        "time_embedding_dim": draw.choice((None, 9, 16)),
        "freq_shift": draw.choice((0, 1)),
        "flip_sin_to_cos": draw.choice((True, False)),
        "down_block_types": draw.choices(DOWN_BLOCKS, k=levels),
        "up_block_types": draw.choices(UP_BLOCKS, k=levels),
        "block_out_channels": channels,
        "layers_per_block": draw.choice((1, 2)),
        "mid_block_scale_factor": draw.choice((1, math.sqrt(2), 0.5)),
        "downsample_padding": draw.choice((0, 1)),
        "dropout": draw.choice((0.0, 0.3)),
        "act_fn": draw.choice(("silu", "swish")),
        "attention_head_dim": draw.choice(head_dims),
        "norm_num_groups": groups,
        "norm_eps": draw.choice((1e-5, 1e-3)),
        "add_attention": draw.choice((True, False)),
        "num_class_embeds": draw.choice((None, 1, 4)),
        "resnet_time_scale_shift": draw.choice(("default", "scale_shift")),
        "downsample_type": draw.choice(("conv", "resnet")),
        "upsample_type": draw.choice(("conv", "resnet")),
        "attn_norm_num_groups": draw.choice((None, groups, 1)),
        "num_train_timesteps": draw.choice((None, 1000)),
    }


def randomise(module: nn.Module, seed: int) -> None:
    """Give every parameter, the zero-initialised ones too, a value that matters in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            z = torch.randn(p.shape, generator=generator)
            scale = 0.1 if p.ndim == 1 else math.prod(p.shape[1:]) ** -0.5
            p.copy_(scale * z + (p.ndim == 1 and name.endswith("weight")))


def make(config: dict[str, Any], seed: int = 0) -> UNet:
    unet = UNet(UNetConfig.from_dict(config)).eval()
    randomise(unet, seed)
    return unet


def inputs(config: dict[str, Any], batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    levels = len(config["block_out_channels"])
    size = config["sample_size"] or [3 * 2 ** (levels - 1), 2**levels]
    height, width = [size, size] if isinstance(size, int) else size
    x = torch.randn(batch, config["in_channels"], height, width, generator=generator)
    t = torch.tensor([999, 0, 451])[:batch]
    embeds = config.get("num_class_embeds")
    return x, t, None if embeds is None else torch.tensor([embeds - 1, 0, embeds // 2])[:batch]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.abs().max())
    assert scale > 1e-2
    assert float((actual - expected).abs().max()) <= tolerance * scale


def check_parity(config: dict[str, Any], batch: int = 3) -> tuple[UNet, nn.Module]:
    import diffusers

    theirs = diffusers.UNet2DModel(**config).eval()
    ours = UNet(UNetConfig.from_dict(config)).eval()
    x, t, labels = inputs(config, batch)
    for source, target, seed in ((theirs, ours, 1), (ours, theirs, 2)):
        randomise(source, seed)
        state = source.state_dict()
        target.load_state_dict(state)
        loaded = target.state_dict()
        assert state.keys() == loaded.keys()
        assert all(torch.equal(value, loaded[key]) for key, value in state.items())
        with torch.no_grad():
            assert_close(ours(x, t, labels), theirs(x, t, labels).sample)
    return ours, theirs


def test_equals_diffusers_on_cifar10() -> None:
    ours, _ = check_parity(CIFAR10, batch=1)
    assert len(ours.state_dict()) == 328
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307


def test_equals_diffusers_on_the_bundled_configuration() -> None:
    check_parity(BUNDLED)


@pytest.mark.parametrize("seed", range(20))
def test_equals_diffusers_on_random_configurations(seed: int) -> None:
    check_parity(random_config(seed))


RESIZING = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (8, 12, 16),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attn_norm_num_groups": 4,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


def test_equals_diffusers_where_residual_blocks_resize() -> None:
    ours, _ = check_parity(RESIZING)
    assert "up_blocks.0.upsamplers.0.time_emb_proj.weight" in ours.state_dict()
    shapes = {block.time_emb_proj.out_features // block.c_out for block in ours.resnets()}
    assert shapes == {2}


def test_a_rescaled_network_is_told_timesteps_of_1000() -> None:
    plain, scaled = (
        make(TINY),
        make({**TINY, "time_embedding_type": "rescaled", "num_train_timesteps": 4000}),
    )
    x, _, labels = inputs(TINY, 3)
    t = torch.tensor([3996, 0, 1806])
    assert torch.equal(scaled(x, t, labels), plain(x, t / 4, labels))
    table = scaled.embed_time(torch.arange(4000))[::4]
    torch.testing.assert_close(table, plain.embed_time(torch.arange(1000)), rtol=0, atol=2e-6)


def test_sinusoids_may_have_more_channels_than_the_first_block() -> None:
    unet = make({**TINY, "time_embedding_channels": 16, "time_embedding_dim": 32})
    assert unet.time_embedding.linear_1.in_features == 16
    waves = sinusoids(torch.arange(5), 16, 0, True)
    assert torch.equal(unet.embed_time(torch.arange(5)), unet.time_embedding(waves))


def test_heads_may_differ_by_level() -> None:
    unet = make({**TINY, "attention_head_dim": (2, 6)})
    assert unet.down_blocks[0].attentions[0].heads == 8 // 2
    assert unet.mid_block.attentions[0].heads == 12 // 6
    assert unet.up_blocks[1].attentions[0].heads == 8 // 2
    x, t, labels = inputs(TINY, 2)
    for dim in (2, 4):
        same = make({**TINY, "attention_head_dim": dim})
        assert not torch.allclose(same(x, t, labels), unet(x, t, labels), atol=1e-5)
    alike = make({**TINY, "attention_head_dim": (4, 4)})
    assert torch.equal(alike(x, t, labels), make(TINY)(x, t, labels))


@pytest.mark.parametrize(
    "change",
    [
        {"time_embedding_type": "rescaled", "num_train_timesteps": 4000},
        {"attention_head_dim": [2, 6]},
        {"time_embedding_channels": 16},
    ],
)
def test_diffusers_stops_at_what_only_we_have(change: dict[str, Any]) -> None:
    import diffusers

    config = UNetConfig.from_dict({**TINY, **change})
    settings = {key: value for key, value in config.to_dict().items() if key[0] != "_"}
    with pytest.raises((TypeError, UnboundLocalError, RuntimeError)):
        theirs, _ = diffusers.UNet2DModel.from_config(settings, return_unused_kwargs=True)
        theirs.load_state_dict(UNet(config).state_dict())


def test_random_configurations_cover_every_key() -> None:
    drawn = [random_config(seed) for seed in range(20)]
    assert {len(config["block_out_channels"]) for config in drawn} == {1, 2, 3, 4}
    assert any(c % 2 for config in drawn for c in config["block_out_channels"])
    for key in ("down_block_types", "up_block_types"):
        assert len({kind for config in drawn for kind in config[key]}) == 3
    names = {field.name for field in dataclasses.fields(UNetConfig)} - OURS
    assert names <= set(drawn[0])
    for name in names:
        assert len({repr(config[name]) for config in drawn}) > 1, name


def test_defaults_are_those_of_diffusers() -> None:
    import diffusers

    with torch.device("meta"):
        theirs = dict(diffusers.UNet2DModel(block_out_channels=(32,) * 4).config)
    ours = UNetConfig(block_out_channels=(32,) * 4).to_dict()
    del ours["_class_name"]
    assert ours == {key: theirs[key] for key in ours}
    assert set(theirs) - set(ours) <= {"_use_default_values"}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("channels", "shift"), [(128, 1), (32, 0), (7, 1), (6, 2)])
def test_sinusoids_are_those_of_diffusers_bit_for_bit(
    channels: int, shift: int, flip: bool
) -> None:
    from diffusers.models import embeddings

    for t in (torch.arange(1000), torch.tensor([0.25, 998.5])):
        theirs = embeddings.get_timestep_embedding(t, channels, flip, shift)
        assert torch.equal(sinusoids(t, channels, shift, flip), theirs)


def test_forward_is_the_body_on_a_row_of_the_table() -> None:
    unet = make(TINY)
    x, t, labels = inputs(TINY, 3)
    table = unet.embed_time(torch.arange(1000))
    assert table.shape == (1000, 32)
    emb = table[t] + unet.class_embedding(labels)
    projections = F.linear(F.silu(emb), *unet.packed_projection())
    # The table is one product with 1,000 rows, whose rounding may differ from one with 3.
    torch.testing.assert_close(unet.body(x, projections), unet(x, t, labels), rtol=0, atol=2e-6)


def test_one_timestep_serves_the_batch() -> None:
    unet = make(TINY)
    x, _, labels = inputs(TINY, 3)
    expected = unet(x, torch.full((3,), 12), labels)
    for t in (12, torch.tensor(12), torch.tensor([12]), 12.0):
        assert torch.equal(unet(x, t, labels), expected)
    assert not torch.equal(unet(x, 12.5, labels), expected)


def test_gradients_reach_every_parameter() -> None:
    unet = make(TINY).train()
    x, t, labels = inputs(TINY, 3)
    unet(x.requires_grad_(), t, labels).square().sum().backward()
    for name, p in unet.named_parameters():
        assert p.grad is not None, name
        assert float(p.grad.abs().sum()) > 0, name
    assert x.grad is not None and bool((x.grad != 0).any())


def test_starts_at_zero() -> None:
    unet = UNet(UNetConfig.from_dict(TINY))
    assert not unet(*inputs(TINY, 2)).any()


def test_channels_last_gives_the_same() -> None:
    unet = make(TINY)
    x, t, labels = inputs(TINY, 3)
    expected = unet(x, t, labels)
    assert_close(unet(x.contiguous(memory_format=torch.channels_last), t, labels), expected)
    unet.to(memory_format=torch.channels_last)
    assert_close(unet(x, t, labels), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_its_weights_dtype(dtype: torch.dtype) -> None:
    unet = make(TINY)
    x, t, labels = inputs(TINY, 2)
    expected = unet(x, t, labels)
    out = unet.to(dtype)(x.to(dtype), t, labels)
    assert out.dtype is dtype
    assert_close(out.float(), expected, 1e-5 if dtype is torch.float64 else 0.1)


def test_copies_have_their_own_values_under_the_same_keys() -> None:
    unet = make(TINY)
    twin = copy.deepcopy(unet)
    keys = set(unet.state_dict())
    assert "mid_block.attentions.0.to_q.weight" in keys
    assert not any("to_qkv" in key for key in keys)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    randomise(twin, seed=5)
    assert set(twin.state_dict()) == keys
    for key, value in unet.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert not torch.equal(value, twin.state_dict()[key]), key
    unet.load_state_dict(twin.state_dict())
    x, t, labels = inputs(TINY, 2)
    assert torch.equal(unet(x, t, labels), twin(x, t, labels))


def test_load_state_dict_names_what_does_not_match() -> None:
    unet = make(TINY)
    state = unet.state_dict()
    del state["conv_in.bias"]
    with pytest.raises(RuntimeError, match=r"conv_in\.bias"):
        unet.load_state_dict(state)


def test_a_config_goes_through_its_dict() -> None:
    for source in (CIFAR10, BUNDLED, *map(random_config, range(20))):
        config = UNetConfig.from_dict(source)
        assert UNetConfig.from_dict(config.to_dict()) == config
        for key, value in source.items():
            if key not in FIXED:
                kept = getattr(config, key)
                assert kept == (tuple(value) if isinstance(value, list) else value)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cross_attention_dim": 8}, "cross_attention_dim=8: unknown key"),
    (
        {"time_embedding_type": "fourier"},
        "time_embedding_type='fourier': must be one of positional",
    ),
    (
        {"time_embedding_type": "rescaled"},
        "num_train_timesteps=None: must be an integer in 1..1000",
    ),
    ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
    ({"time_embedding_channels": 0}, "time_embedding_channels=0"),
    (
        {"time_embedding_channels": 2, "freq_shift": 1},
        "freq_shift=1: .* of time_embedding_channels=2",
    ),
    ({"act_fn": "gelu"}, "act_fn='gelu': must be 'silu' or 'swish'"),
    ({"mid_block_type": None}, "mid_block_type=None"),
    ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
    ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
    ({"attn_norm_num_groups": 5}, r"block_out_channels\[-1\]=12: .* of attn_norm_num_groups=5"),
    ({"attn_norm_num_groups": 0}, "attn_norm_num_groups=0"),
    ({"downsample_type": "fir"}, "downsample_type='fir': must be one of conv, resnet"),
    ({"upsample_type": None}, "upsample_type=None"),
    ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types='SkipDownBlock2D"),
    ({"up_block_types": ["UpBlock2D", 3]}, "up_block_types=3"),
    ({"up_block_types": ["UpBlock2D"]}, r"block_out_channels=\(8, 12\)"),
    ({"block_out_channels": [8, 13]}, "block_out_channels=13: must be a multiple of norm_num_gr"),
    ({"block_out_channels": 8}, "block_out_channels=8"),
    ({"block_out_channels": []}, r"block_out_channels=\[\]"),
    ({"block_out_channels": [8, True]}, "block_out_channels=True"),
    ({"block_out_channels": [8, 0]}, "block_out_channels=0"),
    ({"block_out_channels": [8, "12"]}, "block_out_channels='12'"),
    ({"norm_num_groups": None}, "norm_num_groups=None"),
    ({"attention_head_dim": 8}, "attention_head_dim=8: must divide 12"),
    ({"attention_head_dim": 0}, "attention_head_dim=0"),
    ({"attention_head_dim": [4]}, r"attention_head_dim=\[4\]: must have 2 entries"),
    ({"attention_head_dim": [4, None]}, "attention_head_dim=None"),
    ({"attention_head_dim": [4, 5]}, "attention_head_dim=5: must divide 12"),
    ({"layers_per_block": 0}, "layers_per_block=0"),
    ({"layers_per_block": 1.5}, "layers_per_block=1.5"),
    # A config of a few bytes must not ask for minutes and gigabytes, not even of meta tensors.
    ({"layers_per_block": 17}, "layers_per_block=17: must be in 1..16"),
    ({"block_out_channels": [8] * 11}, r"block_out_channels=\[8, .*: must be a list of 1..10"),
    ({"in_channels": 0}, "in_channels=0"),
    ({"out_channels": -1}, "out_channels=-1"),
    ({"downsample_padding": 2}, "downsample_padding=2"),
    ({"freq_shift": 4}, "freq_shift=4"),
    ({"freq_shift": "1"}, "freq_shift='1'"),
    ({"freq_shift": math.nan}, "freq_shift=nan"),
    ({"flip_sin_to_cos": "false"}, "flip_sin_to_cos='false'"),
    ({"center_input_sample": 1}, "center_input_sample=1"),
    ({"add_attention": None}, "add_attention=None"),
    ({"mid_block_scale_factor": 0}, "mid_block_scale_factor=0"),
    ({"mid_block_scale_factor": math.inf}, "mid_block_scale_factor=inf"),
    ({"norm_eps": "1e-5"}, "norm_eps='1e-5'"),
    ({"norm_eps": 10**400}, "norm_eps=1000"),
    ({"dropout": 1.5}, "dropout=1.5"),
    ({"num_class_embeds": 0}, "num_class_embeds=0"),
    ({"time_embedding_dim": 0}, "time_embedding_dim=0"),
    ({"sample_size": 0}, "sample_size=0"),
    ({"sample_size": [8, None]}, "sample_size=None"),
    ({"sample_size": [8, 8, 8]}, "sample_size="),
    ({"sample_size": "32"}, "sample_size='32'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refuses_a_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        UNet(UNetConfig.from_dict({**TINY, **change}))


def test_ignores_the_notes_of_diffusers_in_a_config() -> None:
    notes = {"_class_name": "UNet2DModel", "_diffusers_version": "0.42.1", "_name_or_path": "x"}
    assert UNetConfig.from_dict({**TINY, **notes}) == UNetConfig.from_dict(TINY)


def test_refuses_inputs() -> None:
    unet = make(TINY)
    x, t, labels = inputs(TINY, 2)
    plain = make({**TINY, "num_class_embeds": None})
    for network, args, message in (
        (unet, (x[:, :1], t, labels), r"x_t of shape \(2, 1, 8, 4\): must be \[B, 2, H, W\]"),
        (unet, (x[0], t, labels), r"x_t of shape \(2, 8, 4\)"),
        (unet, (x[:, :, :7], t, labels), r"x_t of shape \(2, 2, 7, 4\).*multiples of 2"),
        (unet, (x[..., :3], t, labels), r"x_t of shape \(2, 2, 8, 3\).*multiples of 2"),
        (unet, (x, t), "labels: missing, but this network is class-conditional"),
        (plain, (x, t, labels), "labels: given, but this network is unconditional"),
        (unet, (x, t, labels[:1]), r"labels of shape \(1,\): must be \[2\]"),
        (unet, (x, torch.arange(3), labels), r"t of shape \(3,\): must be one or \[2\]"),
        (unet, (x, t[:, None], labels), r"t of shape \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network(*args)
