"""What an evaluation is asked for, and whether it can be done: checked before any work is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.checkpoints.hub import locate
from flashddpm.checkpoints.model_folder import fingerprint
from flashddpm.data import ImageData, ImageSource, load_data
from flashddpm.diffusion.loss_tables import vlb_rows
from flashddpm.diffusion.plan_options import with_defaults
from flashddpm.evaluation import distances
from flashddpm.evaluation.classifier import FEATURES, Classifier, classifier_for
from flashddpm.evaluation.features import INPUTS, Features
from flashddpm.host import isolated
from flashddpm.sampling import inputs
from flashddpm.sampling.sampler import Sampler

METRICS = ("bound", "frechet", "kernel", "prc", "neighbours")
OF_FEATURES = ("frechet", "kernel", "prc")
NUM_IMAGES = 1000
BOUND_IMAGES = 256
BOUND_TIMESTEPS = 100
PRC_NEIGHBOUR = 3
NEIGHBOURS = 5
SUBSET = 1000
AUTO = "auto"
TEST_IMAGES = "t10k-images-idx3-ubyte*"


@dataclass(frozen=True)
class Settings:
    """The options of ``flashddpm evaluate``.

    Attributes:
        model: a model's folder, or OWNER/NAME on the hub.
        data: what it was trained on, as `load_data` takes it.
        out: the page to write, .html; the numbers go beside it as .json.
        reference: real images to compare with; None: the IDX test images in ``data`` where it has
            them, else ``data`` itself.
        metrics: of METRICS.
        seeds: the seed of each sample; by default 0 to 999.
        plan: arguments of `Sampler.plan` by name; None is "not given" (`with_defaults`).
        guidance: w; 1 is off.
        bound_images: real images that the bound is of; None: 256, or all where there are fewer.
        bound_timesteps: "all", or a number; None: 100, or all where there are fewer.
        features: "auto" for a classifier of ``data``, or a TorchScript file.
        feature_input: what that file takes: "uint8", or "float" (in [-1, 1]).
        device, dtype, batch_size, allow_pickle: as for ``flashddpm sample``.
    """

    model: str
    data: Path
    out: Path
    reference: Path | None = None
    metrics: Sequence[str] = METRICS
    seeds: Sequence[int] = range(NUM_IMAGES)
    plan: Mapping[str, Any] = field(default_factory=dict)
    guidance: float = 1.0
    bound_images: int | None = None
    bound_timesteps: int | str | None = None
    features: str = AUTO
    feature_input: str = "uint8"
    device: str = "auto"
    dtype: str | None = None
    batch_size: int = 64
    allow_pickle: bool = False


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation that is ready to run: its settings, checked, and what they name, loaded.

    Attributes:
        settings: what was asked for; its plan has the model's defaults filled in.
        sampler: the model.
        folder, fingerprint: folder and fingerprint of the model.
        data, reference: the training images, and those that samples are compared with.
        held_out: whether ``reference`` is other images than ``data``.
        seeds, labels: seed and label of each sample; labels None for an unconditional model.
        conditional: whether the model's classes are those of ``data``, by their number.
        labelled: whether ``reference`` has labels of these classes.
        bound_images, bound_timesteps: as `variational_bound` takes them.
        extractor: of features; None if no metric wants any.
        classifier: where the features are a classifier's.
    """

    settings: Settings
    sampler: Sampler
    folder: Path
    fingerprint: str
    data: ImageSource
    reference: ImageSource
    held_out: bool
    seeds: list[int]
    labels: list[int] | None
    conditional: bool
    labelled: bool
    bound_images: int
    bound_timesteps: int | None
    extractor: Features | None
    classifier: Classifier | None


def chosen(count: int, total: int) -> Tensor:
    """Return ``count`` of the numbers 0..total-1, rising, drawn at random but always the same.

    Evenly spaced numbers would do for images in any order but one: by class in turn.

    Raises:
        ValueError: more than there are.
    """
    arguments.integer("count", count, 1, total)
    return shuffled(total)[:count].sort().values


