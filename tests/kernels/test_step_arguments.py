"""The groups of tensors that the operations of a step take."""

import inspect

import torch

from flashddpm import kernels
from flashddpm.kernels import StepSlots, StepState, StepStatistics, StepTable, reference
from flashddpm.kernels.step_arguments import FLAT, by_tensor, grouped, tensor_schema

GROUPS = (StepState, StepSlots, StepStatistics, StepTable)


def step(slots: StepSlots, table: StepTable, noise: torch.Tensor | None = None):
    return slots, table, noise


def test_tensors_are_put_into_their_groups():
    """By name, in whatever order they come; those that are not given are None."""
    tensors = {name: torch.tensor(i) for i, name in enumerate(StepSlots._fields + ("next",))}
    slots, table, noise = by_tensor(step)(**dict(reversed(tensors.items())), noise=torch.ones(1))
    assert slots == StepSlots(*list(tensors.values())[:-1])
    assert table == StepTable(None, None, tensors["next"]) and noise == 1
    assert by_tensor(step)(idx=noise) == (
        StepSlots(noise, *[None] * 4),
        StepTable(*[None] * 3),
        None,
    )


def test_a_flat_step_is_grouped():
    state, out, slots, statistics, table, noise = grouped(FLAT)
    assert (out, noise) == ("out", "noise")
    for group, kind in zip((state, slots, statistics, table), GROUPS, strict=True):
        assert type(group) is kind and group == kind._fields


def test_a_function_without_groups_is_left_as_it_is():
    assert by_tensor(kernels.philox) is kernels.philox
    assert inspect.unwrap(by_tensor(reference.advance)) is reference.advance


def test_no_two_groups_have_a_field_of_one_name():
    fields = [field for group in GROUPS for field in group._fields]
    assert len(fields) == len(set(fields)) == 14


def test_schema_of_tensors():
    schema = tensor_schema(("x", "out", "noise"), mutated=("x",), optional=("noise",))
    assert schema == "(Tensor(a0!) x, Tensor out, Tensor? noise) -> ()"
    operator = torch.ops.flashddpm.denoise_step.default._schema
    assert [a.name for a in operator.arguments] == list(FLAT)
    changed = {a.name for a in operator.arguments if a.alias_info and a.alias_info.is_write}
    assert changed == set(StepState._fields)
