"""The network compiled: once for each number of lanes, and only where that repays its cost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from flashddpm.errors import CompilationError
from flashddpm.execution.compile_cache import keep_compiled_code
from flashddpm.execution.slots import Slots
from flashddpm.execution.step import Network, evaluate

log = logging.getLogger("flashddpm")

MAX_SHAPES = 128
"""Where Dynamo by itself stops at 8, with one warning."""

GUARDED = {"recompile_limit": MAX_SHAPES, "skip_nnmodule_hook_guards": False}
"""Dynamo by itself runs code that was compiled before a hook was set, without the hook."""

# compile="auto" on the CPU: compiling takes about a minute and saves about a quarter of the time
# of eager convolutions, which run at some 20 GFLOP/s a core. Rough figures; only the order counts.
COMPILE_SECONDS, SAVED, FLOPS_PER_CORE = 60.0, 0.25, 20e9


def repays(flops: float) -> tuple[bool, str]:
    """Return whether so many floating-point operations on the CPU repay compiling, and why."""
    seconds = flops / (FLOPS_PER_CORE * torch.get_num_threads())
    chosen = seconds * SAVED > COMPILE_SECONDS
    verb = "repays" if chosen else "does not repay"
    return chosen, (
        f"about {seconds:.0f} s of work {verb} about {COMPILE_SECONDS:.0f} s of compiling"
    )


@contextmanager
def compiling() -> Iterator[None]:
    """Turn whatever the compiler raises into one error of one line.

    Raises:
        CompilationError: the compiler failed; its cause is the compiler's own error.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    try:
        yield
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        said = next((line for line in lines if " error: " in line), lines[0])  # g++'s, if any
        traced = isinstance(error, TorchDynamoException) and not isinstance(error, InductorError)
        hint = "" if traced else "is there a working C++ compiler (g++)? "
        raise CompilationError(
            f"could not compile ({type(error).__name__}: {said:.200}); "
            f"{hint}compile=False does without"
        ) from error


class CompiledNetwork:
    """A network, compiled when it is first wanted.

    Args:
        predict: the network.
        tune: whether compiling tries many kernels for each operation, for minutes.

    Attributes:
        shapes: the numbers of lanes it is compiled for, and whether timesteps were floats.
        exact: the numbers of lanes of which bits were seen not to depend on the lane.
    """

    def __init__(self, predict: Network, tune: bool) -> None:
        self._predict, self.tune = predict, tune
        self.shapes: set[tuple[int, bool]] = set()
        self.exact: set[int] = set()

    @cached_property
    def network(self) -> Network:
        """The compiled network."""
        keep_compiled_code()
        mode = "max-autotune-no-cudagraphs" if self.tune else None
        log.info("compiling the network (%s)", mode or "default")
        compiled = torch.compile(self._predict, fullgraph=True, dynamic=False, mode=mode)

        def call(x_t: Tensor, told: Tensor, labels: Tensor | None, index: Tensor) -> Tensor:
            # At every call: Dynamo guards more than shapes, the number of threads, say.
            with compiling(), torch._dynamo.config.patch(GUARDED):
                return compiled(x_t, told, labels, index)

        return call

    def prepare(self, slots: Slots, fractional: bool) -> None:
        """Compile for the lanes of these buffers, if that is new."""
        shape = (len(slots.lane_slot), fractional)
        if shape not in self.shapes:
            evaluate(slots, self.network, fractional)
            self.shapes.add(shape)

    def prove_exact(self, image: Tensor, told: Tensor, L: int, labelled: bool) -> None:
        """Refuse exact mode where the network's bits depend on the lane: try.

        They do on the CPU for some odd sizes, where loops over the whole batch end in tails that
        round differently.

        Args:
            image: [1, C, H, W], which is run in every lane.
            told: [1] or [1, E], what the network is told of time.
            L: lanes.
            labelled: whether the network takes labels.
        """
        index = torch.zeros(L, dtype=torch.int64, device=image.device)
        x = image.expand(L, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        told = told.expand(L, *told.shape[1:]).contiguous()
        out = self.network(x, told, torch.zeros_like(index) if labelled else None, index)
        if not torch.equal(out, out[:1].expand_as(out)):
            raise ValueError(
                f"exact=True: on this machine the compiled network gives other bits in other lanes "
                f"of {L}, for images of {tuple(image.shape[1:])}; must be False"
            )
        self.exact.add(L)