def shuffled(count: int) -> Tensor:
    """Return the numbers 0..count-1 in an order that is random but always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator, device="cpu")


def load_images(
    data: Path, reference: Path | None, shape: tuple[int, int, int]
) -> tuple[ImageSource, ImageSource, bool]:
    """Return training images, those to compare with, and whether these are others.

    Raises:
        DataError: of `load_data`.
        ValueError: images of another shape than the model's.
    """
    if reference is None and data.is_dir():
        found = sorted(data.glob(TEST_IMAGES))
        reference = found[0] if len(found) == 1 else None
    images = load_data(data)
    real = images if reference is None else load_data(reference)
    for name, path, source in (("data", data, images), ("reference", reference, real)):
        if source.shape != shape:
            raise ValueError(
                f"{name}={str(path)!r}: holds images of shape {source.shape}; must be {shape}, "
                "as the model draws"
            )
    # By content: a reference may be named that is DATA once more.
    return images, real, real is not images and real.fingerprint() != images.fingerprint()


def features_for(
    features: str, feature_input: str, data: ImageSource, device: str
) -> tuple[Features, Classifier | None]:
    """Return the extractor that was asked for, and the classifier that it is of, if any.

    Raises:
        ValueError: "auto" for data without labels; or as `Features.of_torchscript`.
    """
    if features != AUTO:
        return Features.of_torchscript(features, feature_input, device), None
    images, labels = everything(data)
    if labels is None:
        raise ValueError(
            f"features={features!r}: must be a TorchScript file, for the data has no labels to "
            "train a classifier with"
        )
    name, classifier = classifier_for(images, labels, progress=True)
    return Features.of_classifier(classifier, name, device), classifier


def everything(source: ImageSource) -> tuple[Tensor, Tensor | None]:
    """Return all images and labels of a source, in memory."""
    if isinstance(source, ImageData):
        return source.images, source.labels
    return source.fetch(torch.arange(len(source), device="cpu"))


@isolated(grad=False)
def prepare(settings: Settings) -> EvaluationJob:
    """Check the settings and load what they name; a classifier may be trained, at the end.

    Raises:
        ValueError: an option that is not allowed, or a metric that cannot be computed: a missing
            package, or too few images (naming the number needed).
        CheckpointError: of the model or the extractor.
        DataError: of the images.
    """
    metrics = _check_options(settings)
    seeds = arguments.seed_list(settings.seeds)
    folder = locate(settings.model, settings.allow_pickle)
    sampler = Sampler.from_pretrained(
        folder, settings.device, settings.dtype, allow_pickle=settings.allow_pickle
    )
    labels = classes_in_turn(sampler, len(seeds))
    inputs.guidance_of(settings.guidance, len(seeds), labels, sampler.conditioning)
    settings = replace(
        settings, plan=with_defaults(settings.plan, sampler.defaults.solver, len(sampler.schedule))
    )
    sampler.plan(**settings.plan)
    data, reference, held_out = load_images(settings.data, settings.reference, sampler.shape)
    conditional, labelled = _classes(sampler, data, reference)
    bound_images, bound_timesteps = 0, None
    if "bound" in metrics:
        bound_images, bound_timesteps = _bound(settings, sampler, reference, labelled)
    if set(metrics) - {"bound"} and sampler.shape[0] not in (1, 3):
        raise ValueError(f"model: draws {sampler.shape[0]} channels; pictures have 1 or 3")
    if "neighbours" in metrics and len(data) < NEIGHBOURS:
        raise ValueError(f"data: {len(data)} images; neighbours need at least {NEIGHBOURS}")
    counts = {"num_images": len(seeds), "reference": len(reference)}
    extractor, classifier = None, None
    if set(metrics) & set(OF_FEATURES):
        where = str(sampler.device)
        if settings.features == AUTO:  # known before a classifier is trained
            _check_counts(metrics, counts, FEATURES)
        extractor, classifier = features_for(settings.features, settings.feature_input, data, where)
        probe, _ = reference.fetch(torch.arange(min(2, len(reference)), device="cpu"))
        _check_counts(metrics, counts, extractor(probe).shape[1])
    return EvaluationJob(
        settings,
        sampler,
        folder,
        fingerprint(folder),
        data,
        reference,
        held_out,
        seeds,
        labels,
        conditional,
        labelled,
        bound_images,
        bound_timesteps,
        extractor,
        classifier,
    )


def _check_options(settings: Settings) -> tuple[str, ...]:
    """Check what can be checked without the model; return the metrics."""
    metrics = tuple(arguments.one_of("metrics", name, METRICS) for name in settings.metrics)
    if not metrics:
        raise ValueError(f"metrics=[]: must be at least one of {', '.join(METRICS)}")
    arguments.one_of("feature_input", settings.feature_input, INPUTS)
    arguments.integer("batch_size", settings.batch_size, 1)
    if settings.features == AUTO and settings.feature_input != "uint8":
        raise ValueError("feature_input: must be given with a TorchScript file only")
    check_out("out", settings.out, ".html")
    require_matplotlib()
    if set(metrics) & set(OF_FEATURES):
        distances.require_fidelity()
    return metrics


def check_out(name: str, out: Path, suffix: str) -> None:
    """Refuse a file that could not be written when the work is done.

    Raises:
        ValueError: another suffix, a folder, or a place where nothing may be written.
    """
    if out.suffix.lower() != suffix or out.is_dir():
        raise ValueError(f"{name}={str(out)!r}: must be a file that ends in {suffix}")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{name}={str(out)!r}: cannot be written; {parent} must allow it")


def require_matplotlib() -> None:
    """Check that matplotlib is there.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the pictures need matplotlib ({error}): {distances.EXTRA}") from None


