"""`RunningBatch`: images in slots, which step together and leave one by one.

One thread at a time uses it. A failure is raised; the caller decides which requests it ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flashddpm import arguments, host
from flashddpm.execution.checks import check_variance
from flashddpm.execution.derived import Glimpse
from flashddpm.execution.executor import Executor
from flashddpm.execution.follower import CHANGED
from flashddpm.execution.plan_table import PlanTable
from flashddpm.execution.slot_table import SlotTable
from flashddpm.execution.step import predicted_x0
from flashddpm.execution.upload import send
from flashddpm.kernels.tables import IDLE
from flashddpm.serving.launch_limiter import LaunchLimiter
from flashddpm.serving.pending_image import FinishedCopy, PendingImage

PLAN_ROWS = 8192
"""The least number of rows of the table of plans; it has more if a model has more timesteps."""


class RunningBatch:
    """The slots of an engine, the images in them, and the step that all of them take together.

    An engine has one, and keeps it as long as it lives. A slot is the place of one image; a lane is
    one network evaluation, of which a guided image takes two a step. ``len(batch)`` is the number
    of images, and ``image in batch`` whether one has a slot.

    Args:
        executor: the executor that runs the network.
        max_batch: the number of slots, the most images at a time.
        exact: whether the compiled network runs, and always on all lanes, so that an image's bits
            do not depend on the other images.
        buckets: the numbers of lanes, each in 1..max_lanes, that the network may run on besides
            max_lanes; None for the powers of two where the network is compiled or captured, else
            for any number. Of no effect if exact, which runs on max_lanes alone.

    Attributes:
        executor, max_batch: the arguments.
        max_lanes: the number of lanes: max_batch, or twice that if images can be guided.
        compiled: whether the compiled network runs.
        buckets: the numbers of lanes that the network may run on, ascending; None for any number.
        images: the slot number of each image, by image, in the order in which they entered; those
            that are finished are among them until they are removed.
        slots: the buffers on the device.
        slot_table: which image is in which slot.
        plan_table: which rows (one for each step) of the buffers hold which plan.

    Raises:
        ValueError: if a bucket is no integer in 1..max_lanes.
    """

    def __init__(
        self,
        executor: Executor,
        max_batch: int,
        exact: bool = False,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.executor, self.max_batch, self._exact = executor, max_batch, exact
        self.max_lanes = max_batch * (1 if executor.conditioning.null_label is None else 2)
        self.compiled = exact or executor.choice.compiles(0, 0)
        rows = 1 + max(PLAN_ROWS, executor.num_timesteps)
        self.slots = executor.service_slots(max_batch, self.max_lanes, rows)
        self.slot_table = SlotTable(self.slots)
        self.plan_table = PlanTable(self.slots)
        self.buckets = self._choose(buckets)
        self.images: dict[PendingImage, int] = {}
        self._changed = False  # whether occupants changed since the device was told
        self._version = 0  # of the weights that embedded the timesteps of plans
        self._glimpse = Glimpse(executor.follower.modules)
        self._weights: Tensor | None = None  # as seen when images last entered
        self._weights_now: Tensor | None = None  # as seen since the last step
        self._channels: int | None = None  # that the network returns
        self._limiter = LaunchLimiter(executor.device)
        # Only noted, for this may be while something is captured; nobody waits for it at exit.
        weakref.finalize(self, executor.graphs.forget, self.slots.token).atexit = False

    def __len__(self) -> int:
        return len(self.images)

    def __contains__(self, image: PendingImage) -> bool:
        return image in self.images

    @property
    def finished(self) -> list[PendingImage]:
        """The images, a list, whose plan is at its end; they keep their slots until `remove`."""
        return [image for image in self.images if image.row == IDLE]

    @property
    def lanes(self) -> int:
        """The number of lanes that the network runs on in the next step, spare ones included."""
        used = self.slot_table.lanes
        if self.buckets is None:
            return used
        return next(lanes for lanes in self.buckets if lanes >= used)

    def _choose(self, buckets: Sequence[int] | None) -> list[int] | None:
        most = self.max_lanes
        if self._exact:
            return [most]
        if buckets is not None:
            return sorted({*(arguments.integer("buckets", n, 1, most) for n in buckets), most})
        fixed = self.compiled or self.executor.capture
        return self.executor.buckets(most) if fixed else None

    def warm(self) -> None:
        """Compile and capture the step for each of ``buckets``; nothing for None.

        Raises:
            CompilationError: if the compiler fails where compile=True; under "auto" the network
                runs uncompiled.
            ValueError: if the network's output is of a wrong shape.
        """
        prefixes = [self.slots.prefix(self.max_batch, L) for L in self.buckets or []]
        self.executor.warm(prefixes, self.compiled)

    def follow_weights(self) -> None:
        """Have images that enter from now on drawn by the network's present weights.

        Call it before `admit`.

        Raises:
            RuntimeError: if the network was changed in a way that cannot be followed, such as moved
                or given new parameters under captured graphs (`Follower.renew`).
        """
        self._weights = self._glimpse.take()  # first: what changes meanwhile shows at the end
        version = self.executor.renew()
        if version != self._version:
            self.plan_table.reload()
            self._version = version

    def admit(self, image: PendingImage) -> None:
        """Put an image whose plan has its rows into a free slot; its x_T is set by `start`.

        Raises:
            ValueError: if no slot is free.
        """
        image.weights, image.version = self._weights, self._version
        self.images[image] = self.slot_table.admit(image)
        self._changed = True

    def start(self, images: Sequence[PendingImage]) -> None:
        """Set x_T of images just admitted: their noise, or the image to begin at, noised.

        Args:
            images: the images, all in the batch.
        """
        self.slot_table.upload()
        plain = [image for image in images if image.plan.initial == (0.0, 1.0)]
        for group in (plain, *([image] for image in images if image not in plain)):
            if group:
                slots = host.ints([self.images[image] for image in group])
                where = send(slots, self.executor.device)
                self.executor.start(self.slots, where, group[0].plan, group[0].init_image)
        self.slot_table.fill_lanes()
        self._changed = False

    def remove(self, image: PendingImage) -> None:
        """Free the slot of an image, finished or not.

        Raises:
            KeyError: if the image has no slot.
        """
        self.slot_table.retire(self.images.pop(image))
        self._changed = True

    def step(self) -> list[tuple[PendingImage, Tensor]]:
        """Take one step of every image, each by the row of the plan that it is at.

        Returns:
            Each unfinished image that has an ``on_step``, with the x0 that the step predicted for
            it, float32 [C, H, W] on the device.

        Raises:
            ValueError: if the network's output is of a wrong shape, or if exact mode is on and the
                compiled network's bits depend on the lane (tried once).
            CompilationError: if the network cannot be compiled, where it must be.
        """
        if self._changed:
            self.slot_table.upload()
            self.slot_table.fill_lanes()
            self._changed = False
        watched = [
            (image, slot, _numbers(image), self.slots.state.x[slot : slot + 1].clone())
            for image, slot in self.images.items()
            if image.on_step is not None and image.row != IDLE
        ]
        if self._exact:
            self.executor.prove_exact(self.max_lanes)
        self._limiter.wait()
        self._weights_now = None
        out = self.executor.take_step(
            self.slots.prefix(self.max_batch, self.lanes),
            self.compiled,
            any(image.needs_stats for image in self.images),
            any(image.fractional for image in self.images),
        )
        self._limiter.mark()
        self._channels = out.shape[1]
        self.slot_table.advance()
        return [
            (image, predicted_x0(self.slots, out, x_t, row, slice(slot, slot + 1))[0])
            for image, slot, row, x_t in watched
        ]

    def take(self, image: PendingImage) -> FinishedCopy:
        """Launch the copy of a finished image out of its slot, which may then be freed.

        Raises:
            KeyError: if the image has no slot.
            ValueError: if the plan learns its variance, and the network has no channels for it.
            RuntimeError: if the network's weights changed since the image entered, so that what was
                derived from them is of another version.
        """
        if self._channels is not None:
            check_variance(image.plan, self._channels, self.executor.shape[0])
        if image.version != self.executor.follower.version:
            raise RuntimeError(CHANGED)
        slot = self.images[image]
        x0 = self.slots.state.x[slot].clone(memory_format=torch.contiguous_format)
        flags = [self.slots.state.nonfinite[slot]]
        if self._weights_now is None:
            self._weights_now = self._glimpse.take()
        if image.weights is not None and self._weights_now is not None:
            flags.append((image.weights != self._weights_now).any())
        stacked = torch.stack([flag.to(torch.int32) for flag in flags])
        on_host = stacked.to("cpu", non_blocking=True)
        return FinishedCopy(x0, on_host, self._limiter.event())

    def after_fork(self) -> None:
        """Forget every image: no thread takes their steps in a forked child."""
        self.images.clear()

    def close(self) -> None:
        """Let go of the captured graphs; their memory is freed at the next chance."""
        self.executor.graphs.forget(self.slots.token)


def _numbers(image: PendingImage) -> list[float]:
    """Return the coefficients of the image's next step, from the host's copy of its plan."""
    return image.plan.rows[image.row - image.start].astype(np.float32).tolist()
