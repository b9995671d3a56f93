"""Checks whether a module does what its class and settings say, or the program has changed it.

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
"""The attributes of a module that change no output in evaluation."""


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all modules in it; one that is used twice comes twice.

    That is nn.Module.modules without its names and its set of duplicates, in a quarter of its time.
    """
    left = [module]
    while left:
        module = left.pop()
        yield module
        left += (child for child in module._modules.values() if child is not None)


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module and of all modules in it; a shared one comes twice."""
    for one in walk(module):
        yield from (p for p in one._parameters.values() if p is not None)


def touched(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return what stands between a call of a module and the forward of its class, in words.

    Args:
        module: the module; what it holds is not looked at.
        kind: the class that it must be of, no subclass.

    Returns:
        "is a X" for another class X, "has a forward of its own", "has hooks", or None for nothing.
    """
    if type(module) is not kind:
        return f"is a {type(module).__name__}"
    if "forward" in vars(module):
        return "has a forward of its own"
    return "has hooks" if has_hooks(module) else None


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module itself has forward or backward hooks, or pre-hooks of them."""
    return any(getattr(module, name) for name in HOOKS)


def hanging(network: Any) -> frozenset[tuple[str, str, int]]:
    """Return every hook, and every forward set on an instance, in a network.

    Two results that differ say that something was hung on or taken off in between.

    Args:
        network: a module, looked at with all that it holds; anything else gives an empty set.

    Returns:
        Triples of the module's name, the kind (one of `HOOKS`, or "forward") and a number, which is
        the hook's id or the id() of the forward.
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
    """Return the first difference of a module from one built anew of its class and settings.

    Compared are the modules in both, their classes, hooks and forwards, and their settings; weights
    and attributes that the built one does not have are not.

    Args:
        module: the module, looked at with all that it holds.
        built: the one that was built anew; its weights may be on the meta device.

    Returns:
        The difference in words, which begin with the name of the module that differs, or None.
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
