"""Validation of arguments: each check returns the value in its normal form, or raises.

Every error is a ValueError whose text has the argument's name, its value and what is allowed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor


def one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """Return ``value`` if it is one of the allowed strings.

    Args:
        name: the name of the argument, for the error's text.
        value: the argument.
        allowed: the strings that it may be.

    Raises:
        ValueError: if the value is no string, or not one of ``allowed``.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    return value


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int in [low, high].

    Args:
        name: the name of the argument, for the error's text.
        value: an int, a NumPy integer or any other object with ``__index__``, but no bool.
        low: the smallest number allowed.
        high: the largest number allowed; None for no limit.

    Raises:
        ValueError: if the value is a bool, a float or no number, or is outside of the limits.
    """
    limits = f"at least {low}" if high is None else f"in {low}..{high}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: must be an integer {limits}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}={number}: must be {limits}")
    return number


def boolean(name: str, value: Any) -> bool:
    """Return ``value`` if it is a Python bool, True or False.

    Args:
        name: the name of the argument, for the error's text.
        value: the argument.

    Raises:
        ValueError: if it is anything else, 0, 1, strings and NumPy's booleans included.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be true or false")
    return value


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Return ``value`` as a finite float in [low, high].

    Args:
        name: the name of the argument, for the error's text.
        value: a number that ``float`` takes, but no bool, str or bytes.
        low: the smallest number allowed; -inf for no limit.
        high: the largest number allowed; inf for no limit.

    Raises:
        ValueError: if the value is no number, NaN or infinite, or outside of the limits.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{name}={value!r}: must be a number") from None
    if not math.isfinite(result) or not low <= result <= high:
        limits = f" in [{low:g}, {high:g}]" if high < math.inf else f" of at least {low:g}"
        if low == -math.inf:
            limits = ""
        raise ValueError(f"{name}={value!r}: must be a finite number{limits}")
    return result


def seed_list(seeds: int | Iterable[int] | Tensor) -> list[int]:
    """Return seeds as a list of signed 64-bit ints, at least one.

    Args:
        seeds: one integer, several, or a tensor of integers of any shape, which is flattened. Each
            is in [-2^63, 2^64); one of 2^63 or more becomes the negative number with the same 64
            bits.

    Raises:
        ValueError: if there is no seed, if one is a bool or no integer or out of that range, or if
            a tensor is not of an integer dtype.
    """
    if isinstance(seeds, Tensor):
        if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype is torch.bool:
            raise ValueError(f"seeds={seeds.dtype} tensor: must hold 64-bit integers")
        seeds = seeds.reshape(-1).tolist()
    if isinstance(seeds, (str, bytes)):
        raise ValueError(f"seeds={seeds!r}: must be integers in [-2^63, 2^64)")
    try:
        items = [seeds] if not isinstance(seeds, Iterable) else list(seeds)
    except TypeError:
        raise ValueError(f"seeds={seeds!r}: must be integers in [-2^63, 2^64)") from None
    if not items:
        raise ValueError("seeds=[]: must name at least one seed")
    result = []
    for item in items:
        try:
            if isinstance(item, bool):
                raise TypeError
            value = operator.index(item)
        except TypeError:
            raise ValueError(f"seeds: {item!r} is not an integer in [-2^63, 2^64)") from None
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"seeds: {value} is not in [-2^63, 2^64)")
        result.append(value - 2**64 if value >= 2**63 else value)
    return result


def label_list(
    labels: int | Iterable[int] | Tensor | None, count: int, num_classes: int | None
) -> list[int] | None:
    """Return one class label for each of ``count`` images, or None for no labels.

    Args:
        labels: one label for all images, one for each of them (a sequence, an array or a tensor of
            integers; no bools), or None.
        count: the number of images.
        num_classes: the number of classes of the model; None for an unconditional model.

    Raises:
        ValueError: if labels are given for an unconditional model, if there are not as many of them
            as images, or if one is no integer in 0..num_classes-1.
    """
    if labels is None:
        return None
    if num_classes is None:
        raise ValueError(f"labels={labels!r}: this model is unconditional and takes no labels")
    if hasattr(labels, "tolist"):  # tensors, arrays and NumPy's numbers
        labels = labels.tolist()
    items = list(labels) if isinstance(labels, Iterable) else [labels] * count
    if len(items) != count:
        raise ValueError(
            f"labels: {len(items)} labels for {count} seeds; give one each, or one for all"
        )
    return [integer("labels", item, 0, num_classes - 1) for item in items]


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the torch.device that a string or device names, a CUDA device always with its number.

    Args:
        device: "auto" (CUDA where there is a GPU, else the CPU), "cpu", "cuda" or "cuda:N", in
            lower case, or a torch.device. A CUDA device without a number becomes this thread's
            current one, since other threads may have another.

    Raises:
        ValueError: if the device is of another kind, or there is no GPU of that number.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = torch.device(device)
    except (RuntimeError, TypeError):
        result = None
    if result is None or result.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: must be auto, cpu, cuda or cuda:N")
    if result.type == "cuda":
        available = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if available == 0:
            raise ValueError(
                f"device={str(device)!r}: no CUDA device is available; use cpu or auto"
            )
        if (result.index or 0) >= available:
            raise ValueError(f"device={str(device)!r}: only {available} CUDA device(s) available")
        if result.index is None:
            result = torch.device("cuda", torch.cuda.current_device())
    return result


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """Return the torch.dtype of the network: float32, bfloat16 or float16.

    Args:
        dtype: the dtype, its name in lower case with or without "torch.", or None for ``default``.
        default: the dtype that is returned for None, unchecked.

    Raises:
        ValueError: if it is another dtype, or no dtype.
    """
    if dtype is None:
        return default
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    return DTYPES[one_of("dtype", str(dtype).removeprefix("torch."), DTYPES)]
