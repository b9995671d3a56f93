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
from flashddpm.kernels.validation import check_vector


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
        reference.advance(idx, next)
    elif idx.numel():
        launch(_advance_kernel, (triton.cdiv(len(idx), 128),), idx, idx, next, len(idx), 128)


@_advance.register_fake
def _advance_fake(idx: Tensor, next: Tensor) -> None:
    return None


def advance(idx: Tensor, next: Tensor) -> None:
    """Set idx[s] = next[idx[s]] for every slot, in place.

    Args:
        idx: int64 [S].
        next: int64 [R]; entries of idx must lie in [0, R): not checked, for that would wait.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    check_vector("idx", idx, idx.numel(), torch.int64, idx)
    check_vector("next", next, next.numel(), torch.int64, idx)
    _advance(idx, next)


def _example(device, dtype: torch.dtype, shape: Shape, batch: int, seed: int) -> Arguments:
    draws = Draws(device, seed)
    return {"idx": draws.integers(batch, 0, 50), "next": draws.integers(50, 0, 50)}


OP = Op(
    name="advance",
    fast=advance,
    reference=reference.advance,
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
