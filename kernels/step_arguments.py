"""What the operations of a step take: tensors in groups, the same ones in each call.

    sample_stats(state, out, slots, statistics, table)
    denoise_step(state, out, slots, statistics, table, noise=None)
    advance(slots, table)

There are S slots (images), L lanes (network evaluations) and R rows; what a row, a lane or a column
is: tables.py. An operation reads no more of a group than its docstring says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class StepState(NamedTuple):
    """What a step changes in place. No two of the images may overlap: not checked.

    Attributes:
        x: float32 [S, C, H, W], channels-last, the states x_t; become x_next.
        hist: float32 [S, C, H, W], channels-last, the previous x0; written where the next row reads
            it.
        net_in: [L, C, H, W], channels-last, float32, float16 or bfloat16: x_next goes to each lane
            of the slot.
        nonfinite: int32 [S]; becomes the slot's row where it is 0 and the network's output is not
            finite.
    """

    x: Tensor
    hist: Tensor
    net_in: Tensor
    nonfinite: Tensor


class StepSlots(NamedTuple):
    """What each slot follows.

    Attributes:
        idx: int64 [S], its row; not checked, for that would wait.
        seeds: int64 [S], of its noise.
        guidance: float32 [S], its weight w, read where it has two lanes.
        lane_cond: int32 [S], its conditional lane.
        lane_uncond: int32 [S], its lane for no label; -1 where it is not guided.
    """

    idx: Tensor
    seeds: Tensor
    guidance: Tensor
    lane_cond: Tensor
    lane_uncond: Tensor


class StepStatistics(NamedTuple):
    """What a slot's row may ask of its whole image: written by ``sample_stats``, read by the step.

    Attributes:
        dynamic_threshold: float32 [S], the bound of x0, of slots whose row has a threshold.
        rescale_factor: float32 [S], of out, of guided slots whose row rescales.
    """

    dynamic_threshold: Tensor
    rescale_factor: Tensor


class StepTable(NamedTuple):
    """The rows of plans.

    Attributes:
        rows: float32 [R, len(Column)], the coefficients of each step.
        keys: int64 [R], the key of each step's noise.
        next: int64 [R], the row that follows; a row that points at itself is the end.
    """

    rows: Tensor
    keys: Tensor
    next: Tensor


FLAT = (
    *(*StepState._fields, "out", *StepSlots._fields),
    *(*StepStatistics._fields, *StepTable._fields, "noise"),
)
"""The arguments of a step, the groups flattened, as its operators take them."""


def grouped(
    tensors: Sequence[Any],
) -> tuple[StepState, Tensor, StepSlots, StepStatistics, StepTable, Tensor | None]:
    """Return the tensors of ``FLAT`` in their groups."""
    return (
        StepState._make(tensors[:4]),
        tensors[4],
        StepSlots._make(tensors[5:10]),
        StepStatistics._make(tensors[10:12]),
        StepTable._make(tensors[12:15]),
        tensors[15],
    )


@functools.cache
def by_tensor(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with the tensors of its groups as keyword arguments of their own.

    Tests and benchmarks, which change one at a time, call it so. What is not given is None.
    """
    kinds = {name: kind for name, kind in get_type_hints(function).items() if name != "return"}
    groups = {name: kind for name, kind in kinds.items() if hasattr(kind, "_fields")}

    @functools.wraps(function)
    def call(**tensors: Any) -> Any:
        for name, kind in groups.items():
            tensors[name] = kind._make([tensors.pop(field, None) for field in kind._fields])
        return function(**tensors)

    return call if groups else function


def tensor_schema(
    names: Sequence[str], mutated: Sequence[str], optional: Sequence[str] = ()
) -> str:
    """Return the schema of an operator of tensors that returns nothing.

    Args:
        names: of its arguments, in order.
        mutated: those that it changes in place.
        optional: those that may be None.
    """
    kinds = dict.fromkeys(optional, "Tensor?")
    kinds |= {name: f"Tensor(a{i}!)" for i, name in enumerate(mutated)}
    arguments = (f"{kinds.get(name, 'Tensor')} {name}" for name in names)
    return f"({', '.join(arguments)}) -> ()"
