"""The command ``flashddpm kernels``: it prints a scorecard of the compiled Triton kernels."""

from __future__ import annotations

import sys
from typing import Annotated

from typer import Option

from flashddpm import arguments


def kernels(
    arch: Annotated[
        str | None, Option(help="80, 90 or 100 (sm_90), comma-separated.  [default: all]")
    ] = None,
    kernel: Annotated[
        str | None, Option(help="Names of kernels, comma-separated.  [default: all]")
    ] = None,
    json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
    verbose: Annotated[
        bool, Option("--verbose", help="Also accesses and opcodes of every variant.")
    ] = False,
) -> None:
    """Print a scorecard of the compiled Triton kernels; no GPU is needed.

    All kernels are compiled for three generations of GPUs, which takes about a minute the first
    time. The exit code is 1 if a gate (a check of the compiled code) fails.
    """
    try:
        from flashddpm.kernels.checks.compiled import ARCHITECTURES, INTERPRETED, KERNELS
        from flashddpm.kernels.checks.report import text
        from flashddpm.kernels.checks.scorecard import scorecard
    except ImportError as error:
        raise ValueError(f"kernels: Triton is needed to compile them ({error})") from None
    names = list(KERNELS) if kernel is None else [part.strip() for part in kernel.split(",")]
    known = list(map(str, ARCHITECTURES))
    archs = known if arch is None else [part.strip() for part in arch.split(",")]
    for name in names:
        arguments.one_of("kernel", name, tuple(KERNELS))
    for number in archs:
        arguments.one_of("arch", number, known)
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it")
    card = scorecard(dict.fromkeys(names), sorted({int(number) for number in archs}))
    print(card.json() if json else text(card, verbose))
    if card.faults:
        sys.exit(1)
