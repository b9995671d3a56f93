"""The strategies really produce what their names say, and layouts keep the values."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, given, settings

from flashddpm.kernels import Column
from flashddpm.testing import strategies
from flashddpm.testing.strategies import LAYOUTS, layouts_of


def drawn(strategy, examples=300) -> list:
    """Return what a strategy produces, the same in every run."""
    found = []

    @settings(max_examples=examples, derandomize=True, database=None, phases=[Phase.generate])
    @given(strategy)
    def collect(value):
        found.append(value)

    collect()
    return found


def test_shapes_of_images():
    shapes = drawn(strategies.shapes(block=64))
    elements = {math.prod(shape) for shape in shapes}
    assert {0, 1, 2, 3, 5, 7, 11, 63, 64, 65} <= elements
    assert {shape[0] for shape in shapes} == {1, 3}
    assert {(17, 17), (8, 8)} <= {shape[1:] for shape in shapes}
    assert any(h != w and 1 < min(h, w) for _, h, w in shapes)
    assert {shape[0] for shape in drawn(strategies.shapes(channels=[2, 4]))} == {2, 4}


def test_shapes_of_vectors_and_planes():
    assert {(0,), (1,), (2,), (127,), (1023,), (1024,), (1025,)} <= set(drawn(strategies.shapes(1)))
    planes = drawn(strategies.shapes(2, block=256))
    assert {len(shape) for shape in planes} == {2} and {(17, 17), (16, 16)} <= set(planes)
    with pytest.raises(ValueError, match="^dims=4"):
        strategies.shapes(4)


def test_dtypes_and_batches():
    assert set(drawn(strategies.dtypes(), 60)) == {torch.float32, torch.float16, torch.bfloat16}
    assert set(drawn(strategies.dtypes([torch.int64]), 5)) == {torch.int64}
    assert set(drawn(strategies.batches(3), 60)) == {1, 2, 3}


@pytest.mark.parametrize("strategy", [strategies.seeds(), strategies.noise_keys()])
def test_seeds_and_keys_cover_64_bits(strategy):
    found = drawn(strategy)
    assert min(found) < -(2**62) and max(found) > 2**62
    assert any(2**32 <= abs(seed) < 2**50 for seed in found)
    assert any(0 <= seed < 1000 for seed in found)
    torch.tensor(found)  # fits
    for seed in found:
        torch.Generator().manual_seed(seed)


def test_step_rows_have_any_columns_zero():
    rows = drawn(strategies.step_rows())
    assert {len(row) for row in rows} == {len(Column)}
    for column in Column:
        values = [row[column] for row in rows]
        assert 0.1 < sum(value == 0 for value in values) / len(rows) < 0.95, column.name
        assert len(set(values)) > 3, column.name
    assert torch.tensor(rows).double().tolist() == rows  # float32 numbers, all of them
    assert all(row[Column.SIGMA] >= 0 and row[Column.CLIP] >= 0 for row in rows)
    assert all(math.copysign(1, row[Column.SIGMA]) == 1 for row in rows)
    assert len({tuple(value != 0 for value in row) for row in rows}) > 50


def test_noising_rows():
    rows = drawn(strategies.noising_rows())
    assert [0.0, 0.0] in rows and [1.0, 0.0] in rows and [0.0, 1.0] in rows
    assert any(abs(a * a + b * b - 1) < 1e-9 and 0 < a < 1 for a, b in rows)
    assert any(abs(a * a + b * b - 1) > 0.1 for a, b in rows)


def test_nonfinite_places():
    places = drawn(strategies.nonfinite((2, 3)))
    assert {index for index, _ in places} == {(i, j) for i in range(2) for j in range(3)}
    assert {str(value) for _, value in places} == {"nan", "inf", "-inf"}
    with pytest.raises(ValueError, match="^shape"):
        strategies.nonfinite((2, 0))


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_layouts_keep_the_values_and_change_the_strides(dims):
    x = torch.randn(tuple(range(2, 2 + dims)))
    found = set(drawn(strategies.layouts(dims), 60))
    assert found == set(layouts_of(dims)) and len(found) == (5, 6, 6, 7)[dims - 1]
    for layout in found:
        view = layout(x)
        assert torch.equal(view, x), layout.__name__
    with pytest.raises(ValueError, match="^dims=0"):
        strategies.layouts(0)


def test_what_each_layout_is():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert strategies.contiguous(x).is_contiguous()
    assert strategies.channels_last(x.contiguous()).stride() == x.stride()
    moved = strategies.offset(x)
    assert moved.storage_offset() == 1 and moved.stride() == x.stride()
    assert strategies.spaced(x).stride() == (120, *x.stride()[1:])
    assert strategies.strided(x).stride()[3] == 2 * strategies.contiguous(x).stride()[3]
    assert strategies.transposed(x).stride(2) < strategies.transposed(x).stride(3)
    assert strategies.padded(x).storage_offset() > 0
    for layout in (moved, strategies.spaced(x), strategies.strided(x), strategies.padded(x)):
        assert not layout.is_contiguous()


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1, 1), (2, 0), (0, 3)])
def test_layouts_of_few_elements(shape):
    for layout in layouts_of(len(shape)):
        assert torch.equal(layout(torch.ones(shape)), torch.ones(shape)), layout.__name__


def test_layouts_are_named_in_failures():
    assert all(layout.__name__ in repr(layout) for layout in LAYOUTS)


WITHOUT = """
import sys
sys.modules["hypothesis"] = None
sys.modules["triton"] = None
from flashddpm import testing
testing.rules.same, testing.Guarded, testing.allocations, testing.KernelCode
for name in ("check_op", "strategies", "Case", "compile_kernel"):
    try:
        getattr(testing, name)
        print(name, "imported")
    except ImportError as error:
        print(name, error)
"""


def test_import_needs_neither_hypothesis_nor_triton():
    command = [sys.executable, "-P", "-c", WITHOUT]
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ
    ).stdout.splitlines()
    assert all("pip install flashddpm[test]" in line for line in lines[:3]), lines
    assert lines[3].startswith("compile_kernel") and "triton" in lines[3]
    assert len(lines) == 4
