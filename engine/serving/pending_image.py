"""`PendingImage`: the image of a request, from `Engine.submit` until its future is resolved."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flashddpm.diffusion.plan import Plan
from flashddpm.errors import NonFiniteError
from flashddpm.execution.follower import CHANGED
from flashddpm.execution.slot_table import Occupant
from flashddpm.serving.request import OnStep, Request, RequestFailed, Result

Outcome = Result | Exception | None
"""How a request ends: with a result, an error, or None where it was cancelled."""


class FinishedCopy(NamedTuple):
    """The copy of a finished image, which may be under way on a GPU.

    Attributes:
        image: float32 [C, H, W] on the device.
        flags: int32 [1 or 2] on the host. The first is 0, or the row of the table of plans after
            whose step the network's output was first not finite. The second, where weights can be
            seen, is 1 if they are not those that the image entered with.
        event: the CUDA event after which both are there; None on the CPU, where they are at once.
    """

    image: Tensor
    flags: Tensor
    event: torch.cuda.Event | None


@dataclass(eq=False, kw_only=True)
class PendingImage(Occupant):
    """The image of a request that was checked: all that the engine knows of it, until it ends.

    It waits in the queue, occupies a slot (a place in the running batch), and is copied out of it.
    What a slot needs (seed, labels, guidance, index and row, the step it is at) are the attributes
    of an `Occupant`; its row is set by `place`.

    Attributes:
        request: the request as it was submitted.
        plan: the plan (table of steps) that it follows.
        needs_stats: whether some row of the plan asks for ``sample_stats`` (statistics of whole
            images).
        fractional: whether the network is told a timestep between the integers.
        init_image: the image to begin at, float32 [1, C, H, W] on the device, a copy; None for
            noise.
        on_step: called after each step with the x0 that it predicts, float32 [C, H, W]; or None.
        submitted: when it was submitted, in seconds by the engine's clock (time.monotonic).
        deadline: when it is not wanted any more, by the same clock; infinity for never.
        future: the future of its `Result`.
        start: the first row of its plan in the table of plans.
        admitted: when it got its slot, in seconds by the engine's clock.
        version: the version of what was derived from the network's weights when it entered.
        weights: some words of the network's parameters when it entered, integers [n] on the device,
            as `Glimpse` takes them; None where they cannot be seen.
    """

    request: Request
    plan: Plan
    needs_stats: bool
    fractional: bool
    init_image: Tensor | None
    on_step: OnStep | None
    submitted: float
    deadline: float
    future: Future[Result] = field(default_factory=Future)
    # Set when it enters a slot.
    start: int = 0
    admitted: float = 0.0
    version: int = 0
    weights: Tensor | None = None

    def place(self, start: int) -> None:
        """Set the image to the first row of its plan.

        Args:
            start: the number of that row in the table of plans; the plan's other rows follow it.
        """
        self.start = self.row = start
        self.last = start + len(self.plan) - 1

    def wait(self, copy: FinishedCopy) -> Tensor:
        """Wait until the copy of this finished image has arrived, and return the image.

        Args:
            copy: what `RunningBatch.take` returned for this image.

        Returns:
            float32 [C, H, W] in about [-1, 1], on the engine's device.

        Raises:
            RuntimeError: if the network's weights changed while the image was under way.
            NonFiniteError: if the network's output turned NaN or infinite.
        """
        if copy.event is not None:
            copy.event.synchronize()
        row, *changed = copy.flags.tolist()
        if any(changed):
            raise RuntimeError(CHANGED)
        if row:
            raise NonFiniteError(self.seed, row - self.start, len(self.plan))
        return copy.image


def failure(stage: str, cause: BaseException) -> RequestFailed:
    """Return a new RequestFailed for one request, so that no two futures share a traceback.

    Args:
        stage: what failed, with which the text begins: "admission", "step", "on_step" or "harvest"
            (the copy out of its slot); not checked.
        cause: the error that it failed with, which becomes the ``__cause__``.
    """
    error = RequestFailed(f"{stage}: {cause!r}")
    error.__cause__ = cause
    return error
