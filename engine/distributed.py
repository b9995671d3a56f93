"""Several processes that share the work of one run, started by torchrun.

torchrun's environment variables say which process each of them is. In sampling, of N processes
number r takes the batches r, r + N, r + 2N, ..., which are cut from the list of seeds before they
are dealt out: a network's last bits depend on the batch that an image is computed in, so that batch
must not depend on N. In training each process takes an equal part of every batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flashddpm import arguments
from flashddpm.host import ints

T = TypeVar("T")

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Set by torchrun only. RANK and WORLD_SIZE are also set in containers that run one process."""

PATIENCE = timedelta(days=365)
"""Time to wait for a process that has more work; one that has died is noticed at once."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is.

    Attributes:
        rank: number of this process among all, 0..size-1.
        size: number of processes, N.
        local_rank: number of this process among those on this machine, 0..local_size-1.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Return the world that torchrun's variables describe; without them, one process.

        Raises:
            ValueError: a variable is missing, is no integer or is out of its range.
        """
        if LAUNCHED not in environment:
            return cls()

        def read(name: str, low: int, high: int | None = None) -> int:
            text = environment.get(name, "")
            value = int(text) if text.isdecimal() else text
            return arguments.integer(name, value, low, high)

        size, local_size = read("WORLD_SIZE", 1), read("LOCAL_WORLD_SIZE", 1)
        return cls(
            read("RANK", 0, size - 1), size, read("LOCAL_RANK", 0, local_size - 1), local_size
        )

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this process: every N-th, from number ``rank`` on."""
        return items[self.rank :: self.size]

    def device(self, device: str) -> str:
        """Return the device of this process: the GPU number ``local_rank``, or the CPU.

        Raises:
            ValueError: one GPU is named for several processes.
        """
        if self.size == 1 or device == "cpu":
            return device
        if device.startswith("cuda:"):
            raise ValueError(
                f"device={device!r}: must be auto, cpu or cuda where {self.size} processes "
                "take a GPU each"
            )
        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            return f"cuda:{self.local_rank}"
        return device

    @contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Join the other processes' group for a block: gloo on the CPU, NCCL on GPUs.

        On the CPU a process takes its share of the machine's threads. torchrun sets
        OMP_NUM_THREADS to 1 where it is unset; any other number is kept.

        Raises:
            ConnectionError: not all processes joined.
        """
        if self.size == 1:
            yield
            return
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        if not cuda and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, cores() // self.local_size))
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ConnectionError(f"the {self.size} processes did not meet: {error}") from error
        yield
        # Not after an error: the others are to wait until this process has said what it was.
        dist.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks; all must call it.

        Raises:
            SystemExit: another process has ended; it, or torchrun, says why.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError:
            raise SystemExit(2) from None
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that all processes finish, or none goes on from.

        The first process with an error raises it; the others wait for it to end, and end quietly.
        The block must not communicate.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = self.gather(failure is not None)
        if not any(failed):
            return
        if failure is not None and failed.index(True) == self.rank:
            raise failure
        with suppress(SystemExit):
            self.gather(None)
        raise SystemExit(2)

    def any(self, value: bool) -> bool:
        """Return whether ``value`` is true in any process; all must call it."""
        if self.size == 1:
            return value
        flag = ints(int(value))  # on the CPU, over gloo: no GPU is waited for
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def minimum_(self, x: Tensor) -> None:
        """Set ``x`` to the elementwise minimum over all processes; all must call it."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MIN)

    def mean(self, x: Tensor) -> float:
        """Return the mean of all processes' ``x``, a scalar; all must call it."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return float(x) / self.size

    def add_up(self, x: Tensor) -> Tensor:
        """Return, in process 0 only, the sum of ``x`` over all processes; all must call it.

        The sum is exact where all processes but one have 0.
        """
        if self.size > 1:
            dist.reduce(x, 0)
        return x


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
