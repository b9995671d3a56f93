"""What the stages hold, made in a plain process, and the programs around us."""

import asyncio
import dataclasses
import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import flashddpm as fd
from flashddpm.checkpoints.model_folder import save_model

TESTS = Path(__file__).parents[2]
FIXTURES = TESTS / "convert" / "fixtures"

Result = dict[str, Tensor]


def load(path: Path) -> Any:
    """Run a Python file of the tests as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = load(TESTS / "training" / "conftest.py")
training, Training = runs.training, runs.Training


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


@dataclasses.dataclass
class Stage:
    """What was made beforehand, in a plain process.

    Attributes:
        training: small runs (tests/training/conftest.py).
        made: a folder with model/, run/, images/, ddpt.safetensors and improved.safetensors.
        live: networks and schedulers.
        out: an empty folder.
    """

    training: Any
    made: Path
    live: Live
    out: Path

    def sampler(self, **options: Any) -> fd.Sampler:
        """A sampler of model/ on the CPU, not compiled unless told to."""
        options = {"device": "cpu", "compile": False, **options}
        return fd.Sampler.from_pretrained(self.made / "model", **options)

    @staticmethod
    def script(name: str) -> Any:
        """A script beside the fixtures of tests/convert, as a module."""
        return load(FIXTURES / f"{name}.py")

    def stored(self) -> Result:
        """The bytes of every model's files below ``out``."""
        models = (path.parent for path in sorted(self.out.rglob("model_index.json")))
        files = [f for model in models for f in (model / "unet", model / "scheduler")]
        files = [f for folder in files for f in sorted(folder.iterdir())]
        return {
            str(f.relative_to(self.out)): torch.from_numpy(np.fromfile(f, np.uint8)) for f in files
        }


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


@pytest.fixture
def programs() -> dict[str, Callable[[Work], Result]]:
    """Each calls what it is given, and returns what that returns."""
    return PROGRAMS


# What the stages hold.


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
    weights = load(FIXTURES / "make_openai.py").weights
    with safe_open(FIXTURES / "ddpt.safetensors", "pt") as file:
        ddpt = weights(json.loads(file.metadata()["other"]))
    save_file({f"model.{key}": value for key, value in ddpt.items()}, folder / "ddpt.safetensors")
    with safe_open(FIXTURES / "openai_improved_scale_shift.safetensors", "pt") as file:
        save_file(weights(json.loads(file.metadata()["shapes"])), folder / "improved.safetensors")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def plain() -> dict[str, Result]:
    """What activities gave in a plain process; filled by the first test that asks."""
    return {}


@pytest.fixture
def stage(made: Path, live: Live, training: Any, tmp_path: Path) -> Stage:
    return Stage(training, made, live, tmp_path / "out")
