"""`Engine`: in-flight (continuous) batching: requests come and go while the batch steps on.

    submit -> queue -> [ schedule, execute, update ] -> future

One thread takes the turns: it puts waiting requests into free slots (a slot is the place of one
image in the batch), takes one step of all slots, whatever step of whatever plan each is at, and
hands out what is finished. docs/engine.md says what is promised.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.diffusion.plan import Plan
from flashddpm.diffusion.plan_options import PlanOptions
from flashddpm.execution.processes import renewed_in_child
from flashddpm.host import isolated
from flashddpm.kernels.tables import IDLE
from flashddpm.sampling import inputs
from flashddpm.sampling.sampler import Sampler
from flashddpm.serving.engine_loop import EngineLoop
from flashddpm.serving.pending_image import PendingImage
from flashddpm.serving.request import OnStep, Request, Result
from flashddpm.serving.request_scheduler import RequestScheduler
from flashddpm.serving.running_batch import RunningBatch

CACHED_PLANS = 128


class Engine:
    """Draws images for many callers at once, in one batch that never waits to be full.

    It is a context manager, which shuts down at the end of the block: every request is finished
    first, or, if the block raises, cancelled.

    Args:
        sampler: the sampler whose network, schedule and device the engine uses; its own ``sample``
            takes turns with the engine's steps. An image that enters is drawn by the network as it
            is then; if weights change while it is under way, other than by ``update_weights``, its
            future fails.
        max_batch: the number of slots: of images that are drawn at a time; at least 1.
        exact: whether the compiled network always runs on one number of lanes, that of a full
            batch, so that an image's bits do not depend on load, slot or other images.
        buckets: the numbers of lanes (network evaluations; a guided image takes two a step) that
            the network may run at a time, besides all that max_batch images may need; each is
            compiled or captured. None for the powers of two where the network is compiled or
            captured, and else for any number; more buckets waste fewer lanes and take longer to
            compile.
        queue_size: the number of requests that may wait for a slot; at least 1.
        max_failures: the number of failed steps in a row, at least 1, after which the engine closes
            itself.
        threaded: whether the engine has a thread of its own that takes turns (steps of the batch,
            with what comes before and after them); if not, call `turn`, from one thread at a time.

    Attributes:
        sampler, max_batch, exact: the arguments.

    Raises:
        ValueError: if an argument is out of its range, or exact is asked for beside buckets or for
            a sampler that does not compile.
        RuntimeError: if called by a callback of the sampler.
    """

    @isolated(grad=False)
    def __init__(
        self,
        sampler: Sampler,
        max_batch: int = 64,
        *,
        exact: bool = False,
        buckets: Sequence[int] | None = None,
        queue_size: int = 1024,
        max_failures: int = 3,
        threaded: bool = True,
    ) -> None:
        self.sampler = sampler
        self.max_batch = arguments.integer("max_batch", max_batch, 1)
        self.exact = arguments.boolean("exact", exact)
        executor = sampler.executor
        if exact and buckets is not None:
            raise ValueError(f"buckets={buckets!r}: must not be given beside exact, which has one")
        if exact and executor.choice.compile is False:
            raise ValueError(
                f"exact=True: needs a compiled network; this sampler, with backend="
                f"{executor.backend!r} and compile=False, has none"
            )
        with executor.exclusive():
            batch = RunningBatch(executor, self.max_batch, exact, buckets)
        waiting = arguments.integer("queue_size", queue_size, 1)
        self._scheduler = RequestScheduler(waiting, self.max_batch, batch.plan_table)
        failures = arguments.integer("max_failures", max_failures, 1)
        self._loop = EngineLoop(self._scheduler, batch, failures)
        self._plan_names = ("solver", "num_steps", *PlanOptions.__annotations__)
        self._cached_plan = lru_cache(CACHED_PLANS, typed=True)(self._make_plan)
        self._thread: threading.Thread | None = None
        sampler.welcome(self)
        renewed_in_child(self)
        if arguments.boolean("threaded", threaded):
            self._thread = threading.Thread(target=self._loop.run, name="flashddpm", daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)

    @isolated(grad=False)
    def submit(self, request: Request, on_step: OnStep | None = None) -> Future[Result]:
        """Queue a request; it enters the batch at the next step boundary with a free slot.

        Args:
            request: the request, which is checked before it is queued.
            on_step: called after each of the request's steps, on the engine's thread (or in
                `turn`), with the x0 that the step predicts, float32 [C, H, W] in about [-1, 1] on
                the sampler's device, a new tensor that may be kept. An Exception that it raises
                fails this request alone, with `RequestFailed`. None for no calls.

        Returns:
            The future of a `Result`. Its ``cancel()`` frees the slot within one step. It may fail
            with `NonFiniteError`, `DeadlineExceeded`, `RequestFailed` or `EngineClosed`.

        Raises:
            ValueError: if a field of the request is not allowed, or exact mode is on and its plan
                has timesteps between the integers.
            CompilationError: if exact mode is on and the compiler has failed.
            QueueFull: if the queue is full.
            EngineClosed: if the engine was shut down or has closed itself.
        """
        image = self._check(request, on_step)
        self._scheduler.add(image)
        return image.future

    @isolated(grad=False)
    def warm(self) -> None:
        """Compile and capture the step for every bucket now, so that no request waits for it.

        Otherwise each bucket is compiled at its first use, which takes tens of seconds. Images
        under way wait meanwhile and are the same.

        Raises:
            RuntimeError: if called by a callback of the engine or sampler.
            CompilationError: if the compiler fails where compile=True; under "auto" the network
                runs uncompiled.
            ValueError: if the network's output is of a wrong shape.
        """
        with self.sampler.executor.exclusive():
            self._loop.batch.warm()

    async def generate(self, request: Request) -> Result:
        """Submit a request and wait for its `Result`; cancelling the task cancels the request.

        Args:
            request: the request.

        Raises:
            ValueError: if a field of the request is not allowed.
            CompilationError: if exact mode is on and the compiler has failed.
            QueueFull: if the queue is full.
            EngineClosed: if the engine was shut down or has closed itself.
            DeadlineExceeded: if the deadline passed before the image was finished.
            NonFiniteError: if the network's output turned NaN or infinite.
            RequestFailed: if a stage of the request failed.
        """
        return await asyncio.wrap_future(self.submit(request))

    async def stream(self, request: Request) -> AsyncIterator[Tensor | Result]:
        """Yield the x0 that each step predicts, float32 [C, H, W], and last the `Result`.

        An x0 is a new tensor on the sampler's device. The request is submitted, or refused, at the
        first ``anext``; leaving the iteration cancels it. While the reader is slow its x0 wait, at
        most one for each step of the request.

        Args:
            request: the request.

        Raises:
            ValueError: if a field of the request is not allowed.
            CompilationError: if exact mode is on and the compiler has failed.
            QueueFull: if the queue is full.
            EngineClosed: if the engine was shut down or has closed itself.
            DeadlineExceeded: if the deadline passed before the image was finished.
            NonFiniteError: if the network's output turned NaN or infinite.
            RequestFailed: if a stage of the request failed.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Tensor | None] = asyncio.Queue()

        def tell(x0: Tensor | None) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, x0)

        def end(future: Future[Result]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                tell(None)

        future = self.submit(request, on_step=tell)
        future.add_done_callback(end)
        try:
            while (x0 := await arrived.get()) is not None:
                yield x0
            yield future.result()
        finally:
            future.cancel()

    def update_weights(self, state: dict[str, Tensor]) -> None:
        """Copy new weights into the sampler's network, once the images under way are finished.

        Requests that have no slot yet, also in other engines of the sampler, wait for that and are
        drawn by the new network. An engine without a thread of its own takes its turns here.

        Args:
            state: a state dict with diffusers' keys, whose shapes match the network's.

        Raises:
            ValueError: if the network is not flashddpm's own, or the state does not match it or is
                not finite; nothing is changed then.
            RuntimeError: if called by a callback of the engine or sampler.
        """
        self.sampler.update_weights(state)

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Let the images under way be finished; within this context no request enters the batch.

        When the block ends, or raises, requests enter again. An engine without a thread of its own
        takes its turns (steps of the batch) here.

        Raises:
            RuntimeError: if called on the engine's thread, by a callback.
        """
        if self._loop.turning == threading.get_ident():
            raise RuntimeError("update_weights: a callback called it, for which its image waits")
        with self._scheduler.held():
            if self._thread is None:
                while self._scheduler.active:
                    self._loop.turn()
            else:
                self._scheduler.wait_until_empty()
            yield

    def metrics(self) -> dict[str, Any]:
        """Return counts and rates by name; rates, occupancy and percentiles are of the latest 1024.

        The counts are submitted, rejected (by a full queue), steps, completed, failed, cancelled,
        expired (their deadline passed), queue_depth (waiting) and active (in a slot or being copied
        out), so that submitted = completed + failed + cancelled + expired + queue_depth + active.
        steps_per_second is of the time spent in steps; occupancy is the mean fraction (0..1) of
        slots in use in a step; latency_p50 and latency_p99 are percentiles, in seconds, from
        ``submit`` to the image. These four are None before the first step or image. graph_bytes is
        the GPU memory, in bytes, that the sampler's captured steps hold.
        """
        return {**self._scheduler.metrics(), "graph_bytes": self.sampler.executor.graphs.bytes}

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every request submitted so far has ended: completed, failed or cancelled.

        A callback of the engine must not call it, for its own request would be waited for.

        Args:
            timeout: the longest wait in seconds, None for no limit; an engine without a thread of
                its own takes its turns first, however long that lasts.

        Returns:
            Whether all have ended.
        """
        futures = self._scheduler.futures
        if self._thread is None:
            while self.turn():
                pass
        return not wait(futures, timeout).not_done

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Accept no more requests; finish those that were accepted, or cancel them.

        Args:
            wait: whether to return only when every future is resolved.
            cancel: whether to cancel the requests that are not finished.

        Called on the engine's own thread, by a callback, it does not wait. An engine without a
        thread takes its turns here, or with ``wait`` false in later calls of `turn`.
        """
        self._scheduler.stop_accepting()
        if cancel:
            for future in self._scheduler.futures:
                future.cancel()
        if self._thread is None:
            while wait and self.turn():
                pass
            if wait:
                self._loop.close(None)
        elif wait and threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self._at_exit)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Shut down: finish every request, or cancel all if an exception leaves the block."""
        self.shutdown(cancel=kind is not None)

    def turn(self) -> bool:
        """Take one turn: fill free slots, take one step of all images, and hand out finished ones.

        Returns:
            Whether some request has not ended.

        Raises:
            RuntimeError: if the engine has a thread of its own.
        """
        if self._thread is not None:
            raise RuntimeError("turn: this engine has a thread of its own (threaded=True)")
        return self._loop.turn()

    def __reduce__(self) -> Any:
        raise TypeError("an Engine: must not be pickled; send its sampler, and make one there")

    def after_fork(self) -> None:
        """Close the engine in a forked child, which lacks the thread that takes turns."""
        self._thread = None
        self._loop.after_fork()
        self._scheduler.after_fork()

    def _at_exit(self) -> None:
        self.shutdown(cancel=True)

    def _check(self, request: Request, on_step: OnStep | None) -> PendingImage:
        """Return the pending image of a request once the request is found to be allowed.

        Raises:
            ValueError: if it is not.
        """
        if not isinstance(request, Request):
            raise ValueError(f"request={request!r}: must be a Request")
        sampler = self.sampler
        images = inputs.images_of(
            request.seed, request.label, request.guidance, sampler.conditioning
        )
        if len(images) != 1:
            raise ValueError(f"seed={request.seed!r}: must be one integer; a Request is one image")
        index = arguments.integer("index", request.index, 0, 2**63 - 1)
        after = request.deadline
        if after is not None:
            after = arguments.number("deadline", after, 0)
        plan = self._plan_of(request)
        if request.strength is not None:
            plan = plan.from_image(request.strength)
        image = inputs.begin_of(request.image, (1, *sampler.shape), plan, sampler.device)
        if len(plan) > len(sampler.schedule):
            raise ValueError(f"solver: a plan of {len(plan)} rows; at most {len(sampler.schedule)}")
        sampler.executor.check_plan(plan)
        if self.exact:
            sampler.executor.check_exact(plan)
        if image is not None:
            image = image.clone()
            if image.is_cuda:  # the engine's thread has a stream of its own
                torch.cuda.current_stream(image.device).synchronize()
        now = time.monotonic()
        return PendingImage(
            request=request,
            plan=plan,
            needs_stats=plan.needs_stats,
            fractional=sampler.executor.tells_floats(plan),
            seed=images.seeds[0],
            label=None if images.labels is None else images.labels[0],
            null_label=sampler.conditioning.null_label,
            guidance=images.guidance[0],
            row=IDLE,
            last=IDLE,
            index=index,
            init_image=image,
            on_step=on_step,
            submitted=now,
            deadline=math.inf if after is None else now + after,
        )

    def _plan_of(self, request: Request) -> Plan:
        options = tuple(getattr(request, name) for name in self._plan_names)
        try:
            hash(options)
        except TypeError:
            return self._make_plan(*options)
        return self._cached_plan(*options)

    def _make_plan(self, *options: Any) -> Plan:
        return self.sampler.plan(**dict(zip(self._plan_names, options, strict=True)))
