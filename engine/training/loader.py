"""The batches of a run, fetched ahead by a thread of its own.

A batch is a pure function of its step: ``draw(step)`` says which images and which are mirrored.
One thread is enough, and no DataLoader of PyTorch's with its processes is needed: NumPy, PyTorch
and Pillow let other Python threads run while they copy, hash or decode, folders that are decoded
as they go have decoding threads of their own, and nothing has to be sent between processes.

The thread itself calls nothing of CUDA: a call of another thread's may break the capture of a
graph. So ``next`` pins the bytes, copies them without waiting, and makes them floats on the device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.data import ImageSource, to_float


@dataclass(frozen=True)
class Draw:
    """What a step trains on, all on the CPU.

    Attributes:
        index: int64 [B], numbers of images.
        flip: bool [B], which of them are mirrored left to right.
        extra: tensors that go with the batch, as they are.
    """

    index: Tensor
    flip: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """A step's images, on the device.

    Attributes:
        x0: float32 [B, C, H, W] in [-1, 1], channels_last.
        labels: int64 [B], or None.
        extra: the draw's tensors.
    """

    x0: Tensor
    labels: Tensor | None
    extra: dict[str, Tensor]


Fetched = tuple[Tensor, Tensor | None, dict[str, Tensor]]


class Loader:
    """Batches of steps start, start + 1, ...; also a context manager that closes itself.

    Args:
        source: the images.
        draw: a pure function of the step. With ``ahead`` it is called in the loader's thread,
            one call at a time and in the order of steps.
        start: the first step.
        device: where batches go.
        ahead: how many batches are fetched while one is trained on; with 0 there is no thread,
            and ``next`` fetches.

    Raises:
        ValueError: ``start`` or ``ahead`` below 0.
    """

    def __init__(
        self,
        source: ImageSource,
        draw: Callable[[int], Draw],
        start: int,
        device: torch.device | str,
        ahead: int = 2,
    ) -> None:
        self.step = arguments.integer("start", start, 0)
        self.wait_seconds = 0.0
        self._source, self._draw = source, draw
        self._device = arguments.resolve_device(device)
        self._lock, self._closed = threading.Lock(), False
        self._thread: ThreadPoolExecutor | None = None
        self._fetching: deque[Future[Fetched]] = deque()
        if arguments.integer("ahead", ahead, 0):
            self._thread = ThreadPoolExecutor(1, "flashddpm-loader")
            for step in range(start, start + ahead):
                self._fetching.append(self._thread.submit(self._fetch, step))

    def next(self) -> Batch:
        """Return the batch of ``step`` and go on to the next; ``wait_seconds`` grows by the wait.

        What ``draw`` or the source raised comes out here, and again at each further call: no step
        is left out.

        Raises:
            RuntimeError: the loader is closed.
        """
        self._check_open()
        began = perf_counter()
        try:
            images, labels, extra = self._wait()
        finally:
            self.wait_seconds += perf_counter() - began
        self.step += 1
        x0 = self._send(images).contiguous(memory_format=torch.channels_last)
        return Batch(
            to_float(x0),
            None if labels is None else self._send(labels),
            {name: self._send(value) for name, value in extra.items()},
        )

    def close(self) -> None:
        """Drop what is fetched ahead, without waiting for a fetch that has begun."""
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

    def _wait(self) -> Fetched:
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

    def _fetch(self, step: int) -> Fetched:
        """Return a step's images uint8 [B, C, H, W], labels and extra tensors, on the CPU."""
        draw = self._draw(step)
        B = len(draw.index)
        if draw.flip.dtype is not torch.bool or draw.flip.shape != (B,):
            raise ValueError(f"flip: {draw.flip.dtype} {list(draw.flip.shape)}; must be bool [{B}]")
        images, labels = self._source.fetch(draw.index)
        if draw.flip.any():
            images = torch.where(draw.flip[:, None, None, None], images.flip(-1), images)
        return images, labels, draw.extra

    def _send(self, tensor: Tensor) -> Tensor:
        """Copy to the device; on CUDA without waiting, from pinned memory."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
