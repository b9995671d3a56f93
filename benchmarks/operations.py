"""Every operation of the registry: the fast path against the reference, on the same arguments.

On the CPU the fast path of the noise is the compiled reference; the other operations have none
there, so only a GPU has anything to compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashddpm.benchmarks.harness import Result, compare
from flashddpm.kernels import reference
from flashddpm.kernels.contract import Purpose
from flashddpm.noise import CompiledNoise

if TYPE_CHECKING:
    from flashddpm.kernels.registry import Arguments, Op

SHAPES = ((16, (3, 32, 32)), (256, (3, 32, 32)), (64, (3, 256, 256)))


def noise_on_the_cpu(device: str) -> Iterator[Result]:
    """Compiled noise against the eager reference, the bits compared first."""
    if device != "cpu":
        return
    draw = CompiledNoise()
    for batch in (16, 800):
        seeds, keys = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
        arguments = (seeds, keys, (1, 28, 28), Purpose.REVERSE_STEP)
        if not torch.equal(draw(*arguments), reference.philox(*arguments)):
            raise AssertionError("compiled noise differs from the reference, not timed")
        yield Result.of(
            f"noise-{batch}x784",
            "eager reference",
            f"{batch * 784} normals a call",
            compare(partial(draw, *arguments), partial(reference.philox, *arguments)),
        )


def check(op: Op, arguments: Arguments) -> None:
    """Refuse to time an operation whose results are not the reference's."""
    results = []
    for function in (op.fast, op.reference):
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        returned = function(**copies)
        results.append([returned, *(copies[name] for name in op.mutates)])
    torch.testing.assert_close(*results, equal_nan=True)


def operations_on_a_gpu(device: str) -> Iterator[Result]:
    """Triton kernels against the eager reference, from one CIFAR batch to large images."""
    if device != "cuda":
        return
    from flashddpm.kernels.registry import OPS

    for op in OPS.values():
        for batch, shape in SHAPES:
            arguments = op.example("cuda", op.dtypes[-1], shape, batch, 0)
            if "idx" in arguments:
                arguments["idx"].fill_(1)  # every slot at work
            check(op, arguments)
            comparison = compare(
                partial(op.fast, **arguments),
                partial(op.reference, **arguments),
                rounds=10,
                warm_ups=3,
            )
            size = "x".join(map(str, (batch, *shape)))
            yield Result.of(f"{op.name}-{size}", "eager reference", str(op.dtypes[-1]), comparison)
