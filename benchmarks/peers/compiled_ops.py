"""Calls of operations and their gradients, and what a compiler makes of the same work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch_config

if TYPE_CHECKING:
    from flashddpm.kernels.operation import Arguments, Op


def copied(arguments: Arguments) -> Arguments:
    """Return the arguments with tensors of their own."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def elements_of(arguments: Arguments) -> int:
    """Return the number of elements of the images; of slots, where there are none."""
    for name in ("x0", "x"):
        if name in arguments:
            return arguments[name].numel()
    first = next(iter(arguments.values()))
    return len(first) * torch.Size(arguments.get("shape", ())).numel()


def upstream_of(op: Op, result: Tensor, arguments: Arguments) -> Tensor:
    """Return the gradient of the result that makes those of the images of the size of 1."""
    mean = result.ndim == 1  # over the elements of an image
    return torch.full_like(result, elements_of(arguments) // len(result) if mean else 1)


def call(function: Callable[..., Any], arguments: Arguments) -> Callable[[], Any]:
    """Return a call of the function on copies of the arguments."""
    return partial(function, **copied(arguments))


def gradient_call(
    op: Op, function: Callable[..., Any], arguments: Arguments
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that computes the gradients alone: the function has run, on copies."""
    copies = copied(arguments)
    leaves = [copies[name].requires_grad_() for name in op.differentiable]
    result = function(**copies)
    upstream = upstream_of(op, result, copies)
    return lambda: torch.autograd.grad(result, leaves, upstream, retain_graph=True)


def directions(op: Op, arguments: Arguments, function: Callable[..., Any]) -> dict[str, Callable]:
    """Return, by direction, what makes a call of the function: its result, its gradients."""
    ways: dict[str, Callable] = {"": partial(call, function, arguments)}
    if op.differentiable:
        ways["-backward"] = partial(gradient_call, op, function, arguments)
    return ways


def compiled(
    function: Callable[..., Any], op: Op, arguments: Arguments, backend: str = "inductor"
) -> Callable[..., Any]:
    """Compile the whole function for these arguments, its gradients too, and run it once."""
    torch.compiler.reset()  # Dynamo stops compiling a function after a few shapes
    # Buffers given away could not serve a gradient that is taken many times.
    with functorch_config.patch(donated_buffer=False):
        made = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        if op.differentiable:
            gradient_call(op, made, arguments)()
        else:
            call(made, arguments)()
    return made


def _said(error: Exception) -> str:
    """Return what a compiler complains of, in a line; a worker's message ends with it."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if lines[0].endswith(":") else 0].strip()


def compiled_peer(
    op: Op, arguments: Arguments, backend: str = "inductor"
) -> tuple[str, Callable[..., Any] | None]:
    """Return the name of the best that a compiler makes of the operation's work, and that.

    The reference; if it does not trace, for it reads numbers, the plain chain of the operation's
    first case; None without one.
    """
    try:
        return "compiled reference", compiled(op.reference, op, arguments, backend)
    except TorchDynamoException as error:
        reason = f"the reference does not compile whole: {_said(error)}"
    chain = op.cases[0].plain if op.cases else None
    if chain is None:
        return f"none; {reason}", None
    return f"compiled plain chain; {reason}", compiled(chain, op, arguments, backend)
