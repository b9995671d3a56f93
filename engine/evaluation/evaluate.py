"""An evaluation: draw samples, and measure them and the model against real images.

``evaluate(job)`` returns the numbers as JSON has them, and pictures (PNG) by their names:

    {"model": {...}, "data": {...}, "reference": {...}, "samples": {...}, "features": {...},
     "environment": {...}, "bound": {...}, "frechet": {...}, "kernel": {...}, "prc": {...},
     "recognised": {...}, "neighbours": {...}}

A metric that was not asked for is missing. Where there are real images that the model was not
trained on, each metric of features is also measured of as many training images, with the samples'
labels, under "training": that is what a perfect model would be given, since a set of few images is
always some way off.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from flashddpm.data import ImageSource
from flashddpm.evaluation import distances, neighbours, pictures
from flashddpm.evaluation.bound import variational_bound
from flashddpm.evaluation.classifier import Classifier, share
from flashddpm.evaluation.features import cached_features, features_of
from flashddpm.evaluation.job import (
    NEIGHBOURS,
    OF_FEATURES,
    PRC_NEIGHBOUR,
    EvaluationJob,
    chosen,
    shuffled,
    subset_size,
)
from flashddpm.host import ints, isolated
from flashddpm.io.images import to_uint8
from flashddpm.sampling.sampler import Sampler

PACKAGES = ("flashddpm", "torch", "torch-fidelity", "numpy")
PART = 1024
ROWS = 10
"""The number of samples in the picture of neighbours: those nearest to a training image."""

Evaluation = tuple[dict[str, Any], dict[str, bytes]]


@isolated(grad=False)
def evaluate(job: EvaluationJob) -> Evaluation:
    """Run an evaluation and return its numbers and its pictures.

    Args:
        job: the evaluation, as `prepare` returns it.

    Returns:
        A dictionary that JSON can hold (NaN and infinities are None), of a dictionary for each of
        "model", "data", "reference" and "environment"; "samples" and "features" if any were drawn
        or used; and the metrics asked for, with "recognised" where a classifier knows the labels.
        And a dictionary of PNG bytes by name: "samples", "terms", "errors" and "neighbours", as far
        as the metrics asked for have them.

    Raises:
        NonFiniteError: if the network's output turns NaN or infinite.
        FloatingPointError: if a term of the bound is not finite.
        ValueError: if the extractor fails on some images, or gives features that are not finite.
        DataError: if a file of images has changed since the job was prepared.
    """
    metrics = job.settings.metrics
    start = time.perf_counter()
    drawn = None
    if set(metrics) - {"bound"}:
        drawn = draw(
            job.sampler,
            job.seeds,
            job.labels,
            job.settings.batch_size,
            guidance=job.settings.guidance,
            **job.settings.plan,
        )
    seconds = time.perf_counter() - start
    result, shown = _facts(job, None if drawn is None else seconds), {}
    if drawn is not None:
        shown["samples"] = pictures.samples(drawn, job.labels, job.sampler.conditioning.class_names)
    if "bound" in metrics:
        result["bound"] = _bound(job)
        shown["terms"] = pictures.terms(result["bound"])
        shown["errors"] = pictures.errors(result["bound"])
    if drawn is not None and set(metrics) & set(OF_FEATURES):
        result |= _of_features(job, drawn)
    if drawn is not None and "neighbours" in metrics:
        result["neighbours"], shown["neighbours"] = _neighbours(job, drawn)
    return jsonable(result), shown


@isolated(grad=False)
def draw(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    batch_size: int = 64,
    progress: bool = True,
    **options: Any,
) -> Tensor:
    """Draw samples and return them as 8-bit images, uint8 [N, C, H, W] on the CPU.

    Args:
        sampler: the sampler that draws them.
        seeds: N seeds, ints, at least one.
        labels: N class labels, ints; None for no labels.
        batch_size: the number of images that are drawn at a time, at least 1.
        progress: whether a progress bar is shown.
        options: further keyword arguments of ``Sampler.sample``: guidance, solver, num_steps and
            the fields of `PlanOptions`.

    Raises:
        ValueError: if an argument is not allowed.
        NonFiniteError: if the network's output turns NaN or infinite.
    """
    step = max(PART // batch_size, 1) * batch_size  # whole batches, so that no bit depends on it
    parts = []
    for i in range(0, len(seeds), step):
        x = sampler.sample(
            seeds[i : i + step],
            None if labels is None else labels[i : i + step],
            batch_size=batch_size,
            progress=progress,
            **options,
        )
        parts.append(to_uint8(x).cpu())
    return torch.cat(parts)


@isolated(grad=False)
def counterpart(source: ImageSource, count: int, labels: Sequence[int] | None) -> Tensor | None:
    """Return as many training images as there are samples, drawn at random but always the same.

    If the samples have labels of the data, each class has as many images as it has samples: only
    such sets compare fairly, since one drawn over all classes is further off by chance.

    Args:
        source: the training images, with labels if ``labels`` are given.
        count: the number of samples.
        labels: the label of each sample, ``count`` ints below the source's ``num_classes``; or
            None.

    Returns:
        uint8 [count, C, H, W] on the CPU; None if there are too few images, of all or of a class.

    Raises:
        ValueError: if count is below 1 and there are no labels.
    """
    if count > len(source):
        return None
    if labels is None:
        return source.fetch(chosen(count, len(source)))[0]
    missing = ints(labels).bincount().tolist()
    order = shuffled(len(source))
    found = []
    for part in order.split(PART):
        images, classes = source.fetch(part)
        assert classes is not None
        for label, wanted in enumerate(missing):
            index = (classes == label).nonzero().flatten()[:wanted]
            missing[label] -= len(index)
            found.append(images[index])
        if not any(missing):
            return torch.cat(found)
    return None


def _facts(job: EvaluationJob, seconds: float | None) -> dict[str, Any]:
    """Return what the numbers depend on: model, data, samples, features and environment."""
    settings, sampler = job.settings, job.sampler
    plan = sampler.plan(**settings.plan)
    facts: dict[str, Any] = {
        "model": {
            "folder": settings.model,
            "fingerprint": job.fingerprint,
            "shape": list(sampler.shape),
            "prediction_type": sampler.prediction_type,
            "num_train_timesteps": len(sampler.schedule),
            "num_classes": sampler.conditioning.num_classes,
        },
        "data": _of_source(str(settings.data), job.data),
        "reference": {
            **_of_source(str(settings.reference or settings.data), job.reference),
            "held_out": job.held_out,
        },
    }
    if seconds is not None:
        facts["samples"] = {
            "count": len(job.seeds),
            "seeds": _ranges(job.seeds),
            "labels": "none" if job.labels is None else "in turn",
            "guidance": settings.guidance,
            **{k: v for k, v in settings.plan.items() if v is not None},
            "num_steps": len(plan),
            "seconds": seconds,
        }
    if job.extractor is not None:
        facts["features"] = {
            "name": job.extractor.name,
            "fingerprint": job.extractor.fingerprint,
        }
    facts["environment"] = environment(sampler)
    return facts


def _of_source(path: str, source: ImageSource) -> dict[str, Any]:
    return {"path": path, "fingerprint": source.fingerprint(), "images": len(source)}


def environment(sampler: Sampler) -> dict[str, Any]:
    """Return the versions of packages, and the device and precision that the sampler runs with.

    Args:
        sampler: the sampler; only its device, dtype and backend are read.

    Returns:
        A dictionary. "versions": a dictionary of version (or "not installed") by the name of the
        package (flashddpm, torch, torch-fidelity and numpy);
        "device": the name of the GPU, or "cpu"; "threads": the number of CPU threads, None on a
        GPU; "dtype": such as "float32"; "backend": "fused" or "reference".
    """
    device = sampler.device
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cuda = device.type == "cuda"
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": None if cuda else torch.get_num_threads(),
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "backend": sampler.backend,
    }


def _ranges(seeds: Sequence[int]) -> str:
    """Return seeds in the form that ``--seeds`` takes, such as "0:1000" or "1,2,5"."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1]:
            parts[-1][1] += 1
        else:
            parts.append([seed, seed + 1])
    return ",".join(str(a) if b == a + 1 else f"{a}:{b}" for a, b in parts)


