"""Benchmarks of each kernel operation: the fast version against the reference, on equal arguments.

An operation is a function of `flashddpm.kernels` with its record, an `Op`. On a GPU its kernels'
time (module ``kernel_time``), for the forward pass and for the gradient separately, is compared
with its bytes at a copy's bandwidth, its instructions, an empty kernel, and the best that a
compiler makes of the same work; a call from Python is compared with the eager reference. On the CPU
only the noise has a fast version: the compiled reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashddpm.benchmarks.measure.harness import Measurement, compare
from flashddpm.benchmarks.measure.runner import BenchmarkCase
from flashddpm.benchmarks.peers.compiled_ops import (
    compiled_peer,
    copied,
    directions,
    elements_of,
    upstream_of,
)
from flashddpm.execution.cpu_noise import CompiledNoise
from flashddpm.kernels import reference
from flashddpm.kernels.tables import Purpose

if TYPE_CHECKING:
    from flashddpm.kernels.operation import Arguments, Op

SMALLEST = (1, (3, 32, 32))
LARGE = ((64, (3, 256, 256)), (256, (3, 256, 256)))
SIZES = (SMALLEST, (256, (3, 32, 32)), *LARGE)
DTYPES = (torch.float32, torch.bfloat16)
OF_BOUND, OF_EMPTY = 0.9, 1.5  # goals: of_bound at least, hot_of_empty at most


def noise_on_the_cpu(device: str) -> Iterator[Measurement]:
    """Time the CPU's compiled noise against the reference, for 16 and 800 images of 784 numbers.

    It yields a comparison for each, of the seconds of one call. ``device`` is not looked at.

    Raises:
        AssertionError: if the two differ in any bit.
    """
    draw = CompiledNoise()
    for batch in (16, 800):
        seeds, keys = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
        arguments = (seeds, keys, (1, 28, 28), Purpose.REVERSE_STEP)
        if not torch.equal(draw(*arguments), reference.philox(*arguments)):
            raise AssertionError("compiled noise differs from the reference, not timed")
        yield Measurement.of(
            f"noise-{batch}x784",
            "eager reference",
            f"{batch * 784} normals a call",
            compare(partial(draw, *arguments), partial(reference.philox, *arguments)),
        )


def arguments_of(op: Op, dtype: torch.dtype, size: Any, device: str) -> Arguments:
    """Return an operation's example arguments by name, with equal work for every image.

    Every image gets the same row (line of coefficients) of the example's table: the first with no 0
    in the columns ``op.all_work``, which switch costly terms on. ``size`` is (batch, (C, H, W)),
    ``dtype`` that of the images, ``device`` "cpu" or "cuda".

    Raises:
        ValueError: if the table has no such row.
    """
    batch, shape = size
    arguments = op.example(device, dtype, shape, batch, 0)
    if op.index:
        arguments[op.index].fill_(first_row(arguments["rows"], op.all_work))
    for name, value in op.alike.items():
        arguments[name].fill_(value)
    return arguments


def first_row(rows: Tensor, columns: Sequence[int]) -> int:
    """Return the index of the first row of a table [R, columns] that has no 0 in the given columns.

    Raises:
        ValueError: if there is no such row.
    """
    found = (rows[:, list(columns)] != 0).all(1).nonzero().flatten().tolist()
    if not found:
        raise ValueError(
            f"rows {rows.tolist()}: one must have no 0 in columns {[*map(int, columns)]}"
        )
    return found[0]


def with_gradients(op: Op, function: Callable[..., Any], arguments: Arguments) -> list[Any]:
    """Call a version of an operation on copies of its arguments and return all that it computes.

    ``function`` is ``op.fast`` or ``op.reference``. The list holds the result (None where there is
    none), the gradients of the arguments that ``op.differentiable`` names, and the arguments that
    ``op.mutates`` names, as changed by the call.
    """
    copies = copied(arguments)
    leaves = [copies[name].requires_grad_() for name in op.differentiable]
    result = function(**copies)
    gradients = (
        torch.autograd.grad(result, leaves, upstream_of(op, result, copies)) if leaves else ()
    )
    return [result, *gradients, *(copies[name] for name in op.mutates)]


def check(op: Op, arguments: Arguments) -> None:
    """Check that an operation's results and gradients are close to those of the reference.

    Raises:
        AssertionError: if they differ by more than the default tolerances of
            ``torch.testing.assert_close``; NaN equals NaN.
    """
    fast, slow = (with_gradients(op, function, arguments) for function in (op.fast, op.reference))
    torch.testing.assert_close(fast, slow, equal_nan=True)


@dataclass(frozen=True)
class Card:
    """The measured properties of a GPU that kernels are compared with.

    Attributes:
        copy: bytes a second of a large copy, those read and those written together.
        empty: seconds of an empty kernel within a CUDA graph.
        cache: bytes of the L2 cache.
        instructions: (name of a kernel, dtype of its images) -> clock cycles that the whole GPU
            spends on the instructions of one element.
    """

    copy: float
    empty: float
    cache: int
    instructions: dict[tuple[str, torch.dtype], float]


@cache
def this_card() -> Card:
    """Measure the current GPU at the first call and return the same `Card` from then on."""
    from flashddpm.benchmarks.measure import kernel_time

    card = torch.cuda.get_device_properties()
    return Card(
        kernel_time.copy_bandwidth(),
        kernel_time.empty_seconds(),
        card.L2_cache_size,
        instruction_clocks(10 * card.major + card.minor, card.multi_processor_count),
    )


def instruction_clocks(arch: int, multiprocessors: int) -> dict[tuple[str, torch.dtype], float]:
    """Return the clock cycles of the whole GPU for one element, by each kernel's instructions.

    The keys are (name of a kernel, dtype of its images), the values cycles of its busiest pipe
    (execution unit); kernels with loops are left out. It is empty if ``arch``, the compute
    capability times 10, is not 90.
    """
    from flashddpm.kernels.checks import scorecard
    from flashddpm.kernels.checks.compiled import KERNELS

    if arch != scorecard.REFERENCE:
        return {}
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    variants = [(kernel, dtype, arch) for kernel in KERNELS.values() for dtype in kernel.dtypes]
    return {
        (entry.kernel, dtypes[entry.dtype]): max(entry.clocks.values()) / multiprocessors
        for entry in scorecard.measure(variants)
        if entry.clocks  # there are none where the kernel has a loop
    }


def bytes_of(op: Op, arguments: Arguments, backward: bool) -> int:
    """Return the bytes that a call of an operation, or of its gradient, moves in all its passes."""
    if not backward:
        return op.bytes_moved(arguments)
    assert op.gradient_bytes is not None, f"{op.name} has no gradient"
    return op.gradient_bytes(arguments)


def once_of(op: Op, arguments: Arguments, backward: bool) -> int:
    """Return the bytes that a call must move: images read in several passes count once."""
    if op.read_again:
        return sum(arguments[name].nbytes for name in op.read_again)
    return bytes_of(op, arguments, backward)


def memory_of(op: Op, arguments: Arguments) -> int:
    """Return the bytes of an operation's tensors, arguments and result: each counts once."""
    result = op.fast(**copied(arguments))
    tensors = [value for value in (result, *arguments.values()) if isinstance(value, Tensor)]
    return sum(value.nbytes for value in tensors)


