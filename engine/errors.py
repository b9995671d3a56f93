"""The errors of this project, besides ValueError for bad arguments."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model folder or one of its files is missing, broken or does not match its config."""


class DataError(ValueError):
    """A file of training data is missing, broken or of the wrong size."""


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
