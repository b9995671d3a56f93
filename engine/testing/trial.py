"""Calls of a function under test, and what they yield: results, gradients and red zones.

Every call gets its arguments in red zones (memory around a tensor whose content shows whether it
was written), and so does what it allocates: a kernel that writes past its output must not harm the
process that finds this out.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashddpm.testing.strategies import Case
from flashddpm.testing.zones import Guarded, allocations

Arguments = dict[str, Any]
Results = dict[str, Tensor]

ZONE = 1 << 15
"""The number of elements before and behind each tensor: more than one program of a kernel would
overrun."""


@dataclass(frozen=True)
class Run:
    """One call of the function under test, and what it left.

    Attributes:
        results: a dictionary of the tensors that the call returned ("result", or "result 0",
            "result 1", ... of several), of the arguments that it changed, by their names, and of
            gradients ("gradient of x").
        arguments: a dictionary of the arguments by name, as they are after the call.
        zones: a dictionary of the guarded memory of every tensor argument, by its name, and of
            everything that the call allocated, "allocation 0", "allocation 1", ...
    """

    results: Results
    arguments: Arguments
    zones: dict[str, Guarded]


@dataclass
class Subject:
    """The function under test, its reference, and what is known of their arguments.

    Attributes:
        fast: the function under test.
        reference: the function that it must equal.
        arguments: called with (device, dtype, shape of one sample, batch, seed); returns the
            arguments by name.
        mutates: the names of the arguments that are changed in place.
        differentiable: the names of the arguments that have a gradient.
        given_batched: the names of the tensors whose first dimension is the batch, if the caller
            gave them; None to find them.
        device: the device that ``fast`` is called on.
    """

    fast: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Callable[..., Arguments]
    mutates: tuple[str, ...]
    differentiable: tuple[str, ...]
    given_batched: tuple[str, ...] | None
    device: torch.device
    _per_sample: set[str] | None = None

    def build(self, case: Case, device: torch.device | str | None = None) -> Arguments:
        """Return the arguments of a case, by name.

        Args:
            case: the dtype, shape, batch and seed.
            device: the device of the tensors; None for that of the subject.
        """
        return self.arguments(self.device if device is None else device, *case)

    def batched(self, case: Case) -> tuple[str, ...]:
        """Return the names of the arguments whose first dimension is the batch.

        Unless the caller gave them, they are those that grow by one when the case's batch does.
        """
        if self.given_batched is not None:
            return self.given_batched
        args, more = (self.build(case._replace(batch=case.batch + i), "cpu") for i in (0, 1))
        return tuple(_growing(args, more, case.batch))

    def per_sample(self, case: Case) -> set[str]:
        """Return the names of the results whose first dimension is the batch.

        They are found once, by the case of the first call of this method, from the reference; later
        calls return them whatever the case. Of changed arguments and gradients, those whose
        argument is batched.
        """
        if self._per_sample is None:
            batched = self.batched(case)
            fewer, more = (
                self.call(self.reference, self.build(case._replace(batch=case.batch + i), "cpu"))
                for i in (0, 1)
            )
            known = {*self.mutates, *(f"gradient of {name}" for name in self.differentiable)}
            grown = set(_growing(fewer, more, case.batch)) - known
            named = {*batched, *(f"gradient of {name}" for name in batched)}
            self._per_sample = grown | (known & named)
        return self._per_sample

    def call(
        self,
        function: Callable[..., Any],
        args: Arguments,
        seed: int = 0,
        order: Tensor | None = None,
    ) -> Results:
        """Call a function and return its results, changed arguments and gradients by name.

        The names are "result" for one tensor, "result 0", "result 1", ... for several, the names of
        the mutated arguments, and "gradient of x". A differentiable argument that no result depends
        on has no gradient among them.

        Args:
            function: the function to call.
            args: its arguments by name; in this dictionary, differentiable ones are replaced by
                leaves of autograd.
            seed: the seed of the gradients that are sent backward from the results; any int.
            order: int64 [batch], a permutation of the samples by which these gradients are
                permuted; None for none.

        Raises:
            ValueError: if the function returns something else than tensors or None, or if it
                returns nothing and no argument is mutated.
        """
        for name in self.differentiable:
            args[name] = args[name].detach().requires_grad_()
        made = _tensors(function(**args))
        if order is not None:
            order = order.to(self.device)
        outputs = [tensor for tensor in made.values() if tensor.requires_grad]
        if self.differentiable and outputs:
            weights = [_weights(tensor, seed + i, order) for i, tensor in enumerate(outputs)]
            torch.autograd.backward(outputs, weights)
        results = {name: args[name].detach() for name in self.mutates}
        results |= {name: tensor.detach() for name, tensor in made.items()}
        for name in self.differentiable:
            if args[name].grad is not None:
                results[f"gradient of {name}"] = args[name].grad.detach()
        if not results:
            raise ValueError("mutates=(): must name arguments, since the function returns nothing")
        return results

    def run(
        self,
        case: Case,
        args: Arguments | None = None,
        fill: float = 0.0,
        canary: float = Guarded.CANARY,
        order: Tensor | None = None,
    ) -> Run:
        """Call the function under test with all arguments and all that it allocates in red zones.

        Args:
            case: the case, whose arguments are taken if ``args`` are None, and whose seed is that
                of the gradients.
            args: the arguments by name, of which guarded copies are made; None for those of the
                case.
            fill: the value that buffers hold when the function allocates them; for integer dtypes
                the nearest that they hold (``zones.fit``), as for the canary.
            canary: the value that the red zones (memory around tensors) hold.
            order: int64 [batch], the permutation by which the samples were permuted, and the
                gradients sent backward are; None for none.

        Raises:
            ValueError: if the function returns something else than tensors or None, or if it
                returns nothing and no argument is mutated.
        """
        zones = {
            name: Guarded.like(value, ZONE, canary)
            for name, value in (self.build(case) if args is None else args).items()
            if isinstance(value, Tensor)
        }
        inside = dict(self.build(case) if args is None else args)
        inside |= {name: zone.view for name, zone in zones.items()}
        with allocations(fill, ZONE, canary) as made, np.errstate(all="ignore"):  # interpreter's
            results = self.call(self.fast, inside, case.seed, order)
        zones |= {f"allocation {i}": zone for i, zone in enumerate(made)}
        return Run(results, inside, zones)


class Trial:
    """A subject (a function under test and its reference) on one case, handed to every check.

    The runs that checks share are made when first asked for, and kept.

    Args:
        subject: the function under test and its reference.
        case: the dtype, shape, batch and seed.
        number: the number of the case, from 0, by which layouts vary.

    Attributes:
        subject, case, number: the arguments of the same names.
        generators_moved: a list of the names (as ``generators`` has them) of the global random
            generators whose state the call of ``base`` changed; empty if there are none. There is
            no such attribute before ``base`` is first read.
    """

    def __init__(self, subject: Subject, case: Case, number: int = 0) -> None:
        self.subject, self.case, self.number = subject, case, number

    @functools.cached_property
    def base(self) -> Run:
        """The ``Run`` of the function under test on the arguments of the case as they are built.

        Checks compare it with the reference, and with other runs: with other layouts, another order
        or other contents of memory. The first access makes it, sets ``generators_moved``, and
        raises whatever the function raises.
        """
        before = generators()
        run = self.subject.run(self.case)
        self.generators_moved = [
            name for name, state in generators().items() if state != before[name]
        ]
        return run

    @functools.cached_property
    def expected(self) -> Results:
        """The reference's results from the case's arguments, a dict of CPU tensors by name."""
        return self._reference(self.subject.build(self.case, "cpu"))

    @functools.cached_property
    def exact(self) -> Results:
        """The reference's results from arguments in float64, a dict of CPU tensors by name."""
        return self.in_float64(self.subject.build(self.case, "cpu"))

    def in_float64(self, args: Arguments) -> Results:
        """Return the reference's results, tensors by name, from arguments that are cast to float64.

        Args:
            args: the arguments by name, on the CPU; those that are not floating-point stay as they
                are.
        """
        return self._reference(in_float64(args))

    def _reference(self, args: Arguments) -> Results:
        return self.subject.call(self.subject.reference, args, self.case.seed)

    @property
    def batched(self) -> tuple[str, ...]:
        """The names of the arguments whose first dimension is the batch, a tuple of strings."""
        return self.subject.batched(self.case)


