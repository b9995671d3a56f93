r"""`Ema`: exponential moving averages of the weights, for several half-lives h (in steps) at once.

    average += (1 - d) (weights - average),    d = min(2^(-1/h), (1 + s) / (10 + s))    at step s

The second term of d makes the first averages forget the random start. All half-lives are kept, as
which one gives the best model is known only after the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Ema:
    """The exponential moving averages of a network's weights, one for each half-life.

    They start as copies of the weights.

    Args:
        parameters: the weights by name, float32, all on one device, at least one; they are read at
            every `update`.
        half_lives: the half-lives h in steps, above 0, all different (not checked). If the weights
            jump once and then stay, the average has gone half of the way after h steps.

    Attributes:
        weights: a dictionary from half-life to a dictionary from the parameter's name to its
            average, float32 of the parameter's shape, on its device.
    """

    def __init__(self, parameters: Mapping[str, Tensor], half_lives: Sequence[int]) -> None:
        self._parameters = list(parameters.values())
        self.weights = {
            half_life: {name: p.detach().clone() for name, p in parameters.items()}
            for half_life in half_lives
        }
        device = self._parameters[0].device
        # On the device: a captured step reads what the host writes there before each replay.
        self._rates = {h: torch.zeros((), dtype=torch.float32, device=device) for h in half_lives}

    def set_rates(self, step: int) -> None:
        """Set the rate by which the next `update` moves each average, for a step.

        It is 1 - min(2^(-1/h), (1 + s) / (10 + s)) at step s, for half-life h; 0 before any call.

        Args:
            step: the number of the step, from 0.
        """
        for half_life, rate in self._rates.items():
            rate.fill_(1 - min(2 ** (-1 / half_life), (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the current weights, in place, by the rates of `set_rates`."""
        for half_life, average in self.weights.items():
            values = list(average.values())
            change = torch._foreach_sub(self._parameters, values)
            torch._foreach_mul_(change, self._rates[half_life])
            torch._foreach_add_(values, change)

    def are_finite(self) -> bool:
        """Return whether every weight was finite at every update so far; waits for the device.

        An average that met a NaN or an infinity stays NaN or infinite.
        """
        averages = [value for average in self.weights.values() for value in average.values()]
        return bool(torch.stack([value.isfinite().all() for value in averages]).all())
