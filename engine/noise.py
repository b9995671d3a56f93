"""The reference noise compiled for the CPU: the same bits, an order of magnitude sooner."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from flashddpm.kernels import reference


class CompiledNoise:
    """``reference.philox`` in three compiled pieces, with its two casts of bits between them.

    (Inductor cannot cast bits on the CPU; hence pieces.) Compiled at the first call.
    """

    @cached_property
    def _pieces(self) -> tuple:
        return tuple(torch.compile(piece, dynamic=True) for piece in reference.PIECES)

    def __call__(
        self, seeds: Tensor, keys: Tensor, shape: tuple[int, int, int], purpose: int
    ) -> Tensor:
        """Return standard normal noise, float32 [B, C, H, W], as ``reference.philox`` does."""
        return reference.philox_in_pieces(self._pieces, seeds, keys, shape, purpose)
