"""The checks of ``check_op``: what is asked of every kernel, one function each.

A check takes a ``Trial`` (the function under test on one case) and a ``Judge`` (the rules that
results are compared by). It raises AssertionError if it fails; it returns None if it passed, or a
string that says why there was nothing to check. The first line of a check's docstring is its text
in ``CHECKS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashddpm.testing import rules, strategies
from flashddpm.testing.rules import Rule
from flashddpm.testing.trial import Arguments, Results, Trial, in_float64

HINT = "(for another order of rounding give rule=rules.rounded(n) or rules.relative)"


@dataclass(frozen=True)
class Judge:
    """The rules by which results are compared with the reference's; calling it compares one.

    Attributes:
        default: the rule of results without one of their own, a callable of (result, the
            reference's result[, the reference's result in float64]) that raises AssertionError.
        own: the rules of results that have one of their own, by the result's name.
    """

    default: Rule = rules.bitwise
    own: Mapping[str, Rule] = field(default_factory=dict)

    def rule(self, name: str) -> Rule:
        """Return the rule of the result of this name: its own, or else the default."""
        return self.own.get(name, self.default)

    @property
    def needs_float64(self) -> bool:
        """Whether any rule compares with the reference's result in float64, a bool."""
        return any(map(rules.needs_float64, (self.default, *self.own.values())))

    def __call__(
        self,
        name: str,
        actual: Results,
        plain: Results,
        exact: Results,
        arguments: Callable[[], Arguments],
    ) -> None:
        """Compare a result with the reference's by its rule.

        Args:
            name: the name of the result.
            actual: the results of the function under test, tensors by name.
            plain: the reference's results, tensors by name.
            exact: the reference's results in float64, tensors by name; read if the rule asks for
                them.
            arguments: called without arguments by a rule that has terms; returns the arguments of
                the call by name, on the CPU.

        Raises:
            AssertionError: if the rule finds the result wrong.
        """
        rule = self.rule(name)
        try:
            if not rules.needs_float64(rule):
                rule(actual[name], plain[name])
            elif isinstance(rule, rules.Rounded) and rule.terms is not None:
                rule(actual[name], plain[name], exact[name], in_float64(arguments()))
            else:
                rule(actual[name], plain[name], exact[name])
        except AssertionError as error:
            hint = rule is rules.bitwise and "elements differ" in str(error)
            raise AssertionError(f"{error}\n{HINT}" if hint else str(error)) from None


class Recorder(TorchDispatchMode):
    """A context manager that records every call of an operator that is not PyTorch's own.

    Attributes:
        calls: a list, empty at first, of (operator, tuple of positional arguments, dictionary of
            keyword arguments), in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace not in ("aten", "prim", "prims"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Prefix the text of an error in a block with a name, and make it an AssertionError."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


def _compare(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys(), f"{sorted(actual)}, not {sorted(expected)}"
    for name, value in expected.items():
        with _about(name):
            rules.same(actual[name], value)


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient of ")


def _judge(trial: Trial, judge: Judge, names: Collection[str]) -> None:
    actual, expected = trial.base.results, trial.expected
    exact = trial.exact if judge.needs_float64 else expected
    for name in names:
        with _about(name):
            judge(name, actual, expected, exact, lambda: trial.subject.build(trial.case, "cpu"))


def _equals_reference(trial: Trial, judge: Judge) -> None:
    """The results are the reference's, by the rule."""
    found, names = (
        [name for name in results if not _is_gradient(name)]
        for results in (trial.base.results, trial.expected)
    )
    assert set(found) == set(names), f"{sorted(found)}, not {sorted(names)}"
    _judge(trial, judge, names)


def _gradients(trial: Trial, judge: Judge) -> str | None:
    """The gradient of each differentiable argument is autograd's of the reference, by the rule."""
    names = [f"gradient of {name}" for name in trial.subject.differentiable]
    for name in names:
        assert name in trial.base.results, f"{name}: the result has no gradient"
        assert name in trial.expected, f"{name}: the result of the reference has no gradient"
    _judge(trial, judge, names)
    return None if names else "differentiable names no argument"


def _repeatable(trial: Trial, judge: Judge) -> None:
    """A second run gives the same bits."""
    _compare(trial.subject.run(trial.case).results, trial.base.results)


def _arguments_unchanged(trial: Trial, judge: Judge) -> str | None:
    """Arguments that the function does not say it changes are as before."""
    fresh = trial.subject.build(trial.case)
    names = [name for name in fresh if name not in trial.subject.mutates]
    before = {name: fresh[name] for name in names if isinstance(fresh[name], Tensor)}
    _compare({name: trial.base.arguments[name] for name in before}, before)
    return None if before else "mutates names every tensor"


def _red_zones(trial: Trial, judge: Judge) -> None:
    """Nothing is written outside the arguments and the outputs, nor between their rows."""
    for name, zone in trial.base.zones.items():
        with _about(name):
            zone.check()


def _former_content(trial: Trial, judge: Judge) -> None:
    """Results do not depend on what buffers held, nor on what lies around the arguments."""
    other = trial.subject.run(trial.case, fill=torch.nan, canary=-678.0)
    _compare(other.results, trial.base.results)


