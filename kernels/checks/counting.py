"""Counts of the bytes that kernels move for each element, beside the formula and plain PyTorch.

    TRITON_INTERPRET=1 python -m flashddpm.kernels.checks.counting [CASE ...]

prints them as JSON, for all cases or for those that are named. The kernels run in Triton's
interpreter, whose loads and stores are counted under their masks. That takes a process of its own:
the interpreter and the compiler exclude each other (``start`` starts one).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from flashddpm.kernels import OPS
from flashddpm.kernels.checks import plain
from flashddpm.kernels.checks.interpreter import quick
from flashddpm.kernels.launch import INTERPRETED
from flashddpm.kernels.operation import ByteCase, Op

SHAPE, BATCH = (3, 5, 7), 2
Bytes = dict[str, dict[str, dict[str, float | None]]]
"""Bytes moved for each element of an image: {case: {dtype "fp32" or "bf16": {"counted", "formula",
"plain": bytes, or None where there is no plain PyTorch code}}}.
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # float16 moves what bfloat16 does


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes that kernels load and store within a with-statement, in Triton's interpreter.

    Loads and stores of blocks (of images and vectors) are counted, for the elements that their
    masks let through; those of single numbers are not. It replaces methods of the interpreter and
    puts them back at the end, also if the block raises, so it is not for several threads at once.

    Yields:
        {"loaded": bytes, "stored": bytes}, which grow as kernels run.
    """
    counts = {"loaded": 0, "stored": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(kind: str, pointers: Any, mask: Any) -> None:
        if pointers.data.size > 1:
            item = pointers.get_element_ty().primitive_bitwidth // 8
            counts[kind] += int(np.sum(mask.data)) * item

    def masked_load(self, ptrs, mask, *rest):
        count("loaded", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        count("stored", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    try:
        yield counts
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


CASES = {case.name: (op, case) for op in OPS.values() for case in op.cases}
"""Every case (an operation with certain arguments) of every operation, by the case's name:
(operation, case).
"""


def count(op: Op, case: ByteCase, dtype: torch.dtype) -> dict[str, float | None]:
    """Count the bytes that one case of an operation moves for each element of its images.

    A case is the operation with certain arguments. The kernels must run in the interpreter
    (TRITON_INTERPRET=1 at import; not checked).

    Args:
        op: the operation's record.
        case: the case, one of ``op.cases``.
        dtype: the dtype of the images, one of ``op.dtypes``.

    Returns:
        Bytes for each element: "counted" in the interpreter, by the operation's "formula", and of
        the same work in "plain" PyTorch, None where the case has no such code.
    """
    args = op.example("cpu", dtype, SHAPE, BATCH, 0)
    args |= case.change(args)
    image = math.prod(SHAPE)
    if case.backward:
        assert op.gradient_bytes is not None
        formula = op.gradient_bytes(args)
        for name in op.differentiable:
            args[name].requires_grad_()
    else:
        formula = op.bytes_moved(args)
    with counted() as moved:
        result = op.fast(**args)
        if case.backward:
            moved.update(loaded=0, stored=0)
            assert result is not None
            result.sum().backward()
    elements = BATCH * image
    replaced = None
    if case.plain is not None:
        replaced = plain.bytes_moved(case.plain, args, image, case.backward) / elements
    return {
        "counted": sum(moved.values()) / elements,
        "formula": formula / elements,
        "plain": replaced,
    }


def start(cases: Collection[str]) -> subprocess.Popen[str]:
    """Start a process that counts the bytes of cases in Triton's interpreter, and return it.

    Args:
        cases: the names of the cases (keys of ``CASES``); empty for all. Other names are ignored.

    Returns:
        The process, whose standard output is the JSON that ``result`` reads.
    """
    command = [sys.executable, "-P", "-m", "flashddpm.kernels.checks.counting", *cases]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def result(child: subprocess.Popen[str]) -> Bytes:
    """Wait for a process that counts bytes, and return what it counted.

    Args:
        child: the process of ``start``.

    Returns:
        {case: {"fp32" or "bf16": {"counted", "formula", "plain": bytes for each element}}}: in the
        interpreter, by the operation's formula, and in plain PyTorch or None.

    Raises:
        RuntimeError: if the process failed; the message holds its standard error.
    """
    out, err = child.communicate()
    if child.returncode:
        raise RuntimeError(f"counting bytes failed: {err.strip()}")
    return json.loads(out)


def main(names: Collection[str] = ()) -> None:
    """Count the bytes of cases and print them as JSON: {case: {dtype: {counted, formula, plain}}}.

    Args:
        names: the names of the cases (keys of ``CASES``), in any order; empty for all. Other names
            are ignored.

    Raises:
        RuntimeError: if TRITON_INTERPRET is not set.
    """
    if not INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is not set to 1: bytes are counted in the interpreter")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: Bytes = {}
    for name, (op, case) in CASES.items():
        if not names or name in names:
            dtypes = {op.dtypes[0], torch.bfloat16} & set(op.dtypes)
            with quick():
                found[name] = {k: count(op, case, v) for k, v in DTYPES.items() if v in dtypes}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
