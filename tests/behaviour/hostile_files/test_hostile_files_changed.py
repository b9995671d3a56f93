"""Any bytes, any value of any key, and any change of any file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.checkpoints.weights import INDEX, PICKLED, WEIGHTS
from flashddpm.errors import CheckpointError
from flashddpm.io.files import read_json

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


@settings(max_examples=200)
@given(data=st.data(), value=JSON)
def test_any_value_of_any_key(
    scratch: dict[str, Path],
    keys: list[tuple[str, str, str]],
    data: st.DataObject,
    value: Any,
    changed: Any,
    judge: Any,
) -> None:
    form, name, key = data.draw(st.sampled_from(keys))
    path = scratch[form] / name
    with changed(path, json.dumps({**json.loads(path.read_text()), key: value}).encode()):
        judge(scratch[form])


@settings(max_examples=40)
@given(name=JSON)
def test_any_name_of_a_shard(scratch: dict[str, Path], name: Any, changed: Any, judge: Any) -> None:
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


@settings(max_examples=150)
@given(place=st.sampled_from(FILES), data=st.data())
def test_any_change_of_any_file(
    scratch: dict[str, Path],
    place: tuple[str, str],
    data: st.DataObject,
    changed: Any,
    judge: Any,
    mangle: Any,
) -> None:
    form, name = place
    path = scratch[form] / name
    with changed(path, mangle(data, path.read_bytes())):
        judge(scratch[form])


@settings(max_examples=80)
@given(data=st.data())
def test_any_change_of_a_safetensors_header(
    scratch: dict[str, Path], data: st.DataObject, mangle: Any, changed: Any, judge: Any
) -> None:
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
    scratch: dict[str, Path], key: str, shape: list[int], dtype: str, changed: Any, judge: Any
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
