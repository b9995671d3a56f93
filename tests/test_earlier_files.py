"""What earlier versions wrote is read, and gone on from, with the results that it had there.

tests/earlier/make.py made a folder a version. The last bits depend on the processor, so numbers are
compared to 1e-4 of themselves and pixels to one level of 255.
"""

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).parent
HALFWAY = runpy.run_path(str(HERE / "same_bits" / "halfway.py"), run_name="halfway")
FOLDERS = sorted(path.parent for path in HERE.glob("earlier/*/expected.safetensors"))
PARTS = {part.__name__: part for part in HALFWAY["CONTINUED"]}

Found = dict[str, Any]


def test_there_are_files_of_earlier_versions() -> None:
    assert FOLDERS


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def earlier(request, tmp_path, monkeypatch) -> dict[str, Found]:
    """What followed by part in the version whose files, copied, are in the current folder."""
    monkeypatch.chdir(shutil.copytree(request.param, tmp_path / "earlier"))
    monkeypatch.setattr(os, "fsync", lambda number: None)  # a slow disk is not what is tested
    expected: dict[str, Found] = {name: {} for name in PARTS}
    with safe_open("expected.safetensors", "pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()} | file.metadata()
    for name, value in values.items():
        part, _, rest = name.partition(" ")
        expected[part][rest] = value
    return expected


def go_on(part: str, earlier: dict[str, Found]) -> tuple[Found, Found]:
    """Go on from a part; return what was found and what was expected, the tensors being close."""
    found, expected = dict(PARTS[part]()), earlier[part]
    for name, value in expected.items():
        assert name in found, f"{name}: is missing"
        if isinstance(value, Tensor):
            actual = found[name]
            assert (actual.dtype, actual.shape) == (value.dtype, value.shape), name
            if value.dtype is torch.uint8:
                assert int((actual.int() - value.int()).abs().max()) <= 1, name
            else:
                torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-4)
    return found, expected


def test_a_model_draws_what_it_drew(earlier) -> None:
    found, _ = go_on("model", earlier)
    assert found["images"].shape == (3, 1, 8, 8)


def test_trajectories_end_where_they_did(earlier) -> None:
    found, expected = go_on("trajectories", earlier)
    positions = [name for name in expected if name.endswith("position")]
    assert len(positions) == 2
    assert [found[name] for name in positions] == ["3 of 6"] * 2


def test_a_run_is_resumed_to_the_same_weights(earlier) -> None:
    found, expected = go_on("run", earlier)
    assert any("unet" in name for name in expected)
    metrics, known = (
        [json.loads(line) for line in part["run/metrics.jsonl"].splitlines()]
        for part in (found, expected)
    )
    assert [line["step"] for line in metrics] == [3, 5]
    losses, rates = ([line[key] for line in metrics] for key in ("loss", "learning_rate"))
    assert losses == pytest.approx([line["loss"] for line in known], rel=1e-4)
    assert rates == [line["learning_rate"] for line in known]
    for name in expected:
        if name.endswith(".json"):
            assert json.loads(found[name]) == json.loads(expected[name]), name
    with safe_open("run/states/000000005.safetensors", "pt") as file:
        assert file.metadata()["step"] == "5"


def test_a_folder_of_samples_is_completed(earlier) -> None:
    drawn = {path.name: path.read_bytes() for path in Path("samples").glob("*.png")}
    found, expected = go_on("samples", earlier)
    assert sorted(drawn) == ["0.png", "1.png"]
    assert {f"samples/{i}.png" for i in range(4)} < expected.keys()
    assert all(Path("samples", name).read_bytes() == old for name, old in drawn.items())
    manifest, known = (json.loads(part["samples/manifest.json"]) for part in (found, expected))
    for key in ("format", "complete", "settings", "images"):
        assert manifest[key] == known[key], key


def test_an_evaluation_is_repeated_with_the_features_that_were_kept(earlier) -> None:
    written = json.loads(Path("report/report.json").read_text())
    found, expected = go_on("evaluation", earlier)
    assert found["features are read"] == expected["features are read"] == "True"
    report = json.loads(found["report/report.json"])
    assert report.keys() == written.keys()
    for key in ("format", "model", "data", "reference", "features"):
        assert report[key] == written[key], key
    numbers = (("bound", "total"), ("frechet", "distance"), ("kernel", "mean"))
    for (part, key), rel in zip(numbers, (1e-4, 1e-2, 1e-2), strict=True):
        assert report[part][key] == pytest.approx(written[part][key], rel=rel), part
    assert report["neighbours"]["median"] == pytest.approx(written["neighbours"]["median"], abs=1)


def test_benchmark_results_are_read(earlier) -> None:
    command, results = HALFWAY["command"], json.loads(Path("benchmark.json").read_text())["results"]
    table = command("bench", "--report", "benchmark.json")
    assert results
    for result in results:
        assert f"| {result['case']} |" in table and f"{result['values']['ratio']:.2f}" in table
    command("bench", "--compare", "benchmark.json", "benchmark.json")
    command("bench", "--merge", "benchmark.json", "benchmark.json", "--out", "merged.json")
    assert json.loads(Path("merged.json").read_text())["results"] == results
