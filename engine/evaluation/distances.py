"""Distances between two sets of images, computed from their features with torch-fidelity.

* ``frechet``: the Frechet distance of Gaussians fitted to the features (Heusel et al. 2017),
  |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2));
* ``kernel``: the squared maximum mean discrepancy under (x.y / D + 1)^3, unbiased, over random
  subsets (Binkowski et al. 2018);
* ``precision_recall``: the share of drawn images that lie within reach of the real ones, and of
  real ones within reach of the drawn ones, where an image reaches as far as its k-th nearest
  neighbour in its own set (Kynkaanniemi et al. 2019).

Features are [N, D] of any floating dtype on any device; all is computed in float64 on the CPU.
Only features of the published Inception network give numbers comparable with published ones.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor
from torch.torch_version import TorchVersion

from flashddpm import arguments
from flashddpm.host import isolated

EXTRA = "pip install flashddpm[evaluate]"
NEEDED = "0.4"
"""The oldest version of torch-fidelity that is taken. Older ones have other keywords, so that they
would silently use their own defaults for ours, and had precision and recall exchanged."""
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance (squared maximum mean discrepancy), over random subsets of the images.

    Attributes:
        mean: the mean over the subsets, a float; about 0 for equal distributions, possibly below.
        deviation: the standard deviation over the subsets, a float.
    """

    mean: float
    deviation: float


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall of drawn images, fractions 0..1.

    An image reaches, in features, as far as its k-th nearest neighbour in its own set: another
    image lies within its reach if their features are no further apart (Euclidean distance).

    Attributes:
        precision: the share of drawn images that look real (lie within reach of the real ones).
        recall: the share of real images that could be drawn (lie within reach of the drawn ones).
    """

    precision: float
    recall: float


def require_fidelity() -> None:
    """Raise ValueError if torch-fidelity cannot be used, before any work is done.

    Raises:
        ValueError: if it is not installed, or older than 0.4.
    """
    _fidelity("metric_fid")


def _fidelity(name: str) -> ModuleType:
    try:
        version = importlib.import_module("torch_fidelity.version").__version__
        module = importlib.import_module(f"torch_fidelity.{name}")
    except ImportError as error:
        raise ValueError(f"these distances need torch-fidelity ({error}): {EXTRA}") from error
    if TorchVersion(version) < NEEDED:
        raise ValueError(
            f"these distances need torch-fidelity {NEEDED} or newer, not {version}: {EXTRA}"
        )
    return module


def check_frechet(name: str, count: int, dimension: int) -> None:
    """Raise ValueError if there are too few samples for a covariance of full rank.

    Args:
        name: the name of the set of samples, for the error's text.
        count: the number of samples.
        dimension: the number of features of a sample, D.

    Raises:
        ValueError: if there are not more samples than features; the text has the number needed.
    """
    if count <= dimension:
        raise ValueError(
            f"{name}: {count} samples of {dimension} features; their covariance needs at least "
            f"{dimension + 1} samples"
        )


def check_kernel(name: str, count: int, subset_size: int) -> None:
    """Raise ValueError if there are fewer samples than one subset takes.

    Args:
        name: the name of the set of samples, for the error's text.
        count: the number of samples.
        subset_size: the number of samples in a subset.

    Raises:
        ValueError: if count is below subset_size; the text has the number needed.
    """
    if count < subset_size:
        raise ValueError(
            f"{name}: {count} samples; subsets of subset_size={subset_size} need at least "
            f"{subset_size} samples"
        )


def check_precision_recall(name: str, count: int, k: int) -> None:
    """Raise ValueError if there are too few samples for each to have k neighbours.

    Args:
        name: the name of the set of samples, for the error's text.
        count: the number of samples.
        k: the number of the nearest neighbour that is needed, besides the sample itself.

    Raises:
        ValueError: if there are not more than k samples; the text has the number needed.
    """
    if count <= k:
        raise ValueError(
            f"{name}: {count} samples; a neighbour number k={k} besides oneself needs at least "
            f"{k + 1} samples"
        )


def _features(names: tuple[str, str], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as float64 on the CPU."""
    for name, x in zip(names, (a, b), strict=True):
        if x.ndim != 2 or not x.is_floating_point() or x.shape[1] != a.shape[1] or not x.shape[1]:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)}, {x.dtype}: must be floating, [N, D], and D "
                "the same in both"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name}: holds NaN or infinities; must be finite")
    return a.detach().cpu().double(), b.detach().cpu().double()


