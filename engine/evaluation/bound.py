r"""The variational bound on the likelihood of 8-bit images, in bits per element.

It is equations S8 to S10 of docs/math.md:

    -log p(x_0)  <=  L_T + sum_{t >= 1} L_{t-1} + L_0

(Ho et al. 2020, eq. 5.) Every image is noised to each chosen timestep, the network predicts from
it, and ``vlb_terms`` computes the term. Noise is drawn once for each pair of image and timestep and
is a pure function of (seed, the image's number, timestep), so that neither the batch size nor the
choice of timesteps changes it.
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
"""The noise key (upper 64 bits of the noise counter) of image i at timestep t is t * KEYS + i."""


@dataclass(frozen=True)
class Bound:
    """A variational bound and its parts, as `variational_bound` returns it.

    All terms are in bits per element (of C x H x W) and are means over the images. A standard error
    is that of such a mean, over images and their noise; it is NaN for one image. S is the number of
    timesteps at which the network was evaluated.

    Attributes:
        timesteps: the S timesteps, rising, the first of them 0.
        terms: the S terms: L_0 for timestep 0, then L_{t-1} for each timestep t.
        terms_stderr: the standard errors of the S terms.
        x0_mse: S squared errors of the predicted x_0 (images in [-1, 1]), means over elements and
            images.
        eps_mse: S squared errors of the predicted noise eps, means over elements and images.
        prior: L_T, the divergence of x_T from the normal distribution.
        prior_stderr: the standard error of L_T.
        decoder: L_0, the same as ``terms[0]``.
        decoder_stderr: the standard error of L_0.
        total: the whole bound, prior + decoder + the sum over t >= 1, which is taken as T - 1 times
            the mean of ``terms[1:]``: exact if all timesteps were evaluated, else an estimate.
        total_stderr: the standard error of the whole bound.
        images: the number of images.
        num_timesteps: T, the number of timesteps that the model was trained with.
        variance_type: the variance of the model's normals: "fixed_small", "fixed_large", "learned"
            or "learned_range".
        clip: the bound of the predicted |x_0|; 0 for none.
        seed: the seed of the noise.
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
        """Return the fields as a dictionary by name, ready for JSON.

        Tuples become lists, and a number that is NaN becomes None.
        """

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
    """Compute the variational bound on -log p of images under a sampler's model.

    The model is that of ancestral sampling over all T timesteps without guidance: normals with the
    posterior mean of x_{t-1} given x_t and the predicted x_0 (equation S5 of docs/math.md), and the
    chosen variance.

    Args:
        sampler: the network with its schedule, on its device.
        images: uint8 [N, C, H, W] on the CPU, N at least 1, C, H and W as the sampler draws them.
        labels: one class label for all images, N labels (a sequence or a tensor of integers [N]),
            or None for the null class (no label), or for a model without classes.
        timesteps: the number of timesteps evaluated, 2..T; None for all. They are 0 and others
            evenly spaced in 1..T-1. Terms fall steeply at first, so few timesteps estimate the
            bound too low.
        seed: the seed of the noise, in [-2^63, 2^64).
        batch_size: the number of images in one network evaluation, at least 1.
        progress: whether a progress bar is shown.
        variance_type: "fixed_small", "fixed_large", or for a network of 2C output channels
            "learned" or "learned_range"; None for the sampler's own.
        clip: the bound of the predicted |x_0|, at least 0; 0 for none. None for the sampler's own,
            or 1 (the images' range) where the sampler has a dynamic threshold.

    Raises:
        ValueError: if an argument is out of its range, the images are of a wrong dtype or shape,
            labels are not classes of the model or not N, the model has neither labels nor a null
            class, T is below 2, or a learned variance is asked for and the network returns C
            channels.
        FloatingPointError: if a term is not finite; the text names the image and the timestep.
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
    """Return the timesteps at which the bound is evaluated: a rising list of ints, the first 0.

    The others are the middles of count - 1 equal parts of 1..T-1.

    Args:
        T: the number of timesteps of the schedule.
        count: the number of timesteps to return; None for all T.

    Raises:
        ValueError: if T is below 2, or count is no integer in 2..T.
    """
    arguments.integer("num_timesteps", T, 2)
    count = T if count is None else arguments.integer("timesteps", count, 2, T)
    parts = count - 1
    return [0, *(1 + (2 * i + 1) * (T - 1) // (2 * parts) for i in range(parts))]


class _Terms:
    """The evaluation of the network and of the bound's terms, for some images."""

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
        """Return the results of ``vlb_terms`` for each timestep and image, float64 [S, N, 3].

        A step of T is the prior. The last batch is filled up with the last pair of timestep and
        image, so that the network sees one batch size only.
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
        """Return ``vlb_terms`` of these pairs of timestep and image, float32 [batch, 3], in nats.

        Either all timesteps are of the network, or all are T, the prior.
        """
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
    """Raise FloatingPointError if the terms [steps, N] are not all finite."""
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
    """Return the `Bound` (in bits) of the terms [S, N, 3] and the prior [N], both in nats."""
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
    """Return the mean over the last axis (images), and the standard error of that mean."""
    N = values.shape[-1]
    error = values.std(-1, ddof=1) / math.sqrt(N) if N > 1 else np.full(values.shape[:-1], np.nan)
    return values.mean(-1), error
