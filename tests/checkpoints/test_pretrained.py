from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from flashddpm.checkpoints import hub
from flashddpm.checkpoints.model_folder import load_scheduler_config
from flashddpm.checkpoints.pretrained import (
    Pretrained,
    load_diffusers,
    load_pretrained,
    save_pretrained,
    scheduler_config,
)
from flashddpm.checkpoints.weights import INDEX, LEGACY, PICKLED, WEIGHTS
from flashddpm.diffusion.schedule import NoiseSchedule
from flashddpm.diffusion.scheduler_config import SCHEDULERS, SamplingDefaults
from flashddpm.errors import CheckpointError
from flashddpm.networks.conditioning import Conditioning

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}


def their_unet(seed: int = 0, **changes: Any) -> diffusers.UNet2DModel:
    unet = diffusers.UNet2DModel(**SETTINGS | changes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return unet


def load(source: Any, **options: Any) -> Pretrained:
    return load_pretrained(source, CPU, torch.float32, **options)


def assert_same_network(ours: Any, theirs: Any, labels: Tensor | None = None) -> None:
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    x, t = torch.randn(2, 3, 8, 8, dtype=theirs.dtype), torch.tensor([3, 998])
    expected = theirs(x, t, class_labels=labels).sample
    tolerance = 1e-5 if theirs.dtype is torch.float32 else 0.1
    torch.testing.assert_close(ours(x, t, labels), expected, rtol=tolerance, atol=tolerance)


def pictures(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline(2, generator, num_inference_steps=3, output_type="np").images


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A flat repository with the files, keys and names of 2022, as google/ddpm-* are."""
    root = tmp_path / "published"
    root.mkdir()
    state = {}
    for key, value in their_unet().state_dict().items():
        for old, new in LEGACY.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = value
    assert "mid_block.attentions.0.proj_attn.bias" in state and not any("to_q" in k for k in state)
    torch.save(state, root / PICKLED)
    note = {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}
    (root / "config.json").write_text(json.dumps(note | SETTINGS))
    (root / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "DDPMScheduler",
                "_diffusers_version": "0.1.1",
                "beta_end": 0.02,
                "beta_schedule": "linear",
                "beta_start": 0.0001,
                "clip_sample": True,
                "num_train_timesteps": 1000,
                "trained_betas": None,
                "variance_type": "fixed_large",
            }
        )
    )
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.1.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What diffusers saves."""
    root = tmp_path / "folder"
    diffusers.DDPMPipeline(their_unet(), diffusers.DDPMScheduler()).save_pretrained(root)
    return root


# Folders


def test_published_repositories_load_as_in_diffusers(published: Path) -> None:
    ours = load(published, allow_pickle=True)
    assert ours.shape == (3, 8, 8)
    assert ours.defaults == SamplingDefaults(variance_type="fixed_large")
    assert ours.prediction_type == "epsilon"
    theirs = diffusers.DDPMPipeline.from_pretrained(published, low_cpu_mem_usage=False)
    assert_same_network(ours.unet, theirs.unet)
    assert_same_network(ours.unet, their_unet())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_pickles_that_diffusers_saves(tmp_path: Path, dtype: torch.dtype) -> None:
    pipeline = diffusers.DDPMPipeline(their_unet().to(dtype), diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / PICKLED).exists()
    unet = load(tmp_path, allow_pickle=True).unet
    assert unet.conv_in.weight.equal(pipeline.unet.conv_in.weight.float())
    assert_same_network(unet, pipeline.unet.float())


def test_pickles_need_a_torch_that_reads_them_safely(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, refused in (("2.9.1", True), ("2.10.0", False), ("2.10.0+cpu", False)):
        monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
        if refused:
            with pytest.raises(CheckpointError, match="needs torch 2.10 or newer.*not 2.9.1"):
                load(published, allow_pickle=True)
        else:
            load(published, allow_pickle=True)


def test_pickles_are_read_only_when_asked_for(published: Path) -> None:
    refusal = rf"^{published / PICKLED}: is a pickle.*pass allow_pickle=True"
    with pytest.raises(CheckpointError, match=refusal):
        load(published)
    with pytest.raises(ValueError, match="^allow_pickle='yes'"):
        load(published, allow_pickle="yes")
    with pytest.raises(ValueError, match="^source=5: must be a folder"):
        load(5)
    (published / PICKLED).write_bytes(b"no pickle")
    their_unet(seed=1).save_pretrained(published)
    for allow_pickle in (False, True):
        ours = load(published, allow_pickle=allow_pickle)
        assert_same_network(ours.unet, their_unet(seed=1))


def test_attention_under_both_names_is_refused(folder: Path) -> None:
    import safetensors.torch

    path = folder / "unet" / WEIGHTS
    state = safetensors.torch.load(path.read_bytes())
    state["mid_block.attentions.0.query.weight"] = torch.zeros(16, 16)
    path.write_bytes(safetensors.torch.save(state))
    with pytest.raises(CheckpointError, match=rf"^{path}: holds mid.*to_q\.weight under its old"):
        load(folder)


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "unet" / WEIGHTS).unlink()
    their_unet().save_pretrained(folder / "unet", max_shard_size="20KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    return folder


def test_sharded_weights(sharded: Path) -> None:
    assert_same_network(load(sharded).unet, their_unet())


def test_shards_that_the_index_does_not_describe(sharded: Path) -> None:
    index = sharded / "unet" / INDEX
    value = json.loads(index.read_text())
    names = value["weight_map"]
    first, second = sorted(set(names.values()))[:2]
    moved = next(key for key, name in names.items() if name == first)
    names[moved] = second
    names["extra"] = second
    del names["conv_out.bias"]
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError) as raised:
        load(sharded)
    message = str(raised.value)
    assert message.startswith(f"{index}: does not match its shards: ")
    assert f"{first} holds {moved}, which is not said" in message
    assert "holds conv_out.bias, which is not said" in message
    assert f"{second} does not hold extra" in message


# The hub


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
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(published, tmp_path / "cache")
    fake_hub(monkeypatch, cache.download)
    with pytest.raises(CheckpointError, match="^google/ddpm: .*allow_pickle=True"):
        load("google/ddpm")
    assert not list((tmp_path / "cache").rglob("*.bin"))
    assert_same_network(load("google/ddpm", allow_pickle=True).unet, their_unet())


def test_failures_of_the_hub_are_checkpoint_errors(monkeypatch: pytest.MonkeyPatch) -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    fake_hub(monkeypatch, lambda *names, **_: asked.append(names))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder|is missing"):
        load(source)
    assert asked == []


def test_a_folder_of_that_name_is_preferred(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert hub.REPOSITORY.fullmatch(name)
    assert_same_network(load(name).unet, their_unet())


# Live objects


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("pipeline", "scheduler"),
    [("DDPMPipeline", name) for name in SCHEDULERS] + [("DDIMPipeline", "DDPMScheduler")],
)
def test_live_pipelines(pipeline: str, scheduler: str, dtype: torch.dtype) -> None:
    theirs = getattr(diffusers, pipeline)(
        their_unet().to(dtype), getattr(diffusers, scheduler)(300, 1e-3, 0.03)
    )
    ours = load_diffusers(theirs)
    assert_same_network(ours.unet, theirs.unet)
    assert ours.unet.conv_in.weight.dtype is dtype
    assert not ours.unet.training
    name = "DDIMScheduler" if pipeline == "DDIMPipeline" else scheduler
    assert ours.scheduler["_class_name"] == name
    assert ours.defaults.solver == SCHEDULERS[name]
    np.testing.assert_allclose(ours.schedule.betas, theirs.scheduler.betas.numpy(), rtol=1e-5)
    assert (ours.shape, ours.conditioning) == ((3, 8, 8), Conditioning())


def test_live_and_saved_say_the_same(tmp_path: Path) -> None:
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


def test_a_bare_unet_needs_a_scheduler() -> None:
    unet = their_unet(num_class_embeds=5)
    with pytest.raises(ValueError, match="^scheduler=None: must be given"):
        load_diffusers(unet)
    ours = load_diffusers(unet, diffusers.DDIMScheduler())
    assert_same_network(ours.unet, unet, torch.tensor([4, 0]))
    assert ours.conditioning == Conditioning(5)
    labels = Conditioning(4, 4)
    assert load_diffusers(unet, diffusers.DDIMScheduler(), labels).conditioning == labels


def test_a_scheduler_takes_the_place_of_the_pipelines() -> None:
    pipeline = diffusers.DDPMPipeline(their_unet(), diffusers.DDPMScheduler())
    ours = load_diffusers(pipeline, diffusers.DPMSolverMultistepScheduler())
    assert ours.defaults.solver == "dpmpp_2m"


def test_a_compiled_unet_is_unwrapped() -> None:
    unet = their_unet()
    compiled = torch.compile(unet)
    assert_same_network(load_diffusers(compiled, diffusers.DDPMScheduler()).unet, unet)


def test_the_weights_are_copies() -> None:
    theirs = their_unet()
    ours = load_diffusers(theirs, diffusers.DDPMScheduler())
    for parameter in theirs.parameters():
        parameter.zero_()
    assert_same_network(ours.unet, their_unet())


def test_live_objects_of_other_kinds_are_refused() -> None:
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
        (Mine(**SETTINGS), good, "^model='Mine'"),
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


# Saving


def settings(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds of it: all but diffusers' note of what nobody has set."""
    return {key: value for key, value in scheduler.items() if key != "_use_default_values"}


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_loaded_and_saved_is_the_same_to_diffusers(tmp_path: Path, scheduler: str) -> None:
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


def test_saving_over_the_loaded_folder(sharded: Path, published: Path) -> None:
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
    sharded: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    defaults: SamplingDefaults, tmp_path: Path, tiny_unet: Any
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
