r"""The quality of a class-conditional model, judged by a small classifier of the real images.

Two numbers, of images drawn with the seeds 0, 1, 2, ... and labels taken in turn:

* recognised: the share of images that the classifier takes for the class that was asked for,
  beside its accuracy on the real test images (it cannot be expected to do better);
* Fréchet distance between Gaussians fitted to the classifier's features a and b (Heusel et al.
  2017, with these features in place of Inception's, so not comparable with published FIDs),

      |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)),

  of the drawn images to the real test images, beside that of as many real training images. The
  classifier was trained on the latter, and a set of few images is always some way off.

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
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.benchmarks.harness import environment
from flashddpm.checkpoint import read_json, read_tensors, write_atomic, write_json
from flashddpm.data import ImageData, load_idx, to_float
from flashddpm.errors import CheckpointError, DataError

FEATURES = 64
BATCH = 128
LEARNING_RATE = 3e-3


class Classifier(nn.Module):
    """Two convolutions and two linear layers, float32; sides are multiples of 4.

    Args:
        channels, height, width: of the images.
        num_classes: of the labels.
    """

    def __init__(self, channels: int, height: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * (height // 4) * (width // 4), FEATURES)
        self.last = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> [B, 64], what the last layer sees."""
        x = F.max_pool2d(F.relu(self.conv1(to_float(images))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> logits [B, num_classes]."""
        return self.last(self.features(images))


def make_classifier(images: Tensor, labels: Tensor) -> Classifier:
    """Return an untrained classifier for such images and labels."""
    _, C, H, W = images.shape
    return Classifier(C, H, W, int(labels.max()) + 1)


def train_classifier(
    images: Tensor, labels: Tensor, seed: int = 0, epochs: int = 5, progress: bool = False
) -> Classifier:
    """Train a classifier: AdamW, one cycle of the learning rate, cross entropy.

    The same seed, number of threads and library versions give the same weights; torch's global
    generator is left as it was.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        seed: of the initial weights and of the order of the images.
        epochs: how many times each image is seen.
        progress: show a bar.
    """
    from tqdm import tqdm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_classifier(images, labels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * steps)
    bar = tqdm(total=epochs * steps, desc="classifier", disable=not progress)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    return model.eval().requires_grad_(False)


def load_classifier(path: Path, images: Tensor, labels: Tensor) -> Classifier:
    """Return the classifier in a file that ``main`` wrote, for such images and labels.

    Raises:
        CheckpointError: the file is missing, broken or of another classifier.
    """
    model = make_classifier(images, labels)
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: is of another classifier: {error}") from error
    return model.eval().requires_grad_(False)


@torch.no_grad()
def judge(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes that the images are taken for, [N], and their features, [N, 64]."""
    features = torch.cat([model.features(part) for part in images.split(500)])
    return model.last(features).argmax(1), features


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Return the Fréchet distance of Gaussians fitted to two sets of features, in float64.

    (S_a S_b)^(1/2) has the trace of (R S_b R)^(1/2) with R = S_a^(1/2), which is symmetric.

    Args:
        features_a: [N_a, D], N_a > D.
        features_b: [N_b, D], N_b > D.

    Raises:
        ValueError: too few rows for a covariance of full rank, unequal D, or not finite.
    """
    moments = []
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or features.shape[1] != features_a.shape[-1]:
            raise ValueError(f"{name} of shape {tuple(features.shape)}: must be [N, D], equal D")
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"{name}: {len(features)} samples of {features.shape[1]} features; "
                f"their covariance needs at least {features.shape[1] + 1} samples"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name}: must be finite")
        x = features.double()
        moments.append((x.mean(0), torch.atleast_2d(torch.cov(x.T))))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ cov_b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance.clamp(min=0))


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


def share(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[float, list[float]]:
    """Return the share of predictions that are the label: of all, and of each class."""
    right = (predicted == labels).double()
    return float(right.mean()), [float(right[labels == c].mean()) for c in range(num_classes)]


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
    classes = model.last.out_features
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
        "frechet_distance": frechet_distance(drawn_features, test_features),
        "frechet_distance_of_training_images": frechet_distance(
            judge(model, reference)[1], test_features
        ),
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


def find_test_images(folder: Path) -> Path:
    """Return the one file of test images in a folder."""
    found = sorted(folder.glob("t10k-images-idx3-ubyte*"))
    if len(found) != 1:
        raise DataError(f"{folder}: must hold one t10k-images-idx3-ubyte[.gz]; found {len(found)}")
    return found[0]


def load_labelled(path: Path) -> ImageData:
    """Return images with labels, their sides multiples of 4."""
    data = load_idx(path, 4)
    if data.labels is None:
        raise DataError(f"{path}: has no file of labels beside it")
    return data


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
        help="safetensors file of the classifier: read, or written if missing",
    )
    parser.add_argument("--epochs", type=int, default=5, help="of the classifier")
    for name, value in vars(defaults).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help=f"default {value}")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure a model, print a table and write JSON."""
    settings = Settings(**{name: getattr(args, name) for name in vars(Settings())})
    train, test = load_labelled(args.data), load_labelled(find_test_images(args.data))
    assert train.labels is not None and train.num_classes is not None
    arguments.integer("epochs", args.epochs, 1)
    classes = train.num_classes
    arguments.integer("num_images", settings.num_images, FEATURES + 1)
    if settings.num_images % classes:
        raise ValueError(f"num_images={settings.num_images}: must be a multiple of {classes}")
    reference = train.images[fixed_draw(train.labels, settings.num_images // classes)]

    if args.classifier is not None and args.classifier.exists():
        model = load_classifier(args.classifier, train.images, train.labels)
    else:
        model = train_classifier(train.images, train.labels, 0, args.epochs, progress=True)
        if args.classifier is not None:
            write_atomic(args.classifier, save(model.state_dict()))

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