@dataclass(frozen=True)
class KernelWork:
    """The work of one call of an operation or of its gradient.

    Attributes:
        kernel: the name of the kernel, as in ``Card.instructions``.
        dtype: the dtype of the images.
        elements: the number of elements of the images.
        once: bytes that memory must move.
        moved: bytes that all passes move, from memory or from caches.
    """

    kernel: str
    dtype: torch.dtype
    elements: int
    once: int
    moved: int


def bound_seconds(card: Card, work: KernelWork, clock: float) -> float:
    """Return the least seconds of a call: of its bytes or of its instructions, whichever is longer.

    Args:
        card, work: the GPU, whose bytes move at the speed of its copy, and the work of the call.
        clock: the clock rate of the GPU's multiprocessors, in Hz.
    """
    clocks = card.instructions.get((work.kernel, work.dtype), 0.0) * work.elements
    return max(work.once / card.copy, clocks / clock)


def figures(
    card: Card,
    size: Any,
    work: KernelWork,
    seconds: float,
    clock: float,
    working_set: int,
    hot: float | None = None,
) -> dict[str, float]:
    """Return the figures of one kernel: how fast it is, and how near to its bound.

    Args:
        card, work: the GPU that it ran on, and the work of one call.
        size: (batch, (C, H, W)), as in SIZES.
        seconds: the time of one call whose arguments are in memory, in seconds.
        clock: the clock rate of the GPU's multiprocessors, in Hz.
        working_set: bytes of all arguments and results that the calls use in turn.
        hot: the time of one call whose arguments are in the L2 cache, in seconds, or None.

    Returns:
        "us" (microseconds of a call), "gb_per_s" (1e9 bytes a second), "of_copy" (fraction of a
        copy's bandwidth), "of_bound" (the least time of a call over its time), "working_set_mb" and
        "sm_clock_mhz"; "once_mb" and "all_passes_mb" where several passes read the same images;
        with ``hot`` "hot_us", "of_empty" and "hot_of_empty" (times over that of an empty kernel);
        "goal_met", 1 or 0: with ``hot`` whether hot_of_empty <= 1.5, else, at the sizes in LARGE
        only, whether of_bound >= 0.9.
    """
    found = {
        "us": seconds * 1e6,
        "gb_per_s": work.once / seconds / 1e9,
        "of_copy": work.once / seconds / card.copy,
        "of_bound": bound_seconds(card, work, clock) / seconds,
        "working_set_mb": working_set / 1e6,
        "sm_clock_mhz": clock / 1e6,
    }
    if work.moved != work.once:
        found |= {"once_mb": work.once / 1e6, "all_passes_mb": work.moved / 1e6}
    if size in LARGE:
        found["goal_met"] = float(found["of_bound"] >= OF_BOUND)
    if hot is not None:
        found |= {"of_empty": seconds / card.empty, "hot_us": hot * 1e6}
        found["hot_of_empty"] = hot / card.empty
        found["goal_met"] = float(found["hot_of_empty"] <= OF_EMPTY)
    return found