def _bound(job: EvaluationJob) -> dict[str, Any]:
    """Return the bound of real images as a dictionary; labels are used where the model has them."""
    images, labels = job.reference.fetch(chosen(job.bound_images, len(job.reference)))
    start = time.perf_counter()
    bound = variational_bound(
        job.sampler,
        images,
        labels if job.labelled else None,
        timesteps=job.bound_timesteps,
        batch_size=job.settings.batch_size,
        progress=True,
    )
    return {
        **bound.to_dict(),
        "labels": "the images'" if job.labelled else "none",
        "seconds": time.perf_counter() - start,
    }


def _of_features(job: EvaluationJob, drawn: Tensor) -> dict[str, Any]:
    """Return the metrics of features: distances, precision, recall and recognition."""
    extractor, count = job.extractor, len(drawn)
    assert extractor is not None
    real = cached_features(
        job.reference, extractor, fingerprint=job.reference.fingerprint(), progress=True
    )
    ours = features_of(drawn, extractor)
    known = None
    if job.held_out:
        images = counterpart(job.data, count, job.labels if job.conditional else None)
        known = None if images is None else features_of(images, extractor)
    result: dict[str, Any] = {}
    for name, measure in (("frechet", _frechet), ("kernel", _kernel), ("prc", _prc)):
        if name in job.settings.metrics:
            training = None if known is None else measure(known, real)
            result[name] = {**measure(ours, real), "training": training}
    if job.classifier is not None and job.labels is not None and job.conditional:
        result["recognised"] = _recognised(job, job.classifier, ours, real)
    return result


