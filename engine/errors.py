"""The errors of this project, besides ValueError for bad arguments."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model folder or one of its files is missing, broken or does not match its config."""


class DataError(ValueError):
    """A file of training data is missing, broken or of the wrong size."""


class DivergedError(FloatingPointError):
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


class NonFiniteError(FloatingPointError):
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
