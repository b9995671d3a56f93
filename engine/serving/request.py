"""What is asked of an `Engine`, what it answers, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
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
    """Admission, a step, ``on_step`` or the harvest of the image failed.

    Its ``__cause__`` is what was raised.
    """


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One image, with a seed, label, guidance and plan of its own.

    All but ``deadline`` are arguments of `Sampler.sample`, for one image.

    Attributes:
        seed: any 64-bit integer.
        label: a class, or None for the null class.
        guidance: w; 1 is off and costs one network evaluation a step instead of two.
        solver: a solver's name, or a Plan of your own, beside which no option may be given.
        num_steps: 1..T; of no effect beside a Plan.
        image: float [C, H, W] in [-1, 1] to begin at, noised; copied by ``submit``.
        strength: in (0, 1], beside an image: the share of the steps that is taken.
        index: a number that a network's ``call`` is told if it asks for it (`Sampler`).
        deadline: seconds from ``submit`` after which the image is not wanted any more.
        spacing, steps_offset, sigmas, timesteps, eta, variance_type, clip, threshold,
            guidance_rescale, guidance_interval, use_clipped_model_output, match_diffusers: of the
            plan, as `plan_options.PlanOptions` says; None is the model's own, or none.
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
        queued: from ``submit`` until it had a slot.
        running: from then until its image was handed out.
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
        request: as it was submitted.
        timings: how long it waited and ran.
    """

    image: Tensor
    request: Request
    timings: Timings


OnStep = Callable[[Tensor], Any]
"""Called with the x0 that a step predicts, float32 [C, H, W]."""


@dataclass(eq=False)
class Job:
    """A request on its way: checked, with its plan, its future and where it stands.

    Attributes:
        request: as it was submitted.
        plan: its rows.
        needs_stats: whether one of them asks for ``sample_stats``.
        fractional: whether one of them has a timestep between the integers.
        seed, label, null_label, guidance, index: as the batch takes them.
        image: float32 [1, C, H, W] on the device, a copy, or None.
        on_step: called after each step with its x0, or None.
        submitted, deadline, admitted: times by the engine's clock; infinity for no deadline.
        start: where its rows stand in the table.
        version: of what was derived from the network's weights then.
        weights: what was seen of the network's parameters when it entered; None where they cannot.
        future: of its `Result`.
    """

    request: Request
    plan: Plan
    needs_stats: bool
    fractional: bool
    seed: int
    label: int | None
    null_label: int | None
    guidance: float
    index: int
    image: Tensor | None
    on_step: OnStep | None
    submitted: float
    deadline: float
    admitted: float = 0.0
    start: int = 0
    weights: Tensor | None = None
    version: int = 0
    future: Future[Result] = field(default_factory=Future)
