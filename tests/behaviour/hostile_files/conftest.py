"""Valid folders of every form, how they are loaded and changed, and what a child does with them.

For the child, which loads every named case for what it costs (1 GB, 5 s of the processor) and does
(nothing is run, written or removed), this file is a script.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import runpy
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st

from flashddpm.checkpoints.model_folder import save_model
from flashddpm.checkpoints.pretrained import Pretrained, load_pretrained
from flashddpm.checkpoints.weights import INDEX, PICKLED, WEIGHTS
from flashddpm.errors import CheckpointError
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.registry import on_meta
from flashddpm.networks.rms_unet import RMSUNetConfig
from flashddpm.networks.unet_config import UNetConfig

MEMORY, SECONDS = 1 << 30, 5.0
CONFIG = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=4,
    num_class_embeds=3,
)
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "use_karras_sigmas": False,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "lambda_min_clipped": float("-inf"),
}
OURS = RMSUNetConfig(8, 1, 1, 4, (4, 8), (False,), (2,), (4,))
FORMS = ("single", "sharded", "pickled", "ours")


def make(root: Path, form: str) -> Path:
    """Write a valid folder: weights in one file, in shards, in a pickle, or of a class of ours."""
    config = OURS if form == "ours" else CONFIG
    labels = Conditioning() if form == "ours" else Conditioning(2, 2, ("cat", "dog"))
    unet = on_meta(config).to_empty(device="cpu")
    for parameter in unet.parameters():
        torch.nn.init.uniform_(parameter, -1, 1)
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    save_model(root, config, state, SCHEDULER, labels)
    folder = root / "unet"
    if form in ("single", "ours"):
        return root
    (folder / WEIGHTS).unlink()
    if form == "pickled":
        torch.save(OrderedDict(state), folder / PICKLED)
        return root
    names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        part = {key: value for key, value in state.items() if names[key] == name}
        safetensors.torch.save_file(part, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return root


def load(root: Path) -> Pretrained:
    return load_pretrained(root, torch.device("cpu"), torch.float32, allow_pickle=True)


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {
        str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in root.rglob("*")
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A valid folder of each form."""
    return {form: make(tmp_path_factory.mktemp(form) / "model", form) for form in FORMS}


@pytest.fixture(scope="session")
def scratch(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies that the properties write to; each puts back what it changed."""
    root = tmp_path_factory.mktemp("scratch")
    return {form: Path(shutil.copytree(models[form], root / form)) for form in FORMS}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """Each form of a folder."""
    return request.param


def _judge(root: Path) -> Pretrained | None:
    before = snapshot(root)
    try:
        result = load(root)
    except CheckpointError as error:
        assert str(root) in str(error)
        result = None
    else:
        assert all(bool(p.isfinite().all()) for p in result.unet.parameters())
        assert len(result.schedule) >= 1
    assert snapshot(root) == before
    return result


@pytest.fixture(scope="session")
def judge() -> Callable[[Path], Pretrained | None]:
    """A function that loads a folder.

    What comes must be whole, a refusal must name a file, and nothing may be written.
    """
    return _judge


@pytest.fixture
def assert_refused(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Callable[[Path], Any], str], None]:
    """A function: a copy of the form's folder, changed, is refused in these words, and stays."""

    def check(form: str, change: Callable[[Path], Any], message: str) -> None:
        monkeypatch.chdir(tmp_path)
        root = Path(shutil.copytree(models[form], tmp_path / "model"))
        change(root)
        before = snapshot(tmp_path)
        with pytest.raises(CheckpointError) as raised:
            load(root)
        assert snapshot(tmp_path) == before
        said = str(raised.value)
        assert said.startswith(f"{root}{os.sep}")
        assert re.search(message, said.removeprefix(str(root)))

    return check


# The named cases in a child, for what they cost and do.


def _named_cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        found |= runpy.run_path(str(file)).get("CASES", {})
    return found


@pytest.fixture
def named_cases() -> dict[str, Any]:
    """The CASES of all files."""
    return _named_cases()


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
DEEDS = {
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove",
    "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
    "socket.connect", "ctypes.dlopen", "pickle.find_class", "import", "exec", "compile",
}  # fmt: skip


def main(folder: str) -> None:
    """Load every named case under a cap of memory, and print what each cost and did."""
    os.chdir(folder)
    torch.set_num_threads(1)
    cases = _named_cases()
    models = {form: make(Path(folder) / form, form) for form in FORMS}
    for root in models.values():
        load(root)
    "".encode("cp437")  # of zip entries' names; like all modules, imported on first use
    deeds: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and (
            event in DEEDS
            or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        ):
            deeds.append(f"{event} {arguments[:2]!r:.200}")

    sys.addaudithook(watch)
    (size,) = (
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    report = {}
    for name, (form, change, _) in cases.items():
        root = Path(shutil.copytree(models[form], Path(folder) / "case"))
        change(root)
        before, seconds = snapshot(Path(folder)), math.inf
        for _ in range(3):  # where others use the processor, too, the same work takes it longer
            start = time.process_time()
            watching = True
            try:
                load(root)
                outcome = "loaded"
            except BaseException as error:
                outcome = type(error).__name__
            watching = False
            seconds = min(seconds, time.process_time() - start)
            if seconds <= SECONDS:
                break
        else:
            deeds.append(f"took {seconds:.1f} s")
        if snapshot(Path(folder)) != before:
            deeds.append("changed the folder")
        report[name] = [outcome, deeds[:]]
        deeds.clear()
        shutil.rmtree(root)
    json.dump(report, sys.stdout)


# Any change of any file.


@contextmanager
def _changed(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="session")
def changed() -> Callable[[Path, bytes], AbstractContextManager[None]]:
    """A context in which a file has another content."""
    return _changed


@pytest.fixture(scope="session")
def keys() -> list[tuple[str, str, str]]:
    """Every form, file and key of which the properties change the value."""
    return [
        *(("single", "unet/config.json", key) for key in CONFIG.to_dict()),
        *(("ours", "unet/config.json", key) for key in OURS.to_dict()),
        *(("single", "scheduler/scheduler_config.json", key) for key in SCHEDULER),
        *(("single", "model_index.json", key) for key in ("_class_name", "unet", "scheduler")),
        *(("single", "flashddpm.json", key) for key in vars(Conditioning())),
        *(("sharded", f"unet/{INDEX}", key) for key in ("metadata", "weight_map", "other")),
    ]


def _mangle(data: st.DataObject, content: bytes) -> bytes:
    text = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly at an end of the file, where structure is.
        ends = [len(text), min(len(text), 2000)]
        at = data.draw(st.integers(0, max(data.draw(st.sampled_from(ends)) - 1, 0)))
        at = data.draw(st.sampled_from([at, max(len(text) - 1 - at, 0)]))
        match data.draw(st.sampled_from(["cut", "flip", "replace", "repeat", "grow"])):
            case "cut":
                del text[at:]
            case "flip" if text:
                text[at] ^= 1 << data.draw(st.integers(0, 7))
            case "replace":
                length = data.draw(st.integers(0, 4))
                text[at : at + length] = data.draw(st.binary(max_size=4) | st.just(b"9"))
            case "repeat":
                text[at:at] = text[at : at + 100]
            case "grow":
                text += data.draw(st.binary(min_size=1, max_size=30))
    return bytes(text)


@pytest.fixture(scope="session")
def mangle() -> Callable[[st.DataObject, bytes], bytes]:
    """A function that cuts, flips, overwrites, inserts, removes or repeats bytes of a content."""
    return _mangle


if __name__ == "__main__":
    main(sys.argv[1])
