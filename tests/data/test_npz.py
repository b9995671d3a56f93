"""NumPy's archives: which arrays and layouts are taken, and hostile files."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.data import load_data, load_npz
from flashddpm.errors import DataError

NCHW = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), np.uint8)
NHWC = np.ascontiguousarray(NCHW.transpose(0, 2, 3, 1))
KINDS = np.array([3, 0, 1, 3, 2])


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_names_and_layouts(tmp_path: Path, save) -> None:
    path = tmp_path / "x.npz"
    for images, labels in (("images", "labels"), ("arr_0", "arr_1"), ("images", "arr_1")):
        for array in (
            NCHW,
            NHWC,
            np.asfortranarray(NHWC),
            NCHW[:, :, ::-1, ::-1][:, :, ::-1, ::-1],
        ):
            save(path, **{images: array, labels: KINDS, "other": KINDS[:2]})
            data = load_npz(path, multiple=2)
            assert data.shape == (3, 4, 6) and data.images.is_contiguous()
            assert np.array_equal(data.images.numpy(), NCHW)
            assert data.labels is not None and data.labels.tolist() == KINDS.tolist()
            assert data.num_classes == 4
        save(path, **{images: NHWC})
        assert load_npz(path).labels is None and load_npz(path).num_classes is None
    save(path, images=NCHW[:, 0])
    assert np.array_equal(load_npz(path).images.numpy(), NCHW[:, :1])
    for one in (NCHW[:, :1], NHWC[..., :1]):
        save(path, images=one)
        assert np.array_equal(load_npz(path).images.numpy(), NCHW[:, :1])


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i4", ">i4", "<i8", ">i8", "u8"])
def test_labels_of_any_integers(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "x.npz", images=NCHW, labels=KINDS.astype(dtype))
    data = load_data(tmp_path / "x.npz")
    assert data.fetch(torch.arange(5))[1].tolist() == KINDS.tolist()


def test_labels_can_be_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.NPZ.npz", images=NCHW, labels=-KINDS)
    path = (tmp_path / "x.NPZ.npz").rename(tmp_path / "x.NPZ")
    data = load_data(path, labels=False)
    assert data.num_classes is None and data.fetch(torch.arange(5))[1] is None


# Failures


def refused(path: Path, message: str, **options) -> None:
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        load_data(path, **options)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({}, "has no images; one array must be named images or arr_0"),
        ({"pictures": NCHW}, "has no images"),
        ({"images": NCHW, "arr_0": NCHW}, "has images and arr_0; one array"),
        ({"images": NCHW, "labels": KINDS, "arr_1": KINDS}, "has labels and arr_1; one array"),
        ({"images": NCHW / 255}, "images is of float64; must be of integers"),
        ({"images": NCHW.astype(np.int16)}, r"images is int16 \[5, 3, 4, 6\]; must be uint8 \[N"),
        ({"images": NCHW[0, 0]}, r"images is uint8 \[4, 6\]; must be uint8 \[N, H, W\]"),
        ({"images": NCHW[None]}, r"images is uint8 \[1, 5, 3, 4, 6\]; must be"),
        ({"images": NCHW[:, :2]}, r"images has shape \[5, 2, 4, 6\]; either axis 1 or axis 3"),
        ({"images": NCHW[..., :3]}, r"images has shape \[5, 3, 4, 3\]; either .* and not both"),
        ({"images": NCHW[:0]}, r"images has 0 bytes; its header says \(0, 3, 4, 6\) of uint8, not"),
        ({"images": NCHW, "labels": KINDS[:4]}, r"labels has shape \[4\]; must be \[5\]"),
        ({"images": NCHW, "labels": KINDS[:, None]}, r"labels has shape \[5, 1\]; must be \[5\]"),
        ({"images": NCHW, "labels": KINDS - 1}, r"labels are in -1..2; must be in 0..1048575"),
        ({"images": NCHW, "labels": KINDS << 40}, r"labels are in 0..\d+; must be in 0..1048575"),
        ({"images": NCHW, "labels": KINDS / 1}, "labels is of float64; must be of integers"),
        ({"images": NCHW, "labels": KINDS > 0}, "labels is of bool; must be of integers"),
    ],
)
def test_arrays_that_are_not_images_are_refused(tmp_path: Path, arrays, message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", message)


def test_sizes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=NCHW)
    refused(tmp_path / "x.npz", "images: images are 4x6; .* must be multiples of 4", multiple=4)
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((5, 1024, 1024), np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 10_000
    refused(tmp_path / "x.npz", "holds 5 MiB; must be at most memory_mb=4", memory_mb=4)
    load_data(tmp_path / "x.npz", memory_mb=6)


class Bomb:
    """Unpickling it raises, so a test shows that nothing was unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_are_not_run(tmp_path: Path) -> None:
    objects = np.array([Bomb()], dtype=object)
    path = archive(tmp_path / "x.npz", images=npy(objects))
    refused(path, "images is of object; must be of integers")
    refused(archive(path, images=npy(NCHW), labels=npy(objects)), "labels is of object")
    structure = np.zeros(5, [("a", "u1"), ("b", object)])
    refused(archive(path, images=npy(structure)), "images is of ")