@isolated(grad=False)
def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Return the Frechet distance (squared, as is usual) of two sets of features, at least 0.

    Args:
        features_a: floating-point [N_a, D], finite, N_a > D.
        features_b: floating-point [N_b, D], finite, N_b > D.

    Raises:
        ValueError: if features are not floating-point, not of two dimensions, not finite or of
            unequal D, if there are too few rows, or if torch-fidelity 0.4 or newer is not
            installed.
    """
    names = ("features_a", "features_b")
    pair = _features(names, features_a, features_b)
    for name, x in zip(names, pair, strict=True):
        check_frechet(name, *x.shape)
    module = _fidelity("metric_fid")
    moments = []
    for x in pair:
        moment = module.fid_features_to_statistics(x)
        moments.append({**moment, "sigma": moment["sigma"].reshape(x.shape[1], x.shape[1])})
    value = module.fid_statistics_to_metric(*moments, verbose=False)[module.KEY_METRIC_FID]
    return max(float(value), 0.0)  # of equal sets it may be rounded to just below


@isolated(grad=False)
def kernel(
    features_a: Tensor,
    features_b: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Return the kernel distance of two sets of features; of equal distributions it is about 0.

    Args:
        features_a: floating-point [N_a, D], finite, N_a >= subset_size.
        features_b: floating-point [N_b, D], finite, N_b >= subset_size.
        subsets: the number of pairs of subsets that are drawn, at least 1.
        subset_size: the number of images in each subset, at least 2.
        seed: the seed by which subsets are drawn, in 0..2^32-1.

    Raises:
        ValueError: if features are not floating-point, not of two dimensions, not finite or of
            unequal D, if there are too few rows, if another argument is out of its range, or if
            torch-fidelity 0.4 or newer is not installed.
    """
    names = ("features_a", "features_b")
    pair = _features(names, features_a, features_b)
    arguments.integer("subsets", subsets, 1)
    arguments.integer("subset_size", subset_size, 2)
    arguments.integer("seed", seed, 0, 2**32 - 1)
    for name, x in zip(names, pair, strict=True):
        check_kernel(name, len(x), subset_size)
    module = _fidelity("metric_kid")
    found = module.kid_features_to_metric(
        *pair, kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=seed, verbose=False
    )
    return KernelDistance(found[module.KEY_METRIC_KID_MEAN], found[module.KEY_METRIC_KID_STD])


@isolated(grad=False)
def precision_recall(real: Tensor, drawn: Tensor, k: int = 3) -> PrecisionRecall:
    """Return the precision and recall of drawn images with respect to real ones.

    Both depend on the sizes of the sets: compare only figures of equal sizes.

    Args:
        real: floating-point [N, D], finite features of real images, N > k.
        drawn: floating-point [M, D], finite features of drawn images, M > k.
        k: an image reaches as far as its k-th nearest neighbour besides itself; at least 1.

    Raises:
        ValueError: if features are not floating-point, not of two dimensions, not finite or of
            unequal D, if there are too few rows, if k is below 1, or if torch-fidelity 0.4 or newer
            is not installed.
    """
    names = ("real", "drawn")
    pair = _features(names, real, drawn)
    arguments.integer("k", k, 1)
    for name, x in zip(names, pair, strict=True):
        check_precision_recall(name, len(x), k)
    module = _fidelity("metric_prc")
    rows = max(1, MAX_BYTES // (8 * max(len(x) for x in pair)))
    found = module.prc_features_to_metric(
        *reversed(pair), prc_neighborhood=k, prc_batch_size=rows, save_cpu_ram=True, verbose=False
    )
    return PrecisionRecall(found[module.KEY_METRIC_PRECISION], found[module.KEY_METRIC_RECALL])
