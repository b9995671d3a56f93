"""Comparison of compiled kernels with their budgets, the most that each may use of a GPU.

Another compiler gives other numbers for the same kernel, so budgets fail a check only for the
pinned version of Triton and are reported for others. Within one version, a budget that is exceeded
says that the kernel became worse.
"""

from __future__ import annotations

import triton

from flashddpm.kernels.operation import Budget

PINNED = "3.8"
"""The version of Triton, "MAJOR.MINOR", that the budgets were taken from."""


def pinned() -> bool:
    """Return whether the installed Triton's major and minor version are those of ``PINNED``."""
    return triton.__version__.split(".")[:2] == PINNED.split(".")


def exceeded(
    budget: Budget | None,
    registers: int,
    shared: int,
    instructions: float | None,
    width: int | None,
) -> list[str]:
    """Return what of a kernel's resources exceeds its budget; an empty list if all is well.

    A missing budget is a fault too.

    Args:
        budget: the kernel's budget (the most that it may use), or None if it has none.
        registers: registers of a thread.
        shared: bytes of shared memory of a program (a thread block).
        instructions: instructions for each element of an image; None, which is not compared, where
            a loop makes them no total.
        width: bytes of the narrowest access of an image; None where no image is accessed.

    Returns:
        A sentence for each number beyond its budget (for the width: below it).
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
