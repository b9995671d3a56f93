"""A small classifier of a data set: whether samples are what was asked for, and features of them.

    python -P -m flashddpm.evaluation.classifier DATA_DIR --out classifier.safetensors

trains one and says how many of the test images it recognises; with --weights FILE it measures the
one in that file. DATA_DIR holds {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or gzipped.
The file holds float16, so a trained classifier is rounded before it is judged or used.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from flashddpm import arguments
from flashddpm.checkpoints.bundled import MODELS
from flashddpm.data import ImageData, load_idx, to_float
from flashddpm.errors import CheckpointError, DataError
from flashddpm.host import isolated, plain_factories
from flashddpm.io.files import read_tensors, write_atomic

log = logging.getLogger("flashddpm")

FEATURES = 64
BATCH = 128
LEARNING_RATE = 3e-3
EPOCHS = 5

BUNDLED = MODELS / "fashion-mnist-classifier" / "classifier.safetensors"
TRIED = 1000
RECOGNISES = 0.5
"""A classifier is of this data if it recognises half of the first ``TRIED`` images."""


class Classifier(nn.Module):
    """Two convolutions and two linear layers, float32; sides are multiples of 4.

    Args:
        channels, height, width: of the images.
        num_classes: of the labels.

    Raises:
        ValueError: a side that is no multiple of 4.
    """

    def __init__(self, channels: int, height: int, width: int, num_classes: int) -> None:
        super().__init__()
        for name, side in (("height", height), ("width", width)):
            if side < 4 or side % 4:
                raise ValueError(f"{name}={side}: must be a positive multiple of 4")
        self.shape = (channels, height, width)
        with plain_factories():
            self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
            self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
            self.hidden = nn.Linear(64 * (height // 4) * (width // 4), FEATURES)
            self.last = nn.Linear(FEATURES, num_classes)

    @property
    def num_classes(self) -> int:
        """Of the labels."""
        return self.last.out_features

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


@isolated(grad=True)
def train_classifier(
    images: Tensor, labels: Tensor, seed: int = 0, epochs: int = EPOCHS, progress: bool = False
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
        torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds CUDA too
        model = make_classifier(images, labels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * steps)
    bar = tqdm(total=epochs * steps, desc="classifier", disable=not progress)
    with plain_factories(), bar:  # the optimizer counts its steps in a tensor
        for _ in range(epochs):
            for index in torch.randperm(len(images), generator=generator).split(BATCH):
                loss = F.cross_entropy(model(images[index]), labels[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return _ready(model, {name: value.half() for name, value in model.state_dict().items()})


def _ready(model: Classifier, state: dict[str, Tensor]) -> Classifier:
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@isolated
def save_classifier(path: Path, model: Classifier) -> None:
    """Write a classifier as float16, whole or not at all."""
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, save(state))


@isolated
def load_classifier(path: Path, shape: tuple[int, int, int], num_classes: int) -> Classifier:
    """Return the classifier in a file, of images [C, H, W] and so many classes.

    Raises:
        CheckpointError: the file is missing, broken, not finite or of another classifier.
    """
    state = read_tensors(path)
    try:
        model = _ready(Classifier(*shape, num_classes), state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: is of another classifier than of images of shape {shape} and {num_classes} "
            f"classes: {error}"
        ) from error
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise CheckpointError(f"{path}: holds weights that are not finite")
    return model


@isolated(grad=False)
def judge(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes that the images are taken for, [N], and their features, [N, 64]."""
    features = torch.cat([model.features(part) for part in images.split(500)])
    return model.last(features).argmax(1), features


def share(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[float, list[float]]:
    """Return the share of predictions that are the label: of all, and of each class.

    A class without an image has NaN.
    """
    right = (predicted == labels).double()
    return float(right.mean()), [float(right[labels == c].mean()) for c in range(num_classes)]


def bundled_classifier(images: Tensor, labels: Tensor) -> Classifier:
    """Return the classifier that comes with the package, if it is one of such images.

    Args:
        images: uint8 [N, C, H, W], of the data to be judged.
        labels: int64 [N].

    Raises:
        ValueError: it takes images of another shape, tells another number of classes, or does not
            recognise half of the first 1,000 of these: other data may have the same shape.
    """
    shape, classes = tuple(images.shape[1:]), int(labels.max()) + 1
    if (shape, classes) != ((1, 28, 28), 10):
        raise ValueError(
            f"images of shape {shape} and {classes} classes: the bundled classifier takes "
            "(1, 28, 28) and 10"
        )
    model = load_classifier(BUNDLED, (1, 28, 28), 10)
    right, _ = share(judge(model, images[:TRIED])[0], labels[:TRIED], 10)
    if right < RECOGNISES:
        raise ValueError(
            f"images: the bundled classifier recognises {right:.1%} of the first {TRIED} as their "
            "label; it was trained on Fashion-MNIST, and these are no such images"
        )
    return model


def classifier_for(
    images: Tensor, labels: Tensor, progress: bool = False
) -> tuple[str, Classifier]:
    """Return a name and a classifier of this data: the bundled one, or where it is not, a new one.

    Args:
        images: uint8 [N, C, H, W], to train on.
        labels: int64 [N].
        progress: show a bar while training.
    """
    try:
        return "bundled Fashion-MNIST classifier", bundled_classifier(images, labels)
    except CheckpointError:
        raise
    except ValueError as error:
        log.info("a classifier is trained on the data: %s", error)
    return "classifier trained on the data", train_classifier(images, labels, progress=progress)


def find_test_images(folder: Path) -> Path:
    """Return the one file of test images in a folder.

    Raises:
        DataError: there is none, or more than one.
    """
    found = sorted(folder.glob("t10k-images-idx3-ubyte*"))
    if len(found) != 1:
        raise DataError(f"{folder}: must hold one t10k-images-idx3-ubyte[.gz]; found {len(found)}")
    return found[0]


def load_labelled(path: Path) -> ImageData:
    """Return images with labels, their sides multiples of 4.

    Raises:
        DataError: of ``load_idx``, or there are no labels.
    """
    data = load_idx(path, 4)
    if data.labels is None:
        raise DataError(f"{path}: has no file of labels beside it")
    return data


def run(args: argparse.Namespace) -> None:
    """Train or load a classifier, write it, and print what it recognises."""
    arguments.integer("epochs", args.epochs, 1)
    train, test = load_labelled(args.data), load_labelled(find_test_images(args.data))
    assert train.labels is not None and train.num_classes is not None and test.labels is not None
    if args.weights is None:
        model = train_classifier(train.images, train.labels, args.seed, args.epochs, True)
    else:
        _, C, H, W = train.images.shape
        model = load_classifier(args.weights, (C, H, W), train.num_classes)
    if args.out is not None:
        save_classifier(args.out, model)
    overall, by_class = share(judge(model, test.images)[0], test.labels, model.num_classes)
    print(f"recognised of {len(test):,} test images: {overall:.2%}")
    print("by class: " + ", ".join(f"{part:.1%}" for part in by_class))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a bad argument or file is one line and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="flashddpm.evaluation.classifier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--weights", type=Path, help="measure this one; train none")
    parser.add_argument("--out", type=Path, help="write the classifier to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
