"""What every test gets: uninitialised memory that shows, small networks, one thread if asked."""

import functools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch.utils import _device

# Without a GPU the kernels run in Triton's interpreter; Triton looks when flashddpm imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on both sides of a comparison

import flashddpm as fd  # noqa: E402
from flashddpm.testing import rules, zones  # noqa: E402

CI = bool(os.environ.get("CI"))
hypothesis.settings.register_profile("default", deadline=None, derandomize=CI)
# On a GPU shapes are larger, and it is the results on the CPU that take the time.
hypothesis.settings.register_profile("gpu", deadline=None, derandomize=CI, max_examples=25)
hypothesis.settings.load_profile("gpu" if torch.cuda.is_available() else "default")


def fill_uninitialised_memory() -> None:
    """Make torch.empty and its kin return NaN (the largest integer), so that reading it shows.

    Patched for the whole run, and not by torch.use_deterministic_algorithms, which fills too but
    also replaces the algorithms that users run, on a GPU the very ones whose repeatability is
    tested. Compiled code is traced without the fill.
    """
    # Tables that are made on first use and hold the functions by identity: make them now.
    _device._device_constructors()
    torch.overrides.get_ignored_functions()

    def filling(empty):
        @functools.wraps(empty)
        def filled(*args, **kwargs):
            x = empty(*args, **kwargs)
            if not zones.fillable(x):
                return x
            with torch.no_grad():
                return x.fill_(zones.fit(torch.nan, x.dtype))

        return filled

    for owner, name in zones.ALLOCATORS:
        setattr(owner, name, filling(getattr(owner, name)))
    assert torch.empty(2).isnan().all() and torch.ones(2).new_empty(3).isnan().all()


fill_uninitialised_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no NVIDIA GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


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
def tiny_config() -> dict[str, Any]:
    """The keys of a small U-Net, diffusers' or ours."""
    return dict(TINY)


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
    """A function that makes a sampler of three classes and a null class, of its own network."""

    def make(network: torch.nn.Module | None = None, **arguments) -> fd.Sampler:
        arguments.setdefault("compile", False)
        return fd.Sampler(
            tiny_unet(num_class_embeds=4) if network is None else network,
            fd.NoiseSchedule.create("squaredcos_cap_v2", 100),
            shape=(1, 8, 8),
            prediction_type="v_prediction",
            conditioning=fd.Conditioning(3, 3),
            device="cpu",
            **arguments,
        )

    return make


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Run interpreted kernels faster, to the same bits."""
    if rules.INTERPRETED:
        from flashddpm.kernels.checks import interpreter

        with interpreter.quick():
            yield
    else:
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep PyTorch on one thread meanwhile: small sums are faster, and always the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def forked() -> Iterator[list[str]]:
    """How a command of Python begins that need not import torch anew: see fork_server.py."""
    file = Path(__file__).with_name("fork_server.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        listener.bind(f"{folder}/socket")
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, "-P", file, "--serve", str(listener.fileno())],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
        listener.close()
        yield [sys.executable, "-IS", str(file), f"{folder}/socket"]
        server.communicate()
