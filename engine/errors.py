"""The errors of this project, besides ValueError for bad arguments."""

from __future__ import annotations

import pickle
from typing import Any


class Portable(Exception):
    """An error that arrives whole where it is pickled to: with its attributes and its causes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, vars(self), _causes(self))


def _rebuild(
    kind: type[Portable],
    args: tuple[Any, ...],
    attributes: dict[str, Any],
    causes: list[BaseException],
) -> Portable:
    error = kind.__new__(kind, *args)  # without __init__, which may take other arguments
    error.args = args
    vars(error).update(attributes)
    last: BaseException = error
    for cause in causes:
        last.__cause__ = cause
        last = cause
    return error


def _causes(error: BaseException) -> list[BaseException]:
    """Return its cause, the cause of that and so on, as far as they do not carry their own."""
    found: list[BaseException] = []
    while error.__cause__ is not None and not (found and isinstance(found[-1], Portable)):
        error = error.__cause__
        found.append(portable(error))
    return found


def portable(error: BaseException) -> BaseException:
    """Return the error, or where it does not come back from a pickle one that says what it was."""
    try:
        back = pickle.loads(pickle.dumps(error))
        same = type(back) is type(error) and str(back) == str(error)
    except Exception:  # of pickle, or of the error's own code
        same = False
    return error if same else RuntimeError(f"{type(error).__name__}: {error}")


class CheckpointError(Portable, ValueError):
    """A model folder or one of its files is missing, broken or does not match its config."""


class CompilationError(Portable, RuntimeError):
    """The compiler failed: there is no C++ compiler, say, or it is broken."""


class DataError(Portable, ValueError):
    """A file of training data is missing, broken or of the wrong size."""


class DivergedError(Portable, FloatingPointError):
    """Training turned NaN or infinite; the run's last save is untouched.

    Attributes:
        step: the first step, counted from 1, whose loss, gradient or weights were not finite.
    """

    def __init__(self, step: int) -> None:
        super().__init__(
            f"training diverged: the loss, a gradient or a weight is not finite at step {step}; "
            "the last save is untouched. What may help: a lower learning_rate, a longer warm-up "
            "(warmup_steps), a lower grad_clip, and precision float32"
        )
        self.step = step


class NonFiniteError(Portable, FloatingPointError):
    """A trajectory turned NaN or infinite.

    Attributes:
        seed: the seed of the first image concerned.
        step: the step (counted from 0) whose network output was first not finite.
    """

    def __init__(self, seed: int, step: int, num_steps: int) -> None:
        super().__init__(
            f"the network's output for seed {seed} is not finite at step {step} of {num_steps}"
        )
        self.seed = seed
        self.step = step