def classes_in_turn(sampler: Sampler, count: int) -> list[int] | None:
    """Return a label for each of so many images: 0, 1, ... and again; None without classes."""
    classes = sampler.conditioning.num_classes
    return None if classes is None else [i % classes for i in range(count)]


def _classes(sampler: Sampler, data: ImageSource, reference: ImageSource) -> tuple[bool, bool]:
    """Return ``conditional`` and ``labelled`` of the job.

    Raises:
        ValueError: the reference has labels that the model, which has the data's, does not know.
    """
    classes, known = sampler.conditioning.num_classes, reference.num_classes
    if classes is None or classes != data.num_classes:
        return False, False
    if known is not None and known > classes:
        raise ValueError(
            f"reference: has labels up to {known - 1}; must be in 0..{classes - 1}, as those of "
            "the data"
        )
    return True, known is not None


def _bound(
    settings: Settings, sampler: Sampler, reference: ImageSource, labelled: bool
) -> tuple[int, int | None]:
    """Return how many images and timesteps the bound is of; None for all timesteps."""
    defaults = sampler.defaults
    inputs.labels_of(0 if labelled else None, 1, sampler.conditioning)
    vlb_rows(sampler.schedule, sampler.prediction_type, defaults.variance_type, defaults.clip)
    total = len(reference)
    T = arguments.integer("num_train_timesteps", len(sampler.schedule), 2)
    images = settings.bound_images
    images = min(BOUND_IMAGES, total) if images is None else images
    arguments.integer("bound_images", images, 2, total)
    given = settings.bound_timesteps
    if given == "all" or (given is None and T <= BOUND_TIMESTEPS):
        return images, None
    if given is None:
        return images, BOUND_TIMESTEPS
    return images, arguments.integer("bound_timesteps", given, 2, T)


def subset_size(count: int) -> int:
    """Return the images in a subset of the kernel distance: half of the set, from 2 to 1,000."""
    return max(min(SUBSET, count // 2), 2)


def _check_counts(metrics: Sequence[str], counts: Mapping[str, int], dimension: int) -> None:
    """Refuse fewer images than a metric needs, naming the number needed."""
    for name, count in counts.items():
        if "frechet" in metrics:
            distances.check_frechet(name, count, dimension)
        if "kernel" in metrics:
            distances.check_kernel(name, count, subset_size(count))
        if "prc" in metrics:
            distances.check_precision_recall(name, count, PRC_NEIGHBOUR)
