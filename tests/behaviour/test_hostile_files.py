"""Whatever the files of a model's folder hold, it is a valid model or a CheckpointError.

The named cases run twice: here, for what the error says, and in a child process, for what they
cost (1 GB, 5 s of the processor) and do (nothing is run, written or removed). For the child this
file is a script.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.checkpoints.model_folder import save_model
from flashddpm.checkpoints.pickles import MAX_PICKLE
from flashddpm.checkpoints.pretrained import Pretrained, load_pretrained
from flashddpm.checkpoints.weights import INDEX, PICKLED, WEIGHTS
from flashddpm.errors import CheckpointError
from flashddpm.io.files import MAX_HEADER, MAX_JSON, read_json
from flashddpm.networks.conditioning import Conditioning
from flashddpm.networks.registry import on_meta
from flashddpm.networks.rms_unet import RMSUNetConfig
from flashddpm.networks.unet_config import UNetConfig

MEMORY = 1 << 30
SECONDS = 5.0

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


# The named cases: a form, a change of its folder, and what the error must say


def config(**changes: Any) -> Callable[[Path], None]:
    return edit("unet/config.json", **changes)


def scheduler(**changes: Any) -> Callable[[Path], None]:
    return edit("scheduler/scheduler_config.json", **changes)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def content(name: str, value: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).write_bytes(value)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink()
        os.mkfifo(root / name)

    return change


def shard(name: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "unet" / INDEX
        index = json.loads(path.read_text())
        index["weight_map"]["conv_in.bias"] = name
        path.write_text(json.dumps(index))

    return change


def linked_shard(root: Path) -> None:
    path = root / "unet" / "part-0.safetensors"
    outside = root.parent / "outside.safetensors"
    shutil.move(path, outside)
    path.symlink_to(outside)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "unet" / WEIGHTS
        state = safetensors.torch.load(path.read_bytes())
        change(state)
        path.write_bytes(safetensors.torch.save(state))

    return apply


def header(text: bytes, body: bytes = b"") -> Callable[[Path], None]:
    return content(f"unet/{WEIGHTS}", len(text).to_bytes(8, "little") + text + body)


def pickled(value: Any) -> Callable[[Path], None]:
    return lambda root: torch.save(value, root / "unet" / PICKLED)


def program(text: bytes) -> Callable[[Path], None]:
    """Put another pickle in the place of the one in the archive."""
    return lambda root: rezip(root, lambda name, data: text if name == "data.pkl" else data)


def rezip(root: Path, change: Callable[[str, bytes], bytes], method: int = 0) -> None:
    path = root / "unet" / PICKLED
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in entries.items():
            new.writestr(name, change(name.split("/", 1)[1], data))


def twice(root: Path) -> None:
    with zipfile.ZipFile(root / "unet" / PICKLED, "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        archive.writestr(name, b"N.")


def many_entries(root: Path) -> None:
    with zipfile.ZipFile(root / "unet" / PICKLED, "w") as archive:
        for i in range(20_000):
            archive.writestr(zipfile.ZipInfo(f"a/data/{i:05}"), b"")


def two_directories(root: Path) -> None:
    """Let the 32-bit end of the archive point elsewhere than its 64-bit one."""
    path = root / "unet" / PICKLED
    data = bytearray(path.read_bytes())
    data[-6:-2] = (int.from_bytes(data[-6:-2], "little") - 46).to_bytes(4, "little")
    path.write_bytes(data)


def append_to(root: Path, name: str) -> None:
    path = root / "unet" / name
    path.write_bytes(path.read_bytes() + b"more")


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


EVIL = "evil-was-here"
WIDE = b'{"conv_in.bias": {"dtype": "F32", "shape": [%d, 0], "data_offsets": [0, 0]}}' % (2**64 - 1)
NAMES = b",".join(
    b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(70_000)
)
assert 0.8 * MAX_HEADER < len(NAMES) < MAX_HEADER
DEEP_TUPLE = b"\x80\x02}q\x00)" + b"\x85" * (MAX_PICKLE - 100) + b"K\x01s."
SHARED_TUPLE = (
    b"\x80\x02})" + b"".join(b"\x85q%c" % i + b"h%c\x86" % i for i in range(100)) + b"K\x01s."
)

CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "json larger than its cap": (
        "single",
        content("unet/config.json", b" " * MAX_JSON + b"{}"),
        "larger",
    ),
    "json that is wide": (
        "single",
        content("unet/config.json", b'{"a":[' + b"[]," * (MAX_JSON // 3 - 10) + b"[]]}"),
        "a=.*unknown key",
    ),
    "json that is deep": (
        "single",
        content("unet/config.json", b'{"a":' + b"[" * 20 + b"]" * 20 + b"}"),
        "deep",
    ),
    "json deeper than the stack": (
        "single",
        content("unet/config.json", b"[" * 10**6),
        "recursion",
    ),
    "json of long numbers": (
        "single",
        content("unet/config.json", b'{"a":' + b"9" * 10**6 + b"}"),
        "JSON",
    ),
    "json with a key twice": (
        "single",
        content("scheduler/scheduler_config.json", b'{"a":1,"a":1}'),
        "twice",
    ),
    "json with NaN": ("single", config(norm_eps=float("nan")), "norm_eps=nan: must be finite"),
    "json with Infinity": ("single", scheduler(beta_end=float("inf")), "beta_end=inf"),
    "json with -Infinity elsewhere": (
        "single",
        scheduler(sigma_min=float("-inf")),
        "sigma_min=-inf",
    ),
    "json with a float that overflows": (
        "single",
        content("unet/config.json", b'{"dropout": [1e999]}'),
        "dropout=inf",
    ),
    "a pipe for a config": ("single", pipe("unet/config.json"), "no plain file"),
    "a pipe for the index": ("single", pipe("model_index.json"), "no plain file"),
    "a pipe for weights": ("single", pipe(f"unet/{WEIGHTS}"), "no plain file"),
    "a pipe for a pickle": ("pickled", pipe(f"unet/{PICKLED}"), "no plain file"),
    "a pipe for a shard": ("sharded", pipe("unet/part-0.safetensors"), "no plain file"),
    "a network that is too large": (
        "single",
        config(
            block_out_channels=[65536] * 10,
            down_block_types=["AttnDownBlock2D"] * 10,
            up_block_types=["AttnUpBlock2D"] * 10,
            layers_per_block=16,
            num_class_embeds=10**6,
        ),
        "parameters",
    ),
    "a network of ours that is too large": (
        "ours",
        config(
            dims=[65536] * 11,
            full_attention=[True] * 10,
            attention_heads=[65536] * 10,
            attention_head_dim=[65536] * 10,
            num_mem_kv=65536,
        ),
        "parameters",
    ),
    "sizes that no int64 holds": ("single", config(block_out_channels=[2**70, 2**80]), "block_out"),
    "a size that is absurd": ("single", config(sample_size=10**9), "sample_size"),
    "an unknown network": ("single", config(_class_name="os.system"), "_class_name='os.system'"),
    "an unknown scheduler": (
        "single",
        scheduler(_class_name="__import__"),
        "_class_name='__import__'",
    ),
    "an unknown pipeline": (
        "single",
        edit("model_index.json", _class_name="Mine"),
        "_class_name='Mine'",
    ),
    "a scheduler of a module": (
        "single",
        edit("model_index.json", scheduler=["subprocess", "Popen"]),
        "scheduler=.*subprocess",
    ),
    "too many timesteps": ("single", scheduler(num_train_timesteps=10**12), "num_train_timesteps"),
    "no timesteps": ("single", scheduler(num_train_timesteps=0), "num_train_timesteps"),
    "true timesteps": ("single", scheduler(num_train_timesteps=True), "num_train_timesteps"),
    "betas above one": ("single", scheduler(trained_betas=[0.5, 1.5]), r"betas\[1\]"),
    "many betas": ("single", scheduler(trained_betas=[0.5] * 100_001), "betas of shape"),
    "betas that are lists": ("single", scheduler(trained_betas=[[0.5], [0.5, 1]]), "betas"),
    "more labels than the network has": (
        "single",
        edit("flashddpm.json", num_classes=10**9),
        "num_classes",
    ),
    "a header larger than its cap": (
        "single",
        header(b" " * (MAX_HEADER + 1)),
        "its header claims",
    ),
    "a header of more than there is": (
        "single",
        content(f"unet/{WEIGHTS}", (1 << 20).to_bytes(8, "little") + b"{}"),
        "safetensors",
    ),
    "a header of many tensors": ("single", header(b"{" + NAMES + b"}"), "069999 is not expected"),
    "a header of impossible shapes": ("single", header(WIDE), "safetensors"),
    "bytes after the tensors": ("single", lambda root: append_to(root, WEIGHTS), "safetensors"),
    "weights that are NaN": (
        "single",
        weights(lambda state: state["conv_in.bias"][3:].fill_(torch.nan)),
        "conv_in.bias holds numbers that are not finite",
    ),
    "a wrong shape": (
        "single",
        weights(lambda state: state.update({"conv_in.bias": torch.zeros(5)})),
        r"conv_in.bias has shape \(5,\)",
    ),
    "a shard above": ("sharded", shard("../part-0.safetensors"), "plain name"),
    "a shard at the root": ("sharded", shard("/etc/passwd"), "plain name"),
    "a shard below": ("sharded", shard("a/part-0.safetensors"), "plain name"),
    "a shard of windows": ("sharded", shard("..\\part-0.safetensors"), "plain name"),
    "a shard with a null": ("sharded", shard("part-0\0.safetensors"), "plain name"),
    "a shard that is a pickle": ("sharded", shard("part.bin"), "plain name"),
    "a shard that is a number": ("sharded", shard(7), "plain name"),
    "a shard that is a list": ("sharded", shard(["part-0.safetensors"]), "plain name"),
    "a shard that is missing": ("sharded", shard("part-9.safetensors"), "is missing"),
    "a shard that is a link out": ("sharded", linked_shard, "link out of the folder"),
    "an index without a map": ("sharded", content(f"unet/{INDEX}", b"{}"), "weight_map"),
    "an index of many shards": (
        "sharded",
        content(
            f"unet/{INDEX}",
            json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(2000)}}).encode(),
        ),
        "names 2000 files",
    ),
    "a pickle that runs a command": (
        "pickled",
        pickled({"conv_in.bias": Touch(os.system, f"touch {EVIL}")}),
        "it asks for 'posix system'",
    ),
    "a pickle that opens a file": ("pickled", pickled(Touch(open, EVIL, "w")), "it asks for '"),
    "a pickle that evaluates": (
        "pickled",
        pickled(Touch(eval, "1")),
        "it asks for '__builtin__ eval'",
    ),
    "a pickle that takes memory": ("pickled", pickled(Touch(bytearray, 10**11)), "bytearray"),
    "a pickle without a zip": (
        "pickled",
        content(f"unet/{PICKLED}", pickle.dumps(Touch(os.system, f"touch {EVIL}"))),
        "does not end as a zip file",
    ),
    "a pickle of a list": ("pickled", pickled([torch.zeros(2)]), "opcode EMPTY_LIST"),
    "a pickle of a number": ("pickled", pickled({"a": 1}), "names and tensors only"),
    "a pickle of numbered tensors": ("pickled", pickled({1: torch.zeros(2)}), "names and tensors"),
    "a pickle of a whole module": (
        "pickled",
        pickled(torch.nn.Linear(1, 1)),
        "it asks for 'torch.nn",
    ),
    "a tensor that shows more than there is": (
        "pickled",
        pickled({"conv_in.bias": torch.zeros(1).expand(10**9)}),
        "must be contiguous",
    ),
    "a tensor that shows less than there is": (
        "pickled",
        pickled({"conv_in.bias": torch.arange(100.0)[:4]}),
        "all of its storage",
    ),
    "a tensor that is turned": (
        "pickled",
        pickled({"conv_in.bias": torch.zeros(2, 3).t()}),
        "must be contiguous",
    ),
    "a sparse tensor": (
        "pickled",
        pickled({"conv_in.bias": torch.eye(3).to_sparse()}),
        "it asks for 'torch._utils _rebuild_sparse",
    ),
    "a record that is short": (
        "pickled",
        lambda root: rezip(root, lambda name, data: data[:-4] if name == "data/0" else data),
        "state dict",
    ),
    "an archive that is compressed": (
        "pickled",
        lambda root: rezip(root, lambda _, data: data, zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "an archive with other files": (
        "pickled",
        lambda root: zipfile.ZipFile(root / "unet" / PICKLED, "a").writestr("x/run.py", ""),
        "'x/run.py' is not one of torch.save's",
    ),
    "an archive with an entry twice": ("pickled", twice, "twice"),
    "an archive of many entries": ("pickled", many_entries, "directory"),
    "an archive of two directories": ("pickled", two_directories, "two zip directories"),
    "an archive with bytes after it": (
        "pickled",
        lambda root: append_to(root, PICKLED),
        "does not end as a zip file",
    ),
    "a pickle that is long": ("pickled", program(b"\x80\x02" + b"N" * MAX_PICKLE), "at most"),
    "a pickle of a million constants": (
        "pickled",
        program(b"\x80\x02" + b"N" * (MAX_PICKLE - 3) + b"."),
        "state dict",
    ),
    "a tuple as deep as the stack": ("pickled", program(DEEP_TUPLE), "nests tuples"),
    "a tuple of shared tuples": ("pickled", program(SHARED_TUPLE), "one tuple in two places"),
    "a pickle that ends early": ("pickled", program(b"\x80\x02}q"), "state dict"),
    "a pickle that takes from nothing": ("pickled", program(b"\x80\x02\x86."), "pickle is broken"),
    "a pickle of no value": ("pickled", program(b"\x80\x02."), "state dict"),
}


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {
        str(f.relative_to(root)): f.read_bytes() if f.is_file() else None for f in root.rglob("*")
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A valid folder of each form."""
    return {form: make(tmp_path_factory.mktemp(form) / "model", form) for form in FORMS}


