"""Whether the compiled network runs: as the user asked, or where that repays what it costs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from flashddpm.errors import CompilationError
from flashddpm.execution.compiled_network import CompiledNetwork, repays
from flashddpm.execution.slots import Slots
from flashddpm.execution.step import Network

log = logging.getLogger("flashddpm")


class CompileChoice:
    """A network, and its compiled twin where that is to run.

    Args:
        compile: True, False or "auto".
        predict: the network.
        tune: whether compiling tries many kernels for each operation, for minutes.
        device: where it runs.
        flops: returns the floating-point operations of one evaluation of one image; None for a
            network that is not ours, which is compiled only when asked.

    Attributes:
        compile: as given; False once "auto" has met a compiler that fails.
        compiled: the compiled network.
        why_not: what the compiler said when "auto" gave up; None before.
    """

    def __init__(
        self,
        compile: bool | str,
        predict: Network,
        tune: bool,
        device: torch.device,
        flops: Callable[[], float] | None,
    ) -> None:
        self.compile, self._predict, self._device = compile, predict, device
        self._count_flops = flops
        self.compiled = CompiledNetwork(predict, tune)
        self.why_not: str | None = None

    @cached_property
    def _flops(self) -> float:
        assert self._count_flops is not None
        return self._count_flops()

    def compiles(self, evaluations: int, lanes: int) -> bool:
        """Return whether to compile for this many evaluations of one image, ``lanes`` at a time."""
        if self.compile != "auto":
            return bool(self.compile)
        return (lanes, False) in self.compiled.shapes or self.auto(evaluations)[0]

    def auto(self, evaluations: int) -> tuple[bool, str]:
        """Return what compile="auto" chooses for so many evaluations of one image, and why."""
        if self._count_flops is None:
            return False, "a foreign network is compiled only when asked"
        if self._device.type == "cuda":
            return True, "our U-Net on CUDA is always compiled"
        return repays(evaluations * self._flops)

    def network(self, compiled: bool) -> Network:
        """Return the network, or its compiled twin."""
        return self.compiled.network if compiled else self._predict

    def prepared(self, slots: Slots, fractional: bool) -> bool:
        """Compile for the lanes of these buffers; return False where "auto" goes on without.

        Raises:
            CompilationError: the compiler failed, and compile=True or exact images asked for it.
        """
        if self.compile is False:
            return False
        try:
            self.compiled.prepare(slots, fractional)
        except CompilationError as error:
            self._give_up(error, len(slots.lane_slot))
        return self.compile is not False

    def predict(
        self, evaluations: int, x_t: Tensor, told: Tensor, labels: Tensor | None, index: Tensor
    ) -> Tensor:
        """Return the output for any images, compiled if so many evaluations repay that.

        Raises:
            CompilationError: as ``prepared``.
        """
        given, lanes = (x_t, told, labels, index), len(x_t)
        if not self.compiles(evaluations, lanes):
            return self._predict(*given)
        try:
            out = self.compiled.network(*given)
        except CompilationError as error:
            self._give_up(error, lanes)
            return self._predict(*given)
        self.compiled.shapes.add((lanes, False))
        return out

    def _give_up(self, error: CompilationError, lanes: int) -> None:
        """Go on without compiling if nobody asked for it, and say so once."""
        if self.compile != "auto" or lanes in self.compiled.exact:
            raise error
        log.warning("goes on without compiling: %s", error)
        self.compile, self.why_not = False, str(error)
