"""Every program around us gets the bits of a plain process, whatever it has set in torch.

An activity takes a ``Stage``, where it finds what was made beforehand, and returns tensors by
their names; it runs once in a plain process and once in each program. Another activity is another
function above ACTIVITIES.
"""

import asyncio
import copy
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import runpy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import flashddpm as fd
from flashddpm.checkpoints.model_folder import load_unet, save_model
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

FIXTURES = Path(__file__).parents[1] / "convert" / "fixtures"

Result = dict[str, Tensor]


@dataclasses.dataclass
class Stage:
    """What was made beforehand, in a plain process.

    Attributes:
        training: small runs (conftest.py).
        made: a folder with model/, run/, images/, ddpt.safetensors and improved.safetensors.
        live: networks and schedulers.
        out: an empty folder.
    """

    training: Any
    made: Path
    live: "Live"
    out: Path


@dataclasses.dataclass
class Live:
    """Networks of 8x8 images and schedulers of diffusers that exist already.

    Attributes:
        unet, hooked: diffusers' U-Nets; on the second a hook.
        ddpm, ddim: schedulers.
        conv: a network of the user's own.
        noise: float32 [2, 1, 8, 8]; t, labels: int64 [2].
    """

    unet: UNet2DModel
    hooked: UNet2DModel
    ddpm: DDPMScheduler
    ddim: DDIMScheduler
    conv: nn.Module
    noise: Tensor
    t: Tensor
    labels: Tensor


# Programs: each calls what it is given, and returns what that returns.

Work = Callable[[], Result]


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def within(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Work], Result]:
    def program(work: Work) -> Result:
        with context():
            return work()

    return program


def in_a_task_of_a_thread(work: Work) -> Result:
    """Where there are no gradients, and deterministic algorithms."""
    found: list[Result] = []  # what a task returned is in its repr, which asyncio.run makes

    async def program() -> None:
        with torch.no_grad(), deterministic():
            found.append(work())

    thread = threading.Thread(target=lambda: asyncio.run(program()))
    thread.start()
    thread.join()
    return found[0]


def in_a_compiled_function(work: Work) -> Result:
    """Nothing of ours may be traced but the networks, which anyone may compile."""
    found: list[Result] = []
    package = re.escape(f"{Path(fd.__file__).parent}/")
    ours = re.compile(package + r"(?!networks/(rms_)?unet)\S+ line.*")

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        lines = [ours.search(node.stack_trace or "") for node in graph.graph.nodes]
        assert not any(lines), [line[0] for line in lines if line]
        return graph.forward

    @torch.compile(backend=backend)
    def program(x: Tensor) -> Tensor:
        x = x + 1
        found.append(work())
        return x + 1

    torch.compiler.reset()
    program(torch.zeros(2))
    return found[0]


PROGRAMS = {
    "default device": within(lambda: default_device("meta")),
    "float64": within(lambda: default_dtype(torch.float64)),
    "bfloat16": within(lambda: default_dtype(torch.bfloat16)),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "inference mode": within(torch.inference_mode),
    "task": in_a_task_of_a_thread,
    "compiled": in_a_compiled_function,
}

# Activities.


@isolated(grad=False)
def inside(function: Callable[..., Any], *args: Any) -> Any:
    """Call what is no entry point from within one."""
    return function(*args)


def draw(stage: Stage) -> Result:
    """What a step sees: so many labels that some lie by the threshold of those dropped."""
    config = dataclasses.replace(stage.training.TINY, batch_size=40_000, label_dropout=0.3)
    drawn = inside(lambda: Draws(config, 1000)(5))
    return {"index": drawn.index, "flip": drawn.flip, **drawn.extra}


def train(stage: Stage) -> Result:
    """Two steps in float32, their weights averaged and saved."""
    trainer = stage.training.run(stage.training.trainer(stage.out, steps=2, ema_half_lives=(3,)))
    return stored(stage.out) | trainer.state().tensors | trainer.draw(7)


def train_in_bfloat16(stage: Stage) -> Result:
    """Two steps under autocast, each of two parts, and the losses of two more."""
    trainer = stage.training.trainer(
        stage.out, steps=4, precision="bfloat16", accumulate=2, timestep_sampling="low_discrepancy"
    )
    losses = [trainer.train_step() for _ in range(3)]
    return trainer.state().tensors | {"losses": torch.stack(losses)}


def resume(stage: Stage) -> Result:
    """A step more of a run; the network of the run's averages."""
    trainer = stage.training.trainer(stage.out, steps=4)
    trainer.out = stage.made / "run"
    trainer.resume()
    loss = trainer.train_step()
    return trainer.state().tensors | trainer.averaged_unet().state_dict() | {"loss": loss}