def _frechet(drawn: Tensor, real: Tensor) -> dict[str, Any]:
    return {"distance": distances.frechet(drawn, real), "reference_images": len(real)}


def _kernel(drawn: Tensor, real: Tensor) -> dict[str, Any]:
    size = subset_size(min(len(drawn), len(real)))
    found = distances.kernel(drawn, real, subset_size=size)
    return {**dataclasses.asdict(found), "subset_size": size, "reference_images": len(real)}


def _prc(drawn: Tensor, real: Tensor) -> dict[str, Any]:
    """Return precision and recall of sets of equal size, since both depend on the sizes."""
    count = min(len(drawn), len(real))
    theirs, ours = (x[chosen(count, len(x))] for x in (real, drawn))
    found = distances.precision_recall(theirs, ours, PRC_NEIGHBOUR)
    return {**dataclasses.asdict(found), "k": PRC_NEIGHBOUR, "reference_images": count}


def _recognised(
    job: EvaluationJob, classifier: Classifier, drawn: Tensor, real: Tensor
) -> dict[str, Any]:
    """Return the share of samples, and of real images, that the classifier recognises."""
    last, classes = classifier.last, classifier.num_classes

    def shares(features: Tensor, labels: Tensor) -> tuple[float, list[float]]:
        found = last(features.to(last.weight.device, last.weight.dtype)).argmax(1).cpu()
        return share(found, labels, classes)

    overall, by_class = shares(drawn, ints(job.labels))
    result: dict[str, Any] = {"overall": overall, "by_class": by_class}
    if job.labelled:
        parts = torch.arange(len(job.reference), device="cpu").split(PART)
        labels = [label for part in parts if (label := job.reference.fetch(part)[1]) is not None]
        result["real_overall"], result["real_by_class"] = shares(real, torch.cat(labels))
    names = job.sampler.conditioning.class_names
    result["class_names"] = list(names) if names else [str(i) for i in range(classes)]
    return result


def _neighbours(job: EvaluationJob, drawn: Tensor) -> tuple[dict[str, Any], bytes]:
    """Return samples' distances to training images, and a picture (PNG) of the nearest ones."""
    found = neighbours.nearest(drawn, job.data, NEIGHBOURS)
    first = found.distance[:, 0]
    rows = first.argsort(stable=True)[:ROWS]
    few = neighbours.Neighbours(found.index[rows], found.distance[rows], found.duplicate[rows])
    copies = (found.duplicate >= 0).nonzero().flatten().tolist()
    result: dict[str, Any] = {
        "k": NEIGHBOURS,
        **_quartiles(first),
        "duplicates": [
            {"seed": job.seeds[i], "training_image": int(found.duplicate[i])} for i in copies
        ],
        "shown": [
            {"seed": job.seeds[i], "training_images": found.index[i].tolist()}
            for i in rows.tolist()
        ],
        "real": None,
    }
    if job.held_out:
        index = chosen(min(len(drawn), len(job.reference)), len(job.reference))
        theirs = neighbours.nearest(job.reference.fetch(index)[0], job.data, 1)
        result["real"] = _quartiles(theirs.distance[:, 0])
    names = [str(job.seeds[i]) for i in rows.tolist()]
    picture = neighbours.picture(drawn[rows], job.data, few, names)
    return result, pictures.of_image(picture)


def _quartiles(distance: Tensor) -> dict[str, float]:
    """Return the smallest and the quartiles of the distances [N], by name."""
    at = distance.new_tensor([0, 0.25, 0.5, 0.75])
    names = ("smallest", "lower_quartile", "median", "upper_quartile")
    return dict(zip(names, torch.quantile(distance, at).tolist(), strict=True))


def jsonable(value: Any) -> Any:
    """Return a value for strict JSON: floats that are NaN or infinite become None, tuples lists.

    Args:
        value: any nesting of dictionaries, lists and tuples; other values are returned as they are.
    """
    if isinstance(value, dict):
        return {key: jsonable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
