from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashddpm import arguments


@pytest.mark.parametrize("value", ["a", "b"])
def test_one_of_takes(value: str) -> None:
    assert arguments.one_of("kind", value, ("a", "b")) == value


@pytest.mark.parametrize("value", ["c", "", "A", None, 1, ["a"], b"a"])
def test_one_of_refuses(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^kind=.*: must be one of a, b$") as raised:
        arguments.one_of("kind", value, ("a", "b"))
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("value", [1, 5, np.int64(3), np.uint8(1), torch.tensor(2)])
def test_integer_takes(value: Any) -> None:
    result = arguments.integer("n", value, 1, 5)
    assert type(result) is int and result == int(value)


@pytest.mark.parametrize(
    "value", [0, 6, True, False, 1.0, math.nan, "1", None, [1], np.float32(1), 10**30, -1]
)
def test_integer_refuses(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^n=.*in 1\.\.5$") as raised:
        arguments.integer("n", value, 1, 5)
    assert repr(value) in str(raised.value)


def test_integer_without_an_upper_limit() -> None:
    assert arguments.integer("n", 10**30, 1) == 10**30
    with pytest.raises(ValueError, match="^n=0: must be at least 1$"):
        arguments.integer("n", 0, 1)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.25), torch.tensor(1.0)])
def test_number_takes(value: Any) -> None:
    result = arguments.number("x", value, 0, 1)
    assert type(result) is float and result == float(value)


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.1, math.nan, math.inf, -math.inf, 10**400, True, "0.5", b"0.5", None, [0.5], 1j]
    + [torch.ones(2), torch.tensor(1j)],
)
def test_number_refuses(value: Any) -> None:
    with pytest.raises(ValueError, match="^x=.*: must be a .*number"):
        arguments.number("x", value, 0, 1)


def test_number_without_limits_is_finite() -> None:
    assert arguments.number("x", -1e300) == -1e300
    with pytest.raises(ValueError, match="^x=inf: must be a finite number$"):
        arguments.number("x", math.inf)


@pytest.mark.parametrize("value", [0, 1, "true", "", None, np.bool_(True)])
def test_boolean_takes_only_true_and_false(value: Any) -> None:
    assert arguments.boolean("flag", True) is True
    assert arguments.boolean("flag", False) is False
    with pytest.raises(ValueError, match="^flag=.*: must be true or false"):
        arguments.boolean("flag", value)


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        (5, [5]),
        (-1, [-1]),
        (2**64 - 1, [-1]),
        (2**63, [-(2**63)]),
        (2**63 - 1, [2**63 - 1]),
        (-(2**63), [-(2**63)]),
        (range(3), [0, 1, 2]),
        ((s for s in (1, 2)), [1, 2]),
        ([np.uint64(2**64 - 2)], [-2]),
        (np.array([7, 8]), [7, 8]),
        (torch.tensor([3, -4]), [3, -4]),
        (torch.tensor(9), [9]),
        (torch.tensor([2**63 + 1], dtype=torch.uint64), [1 - 2**63]),
    ],
)
def test_seed_list_takes(seeds: Any, expected: list[int]) -> None:
    assert arguments.seed_list(seeds) == expected


@given(st.integers(-(2**63), 2**64 - 1))
def test_a_seed_keeps_its_low_64_bits(seed: int) -> None:
    (result,) = arguments.seed_list([seed])
    assert -(2**63) <= result < 2**63
    assert (result - seed) % 2**64 == 0


