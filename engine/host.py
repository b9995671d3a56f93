"""Isolation from torch's global state: default device and dtype, autocast, inference and grad mode.

The caller's program may have set any of these, and may call us inside of its own
``torch.compile``. Our bits are the same in all of them, because

* what is made on the host says its device and its dtype (``ints``, ``floats``);
* networks that we build are built under ``plain_factories``;
* public entry points are ``isolated``.

A default dtype also decides what integers times a fraction are: cast integers first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = ("cpu", "cuda")
AS_IT_IS = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)

FLOATS = frozenset(
    {torch.empty, torch.eye, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros}
)
"""Factories whose tensors are of the default dtype if none is given."""
FACTORIES = FLOATS | {torch.arange, torch.full, torch.randint, torch.randperm, torch.tensor}
"""Factories whose tensors are on the default device if none is given."""


def ints(values: Any) -> Tensor:
    """Return an integer, as [], or (nested) lists of them, as an int64 tensor on the CPU."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def floats(values: Any) -> Tensor:
    """Return a number, as [], or (nested) lists of them, as a float32 tensor on the CPU."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


class plain_factories(TorchFunctionMode):
    """A context in which torch's factories make tensors as in a process without global settings.

    In it torch.zeros and the like make tensors on ``device`` unless told another, and of float32
    where they would be of the default dtype. That is ``with torch.device(device)`` in a plain
    process, but for this thread only: torch.set_default_dtype is for all threads, and torch.device
    would have compiled functions of the whole process compile anew, as they are guarded by its
    innermost device. A torch.device context inside of this one has no effect.

    Args:
        device: the device of tensors that are made.

    Attributes:
        device: the same, a torch.device.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, with the device and dtype set if it is a factory."""
        given = dict(kwargs or {})
        if func in FACTORIES:
            if given.get("device") is None:
                given["device"] = self.device
            made_of = (*args, *given.values())
            if given.get("dtype") is None and (func in FLOATS or _holds_float(made_of)):
                given["dtype"] = torch.float32
        return func(*args, **given)


def _holds_float(value: Any) -> bool:
    """Return whether (nested) lists hold a Python float; NumPy's have their own dtypes."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_float, value))
    return type(value) is float


@overload
def isolated(function: Callable[P, R]) -> Callable[P, R]: ...
@overload
def isolated(*, grad: bool) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def isolated(function: Any = None, *, grad: bool | None = None) -> Any:
    """Decorate a function to run outside of the caller's inference mode, autocast and compiler.

    The tensors that it makes are ordinary ones, of the dtypes that its code says. Where the
    caller's torch.compile meets the function, the graph breaks, and the function runs uncompiled;
    what it compiles itself is compiled as ever. Use it as ``@isolated`` or
    ``@isolated(grad=False)``.

    Args:
        function: the function; neither a generator nor async, since those run where they are
            iterated.
        grad: whether gradients are recorded in the function; None for the caller's own setting.

    Returns:
        A function of the same signature, name and docstring; with ``grad`` alone, a decorator.
    """
    if function is None:
        return functools.partial(_isolated, grad=grad)
    return _isolated(function, grad)


def _isolated(function: Callable[P, R], grad: bool | None) -> Callable[P, R]:
    @functools.wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        records = torch.is_grad_enabled() if grad is None else grad
        with ExitStack() as plain:
            for kind in DEVICES:
                if torch.is_autocast_enabled(kind):
                    torch.clear_autocast_cache()  # of weights, which may have changed since
                    plain.enter_context(torch.autocast(kind, enabled=False))
            if torch.is_inference_mode_enabled():
                plain.enter_context(torch.inference_mode(False))  # which turns gradients on
            if torch.is_grad_enabled() != records:
                plain.enter_context(torch.set_grad_enabled(records))
            return function(*args, **kwargs)

    # Here a graph breaks, and the code runs as it is, with all that it calls: as a function of
    # torch.compiler.disable's, without the seconds that it takes to import the compiler. These are
    # private names, which torch.compiler.disable is made of; torch 2.11 and 2.14 have them.
    entry._torchdynamo_disable = True  # type: ignore[attr-defined]
    set_code_exec_strategy(entry.__code__, AS_IT_IS)  # type: ignore[attr-defined]
    return entry
