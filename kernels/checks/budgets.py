"""Whether a kernel keeps its budget: gated for one version of Triton, reported for others.

Another compiler gives other numbers for the same kernel, so a change of version must not look like
a change of ours. Within one version, a budget that is exceeded says that the kernel became worse.
"""

from __future__ import annotations

import triton

from flashddpm.kernels.operation import Budget

PINNED = "3.8"
"""Of Triton: the major and minor version that the budgets were taken from."""


def pinned() -> bool:
    """Whether the installed Triton is the version that the budgets are for."""
    return triton.__version__.split(".")[:2] == PINNED.split(".")


def exceeded(
    budget: Budget | None,
    registers: int,
    shared: int,
    instructions: float | None,
    width: int | None,
) -> list[str]:
    """Return what exceeds the budget, nothing if all is well; a missing budget is a fault.

    Args:
        budget: of the kernel, None if it has none.
        registers, shared, instructions, width: as in ``Budget``, what was found.
    """
    if budget is None:
        return ["no budget: give it one in its file, with its reason"]
    found = []
    for name, value, most in (
        ("registers", registers, budget.registers),
        ("bytes of shared memory", shared, budget.shared),
        ("instructions an element", instructions, budget.instructions),
    ):
        if value is not None and most is not None and value > most:
            found.append(f"{value:.4g} {name}, {most:.4g} budgeted ({budget.reason})")
    if width is not None and width < budget.width:
        found.append(f"accesses of {width} bytes, {budget.width} budgeted ({budget.reason})")
    return found
