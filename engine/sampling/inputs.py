"""What images are asked for: labels, guidance, images to begin at and noise, checked."""

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
"""(N, C, H, W) of the images of a call."""


@dataclass(frozen=True)
class Images:
    """What each of N images is asked for.

    Attributes:
        seeds: the seed of each.
        labels: the label of each; None for a network without classes.
        guidance: w of each; 1 is off.
    """

    seeds: list[int]
    labels: list[int] | None
    guidance: list[float]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def lanes(self) -> list[int]:
        """How many network evaluations each takes a step."""
        return [1 if w == 1 else 2 for w in self.guidance]

    def occupants(
        self, part: slice, null_label: int | None, length: int, row: int = 1
    ) -> Iterator[Occupant]:
        """Yield some of the images as occupants of slots, at a row of a plan in rows 1..length."""
        for i in range(*part.indices(len(self))):
            label = None if self.labels is None else self.labels[i]
            yield Occupant(self.seeds[i], label, null_label, self.guidance[i], row, length, i)


def images_of(seeds: Any, labels: Any, guidance: Any, conditioning: Conditioning) -> Images:
    """Return seeds, labels and guidance as ``Sampler.sample`` takes them, checked.

    Raises:
        ValueError: one that is not allowed, or another number of them than of seeds.
    """
    seed = arguments.seed_list(seeds)
    label = labels_of(labels, len(seed), conditioning)
    return Images(seed, label, guidance_of(guidance, len(seed), labels, conditioning))


def labels_of(labels: Any, count: int, conditioning: Conditioning) -> list[int] | None:
    """Return the label of every image, the null class where none is asked for."""
    known = arguments.label_list(labels, count, conditioning.num_classes)
    if known is not None or conditioning.num_classes is None:
        return known
    if conditioning.null_label is None:
        raise ValueError("labels=None: this model has no null class; give a label")
    return [conditioning.null_label] * count


def guidance_of(guidance: Any, count: int, labels: Any, conditioning: Conditioning) -> list[float]:
    """Return the guidance of every image; 1 only, without labels or a null class."""
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
    """Return the images to begin at, float32 [N, C, H, W] on the device; None for pure noise."""
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
    """Return noise of the caller's own, float32 [N, C, H, W] on the device."""
    if noise is None:
        return None
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.shape != shape:
        kind = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"{name}: must be floats of shape {shape}, not {kind}")
    return noise.to(device, torch.float32)


def spread(
    step_noise: Callable[[int], Tensor | None], slots: Slots, count: int, plan: Plan
) -> Iterator[Tensor | None]:
    """Yield the caller's noise of each step, in the first ``count`` slots of a batch."""
    z = torch.zeros_like(slots.state.x)
    _, C, H, W = z.shape
    for i, sigma in enumerate(plan.rows[:, Column.SIGMA]):
        noise = noise_of("step_noise", step_noise(i), (count, C, H, W), z.device)
        if noise is not None:
            z[:count] = noise
        elif sigma:
            raise ValueError(f"step_noise: returned None for step {i}, which takes noise")
        yield z if sigma else None
