"""Names on the hub: what is downloaded, when, and what is said where it cannot be."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from flashddpm.checkpoints import hub
from flashddpm.checkpoints.weights import INDEX, PICKLED
from flashddpm.errors import CheckpointError


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., Any]) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


class Cache:
    """A hub of one repository; downloads are links from snapshots/REVISION to blobs."""

    def __init__(self, repository: Path, root: Path) -> None:
        self.repository, self.root = repository, root
        self.calls: list[tuple[str, str | None]] = []

    def download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((repository, revision))
        for file in self.repository.rglob("*"):
            name = file.relative_to(self.repository)
            if file.is_file() and any(fnmatch(str(name), p) for p in allow_patterns):
                blob = self.root / "blobs" / str(abs(hash(str(name))))
                blob.parent.mkdir(exist_ok=True, parents=True)
                shutil.copy(file, blob)
                link = self.root / "snapshots" / "abc" / name
                link.parent.mkdir(exist_ok=True, parents=True)
                link.unlink(missing_ok=True)
                link.symlink_to(blob)
        return str(self.root / "snapshots" / "abc")


def test_names_on_the_hub_are_downloaded(
    sharded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    load: Any,
    assert_same_network: Any,
    their_unet: Any,
) -> None:
    cache = Cache(sharded, tmp_path / "cache")
    (sharded / "unet" / PICKLED).write_bytes(b"large")
    (sharded / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"large")
    (sharded / "run.py").write_text("")
    fake_hub(monkeypatch, cache.download)
    ours = load("google/ddpm-cifar10-32", revision="main")
    assert_same_network(ours.unet, their_unet())
    assert cache.calls == [("google/ddpm-cifar10-32", "main")]
    got = {f.name for f in (tmp_path / "cache" / "snapshots").rglob("*") if f.is_file()}
    shards = {f.name for f in sharded.rglob("*-of-*.safetensors")}
    configs = {"model_index.json", "config.json", "scheduler_config.json"}
    assert got == {INDEX} | shards | configs


def test_pickles_on_the_hub_are_downloaded_only_when_asked_for(
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_network: Any,
    load: Any,
    their_unet: Any,
) -> None:
    cache = Cache(published, tmp_path / "cache")
    fake_hub(monkeypatch, cache.download)
    with pytest.raises(CheckpointError, match="^google/ddpm: .*allow_pickle=True"):
        load("google/ddpm")
    assert not list((tmp_path / "cache").rglob("*.bin"))
    assert_same_network(load("google/ddpm", allow_pickle=True).unet, their_unet())


def test_failures_of_the_hub_are_checkpoint_errors(
    monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    fake_hub(monkeypatch, offline)
    message = "^a/b: no such folder, and it cannot be downloaded.*: ConnectionError: no network"
    with pytest.raises(CheckpointError, match=message):
        load("a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="^a/b: no such folder.*pip install huggingface_hub"):
        load("a/b")


def test_the_real_hub_client_says_that_it_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="^flashddpm-tests/none: no such folder, and it"):
        load("flashddpm-tests/none")


@pytest.mark.parametrize(
    "source", ["nowhere", "a/b/c", "./a", "/a/b", "../x", "a/..", Path("a/b"), "a\0/b", "", "-a/b"]
)
def test_other_names_are_folders_only(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    asked: list[Any] = []
    fake_hub(monkeypatch, lambda *names, **_: asked.append(names))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder|is missing"):
        load(source)
    assert asked == []


def test_a_folder_of_that_name_is_preferred(
    diffusers_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_network: Any,
    their_unet: Any,
    load: Any,
) -> None:
    monkeypatch.chdir(diffusers_folder.parent.parent)
    name = f"{diffusers_folder.parent.name}/{diffusers_folder.name}"
    assert hub.REPOSITORY.fullmatch(name)
    assert_same_network(load(name).unet, their_unet())