def header(shape: str, dtype: str = "'|u1'", version: bytes = b"\1\0") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    width = 2 if version == b"\1\0" else 4
    return b"\x93NUMPY" + version + len(text).to_bytes(width, "little") + text


@pytest.mark.parametrize(
    "content, message",
    [
        (header("(1099511627776, 1024, 1024)"), r"images has 0 bytes; its header says \(1099"),
        (header("(5, 4, 6)") + b"x" * 119, r"images has 119 bytes; its header says \(5, 4, 6\)"),
        (header("(5, 4, 6)") + b"x" * 121, r"images has 121 bytes; its header says \(5, 4, 6\)"),
        (header("(-5, -4, 6)") + b"x" * 120, "cannot be read: "),
        (header("(5, 4.0, 6)") + b"x" * 120, "cannot be read: "),
        (header("(" * 5000) + b"x" * 120, "cannot be read: "),
        (header("9" * 20_000) + b"x" * 120, "cannot be read: "),
        (header("(5, 4, 6)", "'|u1', 'more': 1") + b"x" * 120, "cannot be read: "),
        (header("(5, 4, 6)", version=b"\3\0") + b"x" * 120, r"has .npy version \(3, 0\); must"),
        (b"\x93NUMPY\1\0\xff\xff{", "cannot be read: "),
        (b"not an array", "cannot be read: "),
        (b"", "cannot be read: "),
    ],
)
def test_headers_that_lie_are_refused_before_memory_is_taken(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = archive(tmp_path / "x.npz", images=content)
    tracemalloc.start()
    try:
        refused(path, message)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_version_2_headers_are_read(tmp_path: Path) -> None:
    content = header("(5, 4, 6)", version=b"\2\0") + NCHW[:, 0].tobytes()
    data = load_npz(archive(tmp_path / "x.npz", images=content))
    assert np.array_equal(data.images[:, 0].numpy(), NCHW[:, 0])


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", images=npy(NCHW), labels=npy(KINDS))
    content = path.read_bytes()
    for keep in (0, 1, 22, 200, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:keep])
        refused(path, "cannot be read: ")
    flipped = bytearray(content)
    flipped[200] ^= 1  # a pixel, so only the checksum can tell
    path.write_bytes(flipped)
    refused(path, "cannot be read: Bad CRC-32")
    path.write_bytes(npy(NCHW))
    refused(path, "cannot be read: File is not a zip file")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("count", [1, 7, 100, 5000])
def test_the_checksum_is_compared(tmp_path: Path, compression: int, count: int) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, 4, 6), np.uint8)
    path = archive(tmp_path / "x.npz", compression, images=npy(images))
    assert np.array_equal(load_npz(path).images[:, 0].numpy(), images)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + 16] ^= 1
    path.write_bytes(content)
    refused(path, "cannot be read: Bad CRC-32")


def test_an_archive_that_states_less_than_it_holds_is_refused(tmp_path: Path) -> None:
    """The directory's size is what counts: more is never decompressed."""
    big = npy(np.zeros((1, 4096, 4096), np.uint8))
    path = archive(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, images=big)
    content = path.read_bytes()
    at = content.rindex(b"PK\1\2")
    small = (1000).to_bytes(4, "little")
    path.write_bytes(content[: at + 24] + small + content[at + 28 :])
    tracemalloc.start()
    try:
        refused(path, "cannot be read: Bad CRC-32", memory_mb=1)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=150)
@given(st.data())
def test_any_bytes_give_the_images_or_an_error(scratch: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    path = archive(scratch / "x.npz", kind, images=npy(NHWC), labels=npy(KINDS))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    try:
        source = load_data(path)
    except DataError as error:
        assert str(path) in str(error)
    else:  # what changed was not of the arrays: their checksums hold
        assert np.array_equal(source.fetch(torch.arange(5))[0].numpy(), NCHW)
