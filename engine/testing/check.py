"""``check_op``: run all checks of a kernel on any function that has a reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from flashddpm.errors import Portable, portable
from flashddpm.testing import rules, strategies
from flashddpm.testing.battery import CHECKS, PER_CASE, PER_DTYPE, Check, Judge
from flashddpm.testing.gates import ARCHITECTURES, KernelCode, code_faults
from flashddpm.testing.rules import Rule
from flashddpm.testing.strategies import Case
from flashddpm.testing.trial import Arguments, Subject, Trial
from flashddpm.testing.validate import validate, validate_cases, validate_float64, wanted_checks

__all__ = ["CHECKS", "CheckFailed", "check_op"]

Failures = dict[str, tuple[Case | None, Exception]]
RAN, NOT_RUN = "ran", "not run: "


class CheckFailed(Portable, AssertionError):
    """Checks of ``check_op`` failed; the message has the first and last lines of each failure.

    Args:
        failures: a dictionary: the name of the check -> (the smallest ``Case`` that failed, or None
            for compiled code; the exception).
        not_run: the names of the checks that were not run for safety.

    Attributes:
        failures: the same dictionary, from a check's name to (case or None, exception).
        not_run: a tuple of the names of the checks that were not run, since a kernel that writes
            into red zones (memory around its tensors) may harm the process where there are none.
    """

    def __init__(self, failures: Failures, not_run: Collection[str] = ()) -> None:
        self.failures, self.not_run = failures, tuple(not_run)
        lines = []
        for name, (case, error) in failures.items():
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            lines.append(f"{name}: {kind}{_short(str(error))}")
            lines += [f"    with {case}"] if case else []
        lines += [f"{name}: not run, for a red zone was written" for name in not_run]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        sent = {name: (case, portable(error)) for name, (case, error) in self.failures.items()}
        rebuild, (kind, args, attributes, causes) = super().__reduce__()
        return rebuild, (kind, args, attributes | {"failures": sent}, causes)


def _short(text: str, width: int = 300) -> str:
    """Return the first two lines and the last line of a text, each cut to ``width`` characters."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if len(lines) > 3:
        lines = [*lines[:2], "...", lines[-1]]
    cut = [line if len(line) <= width else f"{line[:width]} ..." for line in lines]
    return "\n    ".join(cut)


@dataclass
class Findings:
    """The findings of one call of ``check_op``, which its checks are run through.

    Attributes:
        wanted: a set of the names of the checks to run.
        failures: a dictionary: the name of the check -> (the smallest ``Case`` that failed, None
            for compiled code; the exception).
        outcomes: a dictionary: the name of the check -> "ran", or "not run: " and why there was
            nothing to check.
    """

    wanted: Collection[str]
    failures: Failures = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    def run(self, name: str, case: Case | None, check: Callable[[], str | None]) -> None:
        """Run a check and note its outcome; of several failures that of the smallest case is kept.

        Args:
            name: the name of the check.
            case: the case, whose size is batch times the elements of a sample; None for compiled
                code.
            check: called without arguments; returns None if it ran, or a string that says why there
                was nothing to check. Whatever Exception it raises is noted as a failure.
        """
        reason = None
        try:
            reason = check()
        except Exception as error:
            known = self.failures[name][0] if name in self.failures else None
            if case is None or known is None or _elements(case) < _elements(known):
                self.failures[name] = (case, error)
        if self.outcomes.get(name) != RAN:
            self.outcomes[name] = RAN if reason is None else NOT_RUN + reason


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
    cases: Iterable[Case] = (),
    examples: int = 25,
    derandomize: bool = True,
    device: torch.device | str | None = None,
    kernels: Sequence[KernelCode] = (),
    architectures: Sequence[int] = ARCHITECTURES,
    checks: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> dict[str, str]:
    """Run all checks on ``fast``, a function of the same arguments as ``reference``.

    Both functions are called with keyword arguments, and return a tensor, a sequence of tensors, or
    None. ``CHECKS`` says what each check asks.

    Args:
        fast: the function under test, called on ``device``.
        reference: the function that it must equal, called on the CPU. If a rule asks for float64 it
            is also called with float64, and then must not cast it to float32.
        arguments: called with (device, dtype, shape of one sample, batch, seed); returns the
            arguments by name, the same numbers on every device and whenever it is called.
        mutates: the names of the arguments that are changed in place.
        differentiable: the names of the arguments that have a gradient.
        batched: the names of the tensors whose first dimension is the batch; None for those that
            grow by one when the batch does, () if samples are not independent.
        rule: the rule that results and gradients are compared by, or a dictionary of rules by the
            name of the result: "result" ("result 0", "result 1" of several), the name of a mutated
            argument, or "gradient of x". Results without a rule must be equal bit for bit.
        dtypes: the dtypes that cases are drawn from: by default float32, float16 and bfloat16.
        shapes: a strategy of one sample's shape; None for (C, H, W) of 0 to 1,025 pixels, C 1 or 3.
        batches: a strategy of the number of samples, at least 1; None for 1 to 4.
        cases: cases, ``Case(dtype, shape, batch, seed)``, that are run before those drawn.
        examples: the most cases that are drawn, each a dozen calls; 0 for ``cases`` alone.
        derandomize: whether every run draws the same cases, so that a failure comes back.
        device: the device of ``fast``; None for "cuda" if there is one, else "cpu".
        kernels: the kernels whose machine code is checked.
        architectures: the GPUs that it is compiled for: compute capabilities times 10, such as 90.
        checks: the names of the checks to run; None for all.
        skip: the names of the checks to leave out, even if ``checks`` has them.

    Returns:
        A dictionary: the name of every check -> "ran", or "not run: " and why: it was left out, or
        had nothing to check.

    Raises:
        CheckFailed: if a check failed. An error of ``fast`` on a case's own arguments is
            raised as it is; one that only a check's changed arguments provoke fails that check.
        ValueError: if a name is unknown, if arguments do not fit what is said of them, or if a
            check that is named in ``checks`` has nothing to check.
    """
    kernels, cases, dtypes = tuple(kernels), tuple(cases), tuple(dtypes)
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
    wanted = wanted_checks(checks, skip, subject, kernels)
    validate_cases(cases, dtypes, examples)
    judge = Judge(own=rule) if isinstance(rule, Mapping) else Judge(rule)
    drawn = strategies.cases(
        strategies.dtypes(dtypes),
        strategies.shapes() if shapes is None else shapes,
        strategies.batches() if batches is None else batches,
    )
    findings = Findings(wanted)
    battery = _Battery(subject, judge, findings)
    with _quick_interpreter():
        for case in cases:
            battery.every_case(case)
        if examples:
            _draw(battery.every_case, drawn, examples, derandomize)
        not_run = battery.every_dtype(dtypes)
    if "compiled_code" in wanted:
        _check_code(kernels, architectures, findings)
    return _outcomes(findings, checks or (), not_run)


