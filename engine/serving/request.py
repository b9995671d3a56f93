"""What an `Engine` is asked for and answers: `Request`, `Result`, and the errors of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashddpm.diffusion.plan import Plan
from flashddpm.errors import Portable


class QueueFull(Portable, RuntimeError):
    """The queue holds as many requests as it may; nothing was queued. Try again later."""


class EngineClosed(Portable, RuntimeError):
    """The engine was shut down, or closed itself after failures (its cause): no image comes."""


class DeadlineExceeded(Portable, TimeoutError):
    """The request's deadline passed before its image was finished."""


class RequestFailed(Portable, RuntimeError):
    """One of the request's stages failed; its text begins with which, and its cause is the error.

    The stages are ``admission`` to a slot, a ``step``, ``on_step``, and ``harvest``: the copy of
    the finished image out of its slot.
    """


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One image, with a seed, label, guidance and plan of its own.

    All but ``deadline`` are arguments of `Sampler.sample`, for one image.

    Attributes:
        seed: the seed of the image's noise, any 64-bit integer.
        label: a class, or None for the null class.
        guidance: the guidance scale w; 1 is off and costs one network evaluation a step instead of
            two.
        solver: a solver's name, or a Plan of your own, beside which no option may be given.
        num_steps: the number of steps, 1..T; of no effect beside a Plan.
        image: the image to begin at, float [C, H, W] in [-1, 1], which is noised; copied by
            ``submit``.
        strength: the share of the steps that is taken, in (0, 1], beside an image.
        index: a number that a network's ``call`` is told if it asks for it (`Sampler`).
        deadline: seconds from ``submit`` after which the image is not wanted any more.
        spacing, steps_offset, sigmas, timesteps, eta, variance_type, clip, threshold,
            guidance_rescale, guidance_interval, use_clipped_model_output, match_diffusers: options
            of the plan, as `PlanOptions` says; None is the model's own, or none.
    """

    seed: int
    label: int | None = None
    guidance: float = 1.0
    solver: str | Plan = "ddim"
    num_steps: int = 50
    image: Tensor | None = None
    strength: float | None = None
    index: int = 0
    deadline: float | None = None
    spacing: str | None = None
    steps_offset: int | None = None
    sigmas: str | None = None
    timesteps: Sequence[float] | str | None = None
    eta: float | None = None
    variance_type: str | None = None
    clip: float | None = None
    threshold: float | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    use_clipped_model_output: bool | None = None
    match_diffusers: bool | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds that a request took.

    Attributes:
        queued: seconds from ``submit`` until it had a slot.
        running: seconds from then until its image was handed out.
    """

    queued: float
    running: float

    @property
    def total(self) -> float:
        """Seconds from ``submit`` to the image."""
        return self.queued + self.running


@dataclass(frozen=True, eq=False)
class Result:
    """A finished image.

    Attributes:
        image: float32 [C, H, W] in about [-1, 1], on the sampler's device; a copy of its own.
        request: the request as it was submitted.
        timings: how long the request waited and ran.
    """

    image: Tensor
    request: Request
    timings: Timings


OnStep = Callable[[Tensor], Any]
"""Called with the x0 that a step predicts, float32 [C, H, W]."""