def note_of(card: Card, work: KernelWork, flushed: bool, sets: int, clock: float | None) -> str:
    """Return the text that explains a kernel's figures in reports.

    Args:
        card, work: the GPU that it ran on, and the work of one call.
        flushed: whether the sets of arguments are together larger than the L2 cache.
        sets: the number of sets of arguments that calls use in turn.
        clock: the clock rate that NVML read, in Hz, or None if it gave none.
    """
    counted = (work.kernel, work.dtype) in card.instructions
    known = "read by NVML while they ran" if clock else "assumed, for NVML gives none"
    return (
        "time of all kernels of a call in a CUDA graph; L2 "
        f"{'flushed' if flushed else 'hot'}, by {sets} sets of arguments in turn; hot: one set. "
        "of_copy, of_bound: shares of a copy's bandwidth, of the kernel's bound "
        f"({'with' if counted else 'without'} its instructions, at sm_clock_mhz, {known}; bytes "
        f"{'that several passes read count once' if work.moved != work.once else 'of one pass'}). "
        f"The goal: of_bound {OF_BOUND}, at the smallest size hot_of_empty {OF_EMPTY}"
    )


def measure(
    op: Op, dtype: torch.dtype, size: Any, card: Card, timer: Any, device: str = "cuda"
) -> Iterator[Measurement]:
    """Check an operation, then time it and its gradient against the reference and a compiler.

    Args:
        op, card: the operation, and the GPU that it runs on.
        dtype, size: the floating-point dtype of the images, and (batch, (C, H, W)).
        timer: the module ``kernel_time``, or a stand-in with its functions.
        device: the device of the arguments: "cuda", or "cpu" with a stand-in.

    Yields:
        Three measurements of the operation, then three of its gradient if it has one: what
        ``figures`` returns; the kernels' seconds against those of the compiled PyTorch code (no
        values without such code); the seconds of a call from Python against the eager reference.

    Raises:
        AssertionError: if results or gradients are not close to the reference's.
        ValueError: if the example's coefficients have no row that is nonzero in ``op.all_work``.
        TorchDynamoException: if the operation's plain PyTorch code cannot be compiled whole.
    """
    from flashddpm.kernels.checks.scorecard import CLOCK

    arguments = arguments_of(op, dtype, size, device)
    check(op, arguments)
    peer_name, peer = compiled_peer(op, arguments)
    memory, elements = memory_of(op, arguments), elements_of(arguments)
    slow = directions(op, arguments, op.reference)
    theirs = directions(op, arguments, peer) if peer else {}
    for way, make in directions(op, arguments, op.fast).items():
        once, moved = (count(op, arguments, bool(way)) for count in (once_of, bytes_of))
        work = KernelWork(op.name + way.replace("-", "_"), dtype, elements, once, moved)
        footprint = min(once, memory)
        sets = timer.sets_beyond(card.cache, footprint)
        capture = partial(timer.capture, sets=sets, least=timer.calls_for(moved))
        case = f"{op.name}{way}-{size[0]}x{'x'.join(map(str, size[1]))}-{str(dtype)[6:]}"
        ours = capture(make)
        comparison = compare(
            ours,
            capture(theirs[way]) if way in theirs else ours,
            rounds=5,
            warm_ups=2,
            clock=timer.seconds_a_call,
        )
        clock = timer.sm_clock(ours)
        hot = timer.median_seconds(make) if size == SMALLEST else None
        took = comparison.ours_seconds
        yield Measurement(
            case,
            "",
            note_of(card, work, sets * footprint > card.cache, sets, clock),
            figures(card, size, work, took, clock or CLOCK, sets * footprint, hot),
        )
        if way in theirs:
            yield Measurement.of(case, peer_name, "kernel times, in CUDA graphs alike", comparison)
        else:
            yield Measurement(f"{case}-peer", peer_name, "no compiled peer", {})
        del ours
        yield Measurement.of(
            case,
            "eager reference",
            "calls from Python, the host's part included",
            compare(make(), slow[way](), rounds=5, warm_ups=2),
        )


