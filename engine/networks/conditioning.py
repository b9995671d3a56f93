"""`Conditioning`: the class labels that a class-conditional network takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conditioning:
    """The class labels that a network takes: 0..num_classes-1, and null_label for "no label".

    The values are not checked.

    Attributes:
        num_classes: the number of classes; None for an unconditional network.
        null_label: the label of the unconditional prediction, an int (num_classes in models trained
            here), by which classifier-free guidance is possible (Ho & Salimans 2022); None for a
            network that was trained without it.
        class_names: the name of each class, num_classes strings; None where they have no names.
    """

    num_classes: int | None = None
    null_label: int | None = None
    class_names: tuple[str, ...] | None = None
