"""The settings of an evaluation, and the job made of them: checked before any work is done."""

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
        model: a model's folder, or OWNER/NAME on the Hugging Face Hub.
        data: the training images: an IDX file or a folder with one, a .npz or a folder of pictures.
        out: the HTML page to write, which ends in .html; the numbers go beside it as .json.
        reference: the real images to compare with, of the same kinds; None for the IDX test images
            in ``data`` where it has them, else ``data`` itself.
        metrics: what is measured: any of "bound", "frechet", "kernel", "prc" (precision and recall)
            and "neighbours".
        seeds: the seed of each sample, ints; by default 0 to 999.
        plan: arguments of `Sampler.plan` by name (solver, num_steps and the fields of
            `PlanOptions`); None is the same as left out.
        guidance: the scale w of classifier-free guidance; 1 is off.
        bound_images: the number of real images that the bound is computed from, at least 2; None
            for 256, or all where there are fewer.
        bound_timesteps: the number of timesteps that the bound is computed at, at least 2, or
            "all"; None for 100, or all where there are at most 100.
        features: "auto" for a classifier of ``data``, or the path of a TorchScript file.
        feature_input: what that file is called with: "uint8", or "float" (float32 in [-1, 1]).
        device: "cpu", "cuda", "cuda:N", or "auto" for the GPU where there is one, else the CPU.
        dtype: the dtype of the network: "float32", "bfloat16" or "float16"; None for bfloat16 on
            CUDA and float32 on the CPU.
        batch_size: the number of images that are drawn or evaluated at a time, at least 1.
        allow_pickle: whether .bin weights (pickles) may be read where there are no safetensors.
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
        settings: the settings; their plan has the model's solver and num_steps filled in.
        sampler: the sampler of the model.
        folder: the folder of the model.
        fingerprint: a hash of the model's files, "sha256:...".
        data: the training images, a source of uint8 images.
        reference: the real images that samples are compared with, a source of uint8 images.
        held_out: whether ``reference`` holds other images than ``data``.
        seeds: the seed of each of the N samples.
        labels: the class label of each sample, N ints; None if samples are drawn without labels.
        conditional: whether the model has as many classes as ``data``; False for any other number.
        labelled: whether the model is conditional and ``reference`` has labels of these classes.
        bound_images: the number of images whose variational bound is computed; 0 if not asked for.
        bound_timesteps: the number of timesteps at which the bound is computed; None for all.
        extractor: the extractor of features; None if no metric uses features.
        classifier: the classifier whose features are used; None for another extractor, or none.
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
    """Return the numbers of ``count`` images out of ``total``, drawn at random, all different.

    The same arguments always give the same numbers (a fixed seed).

    Args:
        count: how many images to choose.
        total: how many images there are, numbered 0..total-1.

    Returns:
        int64 [count] on the CPU, each in 0..total-1, in rising order.

    Raises:
        ValueError: if count is no integer in 1..total.
    """
    arguments.integer("count", count, 1, total)
    return shuffled(total)[:count].sort().values


def shuffled(count: int) -> Tensor:
    """Return the numbers 0..count-1 in a random but fixed order, int64 [count] on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator, device="cpu")


def load_images(
    data: Path, reference: Path | None, shape: tuple[int, int, int]
) -> tuple[ImageSource, ImageSource, bool]:
    """Load the training images, and the real images that samples are compared with.

    Args:
        data: the training images: an IDX file or folder, a .npz or a folder of pictures.
        reference: the real images; None for the one IDX file of test images in the folder ``data``,
            or, where there is none, the training images.
        shape: (C, H, W) of the images that the model draws.

    Returns:
        The training images, the real ones, and whether these differ from the former in content.

    Raises:
        DataError: if a file or folder of images is missing, broken, or of mixed sizes.
        ValueError: if images are of another shape than the model's.
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
    """Load or train the feature extractor that was asked for.

    Args:
        features: "auto" for a classifier of the data, or the path of a TorchScript file.
        feature_input: what that file is called with: "uint8", or "float" (float32 in [-1, 1]).
        data: the training images, by whose labels a classifier is trained.
        device: "cpu", "cuda", "cuda:N", or "auto" for the GPU where there is one, else the CPU.

    Returns:
        The extractor, and the classifier whose features it gives, or None for a TorchScript file.

    Raises:
        ValueError: if features is "auto" and the data have no labels or sides that are no multiples
            of 4, if feature_input is another string, or if there is no such device.
        CheckpointError: if the TorchScript file is missing or cannot be read as one.
        DataError: if the images cannot be read.
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
    """Return a source's images, uint8 [N, C, H, W], and labels, int64 [N] or None, on the CPU.

    Raises:
        DataError: if an image cannot be read.
    """
    if isinstance(source, ImageData):
        return source.images, source.labels
    return source.fetch(torch.arange(len(source), device="cpu"))


@isolated(grad=False)
def prepare(settings: Settings) -> EvaluationJob:
    """Check the settings of an evaluation and load what they name.

    A classifier may be trained, but only after everything else was checked.

    Raises:
        ValueError: if an option is not allowed, or a metric cannot be computed because a package is
            not installed or there are too few images (the text has the number needed).
        CheckpointError: if the model or the extractor is missing or broken.
        DataError: if the images are missing or broken.
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
    """Raise ValueError if a file could not be written when the work is done.

    Args:
        name: the name of the argument, for the error's text.
        out: the file to be written, which may exist.
        suffix: the suffix, in lower case, such as ".html"; the file's may be in upper case too.

    Raises:
        ValueError: if it has another suffix or is a folder, or if what exists nearest above it is
            no folder or not writable.
    """
    if out.suffix.lower() != suffix or out.is_dir():
        raise ValueError(f"{name}={str(out)!r}: must be a file that ends in {suffix}")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{name}={str(out)!r}: cannot be written; {parent} must allow it")


def require_matplotlib() -> None:
    """Check that matplotlib, which draws the pictures, is installed.

    Raises:
        ValueError: if it cannot be imported.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the pictures need matplotlib ({error}): {distances.EXTRA}") from None


def classes_in_turn(sampler: Sampler, count: int) -> list[int] | None:
    """Return a list of ``count`` class labels, 0, 1, ... in turn; None for a model without classes.

    Args:
        sampler: the sampler of the model, which has K classes: image i gets i modulo K.
        count: the number of images, at least 0 (not checked).
    """
    classes = sampler.conditioning.num_classes
    return None if classes is None else [i % classes for i in range(count)]


def _classes(sampler: Sampler, data: ImageSource, reference: ImageSource) -> tuple[bool, bool]:
    """Return whether the job is ``conditional`` and ``labelled``, as `EvaluationJob` defines them.

    Raises:
        ValueError: if the model has the classes of the data, and the reference has labels beyond
            them.
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
    """Return the numbers of images and of timesteps (None for all) of the bound."""
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
    """Return the number of images in a subset of the kernel distance: count // 2, held in 2..1000.

    Args:
        count: the number of images in the set.
    """
    return max(min(SUBSET, count // 2), 2)


def _check_counts(metrics: Sequence[str], counts: Mapping[str, int], dimension: int) -> None:
    """Raise ValueError if there are fewer images than a metric needs."""
    for name, count in counts.items():
        if "frechet" in metrics:
            distances.check_frechet(name, count, dimension)
        if "kernel" in metrics:
            distances.check_kernel(name, count, subset_size(count))
        if "prc" in metrics:
            distances.check_precision_recall(name, count, PRC_NEIGHBOUR)
