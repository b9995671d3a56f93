"""`CompileChoice`: whether a network is compiled, as asked for or where that repays its cost."""

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
    """A network and its compiled form, with the choice of which of the two runs.

    Args:
        compile: True, False, or "auto" for where compiling repays its cost.
        predict: the network, called as a step calls it (`flashddpm.execution.step.Network`).
        tune: whether the compiler tries many kernels for each operation, which takes minutes.
        device: the device on which the network runs.
        flops: called without arguments, returns the floating-point operations of one evaluation of
            one image; None for a network that is not flashddpm's own, which "auto" never compiles.

    Attributes:
        compile: the choice, as given; False once the compiler has failed under "auto".
        compiled: the `CompiledNetwork`, which compiles at its first use.
        why_not: the text of the compiler's error after which "auto" gave up; None before that.
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
        """Return whether the compiled network is to run for the work that is asked for.

        Args:
            evaluations: the number of network evaluations to come, each counted for one image.
            lanes: the number of lanes (evaluations in one call of the network). For lanes that are
                compiled already "auto" answers True.
        """
        if self.compile != "auto":
            return bool(self.compile)
        return (lanes, False) in self.compiled.shapes or self.auto(evaluations)[0]

    def auto(self, evaluations: int) -> tuple[bool, str]:
        """Return whether compile="auto" would compile for this work, and the reason as a sentence.

        On CUDA flashddpm's own networks are always compiled, on the CPU if that saves more than it
        costs.

        Args:
            evaluations: the number of network evaluations to come, each counted for one image.
        """
        if self._count_flops is None:
            return False, "a foreign network is compiled only when asked"
        if self._device.type == "cuda":
            return True, "our U-Net on CUDA is always compiled"
        return repays(evaluations * self._flops)

    def network(self, compiled: bool) -> Network:
        """Return the network as it is or, if ``compiled`` is true, compiled at its first call.

        Both are called with (x_t, told, labels, index), as `flashddpm.execution.step.Network` says.
        """
        return self.compiled.network if compiled else self._predict

    def prepared(self, slots: Slots, fractional: bool) -> bool:
        """Compile the network for the lanes of some buffers, and return whether that worked.

        Args:
            slots: the buffers, whose lanes (network evaluations) are run once.
            fractional: whether the network is given timesteps as float32 instead of int64.

        Returns:
            False if nothing is to be compiled, or if the compiler fails under "auto".

        Raises:
            CompilationError: if the compiler fails and compile=True, or exact images (whose bits do
                not depend on the batch) have been drawn on as many lanes.
            ValueError: if the network's output is of a wrong shape.
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
        """Return the network's output for any images, compiled if that repays its cost.

        Args:
            evaluations: the number of network evaluations to come, each counted for one image.
            x_t: the noisy images, [L, C, H, W], in the dtype of the network's input.
            told: the timesteps, int64 or float32 [L], or for a hoisted U-Net their embeddings, [L,
                E].
            labels: int64 [L], or None for an unconditional network.
            index: int64 [L], the place of each image among those asked for.

        Returns:
            The output, [L, C or 2C, H, W], in the dtype that the network returns; not checked.

        Raises:
            CompilationError: if the compiler fails and compile=True, or exact images (whose bits do
                not depend on the batch) have been drawn on as many lanes.
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
