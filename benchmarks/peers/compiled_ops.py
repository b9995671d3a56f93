"""Calls of kernel operations and of their gradients, and compiled PyTorch code for the same work.

An operation (`Op`) is one of flashddpm's functions with a fast path, a reference in plain PyTorch
and example arguments; its arguments are a dictionary from names to tensors and other values.
"""

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
    """Return a new dictionary of arguments in which every tensor is a copy.

    Args:
        arguments: the arguments of an operation by name; values that are no tensors are taken over.
    """
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def elements_of(arguments: Arguments) -> int:
    """Return the number of elements that one call of an operation works on.

    Args:
        arguments: the arguments of the operation by name; not empty.

    Returns:
        The elements of all images together: those of "x0" or else of "x"; without either, the
        length of the first argument times the elements of an image of the argument "shape" (times 1
        without "shape": the number of slots, the places of images in a batch).
    """
    for name in ("x0", "x"):
        if name in arguments:
            return arguments[name].numel()
    first = next(iter(arguments.values()))
    return len(first) * torch.Size(arguments.get("shape", ())).numel()


def upstream_of(op: Op, result: Tensor, arguments: Arguments) -> Tensor:
    """Return the upstream gradient of an operation's result, scaled for gradients of about size 1.

    Args:
        op: the operation; not looked at.
        result: what the operation returned: floating [B], a mean over the elements of each image,
            or images [B, C, H, W].
        arguments: the arguments of the operation by name.

    Returns:
        A tensor of the result's shape, dtype and device, filled with one value: the number of
        elements of an image for a result [B], otherwise 1.
    """
    mean = result.ndim == 1  # over the elements of an image
    return torch.full_like(result, elements_of(arguments) // len(result) if mean else 1)


def call(function: Callable[..., Any], arguments: Arguments) -> Callable[[], Any]:
    """Return a function without arguments that calls ``function`` on copies of the arguments.

    The copies are made once, here.

    Args:
        function: called with the arguments by name.
        arguments: the arguments of an operation by name.
    """
    return partial(function, **copied(arguments))


def gradient_call(
    op: Op, function: Callable[..., Any], arguments: Arguments
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function without arguments that computes an operation's gradients alone.

    The forward pass is run once, here, on copies of the arguments, and its graph is kept, so that
    the returned function may be called many times.

    Args:
        op: the operation; its ``differentiable`` names the arguments that get a gradient.
        function: the operation's fast path, reference or another function of the same arguments.
        arguments: the arguments of the operation by name.

    Returns:
        A function that returns the gradients, one tensor for each name of ``op.differentiable``, of
        the argument's shape and dtype, for the upstream gradient of `upstream_of`.
    """
    copies = copied(arguments)
    leaves = [copies[name].requires_grad_() for name in op.differentiable]
    result = function(**copies)
    upstream = upstream_of(op, result, copies)
    return lambda: torch.autograd.grad(result, leaves, upstream, retain_graph=True)


def directions(op: Op, arguments: Arguments, function: Callable[..., Any]) -> dict[str, Callable]:
    """Return the makers of an operation's forward call and, where it has one, its gradient call.

    Args:
        op: the operation.
        arguments: the arguments of the operation by name.
        function: the operation's fast path, reference or another function of the same arguments.

    Returns:
        A dictionary: the key "" has a function without arguments that returns a new `call`;
        "-backward", present if the operation is differentiable, one that returns a new
        `gradient_call`. Each call has copies of the arguments of its own.
    """
    ways: dict[str, Callable] = {"": partial(call, function, arguments)}
    if op.differentiable:
        ways["-backward"] = partial(gradient_call, op, function, arguments)
    return ways


def compiled(
    function: Callable[..., Any], op: Op, arguments: Arguments, backend: str = "inductor"
) -> Callable[..., Any]:
    """Compile a function whole for the shapes of given arguments, and run it once.

    All code that torch.compile has made before in this process is dropped (torch.compiler.reset).

    Args:
        function: a function of the operation's arguments.
        op: the operation; if it is differentiable, the gradient is compiled and run too.
        arguments: the arguments of the operation by name; they are copied.
        backend: the backend of torch.compile.

    Returns:
        The compiled function, with the signature of ``function``.

    Raises:
        torch._dynamo.exc.TorchDynamoException: if the function cannot be compiled as one graph.
    """
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
    """Return the essential line of a compiler's error.

    It is the first line, or the last if the first ends in a colon, as a compile worker's does.
    """
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if lines[0].endswith(":") else 0].strip()


def compiled_peer(
    op: Op, arguments: Arguments, backend: str = "inductor"
) -> tuple[str, Callable[..., Any] | None]:
    """Return the best compiled PyTorch code for an operation's work, with a name for it.

    That is the operation's reference, compiled; or, if the reference cannot be compiled whole, the
    plain PyTorch code of the operation's first case, compiled.

    Args:
        op: the operation.
        arguments: the arguments of the operation by name.
        backend: the backend of torch.compile.

    Returns:
        A name for tables, which says why the reference was not compiled; and the compiled function
        of the operation's arguments, or None if there is neither.

    Raises:
        torch._dynamo.exc.TorchDynamoException: if the plain code cannot be compiled whole.
    """
    try:
        return "compiled reference", compiled(op.reference, op, arguments, backend)
    except TorchDynamoException as error:
        reason = f"the reference does not compile whole: {_said(error)}"
    chain = op.cases[0].plain if op.cases else None
    if chain is None:
        return f"none; {reason}", None
    return f"compiled plain chain; {reason}", compiled(chain, op, arguments, backend)
