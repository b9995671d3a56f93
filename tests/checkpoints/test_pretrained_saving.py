"""What is saved is the same to diffusers, whatever was there, and whenever it is stopped."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from flashddpm.checkpoints.model_folder import load_scheduler_config
from flashddpm.checkpoints.pretrained import (
    load_diffusers,
    save_pretrained,
    scheduler_config,
)
from flashddpm.checkpoints.weights import INDEX, PICKLED, WEIGHTS
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SCHEDULERS, SamplingDefaults
from flashddpm.networks.conditioning import Conditioning


def pictures(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline(2, generator, num_inference_steps=3, output_type="np").images


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_loaded_and_saved_is_the_same_to_diffusers(
    tmp_path: Path,
    scheduler: str,
    their_unet: Any,
    assert_same_network: Any,
    load: Any,
    settings: Any,
) -> None:
    original = diffusers.DDPMPipeline(
        their_unet(), getattr(diffusers, scheduler)(300, 1e-3, 0.03, prediction_type="v_prediction")
    )
    original.save_pretrained(tmp_path / "theirs")
    for i, ours in enumerate((load(tmp_path / "theirs"), load_diffusers(original))):
        save_pretrained(tmp_path / str(i), ours.unet, ours.scheduler, ours.conditioning)
        back = diffusers.DDPMPipeline.from_pretrained(tmp_path / str(i), low_cpu_mem_usage=False)
        assert type(back.scheduler) is type(original.scheduler)
        assert public(back.scheduler.config) == public(original.scheduler.config)
        assert_same_network(ours.unet, back.unet)
        np.testing.assert_array_equal(pictures(back), pictures(original))
        general = diffusers.DiffusionPipeline.from_pretrained(
            tmp_path / str(i), low_cpu_mem_usage=False
        )
        kind = "DDIMPipeline" if scheduler == "DDIMScheduler" else "DDPMPipeline"
        assert type(general).__name__ == kind
        again = load(tmp_path / str(i))
        assert again.scheduler == settings(ours.scheduler)
        assert_same_network(again.unet, original.unet)


def test_saving_over_the_loaded_folder(
    sharded: Path, published: Path, load: Any, assert_same_network: Any, their_unet: Any
) -> None:
    """Over shards, which diffusers would prefer, and over a flat folder with other weights."""
    for root, keep in ((sharded, set()), (published, {PICKLED})):
        ours = load(root, allow_pickle=True)
        before = {f.name for f in root.rglob("*") if f.is_file()}
        for parameter in ours.unet.parameters():
            parameter.mul_(2)
        save_pretrained(root, ours.unet, ours.scheduler, ours.conditioning)
        theirs = diffusers.DDPMPipeline.from_pretrained(root, low_cpu_mem_usage=False)
        assert_same_network(load(root).unet, theirs.unet)
        assert torch.equal(load(root).unet.conv_in.bias, 2 * their_unet().conv_in.bias)
        after = {f.name for f in root.rglob("*") if f.is_file()}
        gone = {name for name in before if "-of-" in name or name == INDEX}
        assert after == before - gone | {WEIGHTS, "flashddpm.json"} | keep


def test_a_save_killed_at_any_moment_leaves_the_old_weights_or_the_new(
    sharded: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    """Every file that appears or goes is a moment to be killed at."""
    unlink, replace = os.unlink, os.replace
    for original in (sharded, published):
        ours = load(original, allow_pickle=True)
        old = ours.unet.conv_in.bias.clone()
        for parameter in ours.unet.parameters():
            parameter.mul_(2)
        found = []
        for kill in range(100):
            root = Path(shutil.copytree(original, tmp_path / f"{original.name}-{kill}"))
            left = kill

            def die(call: Callable[..., Any], *names: Any) -> None:
                nonlocal left
                if left == 0 and ".tmp" not in str(names[-1]):  # such a one is cleared up
                    raise KeyboardInterrupt
                left -= ".tmp" not in str(names[-1])
                call(*names)

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", functools.partial(die, replace))
                patch.setattr(os, "unlink", functools.partial(die, unlink))
                try:
                    save_pretrained(root, ours.unet, ours.scheduler, ours.conditioning)
                    ended = True
                except KeyboardInterrupt:
                    ended = False
            bias = load(root, allow_pickle=True).unet.conv_in.bias
            found.append(bias.equal(2 * old))
            assert found[-1] or bias.equal(old)
            if ended:
                break
        assert ended and found == sorted(found) and found[0] is False and found[-1] is True
        assert len(found) >= 6


def test_only_our_unet_is_saved_and_only_to_folders(tmp_path: Path, tiny_unet: Any) -> None:
    with pytest.raises(ValueError, match="^network=Linear"):
        save_pretrained(tmp_path / "a", torch.nn.Linear(1, 1), {}, Conditioning())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="^folder=.*is a file"):
        save_pretrained(tmp_path / "file", tiny_unet(), {}, Conditioning())
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


DEFAULTS = [
    SamplingDefaults(),
    SamplingDefaults("trailing", 1, 0.0, "fixed_large"),
    SamplingDefaults("linspace", 0, 2.5, "fixed_small", 0.99),
    SamplingDefaults(solver="ddim", clip=3.0),
    SamplingDefaults("linspace", solver="dpmpp_2m", clip=0.0, sigmas="karras"),
    SamplingDefaults("linspace", solver="dpmpp_2m_sde", clip=1.5, threshold=0.9),
    SamplingDefaults("trailing", solver="euler", clip=0.0, sigmas="exponential"),
    SamplingDefaults("linspace", solver="euler_ancestral", clip=0.0),
]


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_a_sampler_made_by_hand_has_a_config(
    defaults: SamplingDefaults, tmp_path: Path, tiny_unet: Any, load: Any
) -> None:
    schedule = NoiseSchedule.create("squaredcos_cap_v2", 50)
    config = scheduler_config(schedule, "sample", defaults)
    save_pretrained(tmp_path, tiny_unet(), config, Conditioning())
    assert load_scheduler_config(tmp_path) == config
    ours = load(tmp_path)
    assert (ours.prediction_type, ours.defaults) == ("sample", defaults)
    assert ours.schedule.betas.tolist() == schedule.betas.tolist()
    theirs = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path / "scheduler")
    np.testing.assert_allclose(theirs.betas.numpy(), schedule.betas, rtol=1e-6)
    unknown = set(config) - set(theirs.config) - {"_class_name"}
    # Euler's classes always take noise levels as they are.
    assert unknown <= {"steps_offset"}, unknown


def test_defaults_that_diffusers_cannot_say_are_refused() -> None:
    schedule = NoiseSchedule.create("linear", 50)
    for defaults in (
        SamplingDefaults(solver="euler", clip=1.0),
        SamplingDefaults(solver="ddim", variance_type="fixed_large"),
    ):
        with pytest.raises(ValueError, match="^defaults=.*has no settings for all"):
            scheduler_config(schedule, "epsilon", defaults)
