"""The exception classes of this project; bad arguments are plain ValueErrors."""

from __future__ import annotations

import pickle
from typing import Any


class Portable(Exception):
    """The base class of errors that keep their attributes and causes when pickled."""

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
    """Return an error's chain of causes, up to one that carries its own causes."""
    found: list[BaseException] = []
    while error.__cause__ is not None and not (found and isinstance(found[-1], Portable)):
        error = error.__cause__
        found.append(portable(error))
    return found


def portable(error: BaseException) -> BaseException:
    """Return an error that can be pickled in place of the given one.

    Args:
        error: any exception; it is not changed.

    Returns:
        The error itself, if pickling and unpickling gives one of the same class and text; otherwise
        a RuntimeError whose text is the class's name and the error's text.
    """
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
    """Training turned NaN or infinite; the last save of the run is untouched.

    Args:
        step: the number of the step, from 1.

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
    """The network's output turned NaN or infinite while an image was sampled.

    Args:
        seed: the seed of the image's noise.
        step: the number of the step, from 0.
        num_steps: the number of steps of the image, for the error's text.

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
