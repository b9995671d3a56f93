"""In-flight batching: requests come and go while the batch steps on.

    submit -> queue -> [ schedule, execute, update ] -> future

One thread turns: it puts waiting requests into free slots, takes one step of all slots, whatever
step of whatever plan each is at, and hands out what is finished. docs/engine.md says what is
promised.
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

    Args:
        sampler: the sampler whose network, schedule and device the engine uses; its own ``sample``
            takes turns with the engine's steps. An image that enters is drawn by the network as it
            is then; if weights change while it is under way, other than by ``update_weights``, its
            future fails.
        max_batch: the number of images at a time.
        exact: run the compiled network on one bucket always, so that an image's bits do not
            depend on load, slot or neighbours.
        buckets: numbers of evaluations that the network may run at a time, besides all that
            ``max_batch`` images may need; each is compiled. By default, where it is compiled or
            captured, the powers of two: more of them waste less and take longer to compile.
        queue_size: the number of requests that may wait for a slot.
        max_failures: the number of failed steps in a row after which the engine closes itself.
        threaded: whether the engine has a thread of its own that takes turns; if not, call `turn`,
            from one thread at a time.

    Raises:
        ValueError: an argument that is not allowed; exact for a sampler that does not compile.
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

        ``cancel()`` of the future frees the slot within one step, and changes no other image.

        Args:
            request: the request, which is checked before it is queued.
            on_step: called on the engine's thread after each of the request's steps with the x0
                that it predicts, float32 [C, H, W]; whatever it raises fails this request alone.

        Returns:
            The future of a `Result`. It fails with `NonFiniteError`, `DeadlineExceeded`,
            `RequestFailed` or `EngineClosed`.

        Raises:
            ValueError: an argument that is not allowed.
            QueueFull: the queue is full.
            EngineClosed: the engine was shut down.
        """
        image = self._check(request, on_step)
        self._scheduler.add(image)
        return image.future

    @isolated(grad=False)
    def warm(self) -> None:
        """Compile and capture for every bucket now, so that no request waits for it.

        Without it a bucket is compiled when it is first wanted, which takes tens of seconds. Images
        under way wait meanwhile and are the same.
        """
        with self.sampler.executor.exclusive():
            self._loop.batch.warm()

    async def generate(self, request: Request) -> Result:
        """Return the result; cancelling the task cancels the request. Raises as `submit` does."""
        return await asyncio.wrap_future(self.submit(request))

    async def stream(self, request: Request) -> AsyncIterator[Tensor | Result]:
        """Yield the x0 of each step, float32 [C, H, W], then the result.

        The request is submitted, or refused, at the first ``anext``. Leaving the iteration cancels
        it. For a slow reader previews wait, at most one for each of the request's steps.
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

        Requests that wait, and those of other engines of the sampler, wait for that and are drawn
        by the new network. Without a thread of the engine's own it turns here.

        Args:
            state: as for `Sampler.update_weights`, which does the same.

        Raises:
            ValueError: as there.
            RuntimeError: called on the engine's thread, by a callback.
        """
        self.sampler.update_weights(state)

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Let the images under way be finished; within the context no request enters.

        Raises:
            RuntimeError: called on the engine's thread, by a callback.
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
        """Return what was counted; rates, occupancy and percentiles over the latest 1024.

        submitted = completed + failed + cancelled + expired + queue_depth + active. Occupancy is
        the mean fraction of slots in use in a step; latencies are seconds from ``submit`` to the
        image; steps_per_second is of the time spent stepping; graph_bytes is the memory that the
        sampler's captured steps hold.
        """
        return {**self._scheduler.metrics(), "graph_bytes": self.sampler.executor.graphs.bytes}

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every request submitted so far has ended; return whether that came to be."""
        futures = self._scheduler.futures
        if self._thread is None:
            while self.turn():
                pass
        return not wait(futures, timeout).not_done

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Accept nothing more; finish what was accepted, or cancel it.

        Args:
            wait: whether to return only when every future is resolved.
            cancel: whether to cancel what is not finished.
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
        """Shut down: finish everything, or, when left by an exception, cancel it."""
        self.shutdown(cancel=kind is not None)

    def turn(self) -> bool:
        """Schedule, execute and update, once; return whether work is left.

        Raises:
            RuntimeError: the engine has its own thread.
        """
        if self._thread is not None:
            raise RuntimeError("turn: this engine has a thread of its own (threaded=True)")
        return self._loop.turn()

    def __reduce__(self) -> Any:
        raise TypeError("an Engine: must not be pickled; send its sampler, and make one there")

    def after_fork(self) -> None:
        """In a forked child, be closed: the thread that turns is not there."""
        self._thread = None
        self._loop.after_fork()
        self._scheduler.after_fork()

    def _at_exit(self) -> None:
        self.shutdown(cancel=True)

    def _check(self, request: Request, on_step: OnStep | None) -> PendingImage:
        """Return the pending image of a request, which is checked.

        Raises:
            ValueError: as `submit`.
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
