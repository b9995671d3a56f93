"""Bytes an element: what the kernels move, counted; the formula; plain PyTorch.

    TRITON_INTERPRET=1 python -m flashddpm.kernels.checks.counting [CASE ...]

prints them as JSON, of all cases or of those that are named. The kernels run in Triton's
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
"""By case and dtype: bytes an element, "counted", by the "formula" and "plain"."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # float16 moves what bfloat16 does


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes of images that kernels load and store within: every block, no single numbers.

    Yields:
        {"loaded": bytes, "stored": bytes}, which grow as kernels run in the interpreter.
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
"""Every case of every operation, by its name."""


def count(op: Op, case: ByteCase, dtype: torch.dtype) -> dict[str, float | None]:
    """Return the bytes an element of a case: counted, by the formula, and of plain PyTorch.

    "plain" is None where no chain is given.
    """
    args = op.example("cpu", dtype, SHAPE, BATCH, 0)
    args |= case.change(args)
    image = math.prod(SHAPE)
    formula = op.bytes_moved(args)
    gradients = [args[name].requires_grad_() for name in op.differentiable if case.backward]
    formula += sum(x.numel() * x.itemsize for x in gradients)  # one is written for each
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
    """Start the process that counts the cases of these names; its standard output is the JSON."""
    command = [sys.executable, "-P", "-m", "flashddpm.kernels.checks.counting", *cases]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def result(child: subprocess.Popen[str]) -> Bytes:
    """Wait for the process that counts; return {case: {dtype: bytes}}, as ``count`` gives them.

    Raises:
        RuntimeError: it failed.
    """
    out, err = child.communicate()
    if child.returncode:
        raise RuntimeError(f"counting bytes failed: {err.strip()}")
    return json.loads(out)


def main(names: Collection[str] = ()) -> None:
    """Print the bytes of the cases as JSON: {case: {dtype: {counted, formula, plain}}}.

    Args:
        names: of the cases, in any order; none for all.
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
