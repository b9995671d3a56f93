"""The inner loop of `Sampler.sample`: chunks (batches) of images, drawn one after the other."""

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
    """The numbers of images and lanes (network evaluations) at a time in a call of `sample`.

    Attributes:
        batch: the number of images of a chunk; the last chunk may have fewer.
        most: the most lanes that so many images may take.
        lanes: the number of lanes of every chunk; None for as many as each chunk uses.
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
    """Choose how many images and lanes (network evaluations) run at a time in a call of ``sample``.

    Args:
        executor: the executor that runs the network.
        images: all images of the call.
        plan: the plan (the steps, a row of coefficients each) that they follow.
        batch_size: the most images at a time, at least 1.
        exact: whether images are to have bits that do not depend on the batch, for which the
            compiled network runs on one number of lanes always.
        bucket: the number of lanes of every chunk, at least those that the images use; None for the
            executor's choice.

    Raises:
        ValueError: if bucket is no integer or too small, if exact is no bool, or if it is true and
            the network is not compiled, or is to be given timesteps that are not integers (a
            hoisted U-Net, whose time embeddings are computed beforehand, is given those instead).
        CompilationError: if exact is true and the compiler has failed before.
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
    """Draw one chunk of a call's images, from x_T to the end of the plan.

    N is the number of images of the call, n that of the chunk.

    Args:
        executor: the executor that runs the network; the caller must be in its `exclusive` or
            `following` context, which is not checked.
        images: all images of the call.
        plan: the plan (the steps, a row of coefficients each) that they follow.
        width: the numbers of images and lanes at a time, from `choose_width`.
        chunk: which of the images to draw, at most ``width.batch`` of 0..N-1.
        begin: float32 [N, C, H, W] in [-1, 1] on the device, the images from which x_T is made by
            adding noise; None for an x_T of noise alone.
        z: float32 [N, C, H, W] on the device, standard normal noise to use for x_T; None for that
            of the seeds.
        step_noise: called with the number of a step, from 0, returns its noise z, floats [n, C, H,
            W], or None where the step takes none; None for the noise of the seeds.
        on_step: called after each step with its number, from 0, and the x0 that it predicts,
            float32 [n, C, H, W]; or None.
        advanced: called without arguments after each step, before on_step; what it returns is
            ignored. What one of the three functions raises is raised here.

    Returns:
        The images, float32 [n, C, H, W] in about [-1, 1]: a view that the next chunk overwrites.

    Raises:
        NonFiniteError: if the network's output turned NaN or infinite.
        ValueError: if the network's output is of a wrong shape, or lacks the variance that the plan
            needs, or if step_noise returns floats of a wrong shape, or None where noise is needed.
        CompilationError: if the compiler fails, and compile=True or exact was asked for.
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
    """Raise if the network's output was not finite for some image of the buffers' first slots.

    Args:
        slots: the buffers, whose flags are read, which waits for the device; plans begin at row 1.
        seeds: the seed of the image in each slot, from the first slot on.
        num_steps: the number of steps of each image, for the error's text.

    Raises:
        NonFiniteError: if one was NaN or infinite; it names the first such image's seed and step.
    """
    for seed, row in zip(seeds, slots.state.nonfinite.tolist(), strict=False):
        if row:
            raise NonFiniteError(seed, row - 1, num_steps)


def bar_of(progress: bool, total: int) -> AbstractContextManager[Any]:
    """Return a progress bar, a context manager; call ``update()`` of its value after each step.

    Args:
        progress: whether to show a bar, by tqdm; otherwise ``update()`` does nothing.
        total: the number of steps.
    """
    if not progress:
        return nullcontext(SimpleNamespace(update=lambda: None))
    from tqdm import tqdm

    return tqdm(total=total, unit="step")


def _part(whole: Tensor | None, part: slice) -> Tensor | None:
    return None if whole is None else whole[part]
