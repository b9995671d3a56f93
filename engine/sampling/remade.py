"""Objects that are copied, pickled and changed by making them anew from their arguments."""

from __future__ import annotations

import copy
from typing import Any, Self

from flashddpm.execution.processes import check_picklable
from flashddpm.host import isolated


class Remade:
    """Base of a class whose every object is a function of its arguments.

    What an object has compiled, captured or locked is its own: copies make it anew.

    Args:
        arguments: those of the class, by name.
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments

    def replace(self, **changes: Any) -> Self:
        """Return an object like this one, but for these arguments of the class.

        Raises:
            TypeError: no such argument.
            ValueError: one that is not allowed.
        """
        return type(self)(**self._arguments | changes)

    def __copy__(self) -> Self:
        return self.replace()

    @isolated
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(**copy.deepcopy(self._arguments, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, weights among them.

        Raises:
            TypeError: an argument, such as the network or its call, cannot be pickled.
        """
        for name, value in self._arguments.items():
            check_picklable(
                name,
                value,
                f"make the {type(self).__name__} in the other process, of what can be sent: the "
                "network's state_dict, a folder, a function of a module",
            )
        return _make, (type(self), self._arguments)


def _make(kind: type[Remade], arguments: dict[str, Any]) -> Remade:
    return kind(**arguments)
