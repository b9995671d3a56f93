"""Extractors are called as they want to be, checked, and their features kept but never trusted."""

import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flashddpm.data import ImageData, to_float
from flashddpm.errors import CheckpointError
from flashddpm.evaluation.classifier import Classifier
from flashddpm.evaluation.features import Features, cached_features, features_of, fingerprint_of
from flashddpm.execution import compile_cache


def images(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)


class Flat(nn.Module):
    """Pixels times a weight; dropout shows whether it is in evaluation mode."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x.float().flatten(1) * self.weight)


class Named(nn.Module):
    """As StyleGAN's authors' Inception: probabilities unless features are asked for."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = img.float().flatten(1)
        return x if return_features else x.softmax(1)


def script(module: nn.Module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return path


def giving(make, name: str = "x") -> Features:
    """An extractor that returns ``make(images)``."""
    return Features(make, name, "sha256:0")


def test_classifier_gives_what_its_last_layer_sees():
    torch.manual_seed(0)
    model = Classifier(1, 4, 4, 3)
    x = images(7)
    found = Features.of_classifier(model)(x)
    assert found.shape == (7, 64) and not found.requires_grad
    torch.testing.assert_close(model.last(found), model(x))


@pytest.mark.parametrize("kind", ["module", "torchscript"])
@pytest.mark.parametrize("given", ["uint8", "float"])
def test_images_are_given_as_the_extractor_takes_them(kind, given, tmp_path):
    if kind == "module":
        extractor = Features.of_module(Flat(2.0), "flat", given)
    else:
        extractor = Features.of_torchscript(script(Flat(2.0), tmp_path / "flat.pt"), given)
        assert extractor.name == "flat.pt"
    x = images(5)
    expected = 2 * (x.float() if given == "uint8" else to_float(x)).flatten(1)
    assert torch.equal(extractor(x), expected)


def test_features_are_asked_for_by_name(tmp_path):
    extractor = Features.of_torchscript(script(Named(), tmp_path / "named.pt"))
    x = images(5)
    assert torch.equal(extractor(x), x.float().flatten(1))


def test_loading_torchscript_says_nothing_of_its_age(tmp_path):
    path = script(Flat(), tmp_path / "flat.pt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Features.of_torchscript(path)
    assert [str(warning.message) for warning in said] == []


def test_fingerprint_tells_extractors_apart(tmp_path):
    def made(weight=1.0, name="a", given="uint8"):
        return Features.of_module(Flat(weight), name, given).fingerprint

    first = script(Flat(), tmp_path / "a.pt")
    second = script(Flat(2.0), tmp_path / "b.pt")
    copy = tmp_path / "c.pt"
    copy.write_bytes(first.read_bytes())
    prints = [
        made(),
        made(weight=1.5),
        made(name="b"),
        made(given="float"),
        Features.of_torchscript(first).fingerprint,
        Features.of_torchscript(first, "float").fingerprint,
        Features.of_torchscript(second).fingerprint,
        Features.of_classifier(Classifier(1, 4, 4, 3)).fingerprint,
        Features.of_module(Classifier(1, 4, 4, 3), "features").fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(value) == 71 and value.startswith("sha256:") for value in prints)
    assert made() == made()
    assert Features.of_torchscript(copy).fingerprint == Features.of_torchscript(first).fingerprint


def test_fingerprint_of_images_covers_shape_and_bytes():
    x = images(3)
    other = x.clone()
    other[2, 0, 3, 3] ^= 1
    assert fingerprint_of(x) == fingerprint_of(x.clone())
    assert fingerprint_of(x) == fingerprint_of(x.transpose(2, 3).contiguous().transpose(2, 3))
    assert len({fingerprint_of(part) for part in (x, other, x[:2], x.reshape(3, 1, 2, 8))}) == 4


WRONG = [
    (lambda x: x.float(), r"gave shape \(3, 1, 4, 4\); must be one floating-point tensor \[3, D\]"),
    (lambda x: x.float().flatten(1)[:2], r"gave shape \(2, 16\); must be"),
    (lambda x: x.float().flatten(), r"gave shape \(48,\); must be"),
    (lambda x: x.float().flatten(1)[:, :0], r"gave shape \(3, 0\); must be"),
    (lambda x: x.flatten(1), r"gave torch.uint8; must be"),
    (lambda x: [x.float().flatten(1)], r"gave a list; must be"),
    (lambda x: x.float().flatten(1) * torch.nan, r"NaN or infinite for 3 of 3 images, the first"),
    (nn.Conv2d(3, 1, 1), r"failed on torch.uint8 images of shape \(3, 1, 4, 4\)"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_outputs_are_refused(make, message):
    with pytest.raises(ValueError, match=f"features x: {message}"):
        giving(make)(images(3))


def test_row_that_is_not_finite_is_named():
    def make(x):
        rows = x.float().flatten(1)
        rows[1, 4] = torch.inf
        return rows

    with pytest.raises(ValueError, match="for 1 of 3 images, the first in row 1"):
        giving(make)(images(3))


def test_batches_make_one_table():
    x = images(10)
    sizes = []

    def make(part):
        sizes.append(len(part))
        return part.double().flatten(1)

    found = features_of(x, giving(make), batch_size=4)
    assert sizes == [4, 4, 2]
    assert found.dtype is torch.float32 and torch.equal(found, x.float().flatten(1))
    source = ImageData(x, None, None)
    assert torch.equal(features_of(source, giving(make), 3), found)


def test_number_of_features_may_not_change():
    with pytest.raises(ValueError, match="gave 2 an image from image 4 on and 4 before"):
        features_of(images(6), giving(lambda x: x.float().flatten(1)[:, : len(x)]), 4)


@pytest.mark.parametrize(
    ("x", "batch_size", "message"),
    [
        (images(0), 4, "images: holds none"),
        (images(3), 0, "batch_size=0"),
        (images(3).float(), 4, r"torch.float32: must be uint8 \[N, C, H, W\]"),
        (images(3)[:, 0], 4, r"images of shape \(3, 4, 4\).*must be uint8"),
    ],
)
def test_bad_images_are_refused(x, batch_size, message):
    with pytest.raises(ValueError, match=message):
        features_of(x, giving(lambda part: part.float().flatten(1)), batch_size)


def test_bad_extractors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="images='int8': must be one of uint8, float"):
        Features.of_module(Flat(), "x", "int8")
    with pytest.raises(ValueError, match="device='tpu'"):
        Features.of_module(Flat(), "x", device="tpu")
    with pytest.raises(CheckpointError, match="is missing"):
        Features.of_torchscript(tmp_path / "none.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"PK not a zip")
    with pytest.raises(CheckpointError, match="cannot be read as TorchScript"):
        Features.of_torchscript(broken)
    torch.save({"a": torch.ones(1)}, broken)  # a state dict is no program
    with pytest.raises(CheckpointError, match="cannot be read as TorchScript"):
        Features.of_torchscript(broken)


class Counting(Features):
    """Counts its calls."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(len(x))
        return super().__call__(x)


CALLS: list[int] = []


@pytest.fixture
def extractor():
    CALLS.clear()
    return Counting(lambda x: x.float().flatten(1), "flat", "sha256:1")


def test_features_are_computed_once(extractor, tmp_path):
    x = images(10)
    first = cached_features(x, extractor, folder=tmp_path)
    assert torch.equal(first, x.float().flatten(1)) and CALLS == [10]
    assert torch.equal(cached_features(x, extractor, folder=tmp_path), first) and CALLS == [10]
    assert len(list(tmp_path.iterdir())) == 1


def test_other_images_extractors_and_counts_have_files_of_their_own(extractor, tmp_path):
    x = images(10)
    cached_features(x, extractor, folder=tmp_path)
    cached_features(images(10, 1), extractor, folder=tmp_path)
    other = Counting(lambda part: -part.float().flatten(1), "flat", "sha256:2")
    assert torch.equal(cached_features(x, other, folder=tmp_path), -x.float().flatten(1))
    cached_features(x, extractor, fingerprint="sha256:data", folder=tmp_path)
    cached_features(x[:5], extractor, fingerprint="sha256:data", folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(CALLS) == 5


def test_source_is_known_by_its_own_fingerprint(extractor, tmp_path):
    source = ImageData(images(6), None, None)
    found = cached_features(source, extractor, folder=tmp_path)
    again = cached_features(images(6), extractor, fingerprint=source.fingerprint(), folder=tmp_path)
    assert torch.equal(found, again) and CALLS == [6]


def test_files_lie_in_the_cache_of_the_user(extractor, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_features(images(3), extractor)
    assert len(list((compile_cache.folder() / "features").glob("*.safetensors"))) == 1
    assert compile_cache.folder().parent == tmp_path


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def change_a_number(path) -> None:
    state = load_file(path)
    state["features"][2, 3] += 1
    save_file(state, path)


def take_a_row(path) -> None:
    state = load_file(path)
    save_file({**state, "features": state["features"][1:].clone()}, path)


def as_half(path) -> None:
    state = load_file(path)
    save_file({**state, "features": state["features"].half()}, path)


BREAKS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 100),
    "bit": flip_a_bit,
    "number": change_a_number,
    "row": take_a_row,
    "dtype": as_half,
    "foreign": lambda path: save_file({"x": torch.zeros(2)}, path),
    "undigested": lambda path: save_file({"features": load_file(path)["features"]}, path),
    "short digest": lambda path: save_file({**load_file(path), "digest": torch.zeros(2)}, path),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_file_is_computed_anew(name, extractor, tmp_path, caplog):
    x = images(10)
    good = cached_features(x, extractor, folder=tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    BREAKS[name](path)
    with caplog.at_level(logging.WARNING, "flashddpm"):
        assert torch.equal(cached_features(x, extractor, folder=tmp_path), good)
    assert CALLS == [10, 10] and "computed anew" in caplog.text
    assert path.read_bytes() == whole, "it must have been replaced"


def test_file_of_other_images_under_this_name_is_computed_anew(extractor, tmp_path):
    x, y = images(10), images(10, 1)
    cached_features(x, extractor, folder=tmp_path / "x")
    cached_features(y, extractor, folder=tmp_path / "y")
    [mine], [other] = ((tmp_path / name).iterdir() for name in "xy")
    mine.write_bytes(other.read_bytes())
    assert torch.equal(cached_features(x, extractor, folder=tmp_path / "x"), x.float().flatten(1))


def test_folder_that_cannot_be_written_is_a_warning(extractor, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "flashddpm"):
        found = cached_features(images(3), extractor, folder=tmp_path / "file" / "below")
    assert found.shape == (3, 16) and "not kept" in caplog.text


def test_kill_while_writing_leaves_no_file(extractor, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_features(images(3), extractor, folder=tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.glob("*.safetensors")) == []
