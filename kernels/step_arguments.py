"""The groups of tensors that a sampling step takes: state, slots, statistics and table.

    sample_stats(state, out, slots, statistics, table)
    denoise_step(state, out, slots, statistics, table, noise=None)
    advance(slots, table)

There are S slots (a slot is the place of one image in a batch), L lanes (a lane is one evaluation
of the network; a guided image takes two) and R rows (a row holds the coefficients of one step; its
columns: tables.py). Each call gets the same tensors; an operation reads no more of a group than its
docstring says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class StepState(NamedTuple):
    """The tensors of all slots that a step changes in place.

    x, hist and net_in must not share memory (not checked). In x and hist there may be room between
    one image and the next.

    Attributes:
        x: float32 [S, C, H, W], channels-last, the states x_t of the S slots (a slot is the place
            of one image in a batch); a step replaces them by x_next.
        hist: float32 [S, C, H, W], channels-last, the x0 predicted by the previous step (the
            history of multistep solvers); written only where the row of the next step reads it.
        net_in: float32, float16 or bfloat16 [L, C, H, W], channels-last, the input of the network's
            L lanes (a lane is one evaluation of the network); a step writes x_next to each lane of
            a slot.
        nonfinite: contiguous int32 [S], 0 while the network's output of the slot has been finite; a
            step sets it to the slot's row (the index of its coefficients in the table) when it is 0
            and the output is not finite.
    """

    x: Tensor
    hist: Tensor
    net_in: Tensor
    nonfinite: Tensor


class StepSlots(NamedTuple):
    """The row, seed, guidance and lanes of each slot (the place of one image in a batch).

    All are contiguous vectors on the device of the states.

    Attributes:
        idx: int64 [S], the slot's row (the index of its step's coefficients in the table), in [0,
            R); the range is not checked, for that would wait for the device.
        seeds: int64 [S], the seed of the slot's noise, any value.
        guidance: float32 [S], the weight w of classifier-free guidance, used where the slot has two
            lanes (a lane is one evaluation of the network) and its row is not unguided.
        lane_cond: int32 [S], the index in [0, L) of the slot's conditional lane.
        lane_uncond: int32 [S], the index in [0, L) of the slot's unconditional lane; -1 where the
            slot is not guided.
    """

    idx: Tensor
    seeds: Tensor
    guidance: Tensor
    lane_cond: Tensor
    lane_uncond: Tensor


class StepStatistics(NamedTuple):
    """The statistics of whole images: ``sample_stats`` writes them and ``denoise_step`` reads them.

    Both are contiguous vectors; entries of other slots than those named are neither read nor
    written, so that any memory will do at first.

    Attributes:
        dynamic_threshold: float32 [S], the bound of |x0|, at least 1, of each slot (the place of
            one image in a batch) whose row (the coefficients of its step) has a threshold.
        rescale_factor: float32 [S], the factor of the guided output of each slot that has two lanes
            (evaluations of the network) and whose row rescales the guidance and is not unguided.
    """

    dynamic_threshold: Tensor
    rescale_factor: Tensor


class StepTable(NamedTuple):
    """The table of all rows (a row is one step) of all plans (a plan is the steps of one image).

    All are contiguous. Row 0 is that of slots without an image: it points at itself.

    Attributes:
        rows: float32 [R, len(Column)], the coefficients of each step; columns: ``tables.Column``.
        keys: int64 [R], the key of each step's noise (the upper 64 bits of the noise counter).
        next: int64 [R], the row that follows, in [0, R); a row that points at itself is the end,
            where a slot does nothing.
    """

    rows: Tensor
    keys: Tensor
    next: Tensor


FLAT = (
    *(*StepState._fields, "out", *StepSlots._fields),
    *(*StepStatistics._fields, *StepTable._fields, "noise"),
)
"""The names of a step's arguments, the groups flattened, in the order of its operators."""


def grouped(
    tensors: Sequence[Any],
) -> tuple[StepState, Tensor, StepSlots, StepStatistics, StepTable, Tensor | None]:
    """Return the sixteen flat arguments of a step (``FLAT``) in their groups.

    Args:
        tensors: the tensors of ``FLAT`` in its order; the last one, noise, may be None.
            Fewer raise IndexError or TypeError, more are ignored; kinds are not checked.

    Returns:
        The state, the network's output, the slots, the statistics, the table, and the noise or
        None.
    """
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
    """Return a function that takes the tensors of the groups as keyword arguments of their own.

    Tests and benchmarks, which change one tensor at a time, call operations like this.

    Args:
        function: a function with annotated parameters, some of which may be groups: named tuples of
            tensors such as ``StepState``.

    Returns:
        A function of keyword arguments only: the fields of every group by their names, and the
        other parameters as they are; a field that is not given is None, and a name that is neither
        raises TypeError when called. A function without groups is returned as it is.
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
    """Return the ``torch.library`` schema of an operator that takes tensors and returns nothing.

    For instance "(Tensor(a0!) x, Tensor y, Tensor? z) -> ()" where x is mutated and z optional.

    Args:
        names: the names of the operator's arguments, in order.
        mutated: the names of the arguments that the operator changes in place.
        optional: the names of the arguments that may be None; none of them may be mutated
            (not checked: it would count as mutated).
    """
    kinds = dict.fromkeys(optional, "Tensor?")
    kinds |= {name: f"Tensor(a{i}!)" for i, name in enumerate(mutated)}
    arguments = (f"{kinds.get(name, 'Tensor')} {name}" for name in names)
    return f"({', '.join(arguments)}) -> ()"