def bound(stage: Stage) -> Result:
    """The bound of a model."""
    sampler = fd.Sampler.from_pretrained(stage.made / "model", device="cpu", compile=False)
    data = load_data(stage.made / "images")
    images, labels = data.fetch(chosen(3, len(data)))
    found = variational_bound(sampler, images, labels, timesteps=3)
    return {"bound": torch.from_numpy(np.array([found.total, *found.terms, *found.x0_mse]))}


def measure(stage: Stage) -> Result:
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


def convert_ddpt(stage: Stage) -> Result:
    """denoising-diffusion-pytorch's network, and what it gives."""
    convert(
        stage.made / "ddpt.safetensors", stage.out, "ddpt", image_size=16, objective="pred_noise"
    )
    unet = load_unet(stage.out, torch.device("cpu"), torch.float32)
    times = inside(unet.embed_time, torch.from_numpy(np.arange(3)))
    return stored(stage.out) | {"times": times}


def convert_improved(stage: Stage) -> Result:
    """improved-diffusion's network."""
    flags = scripts("make_openai").CASES["improved_scale_shift"]
    convert(stage.made / "improved.safetensors", stage.out, "improved", **flags)
    return stored(stage.out)


def load(stage: Stage) -> Result:
    """A folder, as it is and in bfloat16; and that there is no memory for what was not loaded."""
    cpu, folder = torch.device("cpu"), stage.made / "model"
    unet, half = (load_unet(folder, cpu, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert not any(p.is_inference() for p in unet.parameters())
    planned = inside(on_meta, unet.config).state_dict()
    assert {(p.device.type, p.dtype) for p in planned.values()} == {("meta", torch.float32)}
    return unet.state_dict() | {f"half.{key}": p for key, p in half.state_dict().items()}


def loaded(stage: Stage, **options: Any) -> fd.Sampler:
    options = {"device": "cpu", "compile": False, **options}
    return fd.Sampler.from_pretrained(stage.made / "model", **options)


def ordinary(found: Result) -> Result:
    """What we return can be trained on, whatever called us."""
    assert not [name for name, value in found.items() if value.is_inference()]
    assert not [name for name, value in found.items() if value.requires_grad]
    return found


def sample(stage: Stage) -> Result:
    """Images by every kind of step, and the noise of seeds."""
    sampler, z = loaded(stage), stage.live.noise
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
            "reference": loaded(stage, backend="reference").sample(
                1, 1, solver="ddpm", num_steps=2
            ),
            "z_T": sampler.initial_noise(range(2)),
            "z": sampler.step_noise(range(2), 7),
            "out": sampler.predict(z, stage.live.t, stage.live.labels),
        }
    )


def walk(stage: Stage) -> Result:
    """A trajectory, saved on its way and resumed by another sampler."""
    asked = {"labels": [0, 1], "guidance": [2.0, 1.0], "num_steps": 3}
    trajectory = loaded(stage).trajectory(range(2), solver="dpmpp_2m", **asked)
    trajectory.step()
    path = stage.out / "trajectory.safetensors"
    trajectory.save(path)
    x, again = trajectory.x, loaded(stage).resume(path)
    found = {"now": x, "resumed": again.run(), "run": trajectory.run()}
    return ordinary(found) | safetensors.torch.load(path.read_bytes())


def pipe(stage: Stage) -> Result:
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


def take_over(stage: Stage) -> Result:
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
    return ordinary(found) | stored(stage.out)


def once_and_half(network: nn.Module) -> tuple[Result, Result]:
    state = network.state_dict()
    return tuple({key: value * by for key, value in state.items()} for by in (1, 0.5))


def change_weights(stage: Stage) -> Result:
    """New weights, in a sampler and under an engine."""
    sampler = loaded(stage)
    whole, halves = inside(once_and_half, sampler.network)
    first = sampler.sample(0, 0, num_steps=2)
    sampler.update_weights(halves)
    found = {"half": sampler.sample(0, 0, num_steps=2)}
    sampler.save_pretrained(stage.out)
    with fd.Engine(sampler, 2) as engine:
        engine.update_weights(whole)
        found["whole"] = engine.submit(fd.Request(seed=0, label=0, num_steps=2)).result().image
    assert torch.equal(found["whole"], first[0])
    return ordinary(found) | stored(stage.out)


def serve(stage: Stage) -> Result:
    """Requests of several plans, on a thread of the engine's and on this one, with previews."""
    sampler, image = loaded(stage), stage.live.noise[0]
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


def call_another(stage: Stage) -> Result:
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


def picture(stage: Stage) -> Result:
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


