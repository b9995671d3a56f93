"""One call of a function under test, and what comes of it: results, gradients, red zones.

Every call gets its arguments in red zones, and so does what it allocates: a kernel that writes past
its output must not harm the process that finds this out.
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
"""Elements around each tensor: more than one program of a kernel would overrun."""


@dataclass(frozen=True)
class Run:
    """One call: its results by name, the arguments after it, and the zones around all of them."""

    results: Results
    arguments: Arguments
    zones: dict[str, Guarded]


@dataclass
class Subject:
    """What is under test; the arguments of ``check_op``, and what is found out about them."""

    fast: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Callable[..., Arguments]
    mutates: tuple[str, ...]
    differentiable: tuple[str, ...]
    given_batched: tuple[str, ...] | None
    device: torch.device
    _per_sample: set[str] | None = None

    def build(self, case: Case, device: torch.device | str | None = None) -> Arguments:
        """Return the arguments of a case."""
        return self.arguments(self.device if device is None else device, *case)

    def batched(self, case: Case) -> tuple[str, ...]:
        """Return the names of the arguments that have one entry a sample."""
        if self.given_batched is not None:
            return self.given_batched
        args, more = (self.build(case._replace(batch=case.batch + i), "cpu") for i in (0, 1))
        return tuple(_growing(args, more, case.batch))

    def per_sample(self, case: Case) -> set[str]:
        """Return the names of the results that have one entry a sample."""
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
        """Return every tensor that the call makes or changes, gradients included, by name.

        A differentiable argument that no result depends on has no gradient among them.

        Args:
            function: to call.
            args: its arguments; those that are differentiable are replaced by leaves.
            seed: of the gradients of the results, that go backward.
            order: permutes these gradients.
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
        """Call the fast function, everything in red zones.

        Args:
            case: whose arguments are taken if ``args`` are not given.
            args: to call it with.
            fill: what its buffers hold when it gets them.
            canary: what the zones hold.
            order: of the samples, if they were permuted.
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
    """A subject on one case, the number-th; runs are made when a check first asks for them."""

    def __init__(self, subject: Subject, case: Case, number: int = 0) -> None:
        self.subject, self.case, self.number = subject, case, number

    @functools.cached_property
    def base(self) -> Run:
        """The run that the others are compared with."""
        before = generators()
        run = self.subject.run(self.case)
        self.generators_moved = [
            name for name, state in generators().items() if state != before[name]
        ]
        return run

    @functools.cached_property
    def expected(self) -> Results:
        """What the reference makes of the same arguments, on the CPU."""
        return self._reference(self.subject.build(self.case, "cpu"))

    @functools.cached_property
    def exact(self) -> Results:
        """The same in float64."""
        return self.in_float64(self.subject.build(self.case, "cpu"))

    def in_float64(self, args: Arguments) -> Results:
        """Return the reference's results from arguments cast to float64."""
        return self._reference(in_float64(args))

    def _reference(self, args: Arguments) -> Results:
        return self.subject.call(self.subject.reference, args, self.case.seed)

    @property
    def batched(self) -> tuple[str, ...]:
        """Names of the arguments that have one entry a sample."""
        return self.subject.batched(self.case)


def in_float64(args: Arguments) -> Arguments:
    """Return the arguments, those of floating point cast to float64."""
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in args.items()
    }


def generators() -> dict[str, Any]:
    """Return the states of the global random generators, by name."""
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
    """Return the names of the tensors that have ``batch`` entries, and one more in ``more``."""
    lengths = {
        name: (len(value), len(more[name]))
        for name, value in args.items()
        if isinstance(value, Tensor) and value.ndim
    }
    return [name for name, pair in lengths.items() if pair == (batch, batch + 1)]


def _tensors(result: Any) -> Results:
    """Return what a function returned, by name."""
    if result is None:
        return {}
    if isinstance(result, Tensor):
        return {"result": result}
    if isinstance(result, Sequence) and all(isinstance(part, Tensor) for part in result):
        return {f"result {i}": part for i, part in enumerate(result)}
    raise ValueError(f"fast returned {type(result).__name__}: must be tensors or None")


def _weights(tensor: Tensor, seed: int, order: Tensor | None) -> Tensor:
    """Return the gradient of a result: numbers that every dtype holds exactly, never 0."""
    draws = torch.Generator().manual_seed(seed % 2**63)
    weights = torch.randint(1, 17, tensor.shape, generator=draws) / 8
    weights = weights * (torch.randint(0, 2, tensor.shape, generator=draws) * 2 - 1)
    weights = weights.to(tensor.device, tensor.dtype)
    return weights if order is None or len(weights) != len(order) else weights[order]
