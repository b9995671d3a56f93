"""State dicts: a check, key by key, that one has the weights of a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes in which weights may be stored."""


def mismatches(
    unet: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> list[str]:
    """Return the reasons why a state dict is not this network's, a list of texts; [] if it is.

    Args:
        unet: the network, of which only keys and shapes are read, and the dtype if none is given.
        state: tensors by name, which must have the network's keys and shapes, be of float64,
            float32, bfloat16 or float16, and hold finite numbers.
        dtype: the dtype in which all numbers must be finite; None for that of the network's first
            parameter.
    """
    dtype = dtype or next(unet.parameters()).dtype
    expected = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    wrong = [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is not expected" for key in state if key not in expected]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, must be {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    for key, value in state.items():
        if value.dtype not in STORED:
            wrong.append(f"{key} holds {value.dtype}, must hold floating-point numbers")
        elif not bool(value.to(dtype).isfinite().all()):
            wrong.append(f"{key} holds numbers that are not finite in {dtype}")
    return wrong
