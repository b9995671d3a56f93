"""Live pipelines, networks and schedulers of diffusers, taken over or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from flashddpm.checkpoints.pretrained import (
    load_diffusers,
)
from flashddpm.diffusion.scheduler_config import SCHEDULERS
from flashddpm.networks.conditioning import Conditioning

SOLVER_OF = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pipeline", "scheduler"),
    [("DDPMPipeline", name) for name in SCHEDULERS] + [("DDIMPipeline", "DDPMScheduler")],
)
def test_live_pipelines(
    pipeline: str, scheduler: str, dtype: torch.dtype, assert_same_network: Any, their_unet: Any
) -> None:
    theirs = getattr(diffusers, pipeline)(
        their_unet().to(dtype), getattr(diffusers, scheduler)(300, 1e-3, 0.03)
    )
    ours = load_diffusers(theirs)
    assert_same_network(ours.unet, theirs.unet)
    assert ours.unet.conv_in.weight.dtype is dtype
    assert not ours.unet.training
    name = "DDIMScheduler" if pipeline == "DDIMPipeline" else scheduler
    assert ours.scheduler["_class_name"] == name
    assert ours.defaults.solver == SOLVER_OF[name]
    np.testing.assert_allclose(ours.schedule.betas, theirs.scheduler.betas.numpy(), rtol=1e-5)
    assert (ours.shape, ours.conditioning) == ((3, 8, 8), Conditioning())


def test_live_and_saved_say_the_same(
    tmp_path: Path, their_unet: Any, load: Any, settings: Any
) -> None:
    for name in SCHEDULERS:
        betas = np.linspace(1e-3, 1e-2, 20)  # in a live config they are an array
        scheduler = getattr(diffusers, name)(
            num_train_timesteps=20, trained_betas=betas, prediction_type="v_prediction"
        )
        pipeline = diffusers.DDPMPipeline(their_unet(), scheduler)
        pipeline.save_pretrained(tmp_path / name)
        live, saved = load_diffusers(pipeline), load(tmp_path / name)
        assert (live.defaults, live.shape) == (saved.defaults, saved.shape)
        assert live.prediction_type == saved.prediction_type == "v_prediction"
        assert live.schedule.betas.tolist() == saved.schedule.betas.tolist() == betas.tolist()
        assert settings(live.scheduler).items() <= saved.scheduler.items()


def test_a_bare_unet_needs_a_scheduler(their_unet: Any, assert_same_network: Any) -> None:
    unet = their_unet(num_class_embeds=5)
    with pytest.raises(ValueError, match="^scheduler=None: must be given"):
        load_diffusers(unet)
    ours = load_diffusers(unet, diffusers.DDIMScheduler())
    assert_same_network(ours.unet, unet, torch.tensor([4, 0]))
    assert ours.conditioning == Conditioning(5)
    labels = Conditioning(4, 4)
    assert load_diffusers(unet, diffusers.DDIMScheduler(), labels).conditioning == labels


def test_a_scheduler_takes_the_place_of_the_pipelines(their_unet: Any) -> None:
    pipeline = diffusers.DDPMPipeline(their_unet(), diffusers.DDPMScheduler())
    ours = load_diffusers(pipeline, diffusers.DPMSolverMultistepScheduler())
    assert ours.defaults.solver == "dpmpp_2m"


def test_a_compiled_unet_is_unwrapped(their_unet: Any, assert_same_network: Any) -> None:
    unet = their_unet()
    compiled = torch.compile(unet)
    assert_same_network(load_diffusers(compiled, diffusers.DDPMScheduler()).unet, unet)


def test_the_weights_are_copies(their_unet: Any, assert_same_network: Any) -> None:
    theirs = their_unet()
    ours = load_diffusers(theirs, diffusers.DDPMScheduler())
    for parameter in theirs.parameters():
        parameter.zero_()
    assert_same_network(ours.unet, their_unet())


def test_live_objects_of_other_kinds_are_refused(their_unet: Any, their_settings: Any) -> None:
    class Mine(diffusers.UNet2DModel):
        pass

    class MyScheduler(diffusers.DDPMScheduler):
        pass

    good = diffusers.DDPMScheduler()
    broken = their_unet()
    broken.conv_in.bias.fill_(torch.nan)
    mixed = their_unet()
    mixed.conv_in.bfloat16()
    for model, scheduler, message in (
        (torch.nn.Linear(1, 1), good, "^model='Linear': must be one of UNet2DModel"),
        ("google/ddpm", good, "^model='str'"),
        (Mine(**their_settings), good, "^model='Mine'"),
        (their_unet(), MyScheduler(), "^scheduler='MyScheduler'"),
        (their_unet(), diffusers.PNDMScheduler(), "^scheduler='PNDMScheduler'"),
        (their_unet(), "ddim", "^scheduler='str'"),
        (
            their_unet(),
            diffusers.DPMSolverMultistepScheduler(solver_order=3),
            "^scheduler: solver_order=3",
        ),
        (their_unet(sample_size=None), good, "^model: sample_size=None"),
        (their_unet(out_channels=5), good, "^model: out_channels=5: must be in_channels=3"),
        (their_unet(act_fn="gelu"), good, "^model: act_fn='gelu'"),
        (broken, good, "^model: its weights do not match.*conv_in.bias holds numbers that are not"),
        (mixed, good, "^model: its weights must be on one device, in one dtype"),
        (their_unet().to("meta"), good, "^model: device='meta'"),
        (their_unet().double(), good, "^model: dtype='float64'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_diffusers(model, scheduler)
