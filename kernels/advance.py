r"""Operation ``advance``, which moves every slot to its next row: idx[s] = next[idx[s]].

A slot is the place of one image in a batch; a row holds the coefficients of one of its steps. The
operation is a launch of its own, after ``denoise_step``: nothing moves an index while another
program of the same sample may still read it. Reads 16 bytes and writes 8 for each slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.examples import ExampleDraws
from flashddpm.kernels.launch import launch, runs_triton
from flashddpm.kernels.operation import Arguments, Budget, Op, Shape, variant
from flashddpm.kernels.step_arguments import StepSlots, StepTable, by_tensor
from flashddpm.kernels.validation import check_vectors


@triton.jit
def _advance_kernel(
    idx,  # int64 [S], read and written
    next,  # int64 [R]
    S,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < S
    row = tl.load(idx + slot, mask=mask, other=0)
    tl.store(idx + slot, tl.load(next + row, mask=mask, other=0), mask=mask)


@torch.library.custom_op("flashddpm::advance", mutates_args=("idx",))
def _advance(idx: Tensor, next: Tensor) -> None:
    if not runs_triton(idx):
        by_tensor(reference.advance)(idx=idx, next=next)
    elif idx.numel():
        launch(_advance_kernel, (triton.cdiv(len(idx), 128),), idx, idx, next, len(idx), 128)


@_advance.register_fake
def _advance_fake(idx: Tensor, next: Tensor) -> None:
    return None


def advance(slots: StepSlots, table: StepTable) -> None:
    """Move every slot (the place of one image in a batch) to its next row, idx[s] = next[idx[s]].

    A row is the coefficients of one step; a row that points at itself (next[i] = i) keeps its
    slots.

    Args:
        slots: only ``idx``, int64 [S], is used; it is changed in place. Its entries must lie in [0,
            R); this is not checked, for that would wait for the device.
        table: only ``next``, int64 [R], the row that follows each row, is read.

    Raises:
        ValueError: if idx or next is not a contiguous int64 vector, or they are on different
            devices; the message begins with the name of the tensor.
    """
    idx, next = slots.idx, table.next
    check_vectors(idx, torch.int64, idx.numel(), idx=idx)
    check_vectors(idx, torch.int64, next.numel(), next=next)
    _advance(idx, next)


# The record of the operation, for tests, gates, counts of bytes and benchmarks.


def _example(device, dtype: torch.dtype, shape: Shape, batch: int, seed: int) -> Arguments:
    draws = ExampleDraws(device, seed)
    return {"idx": draws.integers(batch, 0, 50), "next": draws.integers(50, 0, 50)}


OP = Op(
    name="advance",
    fast=by_tensor(advance),
    reference=by_tensor(reference.advance),
    example=_example,
    bytes_moved=lambda args: 24 * len(args["idx"]),
    kernels=(
        variant(
            "advance",
            _advance_kernel,
            {4: Budget(14, 0, 17.5, "an index or two for a thread: two loads and a store")},
            BLOCK=128,
        ),
    ),
    mutates=("idx",),
    dtypes=(torch.int64,),
)
