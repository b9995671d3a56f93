"""What ``check_op`` refuses: each a ValueError that names the argument and says what it must be."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from flashddpm.testing import rules
from flashddpm.testing.battery import CHECKS, Judge
from flashddpm.testing.gates import KernelCode
from flashddpm.testing.strategies import Case
from flashddpm.testing.trial import Arguments, Subject, in_float64

NUDGE = 1 - 2.0**-40
"""Times a float32, a number that only float64 holds."""


def wanted_checks(
    checks: Collection[str] | None,
    skip: Collection[str],
    subject: Subject,
    kernels: Sequence[KernelCode],
) -> set[str]:
    """Return the names of the checks to run; refuse one asked for that cannot be."""
    for argument, names in (("checks", checks or ()), ("skip", skip)):
        for name in (names,) if isinstance(names, str) else names:
            if name not in CHECKS:
                raise ValueError(f"{argument}={name!r}: must be among {', '.join(CHECKS)}")
        if isinstance(names, str):
            raise ValueError(f"{argument}={names!r}: must be a list of names")
    wanted = set(CHECKS if checks is None else checks) - set(skip)
    for name, argument, given in (
        ("gradients", "differentiable", subject.differentiable),
        ("compiled_code", "kernels", kernels),
    ):
        if checks is not None and name in wanted and not given:
            raise ValueError(f"checks={name!r}: must come with {argument}, which is empty")
    return wanted


def validate_cases(cases: Sequence[Case], dtypes: Sequence[torch.dtype], examples: int) -> None:
    """Refuse cases of other dtypes or without a sample, and no case at all."""
    for case in cases:
        if case.dtype not in dtypes or case.batch < 1:
            allowed = ", ".join(map(str, dtypes))
            raise ValueError(f"cases: {case} must have a sample, and a dtype among {allowed}")
    if examples < 0 or not (examples or cases):
        raise ValueError(f"examples={examples}: must be at least {0 if cases else 1}")


def validate(subject: Subject, judge: Judge, case: Case) -> None:
    """Refuse names that are no argument's, and arguments that differ from call to call."""
    args, again = subject.build(case), subject.build(case)
    tensors = [name for name, value in args.items() if isinstance(value, Tensor)]
    for argument, names in (
        ("mutates", subject.mutates),
        ("differentiable", subject.differentiable),
        ("batched", subject.given_batched or ()),
    ):
        for name in names:
            if name not in tensors:
                raise ValueError(f"{argument}={name!r}: must be among {', '.join(tensors)}")
    for name in tensors:
        try:
            rules.same(args[name], again[name])
        except AssertionError as error:
            raise ValueError(
                f"arguments: {name} must be the same for the same seed: {error}"
            ) from None
    results = subject.call(subject.reference, subject.build(case, "cpu"))
    for name in subject.differentiable:
        if f"gradient of {name}" not in results:
            raise ValueError(
                f"differentiable={name!r}: must be an argument that autograd differentiates the "
                "reference by, and what the reference returns has no gradient for it"
            )
    for name in judge.own:
        if name not in results:
            raise ValueError(f"rule={name!r}: must be among {', '.join(results)}")


def validate_float64(subject: Subject, judge: Judge, case: Case) -> None:
    """Refuse a reference whose results in float64, that a rule looks at, are float32's.

    Its arguments are numbers that float32 does not hold, so that results of which it holds each
    one were rounded to it on the way.
    """
    args: Arguments = {
        name: value * NUDGE if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in in_float64(subject.build(case, "cpu")).items()
    }
    for name, value in subject.call(subject.reference, args, case.seed).items():
        if not value.is_floating_point() or not rules.needs_float64(judge.rule(name)):
            continue
        some = value[value.isfinite() & (value != 0)]
        narrow = value.dtype is not torch.float64
        if narrow or (some.numel() and torch.equal(some.float().double(), some)):
            found = f"returned in {value.dtype}" if narrow else "rounded to float32"
            raise ValueError(
                f"reference: {name} of float64 arguments is {found}: must be computed in float64, "
                "which its rule compares with; say x.double() if x.dtype == torch.float64 else "
                "x.float()"
            )