def speed_of_card(device: str) -> Iterator[Measurement]:
    """Yield one measurement of the current GPU: "copy_gb_per_s", "empty_us" (kernel), "l2_mb"."""
    card = this_card()
    yield Measurement(
        "card",
        "",
        "a copy of 1 GiB, read and written; an empty kernel in a graph; the L2 cache",
        {"copy_gb_per_s": card.copy / 1e9, "empty_us": card.empty * 1e6, "l2_mb": card.cache / 1e6},
    )


def on_a_gpu(name: str, dtype: torch.dtype, size: Any, device: str) -> Iterator[Measurement]:
    """Measure one operation, a name in ``flashddpm.kernels.OPS``, as ``measure`` does on CUDA."""
    from flashddpm.benchmarks.measure import kernel_time
    from flashddpm.kernels import OPS

    yield from measure(OPS[name], dtype, size, this_card(), kernel_time)


def operations(device: str) -> list[BenchmarkCase]:
    """Return the benchmark cases of all operations on a device, "cpu" or "cuda".

    On CUDA: the GPU's own speeds, then each operation at each of SIZES (from one 32x32 image to 256
    of 256x256), in float32 and bfloat16 where its images may have them. On the CPU: the noise
    alone.
    """
    if device != "cuda":
        return [BenchmarkCase("noise", "kernels", noise_on_the_cpu)]
    from flashddpm.kernels import OPS

    cases = [BenchmarkCase("card", "kernels", speed_of_card)]
    for size in SIZES:
        for op in OPS.values():
            for dtype in [x for x in DTYPES if x in op.dtypes] or op.dtypes[:1]:
                name = f"{op.name}-{size[0]}x{'x'.join(map(str, size[1]))}-{str(dtype)[6:]}"
                measured = partial(on_a_gpu, op.name, dtype, size)
                cases.append(BenchmarkCase(f"kernel-{name}", "kernels", measured))
    return cases
