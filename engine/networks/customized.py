"""Whether a module does what its class and settings say, or the program has changed it.

Hooks, a forward of the instance's own, another class, another activation: what runs a network in
its own way, from its weights and config, must know that there is none of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
WITHOUT_EFFECT = ("training", "gradient_checkpointing")
"""Attributes that change no output in evaluation."""


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all that it holds: nn.Module.modules without names, in a quarter of it."""
    left = [module]
    while left:
        module = left.pop()
        yield module
        left += (child for child in module._modules.values() if child is not None)


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module and of all that it holds."""
    for one in walk(module):
        yield from (p for p in one._parameters.values() if p is not None)


def touched(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return what stands between a call of the module and its class's forward; None for nothing.

    Args:
        module: it alone, not what it holds.
        kind: the class that it must be of, no subclass.
    """
    if type(module) is not kind:
        return f"is a {type(module).__name__}"
    if "forward" in vars(module):
        return "has a forward of its own"
    return "has hooks" if has_hooks(module) else None


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run with the module's own forward or backward."""
    return any(getattr(module, name) for name in HOOKS)


def hanging(network: Any) -> frozenset[tuple[str, str, int]]:
    """Return every hook and forward of an instance's own in a network, by module, kind and number.

    Args:
        network: a module with all that it holds; on anything else nothing hangs.
    """
    if not isinstance(network, nn.Module):
        return frozenset()
    found = set()
    for name, module in network.named_modules():
        found |= {(name, kind, key) for kind in HOOKS for key in getattr(module, kind)}
        if "forward" in vars(module):
            found.add((name, "forward", id(vars(module)["forward"])))
    return frozenset(found)


def altered(module: nn.Module, built: nn.Module) -> str | None:
    """Return the first difference of a module from one that was built of its class and settings.

    Weights are not compared, and only those attributes that the built one has.

    Args:
        module: with all that it holds.
        built: anew; its weights may be on the meta device.
    """
    found, wanted = dict(module.named_modules()), dict(built.named_modules())
    if found.keys() != wanted.keys():
        return f"has other modules: {', '.join(sorted(found.keys() ^ wanted.keys())[:3])}"
    for name, twin in wanted.items():
        difference = touched(found[name], type(twin)) or _difference(found[name], twin)
        if difference is not None:
            return f"{name} {difference}".strip()
    return None


def _difference(module: nn.Module, twin: nn.Module) -> str | None:
    """Return which attribute or method of a module is not as its twin has it."""
    have, should = vars(module), vars(twin)
    for key in have.keys() - should.keys():
        if hasattr(type(module), key):
            return f"has a {key} of its own"
    for key in should.keys() - set(WITHOUT_EFFECT):
        if not key.startswith("_") and not _same(have.get(key), should[key]):
            return f"has another {key}"
    return None


def _same(value: Any, wanted: Any) -> bool:
    """Compare settings by value, functions by identity, and other objects by their class."""
    if isinstance(wanted, FunctionType):
        return value is wanted
    if isinstance(wanted, (bool, int, float, str, tuple, list, type(None))):
        return value == wanted
    return type(value) is type(wanted)
