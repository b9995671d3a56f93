"""Folders and repositories of diffusers: pickles, shards and old names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from flashddpm.checkpoints.weights import INDEX, PICKLED, WEIGHTS
from flashddpm.diffusion.scheduler_config import SamplingDefaults
from flashddpm.errors import CheckpointError


def test_published_repositories_load_as_in_diffusers(
    published: Path, load: Any, assert_same_network: Any, their_unet: Any
) -> None:
    ours = load(published, allow_pickle=True)
    assert ours.shape == (3, 8, 8)
    assert ours.defaults == SamplingDefaults(variance_type="fixed_large")
    assert ours.prediction_type == "epsilon"
    theirs = diffusers.DDPMPipeline.from_pretrained(published, low_cpu_mem_usage=False)
    assert_same_network(ours.unet, theirs.unet)
    assert_same_network(ours.unet, their_unet())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_pickles_that_diffusers_saves(
    tmp_path: Path, dtype: torch.dtype, assert_same_network: Any, load: Any, their_unet: Any
) -> None:
    pipeline = diffusers.DDPMPipeline(their_unet().to(dtype), diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / PICKLED).exists()
    unet = load(tmp_path, allow_pickle=True).unet
    assert unet.conv_in.weight.equal(pipeline.unet.conv_in.weight.float())
    assert_same_network(unet, pipeline.unet.float())


def test_pickles_need_a_torch_that_reads_them_safely(
    published: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    for version, refused in (("2.9.1", True), ("2.10.0", False), ("2.10.0+cpu", False)):
        monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
        if refused:
            with pytest.raises(CheckpointError, match="needs torch 2.10 or newer.*not 2.9.1"):
                load(published, allow_pickle=True)
        else:
            load(published, allow_pickle=True)


def test_pickles_are_read_only_when_asked_for(
    published: Path, load: Any, assert_same_network: Any, their_unet: Any
) -> None:
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


def test_attention_under_both_names_is_refused(diffusers_folder: Path, load: Any) -> None:
    import safetensors.torch

    path = diffusers_folder / "unet" / WEIGHTS
    state = safetensors.torch.load(path.read_bytes())
    state["mid_block.attentions.0.query.weight"] = torch.zeros(16, 16)
    path.write_bytes(safetensors.torch.save(state))
    with pytest.raises(CheckpointError, match=rf"^{path}: holds mid.*to_q\.weight under its old"):
        load(diffusers_folder)


def test_sharded_weights(
    sharded: Path, assert_same_network: Any, their_unet: Any, load: Any
) -> None:
    assert_same_network(load(sharded).unet, their_unet())


def test_shards_that_the_index_does_not_describe(sharded: Path, load: Any) -> None:
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
