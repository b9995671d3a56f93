"""The inner loop of `Sampler.sample`: chunks of images, one after the other, each to its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from flashddpm import arguments
from flashddpm.diffusion.plan import Plan
from flashddpm.errors import NonFiniteError
from flashddpm.execution.executor import Executor
from flashddpm.execution.slot_table import SlotTable
from flashddpm.execution.slots import Slots
from flashddpm.sampling import inputs
from flashddpm.sampling.inputs import Images


@dataclass(frozen=True)
class Width:
    """How many images and network evaluations run at a time.

    Attributes:
        batch: the images of a chunk.
        most: the lanes that so many images may take.
        lanes: the lanes of every chunk; None for as many as it uses.
        compiled: whether the compiled network runs.
    """

    batch: int
    most: int
    lanes: int | None
    compiled: bool


def choose_width(
    executor: Executor,
    images: Images,
    plan: Plan,
    batch_size: int,
    exact: bool,
    bucket: int | None,
) -> Width:
    """Return the width of a call of ``sample``, whose arguments these are.

    Raises:
        ValueError: a bucket that is too small, or exact where bits cannot be promised.
    """
    batch = batch_size
    most = batch if executor.conditioning.null_label is None else 2 * batch
    used = max(sum(images.lanes[i : i + batch]) for i in range(0, len(images), batch))
    if bucket is not None:
        arguments.integer("bucket", bucket, used)
    if arguments.boolean("exact", exact):
        executor.check_exact(plan)
        return Width(batch, most, bucket or most, True)
    lanes = bucket or executor.bucket(used, most, compiled=True)
    compiled = executor.choice.compiles(len(plan) * sum(images.lanes), lanes)
    fixed = bucket or compiled or executor.capture
    return Width(batch, most, lanes if fixed else None, compiled)


def draw(
    executor: Executor,
    images: Images,
    plan: Plan,
    width: Width,
    chunk: slice,
    begin: Tensor | None,
    z: Tensor | None,
    step_noise: Callable[[int], Tensor | None] | None,
    on_step: Callable[[int, Tensor], None] | None,
    advanced: Callable[[], Any],
) -> Tensor:
    """Draw one chunk of the images, from x_T to the end of the plan.

    Args:
        executor: whose turn this is.
        images: all images of the call.
        plan: the rows that they follow.
        width: of the call.
        chunk: which of the images.
        begin: float32 [N, C, H, W], the images that all begin at, or None.
        z: float32 [N, C, H, W], the noise that all begin with instead of their seeds', or None.
        step_noise, on_step: as for ``sample``.
        advanced: called after each step.

    Returns:
        float32 [n, C, H, W], valid until the next chunk.

    Raises:
        NonFiniteError: the network's output turned NaN or infinite.
    """
    count = len(images.seeds[chunk])
    lanes = width.lanes or sum(images.lanes[chunk])
    buffers = executor.slots(count, lanes, (width.batch, width.most))
    buffers.load_plan(plan)
    occupants = images.occupants(chunk, executor.conditioning.null_label, len(plan))
    executor.enter(SlotTable(buffers), occupants, plan, _part(begin, chunk), _part(z, chunk))
    slots = buffers.prefix(min(len(buffers.per_slot.idx), lanes), lanes)
    given = step_noise and inputs.spread(step_noise, slots, count, plan)
    steps = executor.run(slots, plan, width.compiled, on_step is not None, given)
    for i, x0 in enumerate(steps):
        advanced()
        if on_step is not None and x0 is not None:
            on_step(i, x0[:count])
    check_finite(slots, images.seeds[chunk], len(plan))
    return slots.state.x[:count]


def check_finite(slots: Slots, seeds: list[int], num_steps: int) -> None:
    """Refuse images whose network's output was not finite; they are in the first slots, from row 1.

    Raises:
        NonFiniteError: naming the first such image's seed and step.
    """
    for seed, row in zip(seeds, slots.state.nonfinite.tolist(), strict=False):
        if row:
            raise NonFiniteError(seed, row - 1, num_steps)


def bar_of(progress: bool, total: int) -> AbstractContextManager[Any]:
    """Return a bar of so many steps with ``update()``, or one that shows nothing."""
    if not progress:
        return nullcontext(SimpleNamespace(update=lambda: None))
    from tqdm import tqdm

    return tqdm(total=total, unit="step")


def _part(whole: Tensor | None, part: slice) -> Tensor | None:
    return None if whole is None else whole[part]
