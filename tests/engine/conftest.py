import pytest
import torch

import flashddpm as fd

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


@pytest.fixture
def tiny_unet():
    """A function that makes a small U-Net whose every weight is random."""

    def make(seed: int = 0, **changes) -> fd.UNet:
        generator = torch.Generator().manual_seed(seed)
        unet = fd.UNet(fd.UNetConfig(**{**TINY, **changes}))
        with torch.no_grad():
            for parameter in unet.parameters():
                fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
        return unet.eval().requires_grad_(False)

    return make


@pytest.fixture
def tiny_sampler(tiny_unet):
    """A function that makes a sampler of three classes and a null class."""

    def make(**arguments) -> fd.Sampler:
        arguments.setdefault("compile", False)
        return fd.Sampler(
            tiny_unet(num_class_embeds=4),
            fd.NoiseSchedule.create("squaredcos_cap_v2", 100),
            shape=(1, 8, 8),
            prediction_type="v_prediction",
            conditioning=fd.Conditioning(3, 3),
            device="cpu",
            **arguments,
        )

    return make
