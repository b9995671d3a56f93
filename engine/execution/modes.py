"""Evaluation mode for networks that are sampled from, and their own mode again afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from flashddpm.execution.processes import renewed_in_child
from flashddpm.networks.customized import walk


class _Evaluations:
    """The modules that are held in evaluation mode, and the threads that hold them.

    There is one in a process: samplers in several threads may share modules, and the first to end
    must not switch dropout on under the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[nn.Module, list[int]] = {}
        renewed_in_child(self)

    def begin(self, networks: Iterable[nn.Module]) -> list[nn.Module]:
        """Switch modules in training to evaluation; return them, and those that others switched."""
        me = threading.get_ident()
        with self._lock:
            modules = (module for network in networks for module in walk(network))
            mine = [m for m in modules if m.training or m in self._held]
            for module in mine:
                self._held.setdefault(module, []).append(me)
                # The flag alone: train() of a user's module may do more, such as to merge weights.
                module.training = False
        return mine

    def end(self, mine: list[nn.Module]) -> None:
        """Release modules that `begin` returned; those that nobody else holds train again."""
        me = threading.get_ident()
        with self._lock:
            for module in mine:
                self._held[module].remove(me)
                self._put_back(module)

    def _put_back(self, module: nn.Module) -> None:
        if not self._held[module]:
            del self._held[module]
            module.training = True

    def after_fork(self) -> None:
        """Release what the parent's other threads held, which are not in the forked child."""
        self._lock = threading.Lock()
        me = threading.get_ident()  # has forked in a callback, if it is among them
        for module, threads in list(self._held.items()):
            threads[:] = [thread for thread in threads if thread == me]
            self._put_back(module)


_EVALUATIONS = _Evaluations()


def module_of(function: Any) -> nn.Module | None:
    """Return a network that is a module, or the module whose bound method it is; else None."""
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Hold networks in evaluation mode within this context, then restore each module's own mode.

    The mode is restored too if the block raises. Threads may hold the same modules: those that were
    in training return to it when the last thread releases them. Only the ``training`` flag is set,
    since a module's own train() may do more, such as merge weights.

    Args:
        networks: the modules, switched with all modules in them.
    """
    switched = _EVALUATIONS.begin(networks)
    try:
        yield
    finally:
        _EVALUATIONS.end(switched)
