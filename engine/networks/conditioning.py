"""The labels that a class-conditional network takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conditioning:
    """The labels that a network takes: 0..num_classes-1, and null_label for "no label".

    Attributes:
        num_classes: the number of classes; None for an unconditional network.
        null_label: the label of the unconditional prediction, by which guidance is possible (Ho &
            Salimans 2022); None for a network that was trained without it.
        class_names: a name for each class, if they have any.
    """

    num_classes: int | None = None
    null_label: int | None = None
    class_names: tuple[str, ...] | None = None