@pytest.fixture(scope="module")
def scratch(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies that the properties write to; each puts back what it changed."""
    root = tmp_path_factory.mktemp("scratch")
    return {form: Path(shutil.copytree(models[form], root / form)) for form in FORMS}


def judge(root: Path) -> Pretrained | None:
    """Load; what comes must be whole, a refusal must name a file, and nothing may be written."""
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


@pytest.mark.parametrize("form", FORMS)
def test_the_folders_that_are_broken_here_are_valid(models: dict[str, Path], form: str) -> None:
    assert judge(models[form]) is not None


@pytest.mark.timeout(60)  # to open a pipe would take forever
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_named_cases(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    form, change, message = CASES[case]
    monkeypatch.chdir(tmp_path)
    root = Path(shutil.copytree(models[form], tmp_path / "model"))
    change(root)
    with pytest.raises(CheckpointError) as raised:
        load(root)
    said = str(raised.value)
    assert said.startswith(f"{root}{os.sep}")
    assert re.search(message, said.removeprefix(str(root)))
    assert not list(tmp_path.rglob(EVIL))


# The same in a child, for what they cost and do


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
    for name, (form, change, _) in CASES.items():
        root = Path(shutil.copytree(models[form], Path(folder) / "case"))
        change(root)
        before, start = snapshot(Path(folder)), time.process_time()
        watching = True
        try:
            load(root)
            outcome = "loaded"
        except BaseException as error:
            outcome = type(error).__name__
        watching = False
        seconds = time.process_time() - start
        if snapshot(Path(folder)) != before:
            deeds.append("changed the folder")
        report[name] = [outcome, seconds, deeds[:]]
        deeds.clear()
        shutil.rmtree(root)
    json.dump(report, sys.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_named_cases_cost_little_and_do_nothing(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report.keys() == CASES.keys()
    assert {name: row[0] for name, row in report.items() if row[0] != "CheckpointError"} == {}
    assert {name: row[1] for name, row in report.items() if row[1] > SECONDS} == {}
    assert {name: row[2] for name, row in report.items() if row[2]} == {}


# Any change of any file


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 1e308])
WORDS = st.text(max_size=5) | st.sampled_from(
    [
        "../x.safetensors",
        "/etc/passwd",
        "UNet2DModel",
        "RMSUNet",
        "DDIMScheduler",
        "os.system",
        "v_prediction",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=60)
@given(content=st.binary(max_size=64) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_as_json(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(path), dict)
    except CheckpointError as error:
        assert str(path) in str(error)


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


@settings(max_examples=200)
@given(place=st.sampled_from(keys()), value=JSON)
def test_any_value_of_any_key(
    scratch: dict[str, Path], place: tuple[str, str, str], value: Any
) -> None:
    form, name, key = place
    path = scratch[form] / name
    with changed(path, json.dumps({**json.loads(path.read_text()), key: value}).encode()):
        judge(scratch[form])


@settings(max_examples=40)
@given(name=JSON)
def test_any_name_of_a_shard(scratch: dict[str, Path], name: Any) -> None:
    path = scratch["sharded"] / "unet" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["conv_in.bias"] = name
    with changed(path, json.dumps(index).encode()):
        assert judge(scratch["sharded"]) is None


FILES = [
    ("single", "unet/config.json"),
    ("single", "scheduler/scheduler_config.json"),
    ("single", "model_index.json"),
    ("single", "flashddpm.json"),
    ("single", f"unet/{WEIGHTS}"),
    ("sharded", f"unet/{INDEX}"),
    ("sharded", "unet/part-1.safetensors"),
    ("pickled", f"unet/{PICKLED}"),
]


def mangle(data: st.DataObject, content: bytes) -> bytes:
    """Cut, flip, overwrite, insert, remove, repeat."""
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


@settings(max_examples=150)
@given(place=st.sampled_from(FILES), data=st.data())
def test_any_change_of_any_file(
    scratch: dict[str, Path], place: tuple[str, str], data: st.DataObject
) -> None:
    form, name = place
    path = scratch[form] / name
    with changed(path, mangle(data, path.read_bytes())):
        judge(scratch[form])


@settings(max_examples=80)
@given(data=st.data())
def test_any_change_of_a_safetensors_header(scratch: dict[str, Path], data: st.DataObject) -> None:
    path = scratch["single"] / "unet" / WEIGHTS
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text = mangle(data, content[8:end])
    with changed(path, len(text).to_bytes(8, "little") + text + content[end:]):
        judge(scratch["single"])


@settings(max_examples=60)
@given(
    key=st.sampled_from(["conv_in.bias", "conv_out.weight", "other"]),
    shape=st.lists(st.integers(0, 5), max_size=5),
    dtype=st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X"]),
)
def test_any_shape_and_dtype(
    scratch: dict[str, Path], key: str, shape: list[int], dtype: str
) -> None:
    path = scratch["single"] / "unet" / WEIGHTS
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:end])
    head[key] = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
    at = 0
    for name, entry in head.items():  # move all tensors, so that there is no hole
        if name == "__metadata__":
            continue
        count = 1
        for side in entry["shape"]:
            count *= side
        size = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"], 1)
        entry["data_offsets"] = [at, at + count * size]
        at += count * size
    text = json.dumps(head).encode()
    valid = (key, shape) in (("conv_in.bias", [4]), ("conv_out.weight", [1, 4, 3, 3]))
    with changed(path, len(text).to_bytes(8, "little") + text + bytes(at)):
        assert (judge(scratch["single"]) is not None) == (
            valid and dtype in ("F32", "F64", "F16", "BF16")
        )


@settings(max_examples=120)
@given(data=st.data())
def test_any_change_of_a_pickle_in_its_archive(
    scratch: dict[str, Path], data: st.DataObject
) -> None:
    """The archive stays whole, so that the changed program is reached."""
    path = scratch["pickled"] / "unet" / PICKLED
    before = path.read_bytes()
    opcodes = st.lists(st.sampled_from(b").]}(tusbRQN\x85\x86\x87q\x00h\x00K\x01"), max_size=30)
    text = data.draw(st.none() | opcodes.map(lambda codes: b"\x80\x02" + bytes(codes) + b"."))
    with changed(path, before):
        rezip(
            scratch["pickled"],
            lambda name, old: (
                old if name != "data.pkl" else mangle(data, old) if text is None else text
            ),
        )
        judge(scratch["pickled"])


if __name__ == "__main__":
    main(sys.argv[1])
