"""The quality of a class-conditional model, judged by a small classifier of the real images.

Two numbers, of images drawn with the seeds 0, 1, 2, ... and labels taken in turn:

* recognised: the share of images that the classifier takes for the class that was asked for,
  beside its accuracy on the real test images (it cannot be expected to do better);
* Fréchet distance in the classifier's features (not Inception's, so not comparable with published
  FIDs) of the drawn images to the real test images, beside that of as many real training images.
  The classifier was trained on the latter, and a set of few images is always some way off.

Images are rounded to 8 bits before they are judged, as the real ones are.

    python -m flashddpm.benchmarks.quality MODEL_DIR DATA_DIR --out quality.json

DATA_DIR holds {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or gzipped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashddpm import arguments
from flashddpm.benchmarks.harness import environment
from flashddpm.data import ImageData
from flashddpm.evaluation.classifier import (
    EPOCHS,
    FEATURES,
    Classifier,
    classifier_for,
    find_test_images,
    judge,
    load_classifier,
    load_labelled,
    save_classifier,
    share,
    train_classifier,
)
from flashddpm.evaluation.distances import frechet, require_fidelity
from flashddpm.files import read_json, write_json


def fixed_draw(labels: Tensor, per_class: int, seed: int = 0) -> Tensor:
    """Return the indices of ``per_class`` images of each class, drawn with a seed.

    Raises:
        ValueError: a class has fewer images.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = []
    for label in range(int(labels.max()) + 1):
        index = order[labels[order] == label][:per_class]
        if len(index) < per_class:
            raise ValueError(f"class {label} has {len(index)} images; {per_class} are needed")
        drawn.append(index)
    return torch.cat(drawn)


def measure(
    model: Classifier, drawn: Tensor, wanted: Tensor, reference: Tensor, test: ImageData
) -> dict[str, Any]:
    """Return the numbers of the module docstring.

    Args:
        model: a trained classifier.
        drawn: the model's images, uint8 [N, C, H, W].
        wanted: the classes that were asked for, [N].
        reference: real images to compare with, as many.
        test: real images that the classifier was not trained on.
    """
    assert test.labels is not None
    classes = model.num_classes
    test_classes, test_features = judge(model, test.images)
    drawn_classes, drawn_features = judge(model, drawn)
    accuracy, accuracy_by_class = share(test_classes, test.labels, classes)
    recognised, recognised_by_class = share(drawn_classes, wanted, classes)
    return {
        "test_images": len(test),
        "classifier_accuracy": accuracy,
        "classifier_accuracy_by_class": accuracy_by_class,
        "images": len(drawn),
        "recognised": recognised,
        "recognised_by_class": recognised_by_class,
        "frechet_distance": frechet(drawn_features, test_features),
        "frechet_distance_of_training_images": frechet(judge(model, reference)[1], test_features),
    }


@dataclass(frozen=True)
class Settings:
    """How the images are drawn."""

    solver: str = "ddim"
    num_steps: int = 50
    guidance: float = 1.0
    num_images: int = 1000
    device: str = "auto"


def draw_images(folder: Path, settings: Settings, num_classes: int) -> tuple[Tensor, Tensor]:
    """Draw images with seeds 0, 1, ...: uint8 [N, C, H, W], and the classes asked for, [N]."""
    import flashddpm

    labels = torch.arange(settings.num_images) % num_classes
    sampler = flashddpm.Sampler.from_pretrained(folder, device=settings.device)
    x = sampler.sample(
        seeds=range(settings.num_images),
        labels=labels.tolist(),
        guidance=settings.guidance,
        solver=settings.solver,
        num_steps=settings.num_steps,
        progress=True,
    )
    return flashddpm.to_uint8(x).cpu(), labels


def table(result: dict[str, Any], names: Sequence[str]) -> str:
    """Return the result as text."""
    rows = [("", "test images", "drawn images")]
    by_class = zip(
        names,
        result["classifier_accuracy_by_class"],
        result["recognised_by_class"],
        strict=True,
    )
    everything = ("all", result["classifier_accuracy"], result["recognised"])
    rows += [(n, f"{100 * a:.1f} %", f"{100 * r:.1f} %") for n, a, r in [*by_class, everything]]
    width = max(len(row[0]) for row in rows)
    text = [f"taken for their class, of {result['test_images']:,} and {result['images']:,}"]
    text += [f"{a:{width}}  {b:>11}  {c:>12}" for a, b, c in rows]
    text += [
        "Fréchet distance to the test images, in the classifier's features",
        f"of {result['images']:,} drawn images     {result['frechet_distance']:8.3f}",
        f"of {result['images']:,} training images  "
        f"{result['frechet_distance_of_training_images']:8.3f}",
    ]
    return "\n".join(text)


def class_names(folder: Path, num_classes: int) -> list[str]:
    """Return the names in the model's flashddpm.json, or the numbers."""
    path = folder / "flashddpm.json"
    names = read_json(path).get("class_names") if path.exists() else None
    if not isinstance(names, list) or len(names) != num_classes:
        return [str(label) for label in range(num_classes)]
    return [str(name) for name in names]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="flashddpm.benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument(
        "--classifier",
        type=Path,
        help="a file of one: read, or trained and written if missing; by default the bundled one "
        "where the data are Fashion-MNIST, else a new one",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of a classifier to be written")
    for name, value in vars(defaults).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help=f"default {value}")
    return parser.parse_args(argv)


def find_classifier(path: Path | None, train: ImageData, epochs: int) -> Classifier:
    """Return the classifier in a file, which is trained and written if missing.

    Without a file, the bundled one if it is of this data, else a new one.
    """
    assert train.labels is not None and train.num_classes is not None
    if path is None:
        return classifier_for(train.images, train.labels, progress=True)[1]
    if not path.exists():
        model = train_classifier(train.images, train.labels, 0, epochs, progress=True)
        save_classifier(path, model)
        return model
    _, C, H, W = train.images.shape
    return load_classifier(path, (C, H, W), train.num_classes)


def run(args: argparse.Namespace) -> None:
    """Measure a model, print a table and write JSON."""
    settings = Settings(**{name: getattr(args, name) for name in vars(Settings())})
    require_fidelity()
    train, test = load_labelled(args.data), load_labelled(find_test_images(args.data))
    assert train.labels is not None and train.num_classes is not None
    arguments.integer("epochs", args.epochs, 1)
    classes = train.num_classes
    arguments.integer("num_images", settings.num_images, FEATURES + 1)
    if settings.num_images % classes:
        raise ValueError(f"num_images={settings.num_images}: must be a multiple of {classes}")
    reference = train.images[fixed_draw(train.labels, settings.num_images // classes)]
    model = find_classifier(args.classifier, train, args.epochs)

    start = time.perf_counter()
    drawn, wanted = draw_images(args.model, settings, classes)
    seconds = time.perf_counter() - start
    result = measure(model, drawn, wanted, reference, test)
    print(table(result, class_names(args.model, classes)))
    if args.out is not None:
        drawing = {**vars(settings), "seconds_to_draw": seconds}
        write_json(args.out, {**result, **drawing, **environment(settings.device)})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a bad argument or file is one line and exit status 1."""
    args = parse(argv)
    try:
        run(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
