"""Bytes an element: what the kernels move, counted; the formula; plain PyTorch.

    TRITON_INTERPRET=1 python -m flashddpm.kernels.checks.counting

prints them as JSON. The kernels run in Triton's interpreter, whose loads and stores are counted
under their masks. That takes a process of its own: the interpreter and the compiler exclude each
other (``start`` starts one).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from flashddpm.kernels.checks import plain
from flashddpm.kernels.launch import INTERPRETED, channels_last
from flashddpm.kernels.registry import OPS, Arguments
from flashddpm.kernels.tables import Column

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


def _images(row: list[float]) -> Callable[[Arguments], Arguments]:
    """Give every image one row."""
    return lambda args: {"t": torch.zeros(BATCH, dtype=torch.int64), "rows": torch.tensor([row])}


def _slots(
    columns: dict[str, float], guided: bool = False, following: bool = False
) -> Callable[[Arguments], Arguments]:
    """Give every slot one row; ``following`` has the next row read the history too."""

    def change(args: Arguments) -> Arguments:
        lanes = torch.arange(2 * BATCH, dtype=torch.int32)
        unguided = torch.full((BATCH,), -1, dtype=torch.int32)
        rows = torch.zeros(3, len(Column))
        for name, value in columns.items():
            rows[1, Column[name.upper()]] = value
        rows[2, Column.C_HIST] = following
        first = torch.zeros(2 * BATCH if guided else BATCH, dtype=torch.int64)
        images = {name: args[name][first] for name in ("net_in", "out") if name in args}
        layout = torch.channels_last
        changed: Arguments = {
            name: x.contiguous(memory_format=layout) for name, x in images.items()
        }
        changed |= {
            "idx": torch.ones(BATCH, dtype=torch.int64),
            "lane_cond": lanes[:BATCH],
            "lane_uncond": lanes[BATCH:] if guided else unguided,
            "rows": rows,
            "keys": torch.arange(3),
            "next": torch.tensor([0, 2, 0]),
        }
        return {name: value for name, value in changed.items() if name in args}

    return change


@dataclass(frozen=True)
class Case:
    """An operation with rows that use certain terms.

    Attributes:
        name: of the case; in ``plain.CHAINS`` too.
        op: name in the registry.
        change: example arguments -> those that differ.
        kernels: names in ``compiled.KERNELS`` of those that move the bytes; by default the name.
        backward: whether the gradient is counted, not the operation.
    """

    name: str
    op: str
    change: Callable[[Arguments], Arguments]
    kernels: tuple[str, ...] = ()
    backward: bool = False

    def __post_init__(self) -> None:
        if not self.kernels:
            object.__setattr__(self, "kernels", (self.name.split()[0],))


def _given(args: Arguments) -> Arguments:
    """Noise that is handed in."""
    return _slots(_ANCESTRAL)(args) | {"noise": args["hist"].clone()}


def _learned(args: Arguments) -> Arguments:
    """An output of 2C channels, the second half of which says how large the noise is."""
    changed = _slots(_ANCESTRAL | {"log_sigma": 0.5})(args)
    return changed | {"out": channels_last(torch.cat([changed["out"]] * 2, 1))}


def _fixed(args: Arguments) -> Arguments:
    """An output of C channels, for a variance that is fixed."""
    row = [0.0, 1.0, 1.0, -0.75, 1.0, 1.0, 0.3, 0.0, 2.0, 0.0]
    return _images(row)(args) | {"out": channels_last(args["out"][:, : SHAPE[0]])}


_ANCESTRAL = dict(x0_xt=1.25, x0_out=-0.75, clip=1.0, c_x0=0.3, c_xt=0.68, sigma=0.2)
_STATS = dict(x0_xt=1.25, x0_out=-0.75, clip=1.5, threshold=0.9, rescale=0.7)
_MULTISTEP = dict(x0_xt=1.25, x0_out=-0.75, c_x0=0.6, c_xt=0.6, c_hist=-0.2)
_EPSILON, _VELOCITY = _images([0.0, 1.0, 1.0]), _images([-0.6, 0.8, 1.0])
_HYBRID = _images([0.0, 1.0, 1.0, 1.5, 0.7, 0.6, -0.4, 3.0, 0.0])
_VLB_LEARNED = _images([-0.6, 0.8, 1.0, -0.6, 0.8, 1.0, 0.7, 0.6, 0.9, 0.0])
_LOSS = ("diffusion_loss", "diffusion_loss_l1", "diffusion_loss_huber")
_GRADIENT = tuple(name.replace("loss", "loss_backward") for name in _LOSS)
CASES = (
    Case("philox", "philox", lambda args: {}),
    Case("add_noise", "add_noise", _images([0.8, 0.6])),
    Case("diffusion_loss", "diffusion_loss", _EPSILON, _LOSS),
    Case("diffusion_loss v", "diffusion_loss", _VELOCITY, _LOSS),
    Case("diffusion_loss backward", "diffusion_loss", _EPSILON, _GRADIENT, True),
    Case("diffusion_loss v backward", "diffusion_loss", _VELOCITY, _GRADIENT, True),
    Case("hybrid_loss", "hybrid_loss", _HYBRID),
    Case("hybrid_loss backward", "hybrid_loss", _HYBRID, ("hybrid_loss_backward",), True),
    Case("denoise_step", "denoise_step", _slots(_ANCESTRAL)),
    Case("denoise_step guided", "denoise_step", _slots(_ANCESTRAL, guided=True)),
    Case("denoise_step multistep", "denoise_step", _slots(_MULTISTEP, following=True)),
    Case("denoise_step given", "denoise_step", _given, ("denoise_step_given",)),
    Case("denoise_step learned", "denoise_step", _learned, ("denoise_step_learned",)),
    Case("vlb_terms", "vlb_terms", _fixed),
    Case("vlb_terms learned", "vlb_terms", _VLB_LEARNED, ("vlb_terms_learned",)),
    Case("sample_stats", "sample_stats", _slots(_STATS, guided=True)),
)
"""The first case of a kernel is the one that moves least: its bytes stand in the bound."""


def count(case: Case, dtype: torch.dtype) -> dict[str, float | None]:
    """Return the bytes an element of a case: counted, by the formula, and of plain PyTorch.

    "plain" is None where no chain is given.
    """
    op = OPS[case.op]
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
    replaced = plain.bytes_moved(case.name, args, image)
    return {
        "counted": sum(moved.values()) / elements,
        "formula": formula / elements,
        "plain": None if replaced is None else replaced / elements,
    }


def start() -> subprocess.Popen[str]:
    """Start the process that counts; its standard output is the JSON."""
    command = [sys.executable, "-P", "-m", "flashddpm.kernels.checks.counting"]
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


def main() -> None:
    """Print the bytes of every case as JSON: {case: {dtype: {counted, formula, plain}}}."""
    if not INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is not set to 1: bytes are counted in the interpreter")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: Bytes = {}
    for case in CASES:
        dtypes = {OPS[case.op].dtypes[0], torch.bfloat16} & set(OPS[case.op].dtypes)
        found[case.name] = {k: count(case, v) for k, v in DTYPES.items() if v in dtypes}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