def in_float64(args: Arguments) -> Arguments:
    """Return the arguments by name, with floating-point tensors cast to float64."""
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in args.items()
    }


def generators() -> dict[str, Any]:
    """Return the states of the global random generators of torch, random and numpy, by name.

    The names are "torch", "random", "numpy" and, where there is a GPU, "torch.cuda" (of the current
    device). The states are lists or tuples of plain numbers, and can be compared with ``==``.
    """
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": [
            part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()
        ],
    }
    if torch.cuda.is_available():
        states["torch.cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def _growing(args: Arguments, more: Arguments, batch: int) -> list[str]:
    """Return the names of tensors of ``batch`` entries in ``args`` and one more in ``more``."""
    lengths = {
        name: (len(value), len(more[name]))
        for name, value in args.items()
        if isinstance(value, Tensor) and value.ndim
    }
    return [name for name, pair in lengths.items() if pair == (batch, batch + 1)]


def _tensors(result: Any) -> Results:
    """Return the tensors that a function returned, by name."""
    if result is None:
        return {}
    if isinstance(result, Tensor):
        return {"result": result}
    if isinstance(result, Sequence) and all(isinstance(part, Tensor) for part in result):
        return {f"result {i}": part for i, part in enumerate(result)}
    raise ValueError(f"fast returned {type(result).__name__}: must be tensors or None")


def _weights(tensor: Tensor, seed: int, order: Tensor | None) -> Tensor:
    """Return the gradient of a result: eighths of 1 to 16, of either sign, exact in every dtype."""
    draws = torch.Generator().manual_seed(seed % 2**63)
    weights = torch.randint(1, 17, tensor.shape, generator=draws) / 8
    weights = weights * (torch.randint(0, 2, tensor.shape, generator=draws) * 2 - 1)
    weights = weights.to(tensor.device, tensor.dtype)
    return weights if order is None or len(weights) != len(order) else weights[order]
