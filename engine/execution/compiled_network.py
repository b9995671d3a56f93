"""`CompiledNetwork`: a network under torch.compile, compiled once for each number of lanes."""

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
"""The number of compilations of one function that are allowed; Dynamo's own limit is 8."""

GUARDED = {"recompile_limit": MAX_SHAPES, "skip_nnmodule_hook_guards": False}
"""The settings of Dynamo under which the network is called.

Without the second, Dynamo runs code that was compiled before a hook was set, without the hook.
"""

# compile="auto" on the CPU: compiling takes about a minute and saves about a quarter of the time
# of eager convolutions, which run at some 20 GFLOP/s a core. Rough figures; only the order counts.
COMPILE_SECONDS, SAVED, FLOPS_PER_CORE = 60.0, 0.25, 20e9


def repays(flops: float) -> tuple[bool, str]:
    """Decide whether work on the CPU repays about a minute of compiling.

    Args:
        flops: the floating-point operations of all the work.

    Returns:
        Whether compiling repays, and the reason as a text with both times in seconds, estimated by
        torch's number of threads.
    """
    seconds = flops / (FLOPS_PER_CORE * torch.get_num_threads())
    chosen = seconds * SAVED > COMPILE_SECONDS
    verb = "repays" if chosen else "does not repay"
    return chosen, (
        f"about {seconds:.0f} s of work {verb} about {COMPILE_SECONDS:.0f} s of compiling"
    )


@contextmanager
def compiling() -> Iterator[None]:
    """Turn the errors of torch's compiler, raised in this context, into a `CompilationError`.

    Any other error of the block goes through as it is.

    Raises:
        CompilationError: if the compiler fails; its text is one line, its cause the compiler's
            error.
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
    """A network under torch.compile; it is compiled at its first call with each new input shape.

    Args:
        predict: the network, called as a step calls it (`flashddpm.execution.step.Network`).
        tune: whether the compiler tries many kernels for each operation, which takes minutes.

    Attributes:
        tune: as above.
        shapes: a set of (lanes, fractional): the numbers of lanes (network evaluations in a call)
            for which the network is compiled, and whether timesteps were fractional.
        exact: the set of numbers of lanes for which `prove_exact` saw the same bits in each lane.
    """

    def __init__(self, predict: Network, tune: bool) -> None:
        self._predict, self.tune = predict, tune
        self.shapes: set[tuple[int, bool]] = set()
        self.exact: set[int] = set()

    @cached_property
    def network(self) -> Network:
        """The compiled network, a function (x_t, told, labels, index) -> output.

        Shapes and dtypes are those of `flashddpm.execution.step.Network`. A call raises
        CompilationError if the compiler fails; the first access raises ValueError if others may
        write to the folder of compiled code.
        """
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
        """Compile the network for the lanes of some buffers by one call, unless that is done.

        Args:
            slots: the buffers, whose lanes (network evaluations) are run.
            fractional: whether the network is given timesteps as float32 instead of int64.

        Raises:
            CompilationError: if the compiler fails.
            ValueError: if the network's output is of a wrong shape.
        """
        shape = (len(slots.lane_slot), fractional)
        if shape not in self.shapes:
            evaluate(slots, self.network, fractional)
            self.shapes.add(shape)

    def prove_exact(self, image: Tensor, told: Tensor, L: int, labelled: bool) -> None:
        """Run one image in all lanes, and raise unless each lane's output has the same bits.

        If they have, L is added to ``exact``. They may differ on the CPU for some odd sizes, where
        a loop over the whole batch ends in a remainder that is rounded differently.

        Args:
            image: [1, C, H, W], in the dtype of the network's input.
            told: what the network is given for the timestep: int64 [1], or the embedding [1, E].
            L: the number of lanes (network evaluations in a call).
            labelled: whether the network takes labels; all are 0 here.

        Raises:
            ValueError: if the bits differ.
            CompilationError: if the compiler fails.
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
