"""What is built in one program and used in another, and what else a program may have set."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashddpm as fd
from flashddpm.checkpoints.model_folder import load_unet

Result = dict[str, Tensor]
BETWEEN = ["default device", "bfloat16", "autocast", "inference mode"]


@pytest.mark.parametrize("where", ["built", "used"])
@pytest.mark.parametrize("program", BETWEEN)
def test_what_is_built_in_one_program_may_be_used_in_another(
    program: str, where: str, stage: Any, programs: dict[str, Any]
) -> None:
    def built(made: list[Any]) -> Result:
        sampler = stage.sampler()
        made += [
            sampler,
            fd.Sampler.from_diffusers(stage.live.unet, stage.live.ddim, compile=False),
            fd.Engine(sampler, 2, threaded=False),
            sampler.trajectory(range(2), 1, num_steps=2),
        ]
        return {}

    def used(sampler: fd.Sampler, other: fd.Sampler, engine: fd.Engine, walk: Any) -> Result:
        future = engine.submit(fd.Request(seed=1, label=1, num_steps=2))
        with engine:
            engine.drain()
        found = {
            "sample": sampler.sample(0, 1, 2.0, "ddpm", 2),
            "other": other.sample(0, num_steps=2),
        }
        return found | {"engine": future.result().image, "walk": walk.run()}

    plainly: list[Any] = []
    built(plainly)
    expected = used(*plainly)
    mixed: list[Any] = []
    if where == "built":
        programs[program](lambda: built(mixed))
        found = used(*mixed)
    else:
        built(mixed)
        found = programs[program](lambda: used(*mixed))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_network_may_be_trained_after_it_was_loaded_in_inference_mode(made: Path, live: Any):
    with torch.inference_mode():
        samplers = [
            fd.Sampler.from_pretrained(made / "model", device="cpu"),
            fd.Sampler.from_diffusers(live.unet, live.ddim),
            copy.deepcopy(fd.Sampler.from_pretrained(made / "model", device="cpu")),
        ]
    for sampler in samplers:
        sampler.network.requires_grad_(True)
        labels = None if sampler.conditioning.num_classes is None else live.labels
        sampler.network(live.noise, 3.5, labels).sum().backward()
        assert all(p.grad is not None for p in sampler.network.parameters())


def test_a_timestep_between_the_integers_is_what_it_is(
    live: Any, made: Path, programs: dict[str, Any]
):
    unet = load_unet(made / "model", torch.device("cpu"), torch.float32)
    expected = unet(live.noise, 3.3, live.labels)
    found = programs["bfloat16"](lambda: unet(live.noise, 3.3, live.labels))
    assert torch.equal(found, expected)


def test_a_callers_autocast_holds_no_old_weights(live: Any):
    """The network's own autocast would take those that the caller's has cast before."""
    conv = copy.deepcopy(live.conv)

    def call(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return conv(x_t)

    schedule = fd.NoiseSchedule.create()
    sampler = fd.Sampler(conv, schedule, shape=(1, 8, 8), call=call, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        conv(live.noise)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.zero_()
        assert not sampler.predict(live.noise, live.t).any()


CLOSE = 1e-3
"""Largest difference of an image where sums are in another order (docs: float32 trajectories)."""


def test_other_threads_and_precisions_of_products_keep_images_close(stage: Any):
    """What a processor adds up in another order is no bit of a promise, but near."""
    sampler = stage.sampler()

    def images() -> Tensor:
        return sampler.sample(range(2), 1, 2.0, "ddpm", 2)

    expected, threads = images(), torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    noise = sampler.initial_noise(range(3))
    try:
        for count, wanted in ((1, "medium"), (2, "highest"), (3, "medium")):
            torch.set_num_threads(count)
            torch.set_float32_matmul_precision(wanted)
            assert torch.equal(sampler.initial_noise(range(3)), noise)
            assert (images() - expected).abs().max() <= CLOSE
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_what_was_made_without_gradients_can_be_trained(around, training: Any, tmp_path: Path):
    with around():
        trainer = training.trainer(tmp_path, steps=2)
    assert all(p.requires_grad and not p.is_inference() for p in trainer.unet.parameters())
    trainer.train_step()
