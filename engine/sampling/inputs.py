"""Checks of what images are asked for: seeds, labels, guidance, images to begin at, and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.diffusion.plan import Plan
from flashddpm.execution.slot_table import Occupant
from flashddpm.execution.slots import Slots
from flashddpm.kernels.tables import Column
from flashddpm.networks.conditioning import Conditioning

Shape = tuple[int, int, int, int]
"""The shape (N, C, H, W) of the images of a call."""


@dataclass(frozen=True)
class Images:
    """The seed, label and guidance scale of each of N images; ``len`` of it is N.

    Attributes:
        seeds: the seed of each image's noise, N signed 64-bit integers.
        labels: the class label of each image; None for a network without classes.
        guidance: the guidance scale w of each image; 1 means no guidance.
    """

    seeds: list[int]
    labels: list[int] | None
    guidance: list[float]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def lanes(self) -> list[int]:
        """The lanes (network evaluations a step) of each image: N ints, 2 if guided, else 1."""
        return [1 if w == 1 else 2 for w in self.guidance]

    def occupants(
        self, part: slice, null_label: int | None, length: int, row: int = 1
    ) -> Iterator[Occupant]:
        """Yield some of the images as occupants of slots (places of a batch), all at the same step.

        Args:
            part: which of the images.
            null_label: the label of their unconditional lanes; None for a network without one.
            length: the number of rows (steps) of their plan, which is in rows 1..length of the
                table.
            row: the row that their next step applies, in 1..length.
        """
        for i in range(*part.indices(len(self))):
            label = None if self.labels is None else self.labels[i]
            yield Occupant(self.seeds[i], label, null_label, self.guidance[i], row, length, i)


def images_of(seeds: Any, labels: Any, guidance: Any, conditioning: Conditioning) -> Images:
    """Check the seeds, labels and guidance of a call of ``sample``, and return them image by image.

    Args:
        seeds: one integer, several, or a tensor of integers, each in [-2^63, 2^64).
        labels: one class label, one for each seed, or None for the null class.
        guidance: the guidance scale w, one number or one for each seed; 1 means no guidance.
        conditioning: the labels that the network takes.

    Raises:
        ValueError: if one is not allowed, if there are neither one nor as many labels or scales as
            seeds, or if w is not 1 where the network has no null class or no labels are given.
    """
    seed = arguments.seed_list(seeds)
    label = labels_of(labels, len(seed), conditioning)
    return Images(seed, label, guidance_of(guidance, len(seed), labels, conditioning))


def labels_of(labels: Any, count: int, conditioning: Conditioning) -> list[int] | None:
    """Return the class label of every image; None for a network without classes.

    Args:
        labels: one label in 0..num_classes-1, one for each image, or None for the null class.
        count: the number of images.
        conditioning: the labels that the network takes.

    Raises:
        ValueError: if a label is not allowed, if there are neither one nor as many as images, if
            labels are given for a network without classes, or if they are None and there is no null
            class.
    """
    known = arguments.label_list(labels, count, conditioning.num_classes)
    if known is not None or conditioning.num_classes is None:
        return known
    if conditioning.null_label is None:
        raise ValueError("labels=None: this model has no null class; give a label")
    return [conditioning.null_label] * count


def guidance_of(guidance: Any, count: int, labels: Any, conditioning: Conditioning) -> list[float]:
    """Return the guidance scale w of every image, a list of floats.

    Args:
        guidance: one finite number, or one for each image; 1 means no guidance.
        count: the number of images.
        labels: the labels as they were given, only to see whether they are None.
        conditioning: the labels that the network takes.

    Raises:
        ValueError: if a scale is no finite number, if there are neither one nor as many as images,
            or if one is not 1 where the network has no null class or no labels are given.
    """
    if hasattr(guidance, "tolist"):  # tensors, arrays and NumPy's numbers
        guidance = guidance.tolist()
    values = list(guidance) if isinstance(guidance, Sequence) else [guidance] * count
    if len(values) != count:
        raise ValueError(f"guidance: {len(values)} values for {count} seeds; give one or one each")
    values = [arguments.number("guidance", value) for value in values]
    if any(value != 1 for value in values):
        if conditioning.null_label is None:
            raise ValueError(f"guidance={guidance!r}: must be 1 for a model without a null class")
        if labels is None:
            raise ValueError(f"guidance={guidance!r}: must be 1 where no labels are given")
    return values


def begin_of(image: Tensor | None, shape: Shape, plan: Plan, device: torch.device) -> Tensor | None:
    """Return the images to begin at, float32 [N, C, H, W] on the device; None for pure noise.

    Args:
        image: floating-point [C, H, W], for all images, or [N, C, H, W], in [-1, 1]; or None. The
            range is not checked.
        shape: (N, C, H, W).
        plan: the plan (the table of the steps), which says whether it begins at an image.
        device: the device of the result.

    Raises:
        ValueError: if the plan begins at an image and there is none, or the reverse, or if the
            image is no floating-point tensor of one of these shapes.
    """
    if image is None:
        if plan.needs_image:
            raise ValueError("image=None: the plan begins at an image; give one")
        return None
    if not plan.needs_image:
        raise ValueError("image: must not be given without strength, or a plan that needs one")
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise ValueError("image: must be a tensor of floats in [-1, 1]")
    if image.shape not in (shape[1:], shape):
        raise ValueError(f"image of shape {tuple(image.shape)}: must be {shape[1:]} or {shape}")
    return image.to(device, torch.float32).expand(shape)


def noise_of(name: str, noise: Any, shape: Shape, device: torch.device) -> Tensor | None:
    """Return the caller's own noise as float32 [N, C, H, W] on the device; None if it is None.

    Args:
        name: the argument's name, for the error's text.
        noise: floating-point [N, C, H, W], or None.
        shape: (N, C, H, W).
        device: the device of the result.

    Raises:
        ValueError: if the noise is no floating-point tensor of that shape.
    """
    if noise is None:
        return None
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.shape != shape:
        kind = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"{name}: must be floats of shape {shape}, not {kind}")
    return noise.to(device, torch.float32)


def spread(
    step_noise: Callable[[int], Tensor | None], slots: Slots, count: int, plan: Plan
) -> Iterator[Tensor | None]:
    """Yield the caller's noise of each step of a plan, put into the first slots of a batch.

    Args:
        step_noise: called with the number of each step, from 0, returns its noise z, floating-point
            [count, C, H, W], or None where the step takes none.
        slots: the buffers of S slots (places of images).
        count: the number of images, which are in the first slots.
        plan: the plan (a row of coefficients a step).

    Yields:
        For each step float32 [S, C, H, W], the same tensor each time; None where the row adds no
        noise.

    Raises:
        ValueError: if step_noise returns None for a step that adds noise, or anything but a
            floating-point tensor of that shape.
    """
    z = torch.zeros_like(slots.state.x)
    _, C, H, W = z.shape
    for i, sigma in enumerate(plan.rows[:, Column.SIGMA]):
        noise = noise_of("step_noise", step_noise(i), (count, C, H, W), z.device)
        if noise is not None:
            z[:count] = noise
        elif sigma:
            raise ValueError(f"step_noise: returned None for step {i}, which takes noise")
        yield z if sigma else None
