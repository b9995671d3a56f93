"""The classifier learns, is a function of its seed, and is refused where it is of other data."""

import copy
import gzip

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashddpm.errors import CheckpointError, DataError
from flashddpm.evaluation import classifier
from flashddpm.evaluation.classifier import (
    BUNDLED,
    Classifier,
    bundled_classifier,
    classifier_for,
    judge,
    load_classifier,
    save_classifier,
    share,
    train_classifier,
)

CLASSES, SIDE = 3, 8
SHAPE = (1, SIDE, SIDE)


def images(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, with a bright quadrant that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    x = torch.randint(0, 100, (n, *SHAPE), generator=generator, dtype=torch.uint8)
    half = SIDE // 2
    for image, label in zip(x, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 120
    return x, labels


def write_idx(folder, name: str, x: torch.Tensor, labels: torch.Tensor) -> None:
    for kind, array in (("images-idx3", x[:, 0]), ("labels-idx1", labels.to(torch.uint8))):
        shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
        header = bytes([0, 0, 8, array.ndim]) + shape
        content = gzip.compress(header + array.contiguous().numpy().tobytes(), 1)
        (folder / f"{name}-{kind}-ubyte.gz").write_bytes(content)


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_idx(folder, "train", *images(600, 0))
    write_idx(folder, "t10k", *images(300, 1))
    return folder


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(*images(600, 0), seed=0, epochs=3)


def test_learns_and_is_a_function_of_its_seed(trained):
    test, labels = images(300, 1)
    predicted, features = judge(trained, test)
    assert features.shape == (300, classifier.FEATURES)
    assert torch.equal(predicted, trained(test).argmax(1))
    assert share(predicted, labels, CLASSES) == (1.0, [1.0] * CLASSES)
    before = torch.random.get_rng_state()
    few = images(256, 0)
    first, second = (train_classifier(*few, seed=7, epochs=1) for _ in range(2))
    other = train_classifier(*few, seed=8, epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.last.weight, second.last.weight)
    assert not torch.equal(first.last.weight, other.last.weight)


def test_seed_draws_the_order_too(monkeypatch):
    start = train_classifier(*images(30, 0), epochs=1)
    monkeypatch.setattr(
        classifier, "make_classifier", lambda *_: copy.deepcopy(start).requires_grad_()
    )
    first, other = (train_classifier(*images(256, 0), seed=seed, epochs=1) for seed in (7, 8))
    assert not torch.equal(first.last.weight, other.last.weight)


def test_share_counts_by_class():
    predicted, wanted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2])
    assert share(predicted, wanted, 3) == (0.75, [1.0, 0.5, 1.0])


def test_sides_that_cannot_be_halved_twice_are_refused():
    for shape, message in (((1, 6, 8), "height=6"), ((1, 8, 2), "width=2")):
        with pytest.raises(ValueError, match=f"{message}: must be a positive multiple of 4"):
            Classifier(*shape, 3)


def test_saved_classifier_judges_as_before(trained, tmp_path):
    """It was rounded to what a file holds when its training ended."""
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, trained)
    loaded = load_classifier(path, SHAPE, CLASSES)
    test, _ = images(100, 1)
    for a, b in zip(judge(trained, test), judge(loaded, test), strict=True):
        assert torch.equal(a, b)
    assert loaded.last.weight.dtype is torch.float32 and not loaded.last.weight.requires_grad
    assert all(value.dtype is torch.float16 for value in load_file(path).values())


def test_files_that_do_not_fit_are_refused(trained, tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, trained)
    for shape, classes in ((SHAPE, 4), ((3, SIDE, SIDE), CLASSES), ((1, 12, 8), CLASSES)):
        with pytest.raises(CheckpointError, match="another classifier"):
            load_classifier(path, shape, classes)
    state = load_file(path)
    state["last.bias"][1] = torch.nan
    save_file(state, path)
    with pytest.raises(CheckpointError, match="not finite"):
        load_classifier(path, SHAPE, CLASSES)
    del state["last.bias"]
    save_file(state, path)
    with pytest.raises(CheckpointError, match="another classifier"):
        load_classifier(path, SHAPE, CLASSES)
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_classifier(path, SHAPE, CLASSES)
    with pytest.raises(CheckpointError, match="is missing"):
        load_classifier(tmp_path / "none.safetensors", SHAPE, CLASSES)


def bundled_images(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of Fashion-MNIST's shape, with the labels that the bundled classifier gives them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)
    x[: n // 2] //= 8
    return x, judge(load_classifier(BUNDLED, (1, 28, 28), 10), x)[0]


def test_bundled_classifier_is_of_its_data_only():
    x, labels = bundled_images()
    labels[-1] = 9  # ten classes are counted by the largest
    model = bundled_classifier(x, labels)
    assert model.shape == (1, 28, 28) and model.num_classes == 10
    assert share(judge(model, x)[0], labels, 10)[0] >= 0.9
    wrong = (labels + 1) % 10
    wrong[-1] = 9
    with pytest.raises(ValueError, match="recognises .*% of the first 1000.*Fashion-MNIST"):
        bundled_classifier(x, wrong)
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\) and 3 classes.*\(1, 28, 28\) and 10"):
        bundled_classifier(*images(30, 0))
    with pytest.raises(ValueError, match=r"9 classes"):
        bundled_classifier(x, labels.clamp(max=8))


def test_other_data_get_a_classifier_of_their_own(monkeypatch):
    x, labels = bundled_images()
    labels[-1] = 9
    name, model = classifier_for(x, labels)
    assert "bundled" in name and torch.equal(judge(model, x)[0][:-1], labels[:-1])
    name, model = classifier_for(*images(600, 0))
    assert "trained" in name and model.num_classes == CLASSES
    monkeypatch.setattr(classifier, "BUNDLED", BUNDLED.with_name("none.safetensors"))
    with pytest.raises(CheckpointError, match="is missing"):
        classifier_for(x, labels)


def test_command_trains_and_measures(data_dir, tmp_path, capsys):
    out = tmp_path / "classifier.safetensors"
    classifier.main([str(data_dir), "--out", str(out), "--epochs", "3", "--seed", "1"])
    said = capsys.readouterr().out
    assert "recognised of 300 test images: 100.00%" in said
    assert "by class: 100.0%, 100.0%, 100.0%" in said
    model = load_classifier(out, SHAPE, CLASSES)
    again = train_classifier(*images(600, 0), seed=1, epochs=3)
    assert torch.equal(model.last.weight, again.last.weight)
    classifier.main([str(data_dir), "--weights", str(out)])
    assert capsys.readouterr().out == said


def test_command_refuses_in_one_line(data_dir, tmp_path):
    with pytest.raises(SystemExit, match="error: epochs=0"):
        classifier.main([str(data_dir), "--epochs", "0"])
    with pytest.raises(SystemExit, match="error: .*is missing"):
        classifier.main([str(data_dir), "--weights", str(tmp_path / "none")])


def test_test_images_are_found_and_labelled(data_dir):
    found = classifier.find_test_images(data_dir)
    assert found.name == "t10k-images-idx3-ubyte.gz"
    assert torch.equal(classifier.load_labelled(found).labels, images(300, 1)[1])
    (data_dir / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="has no file of labels beside it"):
        classifier.load_labelled(found)
    found.unlink()
    with pytest.raises(DataError, match="must hold one t10k-images"):
        classifier.find_test_images(data_dir)