def _layouts(trial: Trial, judge: Judge) -> str | None:
    """Any layout gives the same bits, or is refused by a ValueError that begins with its name.

    All arguments get another layout at once; one that is refused gets its own back.
    """
    args = trial.subject.build(trial.case)
    changed = {}
    for i, (name, value) in enumerate(args.items()):
        if isinstance(value, Tensor) and value.ndim and value.numel():
            possible = strategies.layouts_of(value.ndim)
            changed[name] = possible[(trial.number + i) % len(possible)]
    if not changed:
        return "no argument has a dimension and an element"
    while changed:
        moved = {name: layout(args[name]) for name, layout in changed.items()}
        with _about(", ".join(f"{name} {layout.__name__}" for name, layout in changed.items())):
            try:
                results = trial.subject.run(trial.case, args | moved).results
            except ValueError as refusal:
                refused = [name for name in changed if re.match(rf"{name}\b", str(refusal))]
                assert refused, f"refused without an argument's name: {refusal}"
                del changed[refused[0]]
            else:
                _compare(results, trial.base.results)
                break
    return None


def _zero_batch(trial: Trial, judge: Judge) -> None:
    """A batch of no samples gives what the reference gives."""
    empty = Trial(trial.subject, trial.case._replace(batch=0))
    expected = {
        name: value
        for name, value in empty.expected.items()
        if not _is_gradient(name) or name in trial.base.results  # one that has none: _gradients
    }
    _compare(empty.base.results, expected)


def _batch_order(trial: Trial, judge: Judge) -> str | None:
    """Samples in another order give the same bits in that order.

    Of results that are not one a sample, only arguments changed in place are compared.
    """
    batch = trial.case.batch
    if not trial.batched:
        return "no argument has one entry a sample"
    if batch < 2:
        return "no case has two samples"
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(trial.case.seed % 2**63))
    order = order.roll(1) if torch.equal(order, torch.arange(batch)) else order
    args = trial.subject.build(trial.case)
    for name in trial.batched:
        args[name] = args[name].clone().copy_(args[name][order.to(args[name].device)])
    results = trial.subject.run(trial.case, args, order=order).results
    per_sample = trial.subject.per_sample(trial.case)
    for name, value in trial.base.results.items():
        with _about(name):
            if name in per_sample:
                rules.same(results[name], value.cpu()[order])
            elif name in trial.subject.mutates:
                rules.same(results[name], value)
    return None


def _nonfinite(trial: Trial, judge: Judge) -> str | None:
    """NaN and Inf in one sample change its results as the reference's, and no other sample's.

    Of gradients only those of other samples are compared: autograd's of a reference may be NaN
    where a branch is not taken.
    """
    batch, seed = trial.case.batch, trial.case.seed

    def spoilt(device: Any) -> Arguments:
        args = trial.subject.build(trial.case, device)
        for i, name in enumerate(trial.batched):
            sample = args[name][seed % batch]
            if _can_be_spoilt(sample):
                places = torch.arange(sample.numel(), device=sample.device).reshape(sample.shape)
                first = (seed + i) % sample.numel()
                sample[places == (first + 1) % sample.numel()] = torch.inf
                sample[places == first] = strategies.BAD[(seed + i) % 3]
        return args

    args = trial.subject.build(trial.case, "cpu")
    if not any(_can_be_spoilt(args[name]) for name in trial.batched):
        return "no argument of floating point has one entry a sample"
    results = trial.subject.run(trial.case, spoilt(None)).results
    others = torch.arange(batch) != seed % batch
    for name in trial.subject.per_sample(trial.case) & results.keys():
        with _about(f"{name} of other samples"):
            rules.same(results[name].cpu()[others], trial.base.results[name].cpu()[others])
    expected = trial.subject.call(trial.subject.reference, spoilt("cpu"), seed)
    exact = trial.in_float64(spoilt("cpu")) if judge.needs_float64 else expected
    for name in expected:
        if not _is_gradient(name):
            with _about(name):
                judge(name, results, expected, exact, lambda: spoilt("cpu"))
    return None


def _can_be_spoilt(values: Tensor) -> bool:
    return values.is_floating_point() and values.numel() > 0


def _random_state(trial: Trial, judge: Judge) -> None:
    """The global generators of torch, numpy and random are as before."""
    assert trial.base and not trial.generators_moved, f"moved: {', '.join(trial.generators_moved)}"


def _opcheck(trial: Trial, judge: Judge) -> str | None:
    """Custom operators that a call uses have a right schema, fake and autograd registration."""
    subject = trial.subject
    with Recorder() as recorder:
        subject.call(subject.fast, subject.build(trial.case), trial.case.seed)
    for operator, args, kwargs in recorder.calls:
        if operator.name().endswith("_backward"):  # has no gradient of its own
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        with _about(operator.name()):
            torch.library.opcheck(operator, args, kwargs)
    return None if recorder.calls else "the call uses no custom operator"


def _compiled(trial: Trial, judge: Judge) -> None:
    """``torch.compile(fullgraph=True, backend="aot_eager")`` of it gives the same bits."""
    torch._dynamo.reset()
    compiled = torch.compile(trial.subject.fast, fullgraph=True, backend="aot_eager")
    results = trial.subject.call(compiled, trial.subject.build(trial.case), trial.case.seed)
    _compare(results, trial.base.results)


Check = Callable[[Trial, Judge], str | None]

PER_CASE: dict[str, Check] = {
    "red_zones": _red_zones,
    "equals_reference": _equals_reference,
    "gradients": _gradients,
    "repeatable": _repeatable,
    "arguments_unchanged": _arguments_unchanged,
    "former_content": _former_content,
    "layouts": _layouts,
    "batch_order": _batch_order,
    "nonfinite": _nonfinite,
    "random_state": _random_state,
}
PER_DTYPE: dict[str, Check] = {
    "zero_batch": _zero_batch,
    "opcheck": _opcheck,
    "compiled": _compiled,
}
CHECKS: dict[str, str] = {
    name: (function.__doc__ or "").partition("\n")[0]
    for name, function in (PER_CASE | PER_DTYPE).items()
} | {"compiled_code": "The machine code of the given kernels passes the gates."}
"""The text of every check, which says what it asks, by the check's name."""
