"""Weights that are broken, do not match their config or overflow, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashddpm.checkpoints.model_folder import (
    WEIGHTS,
)
from flashddpm.errors import CheckpointError
from flashddpm.io.files import MAX_HEADER


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def header(text: bytes, body: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + body


WIDE = b'{"conv_in.bias": {"dtype": "F32", "shape": [%d, 0], "data_offsets": [0, 0]}}' % (2**64 - 1)
BROKEN_WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "is missing": lambda path: path.unlink(),
    "cannot be read as safetensors: Error while": lambda path: truncate(path, 0.9),
    "cannot be read as safetensors: Err": lambda path: truncate(path, 0),
    "cannot be read as safetensors: .*header": lambda path: path.write_bytes(b"\7" * 1000),
    "cannot be read as safetensors: its header claims": lambda path: path.write_bytes(
        header(b" " * (MAX_HEADER + 1))
    ),
    "cannot be read as safetensors: reshape": lambda path: path.write_bytes(header(WIDE)),
    "does not match config.json: .*is missing": lambda path: path.write_bytes(header(b"{}")),
}


@pytest.mark.parametrize("message", BROKEN_WEIGHTS)
def test_broken_weights_are_refused(folder: Path, message: str, load_network: Any) -> None:
    path = folder / "unet" / WEIGHTS
    BROKEN_WEIGHTS[message](path)
    with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
        load_network(folder)


def test_every_mismatch_is_listed(folder: Path, edit_weights: Any, load_network: Any) -> None:
    def edit(state: dict[str, Tensor]) -> None:
        del state["conv_in.bias"]
        state["extra.weight"] = torch.zeros(2)
        state["conv_out.weight"] = torch.zeros(1, 4, 3, 1)
        state["conv_out.bias"] = torch.zeros(1, dtype=torch.int64)
        state["conv_norm_out.bias"] = torch.zeros(4, dtype=torch.float8_e4m3fn)
        state["time_embedding.linear_1.bias"] = torch.full((16,), 1.0, dtype=torch.complex64)
        state["time_embedding.linear_1.weight"][3, 1] = torch.nan
        state["conv_norm_out.weight"][0] = torch.inf

    edit_weights(folder, edit)
    with pytest.raises(CheckpointError) as raised:
        load_network(folder)
    message = str(raised.value)
    assert message.startswith(f"{folder / 'unet' / WEIGHTS}: does not match config.json: ")
    assert sorted(message.split(": ", 2)[2].split("; ")) == [
        "conv_in.bias is missing",
        "conv_norm_out.bias holds torch.float8_e4m3fn, must hold floating-point numbers",
        "conv_norm_out.weight holds numbers that are not finite in torch.float32",
        "conv_out.bias holds torch.int64, must hold floating-point numbers",
        "conv_out.weight has shape (1, 4, 3, 1), must be (1, 4, 3, 3)",
        "extra.weight is not expected",
        "time_embedding.linear_1.bias holds torch.complex64, must hold floating-point numbers",
        "time_embedding.linear_1.weight holds numbers that are not finite in torch.float32",
    ]


def test_weights_that_overflow_in_the_dtype_asked_for_are_refused(
    folder: Path, edit_weights: Any, load_network: Any
) -> None:
    edit_weights(folder, lambda state: state["conv_in.bias"].fill_(1e5))
    assert load_network(folder).conv_in.bias[0] == 1e5
    with pytest.raises(CheckpointError, match=r"conv_in\.bias holds .* in torch.float16"):
        load_network(folder, torch.float16)
