from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashddpm.data import find_images, load_idx, read_idx, to_float
from flashddpm.errors import DataError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
PIXELS = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)
KINDS = np.array([3, 0, 1, 3, 2], np.uint8)


def idx(array: np.ndarray) -> bytes:
    shape = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


def write(path: Path, array: np.ndarray) -> Path:
    content = idx(array)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("images", ["", ".gz"])
@pytest.mark.parametrize("labels", ["", ".gz"])
def test_reads_images_and_the_labels_beside(tmp_path: Path, images: str, labels: str) -> None:
    path = write(tmp_path / (IMAGES + images), PIXELS)
    write(tmp_path / (LABELS + labels), KINDS)
    write(tmp_path / "t10k-images-idx3-ubyte.gz", PIXELS[:2])
    for source in (path, str(path), tmp_path):
        data = load_idx(source, multiple=2)
        assert data.images.dtype is torch.uint8 and data.images.shape == (5, 1, 4, 6)
        assert np.array_equal(data.images[:, 0].numpy(), PIXELS)
        assert data.labels is not None and data.labels.dtype is torch.int64
        assert data.labels.tolist() == KINDS.tolist()
        assert data.num_classes == 4
        assert len(data) == 5


def test_the_labels_of_the_images_own_kind_are_preferred(tmp_path: Path) -> None:
    path = write(tmp_path / (IMAGES + ".gz"), PIXELS)
    write(tmp_path / LABELS, KINDS)
    write(tmp_path / (LABELS + ".gz"), KINDS[::-1])
    assert load_idx(path).labels.tolist() == KINDS[::-1].tolist()


def test_images_without_labels(tmp_path: Path) -> None:
    for name in (IMAGES, "pictures", "pictures.gz"):
        data = load_idx(write(tmp_path / name, PIXELS))
        assert data.labels is None and data.num_classes is None
        assert np.array_equal(data.images[:, 0].numpy(), PIXELS)
    # No name says that these are labels.
    write(tmp_path / LABELS, KINDS)
    assert load_idx(tmp_path / "pictures").labels is None


def test_the_only_images_of_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "t10k-images-idx3-ubyte", PIXELS)
    assert find_images(tmp_path) == path
    training = write(tmp_path / IMAGES, PIXELS)
    assert find_images(tmp_path) == training


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_reads_1_to_4_dimensions(tmp_path: Path, ndim: int) -> None:
    array = np.arange(120, dtype=np.uint8).reshape((5, 4, 3, 2)[: ndim - 1] + (-1,))
    assert np.array_equal(read_idx(write(tmp_path / "x", array)), array)


def test_pixels_go_to_minus_one_to_one() -> None:
    assert torch.equal(to_float(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1]))
    x = to_float(torch.arange(256, dtype=torch.uint8))
    assert x.dtype is torch.float32
    assert torch.equal(((x / 2 + 0.5) * 255).round().to(torch.uint8), torch.arange(256))


# Failures

BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "is not an IDX file": lambda content: b"",
    "is not an IDX file of": lambda content: content[:3],
    "is not an IDX file of b": lambda content: b"\x89PNG" + content[4:],
    "is not an IDX file of by": lambda content: b"\0\0\x0d\3" + content[4:],
    "is not an IDX file of byt": lambda content: b"\0\0\x08\0" + content[4:],
    "is not an IDX file of byte": lambda content: b"\0\0\x08\5" + content[4:],
    "is not an IDX file of bytes": gzip.compress,
    "ends inside its header, of 16 bytes": lambda content: content[:15],
    "ends inside its header": lambda content: content[:4],
    r"holds 0 bytes; its header says \(5, 4, 6\)": lambda content: content[:16],
    r"holds 119 bytes; its header says \(5, 4, 6\)": lambda content: content[:-1],
    r"holds 121 bytes; its header says \(5, 4, 6\)": lambda content: content + b"\0",
    r"holds 0 bytes; its header says \(0, 4, 6\), not": lambda content: idx(PIXELS[:0]),
    r"holds 0 bytes; its header says \(5, 0, 6\), not": lambda content: idx(PIXELS[:, :0]),
    r"holds 0 bytes; its header says \(429": lambda content: (
        b"\0\0\x08\3" + b"\xff" * 8 + b"\0" * 4
    ),
    r"has shape \(5, 24\); must be \[N, H, W\]": lambda content: idx(PIXELS.reshape(5, 24)),
    r"has shape \(5, 1, 4, 6\); must be": lambda content: idx(PIXELS[:, None]),
    "images are 5x6; height and width must be multiples of 2": lambda content: idx(
        np.zeros((2, 5, 6))
    ),
    "images are 4x5; height and width must be multiples of 2": lambda content: idx(
        np.zeros((2, 4, 5))
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_images_are_refused(tmp_path: Path, message: str) -> None:
    path = tmp_path / IMAGES
    path.write_bytes(BROKEN[message](idx(PIXELS)))
    for source in (path, tmp_path):
        with pytest.raises(DataError, match=f"^{path}: {message}"):
            load_idx(source, multiple=2)


@pytest.mark.parametrize("keep", [0, 1, 9, 10, 30, -9, -1])
def test_truncated_gzip_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / (IMAGES + ".gz")
    path.write_bytes(gzip.compress(idx(PIXELS))[:keep])
    with pytest.raises(DataError, match=f"^{path}: "):
        load_idx(path)


def test_gzip_with_a_wrong_checksum_or_a_plain_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / (IMAGES + ".gz")
    content = bytearray(gzip.compress(idx(PIXELS)))
    content[-6] ^= 1
    for broken in (bytes(content), idx(PIXELS)):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=f"^{path}: cannot be read"):
            load_idx(path)


def test_broken_labels_are_refused(tmp_path: Path) -> None:
    write(tmp_path / IMAGES, PIXELS)
    labels = tmp_path / LABELS
    for content, message in (
        (idx(KINDS[:4]), r"has shape \(4,\); must be \(5,\)"),
        (idx(KINDS[:, None]), r"has shape \(5, 1\); must be \(5,\)"),
        (idx(KINDS)[:-1], r"holds 4 bytes; its header says \(5,\)"),
        (b"labels", "is not an IDX file"),
    ):
        labels.write_bytes(content)
        with pytest.raises(DataError, match=f"^{labels}: {message}"):
            load_idx(tmp_path)
    labels.unlink()
    labels.mkdir()
    with pytest.raises(DataError, match=f"^{labels}: cannot be read"):
        load_idx(tmp_path)


def test_missing_and_ambiguous_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{tmp_path / 'nothing'}: no such file or folder"):
        load_idx(tmp_path / "nothing")
    with pytest.raises(DataError, match=f"^{tmp_path}: must hold one .* found none"):
        load_idx(tmp_path)
    write(tmp_path / IMAGES, PIXELS)
    write(tmp_path / (IMAGES + ".gz"), PIXELS)
    with pytest.raises(DataError, match=f"^{tmp_path}: must hold one .* found {IMAGES}, {IMAGES}"):
        load_idx(tmp_path)


# Any bytes give an array or DataError


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        array = read_idx(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert array.dtype == np.uint8 and array.size > 0
        body = gzip.decompress(content) if path.suffix == ".gz" else content
        assert idx(array) == body


ALMOST_IDX = st.builds(
    lambda ndim, shape, body: b"\0\0\x08" + bytes([ndim]) + bytes(shape) + body,
    st.integers(0, 5),
    st.lists(st.sampled_from((0, 0, 0, 1, 2, 255)), max_size=17),
    st.binary(max_size=5),
)


@settings(max_examples=200)
@example(b"\0\0\x08\1\0\0")
@example(b"\0\0\x08\4" + b"\xff" * 12 + b"\0" * 4)
@given(st.binary(max_size=40) | ALMOST_IDX)
def test_any_bytes(scratch: Path, content: bytes) -> None:
    check(scratch / "x", content)


@settings(max_examples=100)
@given(st.data())
def test_any_bytes_in_gzip(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(gzip.compress(idx(PIXELS[:2])))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check(scratch / "x.gz", bytes(content))
    check(scratch / "y.gz", data.draw(st.binary(max_size=30)))
    check(scratch / "z.gz", gzip.compress(data.draw(ALMOST_IDX)))
