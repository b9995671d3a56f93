r"""Exponential moving averages of the weights, several half-lives h (in steps) at once:

    average += (1 - d) (weights - average),    d = min(2^(-1/h), (1 + s) / (10 + s))    at step s

so that the average forgets the random start at once. Which half-life is best is seen after the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Averages:
    """The averages of a network's parameters, each as float32 tensors by the parameters' names.

    Args:
        parameters: by name; read at every `update`.
        half_lives: in steps.
    """

    def __init__(self, parameters: Mapping[str, Tensor], half_lives: Sequence[int]) -> None:
        self._parameters = list(parameters.values())
        self.of = {
            half_life: {name: p.detach().clone() for name, p in parameters.items()}
            for half_life in half_lives
        }
        device = self._parameters[0].device
        # On the device: a captured step reads what the host writes there before each replay.
        self._rates = {h: torch.zeros((), dtype=torch.float32, device=device) for h in half_lives}

    def set_rates(self, step: int) -> None:
        """Choose 1 - d for this step."""
        for half_life, rate in self._rates.items():
            rate.fill_(1 - min(2 ** (-1 / half_life), (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the weights."""
        for half_life, average in self.of.items():
            values = list(average.values())
            change = torch._foreach_sub(self._parameters, values)
            torch._foreach_mul_(change, self._rates[half_life])
            torch._foreach_add_(values, change)

    def are_finite(self) -> bool:
        """Return whether every weight always was finite: if one was not, its average stays so."""
        finite = [v.isfinite().all() for average in self.of.values() for v in average.values()]
        return bool(torch.stack(finite).all())