def stored(folder: Path) -> Result:
    """The bytes of every model's files below a folder."""
    models = (path.parent for path in sorted(folder.rglob("model_index.json")))
    files = [f for model in models for f in (model / "unet", model / "scheduler")]
    files = [f for folder in files for f in sorted(folder.iterdir())]
    return {str(f.relative_to(folder)): torch.from_numpy(np.fromfile(f, np.uint8)) for f in files}


def scripts(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_images(folder: Path) -> None:
    """36 images of 8x8 in two classes, as IDX files."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (36, 8, 8), np.uint8)
    labels = np.arange(36, dtype=np.uint8) % 2
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())


def prepare(folder: Path, training: Any) -> None:
    """Make what the stages hold."""
    write_images(folder / "images")
    trainer = training.run(training.trainer(folder / "run", steps=2))
    unet = trainer.averaged_unet()
    scheduler = {"num_train_timesteps": 20}
    save_model(folder / "model", unet.config, unet.state_dict(), scheduler, fd.Conditioning(2, 2))
    weights = scripts("make_openai").weights
    with safe_open(FIXTURES / "ddpt.safetensors", "pt") as file:
        ddpt = weights(json.loads(file.metadata()["other"]))
    save_file({f"model.{key}": value for key, value in ddpt.items()}, folder / "ddpt.safetensors")
    with safe_open(FIXTURES / "openai_improved_scale_shift.safetensors", "pt") as file:
        save_file(weights(json.loads(file.metadata()["shapes"])), folder / "improved.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def made(folder: Path, training: Any) -> Path:
    """What the stages hold; made for the first test that asks."""
    if not any(folder.iterdir()):
        prepare(folder, training)
    return folder


def make_live() -> Live:
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, hooked = (UNet2DModel(**config).eval() for _ in range(2))
        conv, noise = nn.Conv2d(1, 1, 3, padding=1), torch.randn(2, 1, 8, 8)
    hooked.conv_out.register_forward_hook(lambda module, given, out: out * 0.5)
    t, labels = torch.tensor([3, 4]), torch.tensor([0, 1])
    return Live(unet, hooked, DDPMScheduler(), DDIMScheduler(), conv, noise, t, labels)


@pytest.fixture(scope="module")
def live() -> Live:
    return make_live()


@pytest.fixture(scope="module")
def plain() -> dict[str, Result]:
    """What activities gave in a plain process; filled by the first test that asks."""
    return {}


@pytest.fixture
def stage(made: Path, live: Live, training: Any, tmp_path: Path) -> Stage:
    return Stage(training, made, live, tmp_path / "out")


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
    activity: Callable[[Stage], Result],
    program: str,
    plain: dict[str, Result],
    stage: Stage,
) -> None:
    name = activity.__name__
    if name not in plain:
        plain[name] = activity(dataclasses.replace(stage, out=stage.out.with_name("plain")))
    expected = plain[name]
    found = PROGRAMS[program](lambda: activity(stage))
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
    tests, training = load(here), load(here.parents[1] / "training" / "conftest.py").Training()
    live = tests.make_live()
    for start in ("forked", "spawned"):  # after a backward pass torch refuses them in a fork
        for activity in tests.ACTIVITIES:
            name = f"{activity.__name__}-{start}"
            given = tests.Stage(training, made, live, out / name), activity, out / f"{name}.pickle"
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
    plain: dict[str, Result], stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


BETWEEN = ["default device", "bfloat16", "autocast", "inference mode"]


@pytest.mark.parametrize("where", ["built", "used"])
@pytest.mark.parametrize("program", BETWEEN)
def test_what_is_built_in_one_program_may_be_used_in_another(
    program: str, where: str, stage: Stage
) -> None:
    def built(made: list[Any]) -> Result:
        sampler = loaded(stage)
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
        PROGRAMS[program](lambda: built(mixed))
        found = used(*mixed)
    else:
        built(mixed)
        found = PROGRAMS[program](lambda: used(*mixed))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_network_may_be_trained_after_it_was_loaded_in_inference_mode(made: Path, live: Live):
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


def test_a_timestep_between_the_integers_is_what_it_is(live: Live, made: Path):
    unet = load_unet(made / "model", torch.device("cpu"), torch.float32)
    expected = unet(live.noise, 3.3, live.labels)
    with default_dtype(torch.bfloat16):
        assert torch.equal(unet(live.noise, 3.3, live.labels), expected)


def test_a_callers_autocast_holds_no_old_weights(live: Live):
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


def test_other_threads_and_precisions_of_products_keep_images_close(stage: Stage):
    """What a processor adds up in another order is no bit of a promise, but near."""
    sampler = loaded(stage)

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