def _quick_interpreter() -> AbstractContextManager[None]:
    """Return a context that speeds up Triton's interpreter; one without effect without Triton."""
    try:
        from flashddpm.kernels.checks.interpreter import quick
    except ImportError:
        return nullcontext()
    return quick()


def _outcomes(
    findings: Findings, asked: Collection[str], not_run: Collection[str]
) -> dict[str, str]:
    """Return the outcome of every check, by name.

    Raises:
        CheckFailed: if a check failed.
        ValueError: if a check that was asked for by name had nothing to check.
    """
    if findings.failures:
        ordered = {name: findings.failures[name] for name in CHECKS if name in findings.failures}
        raise CheckFailed(ordered, not_run)
    outcomes = {name: findings.outcomes.get(name, NOT_RUN + "left out") for name in CHECKS}
    for name in asked:
        reason = outcomes[name].removeprefix(NOT_RUN)
        if name in findings.wanted and reason != RAN:
            raise ValueError(f"checks={name!r}: must have something to check, but {reason}")
    return outcomes


def _draw(
    every_case: Callable[[Case], None],
    drawn: SearchStrategy[Case],
    examples: int,
    derandomize: bool,
) -> None:
    """Call ``every_case`` with ``examples`` cases that are drawn from a strategy."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=derandomize,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def call(case: Case) -> None:
        every_case(case)

    call()


@dataclass
class _Battery:
    """The run of all checks on a subject, case by case."""

    subject: Subject
    judge: Judge
    findings: Findings
    number: int = 0
    chosen: Case | None = None
    """The case for the checks that are run once per dtype: the first case that has elements."""

    def every_case(self, case: Case) -> None:
        """Run the checks of one case; before the first, validate what the caller gave."""
        if self.number == 0:
            validate(self.subject, self.judge, case)
        if self.chosen is None or 0 in self.chosen.shape:
            if self.judge.needs_float64 and 0 not in case.shape:
                validate_float64(self.subject, self.judge, case)
            self.chosen = case._replace(batch=max(case.batch, 2))
        self._run(PER_CASE, Trial(self.subject, case, self.number))
        self.number += 1

    def every_dtype(self, dtypes: Sequence[torch.dtype]) -> list[str]:
        """Run the checks of each dtype; return the names of those that were not run for safety."""
        names = [name for name in PER_DTYPE if name in self.findings.wanted]
        if "red_zones" in self.findings.failures:
            return names
        assert self.chosen is not None
        for dtype in dtypes:
            self._run(PER_DTYPE, Trial(self.subject, self.chosen._replace(dtype=dtype)))
        return []

    def _run(self, checks: Mapping[str, Check], trial: Trial) -> None:
        names = [name for name in checks if name in self.findings.wanted]
        if not names:
            return
        try:
            _ = trial.base
        except Exception as error:
            error.add_note(f"fast was called with the arguments of {trial.case}")
            raise
        for name in names:
            check = functools.partial(checks[name], trial, self.judge)
            self.findings.run(name, trial.case, check)


def _elements(case: Case) -> int:
    return case.batch * math.prod(case.shape)


def _check_code(
    kernels: Sequence[KernelCode], architectures: Sequence[int], findings: Findings
) -> None:
    """Check the machine code of the kernels."""

    def check(kernel: KernelCode) -> None:
        found = code_faults(kernel, architectures)
        assert not found, f"{kernel.fn.__name__} {'; '.join(found)}"

    for kernel in kernels:
        findings.run("compiled_code", None, functools.partial(check, kernel))
    if not kernels:
        findings.run("compiled_code", None, lambda: "no kernels are given")
