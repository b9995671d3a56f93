r"""Move every slot to its next row: idx[s] = next[idx[s]].

A launch of its own, after ``denoise_step``: nothing moves an index while another program of the
same sample may still read it. Reads 16 bytes and writes 8 a slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashddpm.kernels import reference
from flashddpm.kernels.examples import Draws
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
    """Set idx[s] = next[idx[s]] for every slot, in place.

    Args:
        slots: whose idx it moves; its entries must lie in [0, R): not checked, for that would wait.
        table: whose next it reads.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message begins with the name of
            the tensor.
    """
    idx, next = slots.idx, table.next
    check_vectors(idx, torch.int64, idx.numel(), idx=idx)
    check_vectors(idx, torch.int64, next.numel(), next=next)
    _advance(idx, next)


# The record of the operation, for tests, gates, counts of bytes and benchmarks.


def _example(device, dtype: torch.dtype, shape: Shape, batch: int, seed: int) -> Arguments:
    draws = Draws(device, seed)
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
