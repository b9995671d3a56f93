"""Distributed runs: several processes, started by torchrun, that share the work of one run.

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
"""The environment variable that only torchrun sets (containers of one process may set RANK too)."""

PATIENCE = timedelta(days=365)
"""The timeout of collectives, for a process that still has work; a dead one is noticed at once."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is; by default one process.

    With one process nothing is communicated. With several, the methods that all must call need
    the block of `joined`; if a process has ended, they raise torch's RuntimeError, unless their own
    docstring names another error.

    Attributes:
        rank: the number of this process among all, 0..size-1.
        size: the number of processes, N.
        local_rank: the number of this process among those on this machine, 0..local_size-1.
        local_size: the number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Return the world that torchrun's variables describe, or one process without torchrun.

        Args:
            environment: strings by name, of which TORCHELASTIC_RUN_ID (set by torchrun alone),
                RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are read; by default the process's
                own.

        Raises:
            ValueError: if torchrun is used, and a variable is missing, is no integer or is out of
                its range.
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
        """Return the items that fall to this process: those numbered rank, rank + N, rank + 2N, ...

        Args:
            items: the items of the whole run, the same in every process.
        """
        return items[self.rank :: self.size]

    def device(self, device: str) -> str:
        """Return the name of the device that this process runs on.

        Args:
            device: "auto", "cpu", "cuda" or, for one process only, "cuda:N", in lower case; any
                other string is returned as it is.

        Returns:
            ``device`` itself for one process or the CPU; among several processes "cuda:R", R being
            ``local_rank``, for "cuda", and for "auto" where CUDA is available.

        Raises:
            ValueError: if one GPU ("cuda:N") is named for several processes.
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
        """Join the torch.distributed group of all processes for a block (a context manager).

        The group uses gloo on the CPU and, where the device is no CPU and CUDA is available, NCCL
        for tensors on GPUs, and then makes GPU number ``local_rank`` the current one. On the CPU a
        process takes its share of the machine's threads: torchrun sets OMP_NUM_THREADS to 1 where
        it is unset; any other number is kept. With one process nothing is done. The group is left
        at the end of the block, but not if the block raises: the error goes on, and the other
        processes wait until this one has ended.

        Args:
            device: the device of this process, as `device` returns it.

        Raises:
            ConnectionError: if not all processes joined.
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
        """Return the values of all processes, as a list by rank; all processes must call it.

        Args:
            value: an object that can be pickled.

        Raises:
            SystemExit: if another process has ended (exit code 2); it, or torchrun, says why.
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
        """Run a block, as a context manager, after which either all processes go on or none does.

        If the block raises an Exception in some processes, the one of them with the lowest rank
        raises it; the others wait for that process to end. All must run it, and the block must not
        communicate.

        Raises:
            SystemExit: if the block failed, in all processes but the one that raises its error
                (exit code 2).
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
        """Return whether ``value`` is true in any process, in each; all must call it.

        The processes exchange it on the CPU (gloo), so that no GPU is waited for.

        Args:
            value: this process's own bool.
        """
        if self.size == 1:
            return value
        flag = ints(int(value))  # on the CPU, over gloo: no GPU is waited for
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def minimum_(self, x: Tensor) -> None:
        """Set ``x`` to the elementwise minimum over all processes, in place; all must call it.

        Args:
            x: a tensor of the same shape and dtype in every process (not checked), on the CPU or
                on this process's GPU.
        """
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MIN)

    def mean(self, x: Tensor) -> float:
        """Return the mean, over all processes, of one number from each; all must call it.

        Args:
            x: this process's number, a floating-point tensor of one element, of the same dtype in
                every process; it stays as it is.

        Returns:
            The mean as a Python float, in every process.
        """
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return float(x) / self.size

    def add_up(self, x: Tensor) -> Tensor:
        """Return, in process 0, the sum of ``x`` over all processes; all must call it.

        The sum is exact where all processes but one have 0.

        Args:
            x: a tensor of the same shape and dtype in every process; it is overwritten.

        Returns:
            ``x``, which holds the sum in process 0, and nothing of use in the others.
        """
        if self.size > 1:
            dist.reduce(x, 0)
        return x


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
