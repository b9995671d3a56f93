"""A small image classifier of a data set: it tells samples' classes, and gives features of images.

    python -P -m flashddpm.evaluation.classifier DATA_DIR --out classifier.safetensors

trains one and prints the share of the test images that it recognises; with --weights FILE it loads
that file instead of training. DATA_DIR holds {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or
gzipped. The file holds float16, so a trained classifier is rounded before it is judged or used.
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
"""The bundled classifier suits data of which it recognises half of the first ``TRIED`` images."""


class Classifier(nn.Module):
    """A classifier, float32: two convolutions, a hidden layer of 64 features, a linear layer.

    Args:
        channels: the number of channels of the images.
        height: the height of the images in pixels, a positive multiple of 4.
        width: the width of the images in pixels, a positive multiple of 4.
        num_classes: the number of classes; neither it nor ``channels`` is checked.

    Attributes:
        shape: (C, H, W) of the images, a tuple of ints.

    Raises:
        ValueError: if height or width is no positive multiple of 4.
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
        """The number of classes that it tells apart, an int."""
        return self.last.out_features

    def features(self, images: Tensor) -> Tensor:
        """Return the features of images: what the last layer, which gives the logits, is fed with.

        Args:
            images: uint8 [B, C, H, W] of the classifier's shape, on its device.

        Returns:
            float32 [B, 64] on the same device, each number at least 0 (the hidden layer's ReLU).
        """
        x = F.max_pool2d(F.relu(self.conv1(to_float(images))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32 [B, num_classes], of images.

        Args:
            images: uint8 [B, C, H, W], on the classifier's device.
        """
        return self.last(self.features(images))


def make_classifier(images: Tensor, labels: Tensor) -> Classifier:
    """Return an untrained classifier for images of this shape and labels of this range.

    Args:
        images: [N, C, H, W]; only the shape is read.
        labels: int64 [N], N at least 1; the number of classes is the largest label + 1.

    Raises:
        ValueError: if H or W is no positive multiple of 4.
    """
    _, C, H, W = images.shape
    return Classifier(C, H, W, int(labels.max()) + 1)


@isolated(grad=True)
def train_classifier(
    images: Tensor, labels: Tensor, seed: int = 0, epochs: int = EPOCHS, progress: bool = False
) -> Classifier:
    """Train a classifier on the CPU with AdamW, a one-cycle learning rate and cross entropy.

    The same seed, number of threads and library versions give the same weights; torch's global
    generator is left as it was.

    Args:
        images: uint8 [N, C, H, W] on the CPU, H and W multiples of 4.
        labels: int64 [N] on the CPU, none negative; there are largest label + 1 classes.
        seed: the seed of the initial weights and of the order of the images.
        epochs: the number of times that each image is seen, at least 1 (not checked).
        progress: whether a progress bar is shown.

    Returns:
        The classifier in evaluation mode, without gradients; its float32 weights are rounded to
        float16.

    Raises:
        ValueError: if H or W is no positive multiple of 4.
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
    """Write a classifier's weights as a safetensors file of float16, whole or not at all.

    Args:
        path: the file to write; its folder is made if it is missing.
        model: the classifier.

    Raises:
        OSError: if the file cannot be written.
    """
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    write_atomic(path, save(state))


@isolated
def load_classifier(path: Path, shape: tuple[int, int, int], num_classes: int) -> Classifier:
    """Load a classifier, in evaluation mode on the CPU, from a safetensors file.

    Args:
        path: the file, as ``save_classifier`` writes it.
        shape: (C, H, W) of the images that it classifies.
        num_classes: the number of classes that it tells apart.

    Raises:
        CheckpointError: if the file is missing or broken, its tensors are of a classifier of
            another shape or number of classes, or a weight is not finite.
        ValueError: if H or W is no positive multiple of 4.
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
    """Return the predicted classes, int64 [N], and the features, float32 [N, 64], of images.

    Args:
        model: the classifier.
        images: uint8 [N, C, H, W], on the classifier's device, N at least 1.
    """
    features = torch.cat([model.features(part) for part in images.split(500)])
    return model.last(features).argmax(1), features


def share(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[float, list[float]]:
    """Return the fractions 0..1 of predictions that equal the label: of all images, and by class.

    Args:
        predicted: int64 [N], the predicted classes.
        labels: int64 [N], the right classes.
        num_classes: the number of classes, int.

    Returns:
        The fraction of all images, and a list of num_classes fractions; a class without an image
        (and the first fraction where N is 0) is NaN.
    """
    right = (predicted == labels).double()
    return float(right.mean()), [float(right[labels == c].mean()) for c in range(num_classes)]


def bundled_classifier(images: Tensor, labels: Tensor) -> Classifier:
    """Load the package's Fashion-MNIST classifier, if the data are such images.

    Args:
        images: uint8 [N, C, H, W] on the CPU, the data to be judged.
        labels: int64 [N] on the CPU, the classes of the images.

    Returns:
        The classifier, in evaluation mode on the CPU.

    Raises:
        ValueError: if the images are not of shape (1, 28, 28) or the largest label is not 9, or if
            it recognises less than half of the first 1,000 images, for other data may have the same
            shape.
        CheckpointError: if the package's own file is missing or broken.
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
    """Return a classifier of this data and its name: the bundled one, or else one that is trained.

    Args:
        images: uint8 [N, C, H, W] on the CPU, the images to judge by and to train on.
        labels: int64 [N] on the CPU, the classes of the images.
        progress: whether a progress bar is shown while training.

    Returns:
        "bundled Fashion-MNIST classifier" or "classifier trained on the data", and the classifier,
        in evaluation mode on the CPU.

    Raises:
        CheckpointError: if the package's own file of weights is missing or broken.
        ValueError: if one has to be trained and H or W is no positive multiple of 4.
    """
    try:
        return "bundled Fashion-MNIST classifier", bundled_classifier(images, labels)
    except CheckpointError:
        raise
    except ValueError as error:
        log.info("a classifier is trained on the data: %s", error)
    return "classifier trained on the data", train_classifier(images, labels, progress=progress)


def find_test_images(folder: Path) -> Path:
    """Return the path of the one file of test images, t10k-images-idx3-ubyte*, in a folder.

    Raises:
        DataError: if there is none, or more than one.
    """
    found = sorted(folder.glob("t10k-images-idx3-ubyte*"))
    if len(found) != 1:
        raise DataError(f"{folder}: must hold one t10k-images-idx3-ubyte[.gz]; found {len(found)}")
    return found[0]


def load_labelled(path: Path) -> ImageData:
    """Load the images and labels of an IDX file, whose sides must be multiples of 4 pixels.

    Args:
        path: an IDX file of images, with its file of labels beside it, or a folder with the
            training images.

    Returns:
        The images, uint8 [N, 1, H, W], and labels, int64 [N], as one `ImageData`.

    Raises:
        DataError: if a file is missing or broken, a side is no multiple of 4, or there are no
            labels.
    """
    data = load_idx(path, 4)
    if data.labels is None:
        raise DataError(f"{path}: has no file of labels beside it")
    return data


def run(args: argparse.Namespace) -> None:
    """Train or load a classifier, write it if asked, and print what share of images it recognises.

    Args:
        args: the parsed command line: data (folder, a Path), weights and out (Path or None), seed
            and epochs (ints).

    Raises:
        ValueError: if epochs is below 1; or, as a DataError or CheckpointError, if a file of images
            or of weights is missing or broken.
    """
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
    """Run the command line of this module; a bad argument or file is one line and exit status 1.

    Args:
        argv: the arguments without the program's name; None for those of the process.

    Raises:
        SystemExit: after an error (1), or after arguments that cannot be parsed (2).
    """
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
