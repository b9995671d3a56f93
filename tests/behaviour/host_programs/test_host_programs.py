"""Every program around us gets the bits of a plain process, whatever it has set in torch.

An activity takes a ``Stage`` (conftest.py), where it finds what was made beforehand, and returns
tensors by their names; it runs once in a plain process and once in each program. Another activity
is another function above ACTIVITIES.
"""

import dataclasses
import multiprocessing
import os
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import flashddpm as fd
from flashddpm.checkpoints.model_folder import load_unet
from flashddpm.convert import convert
from flashddpm.data import load_data
from flashddpm.evaluation.bound import variational_bound
from flashddpm.evaluation.classifier import judge, train_classifier
from flashddpm.evaluation.distances import precision_recall
from flashddpm.evaluation.evaluate import counterpart
from flashddpm.evaluation.features import Features, features_of
from flashddpm.evaluation.job import chosen
from flashddpm.evaluation.neighbours import nearest
from flashddpm.host import isolated
from flashddpm.integrations.diffusers_pipelines import DDIMPipeline, DDPMPipeline
from flashddpm.io.images import make_grid, save_grid, to_uint8
from flashddpm.networks.registry import on_meta
from flashddpm.training.draws import Draws

Result = dict[str, Tensor]
PROGRAMS = (
    "default device",
    "float64",
    "bfloat16",
    "autocast",
    "inference mode",
    "task",
    "compiled",
)
"""The names of ``programs`` (conftest.py)."""

# Activities.


@isolated(grad=False)
def inside(function: Callable[..., Any], *args: Any) -> Any:
    """Call what is no entry point from within one."""
    return function(*args)


def draw(stage: Any) -> Result:
    """What a step sees: so many labels that some lie by the threshold of those dropped."""
    config = dataclasses.replace(stage.training.TINY, batch_size=40_000, label_dropout=0.3)
    draws = inside(Draws, config, 1000)
    keys = inside(draws.keys, 5)
    of_keys = (draws.index, draws.flips, draws.timesteps, draws.seeds, draws.label_drops)
    return {"keys": keys} | {draw.__name__: inside(draw, keys) for draw in of_keys}


def train(stage: Any) -> Result:
    """Two steps in float32, their weights averaged and saved."""
    trainer = stage.training.run(stage.training.trainer(stage.out, steps=2, ema_half_lives=(3,)))
    return stage.stored() | trainer.state().tensors | trainer.batch(7)._asdict()


def train_in_bfloat16(stage: Any) -> Result:
    """Two steps under autocast, each of two parts, and the losses of two more."""
    trainer = stage.training.trainer(
        stage.out, steps=4, precision="bfloat16", accumulate=2, timestep_sampling="low_discrepancy"
    )
    losses = [trainer.train_step() for _ in range(3)]
    return trainer.state().tensors | {"losses": torch.stack(losses)}


def resume(stage: Any) -> Result:
    """A step more of a run; the network of the run's averages."""
    trainer = stage.training.trainer(stage.out, steps=4)
    trainer.out = stage.made / "run"
    trainer.resume()
    loss = trainer.train_step()
    return trainer.state().tensors | trainer.averaged_unet().state_dict() | {"loss": loss}


def bound(stage: Any) -> Result:
    """The bound of a model."""
    sampler = fd.Sampler.from_pretrained(stage.made / "model", device="cpu", compile=False)
    data = load_data(stage.made / "images")
    images, labels = data.fetch(chosen(3, len(data)))
    found = variational_bound(sampler, images, labels, timesteps=3)
    return {"bound": torch.from_numpy(np.array([found.total, *found.terms, *found.x0_mse]))}


def measure(stage: Any) -> Result:
    """A classifier, its features, neighbours, and distances."""
    data = load_data(stage.made / "images")
    images, labels = data.fetch(chosen(30, len(data)))
    classifier = train_classifier(images, labels, epochs=1)
    predicted, _ = judge(classifier, images)
    features = features_of(images, Features.of_classifier(classifier))
    near = nearest(images[:4], data, 2)
    like = counterpart(data, 4, labels[:4].tolist())
    assert like is not None
    pair = precision_recall(features[:15], features[15:])
    return {
        **classifier.state_dict(),
        "predicted": predicted,
        "features": features,
        "index": near.index,
        "distance": near.distance,
        "duplicate": near.duplicate,
        "like": like,
        "prc": torch.from_numpy(np.array([pair.precision, pair.recall])),
    }


