r"""The variational bound on the likelihood of 8-bit images, in bits for each element   (S8 to S10).

    -log p(x_0)  <=  L_T + sum_{t >= 1} L_{t-1} + L_0

(Ho et al. 2020, eq. 5.) Every image is noised to each chosen timestep, the network predicts, and
``vlb_terms`` compares: noise is drawn once for each pair of image and timestep, a pure function of
(seed, image's number, timestep), so that neither the batch nor the choice of timesteps changes it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashddpm import arguments
from flashddpm.data import to_float
from flashddpm.diffusion.loss_tables import vlb_rows
from flashddpm.diffusion.parameterization import LEARNED_VARIANCES, noising_rows
from flashddpm.execution.upload import send
from flashddpm.host import ints, isolated
from flashddpm.sampling import inputs
from flashddpm.sampling.sampler import Sampler

KEYS = 2**32
"""The noise key of image i at timestep t is t KEYS + i."""


@dataclass(frozen=True)
class Bound:
    """The bound and its parts: bits for each element, means over images, unless it says otherwise.

    A standard error is that of a mean over images, NaN for one image: noise and images both.

    Attributes:
        timesteps: where the network was evaluated, rising from 0.
        terms, terms_stderr: L_0 and L_{t-1}, of each of these, and their standard errors.
        x0_mse, eps_mse: of each, squared errors of the predicted x_0 and eps, means over elements.
        prior, prior_stderr: L_T.
        decoder, decoder_stderr: L_0, the first of the terms.
        total, total_stderr: the bound. The sum over t >= 1 is T - 1 times the mean of the terms at
            hand, an estimate unless all are.
        images: how many.
        num_timesteps: T.
        variance_type, clip: of the model's normals (loss_tables.vlb_rows).
        seed: of the noise.
    """

    timesteps: tuple[int, ...]
    terms: tuple[float, ...]
    terms_stderr: tuple[float, ...]
    x0_mse: tuple[float, ...]
    eps_mse: tuple[float, ...]
    prior: float
    prior_stderr: float
    decoder: float
    decoder_stderr: float
    total: float
    total_stderr: float
    images: int
    num_timesteps: int
    variance_type: str
    clip: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON has them: lists, and None for a number that is NaN."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(entry) for entry in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        return {name: plain(value) for name, value in asdict(self).items()}


@isolated(grad=False)
def variational_bound(
    sampler: Sampler,
    images: Tensor,
    labels: Any = None,
    *,
    timesteps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    variance_type: str | None = None,
    clip: float | None = None,
) -> Bound:
    """Return the variational bound on -log p of these images under the sampler's model.

    The model is that of ancestral sampling over all T timesteps, without guidance: mean of S5 with
    the predicted x_0, and the variance.

    Args:
        sampler: the network with its schedule, on its device.
        images: uint8 [N, C, H, W].
        labels: of each image (one for all, or N), as for ``sample``: None is the null class.
        timesteps: how many timesteps, from 2 to T; None is all of them. 0 is always one, the others
            lie evenly in 1..T-1. Terms fall steeply at first, so that few timesteps estimate the
            bound too low.
        seed: of the noise.
        batch_size: evaluations of the network at a time.
        progress: show a bar.
        variance_type: fixed_small, fixed_large, or for 2C channels learned or learned_range; by
            default the sampler's own.
        clip: bound of the predicted x_0, 0 for none; by default the sampler's own, and 1, that of
            the images, where it has a dynamic threshold.

    Raises:
        ValueError: an argument that is not allowed.
        FloatingPointError: a term is not finite; it says of which image and timestep.
    """
    _check_images(images, sampler.shape)
    N, T, defaults = len(images), len(sampler.schedule), sampler.defaults
    label = inputs.labels_of(labels, N, sampler.conditioning)
    steps = chosen_timesteps(T, timesteps)
    (number,) = arguments.seed_list(arguments.integer("seed", seed, -(2**63), 2**64 - 1))
    batch = arguments.integer("batch_size", batch_size, 1)
    kind = defaults.variance_type if variance_type is None else variance_type
    if clip is None:
        clip = 1.0 if defaults.threshold else defaults.clip
    rows = vlb_rows(sampler.schedule, sampler.prediction_type, kind, clip)
    terms = _Terms(sampler, images, label, rows, kind, number)
    found = terms.of(np.array(steps), batch, arguments.boolean("progress", progress))
    prior = terms.of(np.array([T]), batch, False)[0, :, 0]
    _check_finite(np.concatenate([found[..., 0], prior[None]]), [*steps, T])
    return _summary(found, prior, steps, T, kind, clip, seed)


def chosen_timesteps(T: int, count: int | None) -> list[int]:
    """Return 0 and count - 1 timesteps of 1..T-1, the middles of as many equal parts; all if None.

    Raises:
        ValueError: T below 2, or a count that is not an integer from 2 to T.
    """
    arguments.integer("num_timesteps", T, 2)
    count = T if count is None else arguments.integer("timesteps", count, 2, T)
    parts = count - 1
    return [0, *(1 + (2 * i + 1) * (T - 1) // (2 * parts) for i in range(parts))]


class _Terms:
    """Evaluates the network and the terms of some images."""

    def __init__(
        self,
        sampler: Sampler,
        images: Tensor,
        labels: list[int] | None,
        rows: NDArray[np.float64],
        variance_type: str,
        seed: int,
    ) -> None:
        self.sampler, self.images, self.seed = sampler, images, seed
        self.labels = None if labels is None else ints(labels)
        self.learns = variance_type in LEARNED_VARIANCES
        self.variance_type = variance_type
        self.rows, self.noising = (
            torch.tensor(table, dtype=torch.float32, device=sampler.device)
            for table in (rows, noising_rows(sampler.schedule))
        )

    def of(self, steps: NDArray[np.int64], batch: int, progress: bool) -> NDArray[np.float64]:
        """Return what ``vlb_terms`` has for every row of ``steps`` and image, [steps, N, 3].

        The last batch is filled up with the last pair, so that the network sees one shape.
        """
        from tqdm import tqdm

        N = len(self.images)
        pairs = len(steps) * N
        batch = min(batch, pairs)
        found = torch.empty(pairs, 3, dtype=torch.float32, device=self.sampler.device)
        with tqdm(total=pairs, unit="evaluation", disable=not progress) as bar:
            for start in range(0, pairs, batch):
                pair = np.minimum(np.arange(start, start + batch), pairs - 1)
                count = min(batch, pairs - start)
                step, image = ints(steps[pair // N]), ints(pair % N)
                found[start : start + count] = self._batch(step, image, pairs)[:count]
                bar.update(count)
        return found.cpu().double().numpy().reshape(len(steps), N, 3)

    def _batch(self, step: Tensor, image: Tensor, evaluations: int) -> Tensor:
        """Return the terms of these pairs, all timesteps or all the prior, float32 [batch, 3]."""
        device, ops = self.sampler.device, self.sampler.executor.ops
        x0 = send(to_float(self.images[image]), device)
        x0 = x0.contiguous(memory_format=torch.channels_last)
        t, keys = send(step, device), send(step * KEYS + image, device)
        seeds = torch.full_like(keys, self.seed)
        out = x0  # the prior's row reads no output
        if step[0] < len(self.noising):
            x_t = ops.add_noise(x0, t, seeds, keys, self.noising)
            labels = None if self.labels is None else send(self.labels[image], device)
            out = self.sampler.predict(x_t, t, labels, evaluations=evaluations)
            if self.learns and out.shape[1] == x0.shape[1]:
                raise ValueError(
                    f"variance_type={self.variance_type!r}: must be fixed_small or fixed_large for "
                    f"a network that returns {out.shape[1]} channels"
                )
        return ops.vlb_terms(out, x0, t, seeds, keys, self.rows)


def _check_images(images: Any, shape: tuple[int, int, int]) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(f"images of {type(images).__name__}: must be a uint8 tensor [N, C, H, W]")
    if images.dtype is not torch.uint8 or images.ndim != 4 or images.shape[1:] != shape:
        raise ValueError(
            f"images of {images.dtype} and shape {tuple(images.shape)}: must be uint8 of shape "
            f"(N, {', '.join(map(str, shape))})"
        )
    if not len(images):
        raise ValueError("images: must hold at least one")


def _check_finite(terms: NDArray[np.float64], steps: list[int]) -> None:
    """Refuse terms [steps, N] that are not all finite."""
    wrong = np.argwhere(~np.isfinite(terms))
    if len(wrong):
        step, image = wrong[0]
        raise FloatingPointError(
            f"the bound of image {image} at timestep {steps[step]} is not finite, of "
            f"{len(wrong)} such terms the first"
        )


def _summary(
    found: NDArray[np.float64],
    prior: NDArray[np.float64],
    steps: list[int],
    T: int,
    variance_type: str,
    clip: float,
    seed: int,
) -> Bound:
    """Return the means of [steps, N, 3] and [N], in nats, over images."""
    terms, prior = found[..., 0] / math.log(2), prior / math.log(2)
    means, errors = _mean(terms)
    total = prior + terms[0] + (T - 1) * terms[1:].mean(0)
    prior_mean, prior_error = (float(value) for value in _mean(prior))
    total_mean, total_error = (float(value) for value in _mean(total))
    return Bound(
        timesteps=tuple(steps),
        terms=tuple(means.tolist()),
        terms_stderr=tuple(errors.tolist()),
        x0_mse=tuple(found[..., 1].mean(1).tolist()),
        eps_mse=tuple(found[..., 2].mean(1).tolist()),
        prior=prior_mean,
        prior_stderr=prior_error,
        decoder=float(means[0]),
        decoder_stderr=float(errors[0]),
        total=total_mean,
        total_stderr=total_error,
        images=len(prior),
        num_timesteps=T,
        variance_type=variance_type,
        clip=float(clip),
        seed=seed,
    )


def _mean(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean over the last axis, images, and its standard error."""
    N = values.shape[-1]
    error = values.std(-1, ddof=1) / math.sqrt(N) if N > 1 else np.full(values.shape[:-1], np.nan)
    return values.mean(-1), error