@pytest.mark.parametrize(
    "seeds",
    [2**64, -(2**63) - 1, [], (), 1.0, [1, 2.0], "12", b"12", None, [None], True, [False], ["1"]]
    + [torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(0, dtype=torch.int64)]
    + [np.array(1.5), [[1]]],
)
def test_seed_list_refuses(seeds: Any) -> None:
    with pytest.raises(ValueError, match="^seeds"):
        arguments.seed_list(seeds)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, None),
        (2, [2, 2, 2]),
        ([0, 1, 2], [0, 1, 2]),
        (range(3), [0, 1, 2]),
        (np.array([2, 1, 0]), [2, 1, 0]),
        (torch.tensor([2, 1, 0]), [2, 1, 0]),
        (torch.tensor(1), [1, 1, 1]),
    ],
)
def test_label_list_takes(labels: Any, expected: list[int] | None) -> None:
    assert arguments.label_list(labels, 3, 3) == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (3, r"labels=3: must be in 0\.\.2"),
        (-1, r"labels=-1: must be in 0\.\.2"),
        ([0, 1, 3], "labels=3"),
        ([0, 1], "labels: 2 labels for 3 seeds"),
        ([0, 1, 2, 0], "labels: 4 labels for 3 seeds"),
        (torch.tensor([0, 1]), "labels: 2 labels for 3 seeds"),
        (1.0, "labels=1.0: must be an integer"),
        ([0, None, 1], "labels=None"),
        (True, "labels=True"),
        (torch.ones(3), "labels=1.0"),
        (torch.ones(3, dtype=torch.bool), "labels=True"),
        ("012", "labels='0'"),
    ],
)
def test_label_list_refuses(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        arguments.label_list(labels, 3, 3)


def test_an_unconditional_model_takes_no_labels() -> None:
    assert arguments.label_list(None, 3, None) is None
    with pytest.raises(ValueError, match=r"^labels=\[0\]: this model is unconditional"):
        arguments.label_list([0], 1, None)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = arguments.resolve_device
    assert resolve("cpu") == resolve(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto") == torch.device("cpu")
    for device in ("cuda", "cuda:0", torch.device("cuda", 1)):
        with pytest.raises(ValueError, match="^device='cuda.*: no CUDA device is available"):
            resolve(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve("auto") == resolve("cuda") == torch.device("cuda", 1)  # in any thread
    assert resolve("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"^device='cuda:2': only 2 CUDA device\(s\)"):
        resolve("cuda:2")


@pytest.mark.parametrize(
    "device", ["gpu", "", "meta", "mps", "xpu:0", "cuda:x", "cuda:-1", "AUTO", None, 1.5]
)
def test_unknown_devices_are_refused(device: Any) -> None:
    with pytest.raises(ValueError, match=f"^device='{device}': must be auto, cpu, cuda or cuda:N"):
        arguments.resolve_device(device)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtypes(name: str) -> None:
    dtype = getattr(torch, name)
    for value in (name, f"torch.{name}", dtype):
        assert arguments.resolve_dtype(value, torch.float64) is dtype
    assert arguments.resolve_dtype(None, dtype) is dtype


@pytest.mark.parametrize("dtype", ["float64", torch.int8, torch.float64, "half", "", 16])
def test_unknown_dtypes_are_refused(dtype: Any) -> None:
    message = "^dtype='.*': must be one of float32, bfloat16, float16"
    with pytest.raises(ValueError, match=message):
        arguments.resolve_dtype(dtype, torch.float32)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children),
    max_leaves=4,
)
CHECKS: dict[str, Callable[[Any], Any]] = {
    "one_of": lambda value: arguments.one_of("name", value, ("a",)),
    "integer": lambda value: arguments.integer("name", value, 0, 9),
    "number": lambda value: arguments.number("name", value),
    "boolean": lambda value: arguments.boolean("name", value),
    "seed_list": arguments.seed_list,
    "label_list": lambda value: arguments.label_list(value, 2, 3),
    "resolve_device": arguments.resolve_device,
    "resolve_dtype": lambda value: arguments.resolve_dtype(value, torch.float32),
}


@pytest.mark.parametrize("check", CHECKS)
@given(value=ANYTHING)
def test_anything_is_taken_or_refused_with_a_value_error(check: str, value: Any) -> None:
    try:
        CHECKS[check](value)
    except ValueError as error:
        assert len(str(error)) > 10