def convert_ddpt(stage: Any) -> Result:
    """denoising-diffusion-pytorch's network, and what it gives."""
    convert(
        stage.made / "ddpt.safetensors", stage.out, "ddpt", image_size=16, objective="pred_noise"
    )
    unet = load_unet(stage.out, torch.device("cpu"), torch.float32)
    times = inside(unet.embed_time, torch.from_numpy(np.arange(3)))
    return stage.stored() | {"times": times}


def convert_improved(stage: Any) -> Result:
    """improved-diffusion's network."""
    flags = stage.script("make_openai").CASES["improved_scale_shift"]
    convert(stage.made / "improved.safetensors", stage.out, "improved", **flags)
    return stage.stored()


def load(stage: Any) -> Result:
    """A folder, as it is and in bfloat16; and that there is no memory for what was not loaded."""
    cpu, folder = torch.device("cpu"), stage.made / "model"
    unet, half = (load_unet(folder, cpu, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert not any(p.is_inference() for p in unet.parameters())
    planned = inside(on_meta, unet.config).state_dict()
    assert {(p.device.type, p.dtype) for p in planned.values()} == {("meta", torch.float32)}
    return unet.state_dict() | {f"half.{key}": p for key, p in half.state_dict().items()}


def ordinary(found: Result) -> Result:
    """What we return can be trained on, whatever called us."""
    assert not [name for name, value in found.items() if value.is_inference()]
    assert not [name for name, value in found.items() if value.requires_grad]
    return found


def sample(stage: Any) -> Result:
    """Images by every kind of step, and the noise of seeds."""
    sampler, z = stage.sampler(), stage.live.noise
    x0: list[Tensor] = []
    return ordinary(
        {
            "ddim": sampler.sample(
                range(3), [0, 1, 0], 2.0, num_steps=2, on_step=lambda i, x: x0.append(x.clone())
            ),
            "x0": x0[0],
            "ddpm": sampler.sample(range(2), 1, solver="ddpm", num_steps=2, batch_size=1),
            "image": sampler.sample(
                3, 0, solver="ddpm", num_steps=3, image=z[0], strength=0.7, spacing="trailing"
            ),
            "threshold": sampler.sample(
                5, 0, 3.0, num_steps=2, clip=2.0, threshold=0.9, guidance_rescale=0.7
            ),
            "fractional": sampler.sample(5, 1, solver="euler", num_steps=2, spacing="linspace"),
            "given": sampler.sample(
                range(2), 0, solver="ddpm", num_steps=2, initial_noise=z, step_noise=lambda i: z
            ),
            "reference": stage.sampler(backend="reference").sample(
                1, 1, solver="ddpm", num_steps=2
            ),
            "z_T": sampler.initial_noise(range(2)),
            "z": sampler.step_noise(range(2), 7),
            "out": sampler.predict(z, stage.live.t, stage.live.labels),
        }
    )


def walk(stage: Any) -> Result:
    """A trajectory, saved on its way and resumed by another sampler."""
    asked = {"labels": [0, 1], "guidance": [2.0, 1.0], "num_steps": 3}
    trajectory = stage.sampler().trajectory(range(2), solver="dpmpp_2m", **asked)
    trajectory.step()
    path = stage.out / "trajectory.safetensors"
    trajectory.save(path)
    x, again = trajectory.x, stage.sampler().resume(path)
    found = {"now": x, "resumed": again.run(), "run": trajectory.run()}
    return ordinary(found) | safetensors.torch.load(path.read_bytes())


def pipe(stage: Any) -> Result:
    """diffusers' pipelines, whose noise is torch's or ours."""

    def generator(seed: int = 0) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed)

    live, sampler = stage.live, fd.Sampler.from_diffusers
    ddpm = DDPMPipeline(sampler(live.unet, live.ddpm, compile=False))
    ddim = DDIMPipeline.from_pretrained(stage.made / "model", compile=False)
    half = DDIMPipeline(**ddim.components).to(torch.bfloat16)
    assert not any(p.is_inference() for p in half.unet.parameters())
    for pipeline in (ddpm, ddim, half):
        pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    torch.manual_seed(5)
    found = {
        "none": ddpm(2, **asked).images,
        "seeds": ddpm(seeds=[3, 4], **asked).images,
        "list": ddpm(2, [generator(1), generator(2)], **asked).images,
    }
    asked |= {"class_labels": 0}
    found["generator"] = ddim(2, generator(), eta=0.5, **asked).images
    ddim.scheduler = live.ddpm
    found["set"] = ddim(seeds=[1], guidance_scale=2.0, **asked).images
    found["half"] = half(generator=generator(), **asked).images
    return ordinary(found)


def take_over(stage: Any) -> Result:
    """Live objects of diffusers; the network that has a hook is called itself."""
    live = stage.live
    plain = fd.Sampler.from_diffusers(live.unet, live.ddim, tables="diffusers")
    hooked = fd.Sampler.from_diffusers(live.hooked, live.ddpm)
    assert not any(p.is_inference() for p in plain.network.parameters())
    plain.save_pretrained(stage.out)
    found = {
        "plain": plain.sample(range(2), num_steps=2),
        "hooked": hooked.sample(range(2), solver="ddpm", num_steps=2),
        "fractional": hooked.sample(0, solver="euler", num_steps=2, spacing="linspace"),
    }
    return ordinary(found) | stage.stored()


def once_and_half(network: nn.Module) -> tuple[Result, Result]:
    state = network.state_dict()
    return tuple({key: value * by for key, value in state.items()} for by in (1, 0.5))


def change_weights(stage: Any) -> Result:
    """New weights, in a sampler and under an engine."""
    sampler = stage.sampler()
    whole, halves = inside(once_and_half, sampler.network)
    first = sampler.sample(0, 0, num_steps=2)
    sampler.update_weights(halves)
    found = {"half": sampler.sample(0, 0, num_steps=2)}
    sampler.save_pretrained(stage.out)
    with fd.Engine(sampler, 2) as engine:
        engine.update_weights(whole)
        found["whole"] = engine.submit(fd.Request(seed=0, label=0, num_steps=2)).result().image
    assert torch.equal(found["whole"], first[0])
    return ordinary(found) | stage.stored()


def serve(stage: Any) -> Result:
    """Requests of several plans, on a thread of the engine's and on this one, with previews."""
    sampler, image = stage.sampler(), stage.live.noise[0]
    watched = fd.Request(seed=1, label=0, num_steps=2, guidance=2.0, guidance_rescale=0.5)
    others = [
        fd.Request(seed=2, solver="ddpm", num_steps=2, label=1, image=image, strength=0.5),
        fd.Request(seed=3, solver="euler", num_steps=2, spacing="linspace"),
    ]
    found: Result = {}
    for threaded in (True, False):
        at_once = 1 if threaded else 3  # who meets whom in a batch, and so the bits, are chance
        previews: list[Tensor] = []
        with fd.Engine(sampler, at_once, threaded=threaded) as engine:
            futures = [engine.submit(request) for request in others]
            futures.append(engine.submit(watched, on_step=previews.append))
            while not threaded and engine.turn():
                pass
            images = [future.result().image for future in futures]
        assert len(previews) == 2
        found |= {f"{threaded}.{i}": x for i, x in enumerate(images + previews)}
    return ordinary(found)


def call_another(stage: Any) -> Result:
    """A network of the user's own: told of indices, and in an autocast that it enters itself."""
    live = stage.live
    schedule = fd.NoiseSchedule.create("squaredcos_cap_v2", 20)

    def by_index(x_t: Tensor, t: Tensor, labels: Tensor | None, index: Tensor) -> Tensor:
        assert x_t.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
        return live.conv(x_t) * (1 + index + t.float()).reshape(-1, 1, 1, 1)

    def mixed(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = live.conv(x_t)
        assert out.dtype is torch.bfloat16
        return out

    samplers = {
        name: fd.Sampler(live.conv, schedule, shape=(1, 8, 8), call=call, device="cpu")
        for name, call in (("index", by_index), ("mixed", mixed))
    }
    found = {"predicted": samplers["index"].predict(live.noise, live.t)}
    for name, sampler in samplers.items():
        found[name] = sampler.sample(range(2), solver="ddpm", num_steps=2)
    return ordinary(found)


def picture(stage: Any) -> Result:
    """Pictures of samples."""
    x = stage.live.noise
    save_grid(x, stage.out / "grid.png")
    grid = np.array(make_grid(x, captions=["a", "b"]))
    levels = ordinary({"uint8": to_uint8(x)})
    return levels | {
        "grid": torch.from_numpy(grid),
        "file": torch.from_numpy(np.fromfile(stage.out / "grid.png", np.uint8)),
    }


ACTIVITIES = (
    draw,
    train,
    train_in_bfloat16,
    resume,
    bound,
    measure,
    convert_ddpt,
    convert_improved,
    load,
    sample,
    walk,
    pipe,
    take_over,
    change_weights,
    serve,
    call_another,
    picture,
)

TRACED = {bound, sample, walk, pipe, take_over, serve, call_another, picture}
"""Those that are run in a compiled function: others hold many tensors, each of which it guards."""


# The matrix.


@pytest.mark.parametrize(
    ("activity", "program"),
    [
        pytest.param(a, p, marks=pytest.mark.slow if p == "compiled" and a is not sample else ())
        for a in ACTIVITIES
        for p in PROGRAMS
        if p != "compiled" or a in TRACED
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_bits_are_those_of_a_plain_process(
    activity: Callable[[Any], Result],
    program: str,
    programs: dict[str, Callable[..., Result]],
    plain: dict[str, Result],
    stage: Any,
) -> None:
    assert tuple(programs) == PROGRAMS
    name = activity.__name__
    if name not in plain:
        plain[name] = activity(dataclasses.replace(stage, out=stage.out.with_name("plain")))
    expected = plain[name]
    found = programs[program](lambda: activity(stage))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].device, found[key].dtype) == (value.device, value.dtype), key
        assert torch.equal(found[key], value), key


SPAWNED = """
import importlib.util, multiprocessing, os, pickle, sys, warnings
from pathlib import Path

def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def run(stage, activity, file):
    file.write_bytes(pickle.dumps(activity(stage)))

def main(here, made, out):
    import torch
    torch.set_num_threads(1)
    tests, fixtures = load(here), load(here.with_name("conftest.py"))
    training, live = fixtures.Training(), fixtures.make_live()
    for start in ("forked", "spawned"):  # after a backward pass torch refuses them in a fork
        for activity in tests.ACTIVITIES:
            name = f"{activity.__name__}-{start}"
            stage = fixtures.Stage(training, made, live, out / name)
            given = stage, activity, out / f"{name}.pickle"
            if start == "spawned":
                run(*given)
                continue
            child = multiprocessing.get_context("fork").Process(target=run, args=given)
            child.start()
            child.join(60)
            if child.exitcode != 0:
                child.kill()
                sys.exit(f"{name}: ended with {child.exitcode}")

main(*map(Path, os.environ["SPAWNED"].split(os.pathsep)))
"""


@pytest.mark.slow
def test_bits_of_spawned_and_forked_processes(
    plain: dict[str, Result], stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    paths = map(str, (__file__, stage.made, tmp_path))
    monkeypatch.setenv("SPAWNED", os.pathsep.join(paths))
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=runpy.run_path, args=(str(script),))
    child.start()
    child.join(240)
    child.kill()
    assert child.exitcode == 0
    for activity in ACTIVITIES:
        name = activity.__name__
        if name not in plain:
            plain[name] = activity(dataclasses.replace(stage, out=tmp_path / name))
        for start in ("forked", "spawned"):
            found = pickle.loads((tmp_path / f"{name}-{start}.pickle").read_bytes())
            assert found.keys() == plain[name].keys()
            for key, value in plain[name].items():
                assert torch.equal(found[key], value), (name, start, key)
