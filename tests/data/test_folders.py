"""Folders of pictures: what is read, in which order, and what is refused before training."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from flashddpm.data import ImageFolder, load_data, pictures
from flashddpm.data.pictures import look
from flashddpm.errors import DataError


def pixels(seed: int, channels: int = 3, height: int = 4, width: int = 6) -> np.ndarray:
    """Random uint8 [C, H, W]."""
    return np.random.default_rng(seed).integers(0, 256, (channels, height, width), np.uint8)


def write(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
    Image.fromarray(array).save(path, **options)
    return path


def both(folder: Path, **options) -> list[ImageFolder]:
    """The folder decoded once into memory, and decoded at each fetch."""
    sources = [ImageFolder(folder, **options), ImageFolder(folder, memory_mb=0, **options)]
    assert sources[0]._pixels is not None and sources[1]._pixels is None
    return sources


@pytest.mark.parametrize("channels", [1, 3])
def test_a_flat_folder_in_the_order_of_names(tmp_path: Path, channels: int) -> None:
    wanted = {}
    for seed, name in enumerate(("b.png", "a.bmp", "10.PNG", "9.png", "C.png")):
        write(tmp_path / name, pixels(seed, channels))
        wanted[name] = pixels(seed, channels)
    order = torch.tensor([4, 0, 0, 2])
    for source in both(tmp_path, multiple=2):
        assert source.shape == (channels, 4, 6) and len(source) == 5
        assert source.num_classes is None and source.class_names is None
        images, labels = source.fetch(torch.arange(5))
        assert labels is None and images.dtype is torch.uint8 and images.is_contiguous()
        for image, name in zip(images, ("10.PNG", "9.png", "C.png", "a.bmp", "b.png"), strict=True):
            assert np.array_equal(image.numpy(), wanted[name])
        assert torch.equal(source.fetch(order)[0], images[order])


def test_every_format_is_read(tmp_path: Path) -> None:
    assert features.check("webp")
    write(tmp_path / "a.png", pixels(0))
    write(tmp_path / "b.bmp", pixels(0))
    write(tmp_path / "c.webp", pixels(0), lossless=True)
    write(tmp_path / "d.jpg", pixels(0), quality=90)
    write(tmp_path / "e.jpeg", pixels(0), quality=90)
    for source in both(tmp_path):
        images, _ = source.fetch(torch.arange(5))
        assert np.array_equal(images[0].numpy(), pixels(0))
        assert torch.equal(images[1], images[0]) and torch.equal(images[2], images[0])
        decoded = np.asarray(Image.open(tmp_path / "d.jpg")).transpose(2, 0, 1)
        assert np.array_equal(images[3].numpy(), decoded) and torch.equal(images[4], images[3])


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = [f"{kind}/{file}.png" for kind in ("dog", "Ant", "cat") for file in ("2", "1")]
    for seed, name in enumerate(names):
        write(tmp_path / name, pixels(seed))
    order = [names.index(name) for name in sorted(names)]
    for source in both(tmp_path):
        assert source.num_classes == 3 and source.class_names == ("Ant", "cat", "dog")
        images, labels = source.fetch(torch.tensor([5, 0, 3]))
        assert labels is not None and labels.dtype is torch.int64 and labels.tolist() == [2, 0, 1]
        for image, i in zip(images, (5, 0, 3), strict=True):
            assert np.array_equal(image.numpy(), pixels(order[i]))
    for source in both(tmp_path, labels=False):
        assert source.num_classes is None and source.class_names is None
        assert source.fetch(torch.arange(6))[1] is None


def test_images_and_labels_are_those_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder as Peer

    names = [f"{kind}/{file}.png" for kind in ("dog", "Ant", "cat10", "cat2") for file in "b9A"]
    for seed, name in enumerate(names):
        write(tmp_path / name, pixels(seed))
    peer = Peer(str(tmp_path))
    for source in both(tmp_path):
        images, labels = source.fetch(torch.arange(len(names)))
        assert list(source.class_names) == peer.classes and labels.tolist() == peer.targets
        for image, (wanted, _) in zip(images, peer, strict=True):
            assert np.array_equal(image.numpy(), np.asarray(wanted).transpose(2, 0, 1))


def test_links_are_followed_and_hidden_names_left_out(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "x.png", pixels(0))
    folder = tmp_path / "data"
    write(folder / "a/1.png", pixels(1))
    os.symlink(elsewhere, folder / "b")
    os.symlink("1.png", folder / "a/2.png")
    write(folder / ".thumbnails/1.png", pixels(2, height=9))
    (folder / "a/.DS_Store").write_bytes(b"")
    for source in both(folder):
        images, labels = source.fetch(torch.arange(3))
        assert labels.tolist() == [0, 0, 1]
        assert torch.equal(images[0], images[1])
        assert np.array_equal(images[2].numpy(), pixels(0))


def test_a_line_names_what_is_left_out_and_where_pictures_are_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flashddpm")
    write(tmp_path / "a.png", pixels(0))
    (tmp_path / "readme.txt").write_text("words")
    (tmp_path / "b.gif").write_bytes(b"")
    both(tmp_path)
    text = caplog.text
    assert "left out what is no picture: b.gif, readme.txt" in text
    assert "decoding 1 pictures, into memory" in text and "pictures, at each fetch" in text


def test_many_pictures_keep_their_places(tmp_path: Path) -> None:
    count = 3 * 64 + 5  # several parts for the threads
    for seed in range(count):
        write(tmp_path / f"{seed:04}.png", np.full((1, 2, 2), seed, np.uint8))
    for source in both(tmp_path):
        images, _ = source.fetch(torch.arange(count))
        assert torch.equal(images[:, 0, 0, 0], torch.arange(count).to(torch.uint8))


# The fingerprint


def fingerprint(folder: Path, **options) -> str:
    prints = {source.fingerprint() for source in both(folder, **options)}
    assert len(prints) == 1, "depends on where pictures are decoded"
    return prints.pop()


def test_the_fingerprint_is_of_names_and_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        write(folder / "x/1.png", pixels(1))
        write(folder / "y/2.png", pixels(2))
    first = fingerprint(a)
    assert first.startswith("sha256:") and len(first) == 7 + 64
    assert fingerprint(b) == first  # not of the place or the time
    assert fingerprint(a, labels=False) != first
    write(b / "y/2.png", pixels(3))
    changed = fingerprint(b)
    write(b / "y/2.png", pixels(2))
    assert fingerprint(b) == first != changed
    (b / "y/2.png").rename(b / "y/3.png")
    assert fingerprint(b) != first
    (b / "y/3.png").rename(b / "y/2.png")
    (b / "y").rename(b / "z")
    assert fingerprint(b) != first


# Failures


def refused(folder: Path, message: str, **options) -> str:
    """Both ways of decoding refuse, with one text."""
    texts = set()
    for memory_mb in (4096, 0):
        with pytest.raises(DataError, match=message) as error:
            load_data(folder, memory_mb=memory_mb, **options)
        texts.add(str(error.value))
    [text] = texts
    assert str(folder) in text
    return text


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"holds no pictures \(\.png, .*class folders or \*images-idx3\* file")
    (tmp_path / "notes.txt").write_text("none")
    refused(tmp_path, "holds no pictures")
    (tmp_path / "a").mkdir()
    refused(tmp_path, r"a: holds no pictures .*; every class must have some")
    write(tmp_path / "b/1.png", pixels(0))
    refused(tmp_path, r"a: holds no pictures .*; every class must have some")


def test_mixed_and_deep_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a/1.png", pixels(0))
    write(tmp_path / "2.png", pixels(0))
    refused(tmp_path, r"holds pictures \(2.png\) beside folders \(a\); must hold")
    (tmp_path / "2.png").unlink()
    write(tmp_path / "a/deep/1.png", pixels(0))
    refused(tmp_path, r"a: holds folders \(deep\); a class folder must hold pictures only")


def test_mixed_sizes_and_modes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "1.png", pixels(0))
    write(tmp_path / "2.png", pixels(0))
    write(tmp_path / "3.png", pixels(0, 3, 6, 4))
    refused(tmp_path, r"one size; holds 4x6 \(2, such as 1.png\), 6x4 \(1, such as 3.png\)$")
    write(tmp_path / "3.png", pixels(0, 1))
    refused(tmp_path, r"one mode; holds RGB \(2, such as 1.png\), L \(1, such as 3.png\)$")


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("first", [True, False])
def test_other_modes_are_refused_and_the_way_out_named(
    tmp_path: Path, mode: str, first: bool
) -> None:
    write(tmp_path / "b.png", pixels(0))
    suffix = "jpg" if mode == "CMYK" else "png"
    picture = Image.new(mode, (6, 4))
    name = f"{'a' if first else 'c'}.{suffix}"
    picture.save(tmp_path / name)
    refused(
        tmp_path,
        rf"1 of 2 pictures are not of mode L or RGB: {name} \({mode}\); convert .*convert\('RGB'\)",
    )
    (tmp_path / "b.png").unlink()  # nor is a folder of only such
    refused(tmp_path, rf"1 of 1 pictures are not of mode L or RGB: {name} \({mode}\)")


def test_sizes_that_cannot_be_halved_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "1.png", pixels(0))
    refused(tmp_path, "images are 4x6; height and width must be multiples of 4", multiple=4)
    ImageFolder(tmp_path, multiple=2)


def test_broken_files_are_listed_ten_by_name(tmp_path: Path) -> None:
    for i in range(14):
        path = write(tmp_path / f"{i:02}.png", pixels(i))
        if i >= 2:
            path.write_bytes(path.read_bytes()[:-30])
    text = refused(tmp_path, "12 of 14 files are no pictures that can be read: 02.png")
    assert "11.png" in text and "12.png" not in text and text.endswith("and 2 more")


BROKEN = {
    "empty": b"",
    "words": b"a picture, honestly",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EOF\n",
    "gif": b"GIF89a\x06\0\x04\0\0\0\0;",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["a.png", "z.png"])
def test_what_is_no_picture_is_listed(tmp_path: Path, kind: str, name: str) -> None:
    write(tmp_path / "m.png", pixels(0))
    (tmp_path / name).write_bytes(BROKEN[kind])
    refused(tmp_path, rf"1 of 2 files are no pictures that can be read: {name} \(cannot identify")


def test_pipes_and_dangling_links_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "1.png", pixels(0))
    os.symlink("nowhere.png", tmp_path / "2.png")
    refused(tmp_path, r"1 of 2 files .*: 2.png \(is missing\)")
    os.mkfifo(tmp_path / "3.png")
    refused(tmp_path, r"2 of 3 files .*: 2.png \(is missing\), 3.png \(is no plain file\)")


def test_animations_are_listed(tmp_path: Path) -> None:
    frames = [Image.fromarray(pixels(i).transpose(1, 2, 0)) for i in range(2)]
    frames[0].save(tmp_path / "1.webp", save_all=True, append_images=frames[1:])
    refused(tmp_path, r"1.webp \(is an animation; must be one picture\)")


@pytest.mark.parametrize("position", ["a", "z"])
def test_pictures_that_pillow_warns_of_are_refused_undecoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: str
) -> None:
    write(tmp_path / "m.png", pixels(0))
    write(tmp_path / f"{position}.png", pixels(1, 3, 5, 8))
    # A limit of 39 pixels: Pillow warns above it and raises itself only above twice of it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 39)
    with pytest.warns(Image.DecompressionBombWarning):
        refused(tmp_path, rf"{position}.png \(is 5x8; must have at most 39 pixels\)")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 19)
    with pytest.warns(Image.DecompressionBombWarning):
        refused(tmp_path, rf"2 of 2 .*{position}.png \(Image size \(40 pixels\) exceeds limit")


def test_a_picture_of_another_size_is_never_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "1.png", pixels(0))
    decoded = []
    monkeypatch.setattr(pictures.np, "asarray", lambda picture: decoded.append(picture))
    found, array = look(path, (3, 6, 4))
    assert (found.shape, found.error, array, decoded) == ((3, 4, 6), "", None, [])


def test_a_file_that_changes_after_the_check_is_named_at_the_fetch(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.png", pixels(i)) for i in range(3)]
    memory, source = both(tmp_path)
    paths[1].write_bytes(b"gone")
    write(paths[2], pixels(0, 3, 8, 8))
    assert source.fetch(torch.tensor([0]))[0].shape == (1, 3, 4, 6)
    with pytest.raises(DataError, match=rf"^{paths[1]}: cannot identify"):
        source.fetch(torch.tensor([0, 1]))
    message = rf"^{paths[2]}: is RGB 8x8; was \[3, 4, 6\] when it was first read"
    with pytest.raises(DataError, match=message):
        source.fetch(torch.tensor([2]))
    assert np.array_equal(memory.fetch(torch.tensor([2]))[0][0].numpy(), pixels(2))


def test_numbers_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "1.png", pixels(0))
    for source in both(tmp_path):
        for index in (torch.tensor([-1]), torch.tensor([0, 1]), torch.tensor([0.0])):
            with pytest.raises(ValueError, match="^index: "):
                source.fetch(index)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=100)
@given(st.data())
def test_any_bytes_give_the_picture_or_an_error(scratch: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from((".png", ".jpg", ".bmp", ".webp")))
    path = write(scratch / f"x{suffix}", pixels(0))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    found, array = look(path, (3, 4, 6), hashed=True)
    if array is not None:
        assert array.shape == (3, 4, 6) and array.dtype == np.uint8 and len(found.sha256) == 32
    else:
        assert found.error or found.mode not in pictures.MODES or found.shape != (3, 4, 6)
