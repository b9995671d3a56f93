"""Validation of the arguments of ``check_op``, by ValueErrors that name the argument."""

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
"""A factor that makes a float32 number one that only float64 holds."""


def wanted_checks(
    checks: Collection[str] | None,
    skip: Collection[str],
    subject: Subject,
    kernels: Sequence[KernelCode],
) -> set[str]:
    """Return the names of the checks to run.

    Args:
        checks: the names of the checks that were asked for; None for all.
        skip: the names of the checks to leave out, even if ``checks`` has them.
        subject: the function under test, which has the differentiable arguments.
        kernels: the kernels whose machine code is to be checked.

    Raises:
        ValueError: if a name is not in ``CHECKS``, if names are a string and no list, or if
            "gradients" is asked for and no argument is differentiable, or "compiled_code" and there
            is no kernel.
    """
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
    """Raise ValueError if the cases and the number of draws do not fit.

    Args:
        cases: the cases that the caller gave.
        dtypes: the dtypes that are allowed.
        examples: the number of cases to draw.

    Raises:
        ValueError: if a case has another dtype or less than one sample, if examples is negative, or
            if there is neither a case nor an example.
    """
    for case in cases:
        if case.dtype not in dtypes or case.batch < 1:
            allowed = ", ".join(map(str, dtypes))
            raise ValueError(f"cases: {case} must have a sample, and a dtype among {allowed}")
    if examples < 0 or not (examples or cases):
        raise ValueError(f"examples={examples}: must be at least {0 if cases else 1}")


def validate(subject: Subject, judge: Judge, case: Case) -> None:
    """Raise ValueError if names are wrong, or if arguments differ from call to call.

    Args:
        subject: the function under test, which has the names of arguments and builds them.
        judge: the rules, by the names of results.
        case: the case on which it is found out.

    Raises:
        ValueError: if a mutated, differentiable or batched name is no tensor argument, if arguments
            differ for the same seed, if the reference's result has no gradient for a differentiable
            argument, if a rule is for a name that is no result, or if the reference returns
            something else than tensors or None.
    """
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
    """Raise ValueError if the reference rounds to float32 where it is called with float64.

    Its arguments are numbers that float32 does not hold, so that a result of which float32 holds
    every element must have been rounded to it on the way.

    Args:
        subject: the function under test and its reference.
        judge: the rules; only results whose rule compares with float64 are looked at.
        case: the case whose arguments are taken.

    Raises:
        ValueError: if a floating-point result is not float64, or all its finite elements but 0 are
            numbers that float32 holds.
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
