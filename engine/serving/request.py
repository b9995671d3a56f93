"""`Request` and `Result`, what an `Engine` takes and returns, and the errors of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashddpm.diffusion.plan import Plan
from flashddpm.errors import Portable


class QueueFull(Portable, RuntimeError):
    """As many requests wait as the queue may hold; the request was not queued. Try again later."""


class EngineClosed(Portable, RuntimeError):
    """The engine was shut down, or closed itself after failures (the cause): no image comes."""


class DeadlineExceeded(Portable, TimeoutError):
    """The request's deadline passed before its image was finished."""


class RequestFailed(Portable, RuntimeError):
    """One stage of the request failed; the text begins with the stage, and the cause is the error.

    The stages are ``admission`` to a slot, a ``step``, ``on_step``, and ``harvest``: the copy of
    the finished image out of its slot.
    """


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One image to be drawn, with a seed, label, guidance and plan of its own; checked by `submit`.

    All but ``deadline`` and ``index`` are arguments of `Sampler.sample`, for one image. A plan is
    the table of the steps that an image takes. In the options of the plan, from ``spacing`` on,
    None is the model's own setting, or none.

    Attributes:
        seed: the seed of the image's noise, an integer in [-2^63, 2^64).
        label: the class, 0..num_classes-1, or None for the null class; None for a model without
            classes.
        guidance: the guidance scale w; 1 is off and costs one network evaluation a step instead of
            two.
        solver: the name of a solver, "ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler" or
            "euler_ancestral"; or a `Plan` of your own, beside which no option may be given.
        num_steps: the number of steps, 1..T; of no effect beside a Plan.
        image: the image to begin at, which is noised: floating-point [C, H, W] in [-1, 1], beside
            strength or a Plan that needs one; copied by ``submit``. None to begin at noise.
        strength: the share of the steps that is taken, in (0, 1], beside an image.
        index: a number in 0..2^63-1 that the network's ``call`` is given if it asks for it
            (`Sampler`).
        deadline: the seconds from ``submit``, at least 0, after which the image is not wanted any
            more; None for never.
        spacing: the spacing of timesteps: "leading", "linspace" or "trailing".
        steps_offset: an integer, at least 0, added to leading timesteps.
        sigmas: the spacing of noise levels: "karras", "exponential" or "beta".
        timesteps: the timesteps themselves, strictly decreasing within 0..T-1, or one of OpenAI's
            respacing strings, such as "ddim50".
        eta: the noise of ddim, in [0, 1]: 0 is deterministic, 1 as noisy as ddpm.
        variance_type: the variance of ddpm: "fixed_small", "fixed_large", "learned" or
            "learned_range".
        clip: the bound of |x0|, 0 for none; beside a threshold, the largest threshold.
        threshold: the quantile of dynamic thresholding, in [0, 1]; 0 for none.
        guidance_rescale: how far a guided output is brought back to the standard deviation of the
            conditional one, in [0, 1].
        guidance_interval: (low, high): guidance only where low < sigma <= high, sigma being
            sqrt((1 - abar) / abar).
        use_clipped_model_output: whether ddim derives eps again from the clipped x0.
        match_diffusers: whether quirks (deviations of diffusers from the papers) are reproduced.
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
    """How long a request took, in seconds.

    Attributes:
        queued: the seconds from ``submit`` until it had a slot (a place in the batch).
        running: the seconds from then until its image was handed out.
    """

    queued: float
    running: float

    @property
    def total(self) -> float:
        """The seconds from ``submit`` until the image was handed out, a float."""
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
"""A function that is called with the x0 that a step predicts, float32 [C, H, W]; what it returns is
ignored."""
