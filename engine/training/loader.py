"""`Loader`: the data loader of a training run, which makes a `TrainBatch` for every step.

Batches are fetched ahead by a thread of the loader's own. A batch is a pure function of its step:
`Draws` makes the random choices, and this file applies them: it reads the images, mirrors some, and
drops some labels.

One thread is enough, and no DataLoader of PyTorch's with its processes is needed: NumPy, PyTorch
and Pillow let other Python threads run while they copy, hash or decode; folders of pictures that
are decoded at each fetch have decoding threads of their own; and nothing has to be sent between
processes.

The thread itself makes no CUDA call, since a call from another thread may break the capture of a
graph. So ``next`` pins the bytes, copies them without waiting, and makes them floats on the device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import repeat
from time import perf_counter
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.data import ImageSource, to_float
from flashddpm.training.draws import Draws


class TrainBatch(NamedTuple):
    """The inputs of a training step: one process's part of a batch, B images, all on one device.

    Attributes:
        x0: the images, float32 [B, C, H, W] in [-1, 1], channels_last.
        t: the timestep of each image, int64 [B] in 0..T-1.
        seeds: the seed of each image's noise, int64 [B].
        keys: the key of each image's noise (the upper 64 bits of Philox's counter), which is the
            image's number in the run, int64 [B].
        labels: the class of each image, int64 [B] in 0..K-1, or K, the null class, where the label
            is dropped; None for an unconditional network.
    """

    x0: Tensor
    t: Tensor
    seeds: Tensor
    keys: Tensor
    labels: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the batch in the order of the fields, without None."""
        return [value for value in self if value is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        """Return the batch with each tensor replaced by what a function returns for it.

        Args:
            function: called with each field's tensor and returns one; it is not called for None.
        """
        return TrainBatch._make(None if value is None else function(value) for value in self)

    def chunk(self, parts: int) -> list[TrainBatch]:
        """Return the batch cut into equal parts along the images, in order, as views of this batch.

        Args:
            parts: the number of parts, which must divide B (not checked).
        """
        columns = [repeat(None) if value is None else value.chunk(parts) for value in self]
        return [TrainBatch._make(rows) for rows in zip(*columns, strict=False)]


class Loader:
    """Fetches the batches of steps start, start + 1, ...: each call of `next` returns one.

    It is a context manager, which closes itself at the end of the block, also one that raises.

    Args:
        source: the images and labels.
        draws: the random choices of the run (which images, mirrored or not, timesteps, dropped
            labels). If ``ahead`` is above 0 they are made in the loader's thread, one step at a
            time and in the order of steps.
        start: the number of the first step, from 0.
        device: the device that batches are copied to: "cpu", "cuda", "cuda:N", a torch.device, or
            "auto" for CUDA where there is a GPU, else the CPU.
        ahead: the number of batches that are fetched while one is trained on; with 0 there is no
            thread, and ``next`` itself fetches.

    Attributes:
        step: the number of the step whose batch ``next`` returns, an int; at first ``start``.
        wait_seconds: the total time that ``next`` has waited for batches, in seconds, a float; at
            first 0. With ``ahead`` 0 it is the time of fetching.

    Raises:
        ValueError: if ``start`` or ``ahead`` is below 0 or no integer, or the device cannot be
            used.
    """

    def __init__(
        self,
        source: ImageSource,
        draws: Draws,
        start: int,
        device: torch.device | str,
        ahead: int = 2,
    ) -> None:
        self.step = arguments.integer("start", start, 0)
        self.wait_seconds = 0.0
        self._source, self._draws = source, draws
        self._device = arguments.resolve_device(device)
        self._lock, self._closed = threading.Lock(), False
        self._thread: ThreadPoolExecutor | None = None
        self._fetching: deque[Future[TrainBatch]] = deque()
        if arguments.integer("ahead", ahead, 0):
            self._thread = ThreadPoolExecutor(1, "flashddpm-loader")
            for step in range(start, start + ahead):
                self._fetching.append(self._thread.submit(self._fetch, step))

    def next(self) -> TrainBatch:
        """Return the batch of ``step`` on the device, and go on to the next step.

        ``wait_seconds`` grows by the time that it waited. Errors of ``draws`` and of the source
        (such as `DataError`) are raised here; no step is left out then: a further call is for the
        same step, and where a thread fetches it raises the same error.

        Raises:
            RuntimeError: if the loader is closed, also by another thread meanwhile.
        """
        self._check_open()
        began = perf_counter()
        try:
            batch = self._wait()
        finally:
            self.wait_seconds += perf_counter() - began
        self.step += 1
        batch = batch.map(self._send)
        pixels = batch.x0.contiguous(memory_format=torch.channels_last)
        return batch._replace(x0=to_float(pixels))

    def close(self) -> None:
        """Drop the batches fetched ahead, without waiting for a fetch that has begun.

        The loader cannot be used afterwards; closing it again does nothing.
        """
        with self._lock:
            self._closed = True
            if self._thread is not None:
                self._thread.shutdown(wait=False, cancel_futures=True)
            self._fetching.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("loader: is closed; make another")

    def _wait(self) -> TrainBatch:
        """Return the batch fetched for ``step``, and have the thread fetch one step further."""
        if self._thread is None:
            return self._fetch(self.step)
        with self._lock:
            self._check_open()
            first = self._fetching[0]
        try:
            fetched = first.result()  # stays in its place if it raises
        except CancelledError:
            self._check_open()  # closed by another thread meanwhile
            raise
        with self._lock:
            self._check_open()
            following = self._thread.submit(self._fetch, self.step + len(self._fetching))
            self._fetching.append(following)
            self._fetching.popleft()
        return fetched

    def _fetch(self, step: int) -> TrainBatch:
        """Return a step's batch on the CPU, x0 still as pixels, uint8 [B, C, H, W]."""
        draws = self._draws
        keys = draws.keys(step)
        flip, B = draws.flips(keys), len(keys)
        if flip.dtype is not torch.bool or flip.shape != (B,):
            raise ValueError(f"flip: {flip.dtype} {list(flip.shape)}; must be bool [{B}]")
        images, labels = self._source.fetch(draws.index(keys))
        if flip.any():
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        null_class = self._source.num_classes
        if null_class is None or labels is None:
            labels = None
        else:
            labels = labels.masked_fill(draws.label_drops(keys), null_class)
        return TrainBatch(images, draws.timesteps(keys), draws.seeds(keys), keys, labels)

    def _send(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device, copied from pinned memory without waiting on CUDA."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
