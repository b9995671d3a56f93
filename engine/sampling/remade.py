"""`Remade`: the base class of objects that are copied and pickled by their arguments alone."""

from __future__ import annotations

import copy
from typing import Any, Self

from flashddpm.execution.processes import check_picklable
from flashddpm.host import isolated


class Remade:
    """The base class of objects that are made anew, from their arguments, to be copied or pickled.

    What an object has compiled, captured or locked is its own, and is not taken over by copies. A
    copy by copy.copy has the same arguments, one by copy.deepcopy copies of them.

    Args:
        arguments: the arguments of the subclass, by name; they are kept, not copied.
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments

    def replace(self, **changes: Any) -> Self:
        """Return a new object with the arguments of this one, except for those given here.

        Args:
            changes: arguments of the class, by name.

        Raises:
            TypeError: if the class has no such argument.
            ValueError: if the class does not allow a value.
        """
        return type(self)(**self._arguments | changes)

    def __copy__(self) -> Self:
        return self.replace()

    @isolated
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(**copy.deepcopy(self._arguments, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle needs to make the object anew: its arguments, the weights among them.

        Raises:
            TypeError: if an argument, such as the network or its call, cannot be pickled.
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
