"""``check_op``: the whole battery on any function that has a reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from flashddpm.testing import rules, strategies
from flashddpm.testing.battery import CHECKS, PER_CASE, PER_DTYPE, Check, Judge
from flashddpm.testing.gates import ARCHITECTURES, KernelCode, code_faults
from flashddpm.testing.rules import Rule
from flashddpm.testing.strategies import Case
from flashddpm.testing.trial import Arguments, Subject, Trial

__all__ = ["CHECKS", "CheckFailed", "check_op"]

Failures = dict[str, tuple[Case | None, Exception]]


class CheckFailed(AssertionError):
    """Checks failed.

    Attributes:
        failures: name of the check -> (the smallest arguments that failed, None for compiled code;
            why).
        not_run: names of the checks that were not run, since a kernel that writes into red zones
            may harm the process where there are none.
    """

    def __init__(self, failures: Failures, not_run: Collection[str] = ()) -> None:
        self.failures, self.not_run = failures, tuple(not_run)
        lines = []
        for name, (case, error) in failures.items():
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            lines.append(f"{name}: {kind}{error}" + (f"\n    with {case}" if case else ""))
        lines += [f"{name}: not run" for name in not_run]
        super().__init__("\n".join(lines))


def check_op(
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Callable[..., Arguments],
    *,
    mutates: Iterable[str] = (),
    differentiable: Iterable[str] = (),
    batched: Iterable[str] | None = None,
    rule: Rule | Mapping[str, Rule] = rules.bitwise,
    dtypes: Sequence[torch.dtype] = strategies.FLOATS,
    shapes: SearchStrategy[tuple[int, ...]] | None = None,
    batches: SearchStrategy[int] | None = None,
    examples: int = 25,
    device: torch.device | str | None = None,
    kernels: Sequence[KernelCode] = (),
    architectures: Sequence[int] = ARCHITECTURES,
    checks: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Run the battery on ``fast``, a function of the same arguments as ``reference``.

    Both return a tensor, several, or None. ``CHECKS`` says what each check asks.

    Args:
        fast: the function under test, called on ``device``.
        reference: what it must equal, called on the CPU; in float64 too, if a rule asks.
        arguments: (device, dtype, shape of one sample, batch, seed) -> the arguments by name, the
            same numbers on every device and whenever it is called.
        mutates: names of the arguments that are changed in place.
        differentiable: names of the arguments that have a gradient.
        batched: names of the tensors with one entry a sample, along their first dimension. If not
            given, those that grow by one when the batch does; () if samples are not independent.
        rule: how results and gradients are judged, ``rules.bitwise`` if nothing is said; or one for
            each by its name: "result" ("result 0", "result 1" of several), that of a mutated
            argument, or "gradient of x".
        dtypes: drawn from.
        shapes, batches: strategies to draw from; images and 1 to 4 samples if nothing is said.
        examples: how many draws; each is a dozen calls.
        device: cuda if there is one, else cpu.
        kernels: whose machine code is checked for ``architectures``.
        architectures: compute capabilities, times 10.
        checks: names of the checks to run; all, if nothing is said.
        skip: names of the checks to leave out.

    Raises:
        CheckFailed: with every check that failed.
        ValueError: an unknown name, or arguments that do not fit what is said of them.
    """
    wanted = _wanted(checks, skip)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = Subject(
        fast=fast,
        reference=reference,
        arguments=arguments,
        mutates=tuple(mutates),
        differentiable=tuple(differentiable),
        given_batched=None if batched is None else tuple(batched),
        device=torch.device(device),
    )
    judge = Judge(own=rule) if isinstance(rule, Mapping) else Judge(rule)
    drawn = strategies.cases(
        strategies.dtypes(dtypes),
        strategies.shapes() if shapes is None else shapes,
        strategies.batches() if batches is None else batches,
    )
    failures, not_run = _run_battery(subject, judge, drawn, dtypes, examples, wanted)
    if "compiled_code" in wanted:
        _check_code(kernels, architectures, failures)
    if failures:
        ordered = {name: failures[name] for name in CHECKS if name in failures}
        raise CheckFailed(ordered, not_run)


def _run_battery(
    subject: Subject,
    judge: Judge,
    drawn: SearchStrategy[Case],
    dtypes: Sequence[torch.dtype],
    examples: int,
    wanted: Collection[str],
) -> tuple[Failures, list[str]]:
    """Return what failed, and what was not run for safety."""
    failures: Failures = {}
    chosen: list[Case] = []  # the case that does for the checks of each dtype

    number = itertools.count()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def every_case(case: Case) -> None:
        if not chosen:
            _validate(subject, judge, case)
        if not chosen or 0 in chosen[0].shape:
            chosen[:] = [case._replace(batch=max(case.batch, 2))]
        _run_checks(PER_CASE, wanted, Trial(subject, case, next(number)), judge, failures)

    every_case()
    later = [name for name in PER_DTYPE if name in wanted]
    if "red_zones" in failures:
        return failures, later
    for dtype in dtypes:
        trial = Trial(subject, chosen[0]._replace(dtype=dtype))
        _run_checks(PER_DTYPE, wanted, trial, judge, failures)
    return failures, []


def _run_checks(
    checks: Mapping[str, Check],
    wanted: Collection[str],
    trial: Trial,
    judge: Judge,
    failures: Failures,
) -> None:
    """Add what fails, if the case is smaller than the one that failed before."""
    case = trial.case
    if not any(name in wanted for name in checks):
        return
    try:
        _ = trial.base
    except Exception as error:
        error.add_note(f"fast was called with the arguments of {case}")
        raise
    for name, check in checks.items():
        if name not in wanted:
            continue
        try:
            check(trial, judge)
        except Exception as error:
            known = failures[name][0] if name in failures else None
            if known is None or _elements(case) < _elements(known):
                failures[name] = (case, error)


def _elements(case: Case) -> int:
    return case.batch * math.prod(case.shape)


def _check_code(
    kernels: Sequence[KernelCode], architectures: Sequence[int], failures: Failures
) -> None:
    """Add what is wrong with the kernels' machine code."""
    for kernel in kernels:
        name = kernel.fn.__name__
        try:
            found = code_faults(kernel, architectures)
            assert not found, f"{name} {'; '.join(found)}"
        except (AssertionError, RuntimeError) as error:
            failures["compiled_code"] = (None, error)


def _wanted(checks: Collection[str] | None, skip: Collection[str]) -> set[str]:
    """Return the names of the checks to run."""
    for argument, names in (("checks", checks or ()), ("skip", skip)):
        for name in (names,) if isinstance(names, str) else names:
            if name not in CHECKS:
                raise ValueError(f"{argument}={name!r}: must be among {', '.join(CHECKS)}")
        if isinstance(names, str):
            raise ValueError(f"{argument}={names!r}: must be a list of names")
    return set(CHECKS if checks is None else checks) - set(skip)


def _validate(subject: Subject, judge: Judge, case: Case) -> None:
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
    for name in judge.own:
        if name not in results:
            raise ValueError(f"rule={name!r}: must be among {', '.join(results)}")
