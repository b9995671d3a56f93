"""Adapters that give a network, or the user's own call of one, the signature that a step calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from flashddpm.execution.step import Call, Network


def positional(network: Call) -> Network:
    """Return a function of a step's signature that calls a network with positional arguments.

    Args:
        network: called with x_t, [L, C, H, W] for L lanes (network evaluations), and t, int64 or
            float32 [L], and where there are labels with labels, int64 [L], as the third; it returns
            the output, [L, C or 2C, H, W].

    Returns:
        A function (x_t, t, labels or None, index) -> output, which does not use index.
    """

    def predict(x_t: Tensor, t: Tensor, labels: Tensor | None, index: Tensor) -> Tensor:
        return network(x_t, t) if labels is None else network(x_t, t, labels)

    return predict


def by_call(call: Call) -> Network:
    """Return a function of a step's signature that calls the network by the user's ``call``.

    Args:
        call: called with x_t, [L, C, H, W] for L lanes (network evaluations), t, int64 or float32
            [L], and labels, int64 [L] or None; and with index, int64 [L], by name, where it has a
            parameter ``index``. It returns the output, [L, C or 2C, H, W].

    Returns:
        A function (x_t, t, labels or None, index) -> output; index is the place of each lane's
        image among the images asked for.
    """

    def predict(x_t: Tensor, t: Tensor, labels: Tensor | None, index: Tensor) -> Tensor:
        return call(x_t, t, labels)

    def predict_by_index(x_t: Tensor, t: Tensor, labels: Tensor | None, index: Tensor) -> Tensor:
        return call(x_t, t, labels, index=index)

    return predict_by_index if _takes_index(call) else predict


def _takes_index(function: Callable[..., Any]) -> bool:
    """Return whether a function has a parameter ``index`` that may be given by its name."""
    if isinstance(function, partial) and "index" in function.keywords:
        return False  # it is given already
    called = function.forward if isinstance(function, nn.Module) else function
    for through in (False, True):  # what wraps a function, then the function, if that gets them all
        try:
            parameters = inspect.signature(called, follow_wrapped=through).parameters
        except (TypeError, ValueError):  # a built-in function
            return False
        index = parameters.get("index")
        if index is not None:
            return index.kind is not inspect.Parameter.POSITIONAL_ONLY
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return False
    return False
