"""What every source has in common, images in memory, and PyTorch's data sets."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from flashddpm.data import ImageData, from_dataset, load_data
from flashddpm.errors import DataError

IMAGES = torch.randint(256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0)).byte()
LABELS = torch.tensor([2, 0, 1, 2, 2])
NAMES = ("ant", "bee", "cat")
DATA = ImageData(IMAGES, LABELS, 3, NAMES)


class Items(Dataset):
    """A data set of given items."""

    def __init__(self, items, classes=None):
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, position):
        return self.items[position]


def picture(i: int) -> Image.Image:
    return Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy())


LABELLED = Items([(picture(i), int(LABELS[i])) for i in range(5)], NAMES)


def idx(array: np.ndarray) -> bytes:
    shape = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


@pytest.fixture(params=["memory", "dataset", "npz", "folder", "idx"])
def source(request, tmp_path: Path):
    """The same images, labels and classes from every place that can hold them, in one order."""
    if request.param == "memory":
        return DATA
    if request.param == "dataset":
        return from_dataset(LABELLED)
    if request.param == "npz":
        np.savez(tmp_path / "x.npz", images=IMAGES.numpy(), labels=LABELS.numpy())
        return load_data(tmp_path / "x.npz")
    if request.param == "idx":
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:, 0].numpy()))
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS.numpy()))
        return load_data(tmp_path)
    for i, label in enumerate(LABELS.tolist()):
        path = tmp_path / NAMES[label] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture(i).save(path)
    return load_data(tmp_path)


def test_every_source_keeps_the_contract(source) -> None:
    assert source.shape[1:] == (4, 6) and len(source) == 5 and source.num_classes == 3
    assert source.class_names in (None, NAMES)
    index = torch.tensor([3, 0, 0, 4])
    images, labels = source.fetch(index)
    assert images.dtype is torch.uint8 and images.is_contiguous() and images.device.type == "cpu"
    assert images.shape == (4, *source.shape)
    assert labels.dtype is torch.int64 and labels.shape == (4,)
    everything, kinds = source.fetch(torch.arange(5))
    assert torch.equal(images, everything[index]) and torch.equal(labels, kinds[index])
    assert {tuple(x.flatten().tolist()) for x in everything} == {
        tuple(x.flatten().tolist()) for x in IMAGES[:, : source.shape[0]]
    }
    for wrong in (torch.tensor([5]), torch.tensor([-1]), index.int(), index[:, None]):
        with pytest.raises(ValueError, match="^index: "):
            source.fetch(wrong)
    assert source.fetch(torch.arange(0))[0].shape == (0, *source.shape)


def test_a_batch_is_nobody_elses_memory(source) -> None:
    index = torch.arange(5)
    images, labels = source.fetch(index)
    kept = images.clone(), labels.clone()
    images.zero_(), labels.zero_()
    again = source.fetch(index)
    assert torch.equal(again[0], kept[0]) and torch.equal(again[1], kept[1])


def test_the_fingerprint_is_repeated(source) -> None:
    first = source.fingerprint()
    assert first == source.fingerprint() and len(first) == len("sha256:") + 64


def test_the_fingerprint_of_images_in_memory_is_known() -> None:
    """Saved runs hold it, so it must not change with the machine or the version."""
    sha = hashlib.sha256(b'[5, [3, 4, 6], 3, ["ant", "bee", "cat"]]')
    sha.update((5 * 3 * 4 * 6).to_bytes(8, "little") + bytes(IMAGES.flatten().tolist()))
    sha.update((5 * 8).to_bytes(8, "little"))
    for label in LABELS.tolist():
        sha.update(label.to_bytes(8, "little"))
    assert DATA.fingerprint() == f"sha256:{sha.hexdigest()}"


def test_the_fingerprint_of_images_in_memory_changes_with_everything() -> None:
    changed = IMAGES.clone()
    changed[4, 2, 3, 5] ^= 1
    others = [
        dataclasses.replace(DATA, images=changed),
        dataclasses.replace(DATA, labels=LABELS.flip(0)),
        dataclasses.replace(DATA, num_classes=4, class_names=None),
        dataclasses.replace(DATA, class_names=("ant", "bee", "dog")),
        dataclasses.replace(DATA, class_names=None),
        ImageData(IMAGES, None, None),
        ImageData(IMAGES.view(5, 3, 6, 4), LABELS, 3, NAMES),
    ]
    prints = {data.fingerprint() for data in [DATA, *others]}
    assert len(prints) == 1 + len(others)
    assert dataclasses.replace(DATA, images=IMAGES.clone()).fingerprint() == DATA.fingerprint()
    strided = IMAGES.contiguous(memory_format=torch.channels_last)
    assert dataclasses.replace(DATA, images=strided).fingerprint() == DATA.fingerprint()
    assert dataclasses.replace(DATA, images=strided).fetch(torch.arange(5))[0].is_contiguous()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"images": IMAGES.float()}, r"images: torch.float32 \[5, 3, 4, 6\]; must be uint8"),
        ({"images": IMAGES[0]}, r"images: torch.uint8 \[3, 4, 6\]; must be uint8 \[N, C, H, W\]"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images: .* not empty"),
        ({"labels": LABELS[:4]}, r"labels: torch.int64 \[4\]; must be int64 \[5\]"),
        ({"labels": LABELS.int()}, r"labels: torch.int32 \[5\]; must be int64 \[5\]"),
        ({"labels": LABELS - 1}, r"labels: are in -1..1; with 3 classes they must be in 0..2"),
        ({"num_classes": 2, "class_names": None}, "labels: are in 0..2; with 2 classes they must"),
        ({"class_names": ("ant", "bee")}, "class_names: 2 for 3 classes; must be one each"),
        ({"num_classes": None}, "class_names: 3 for None classes"),
        ({"labels": None}, "num_classes: must be given with labels, and only with them"),
        ({"num_classes": 0, "class_names": None}, "num_classes=0: must be at least 1"),
        ({"num_classes": None, "class_names": None}, "num_classes: must be given with labels"),
    ],
)
def test_images_in_memory_are_checked(fields, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(DATA, **fields)


# load_data


def test_a_path_names_its_kind(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=f"^{tmp_path / '1.png'}: is one picture; must be a folder"):
        load_data(tmp_path / "1.png")
    with pytest.raises(DataError, match="no such file or folder"):
        load_data(tmp_path / "nothing.npz")
    assert len(load_data(str(tmp_path))) == 1
    (tmp_path / "x-images-idx3-ubyte").write_bytes(idx(IMAGES[:, 0].numpy()))  # counts as IDX then
    assert len(load_data(tmp_path)) == 5


def test_labels_of_idx_files_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:, 0].numpy()))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"broken")
    data = load_data(tmp_path, 2, labels=False)
    assert data.num_classes is None and data.fetch(torch.arange(5))[1] is None
    with pytest.raises(DataError, match="labels-idx1-ubyte: is not an IDX file"):
        load_data(tmp_path)
    with pytest.raises(DataError, match="are 4x6; height and width must be multiples of 4"):
        load_data(tmp_path, 4, labels=False)


@pytest.mark.parametrize("options", [{"multiple": 0}, {"multiple": 1.5}, {"memory_mb": -1}])
def test_arguments_are_checked(tmp_path: Path, options) -> None:
    [name] = options
    with pytest.raises(ValueError, match=f"^{name}="):
        load_data(tmp_path, **options)


# from_dataset


@pytest.mark.parametrize("image", [picture, lambda i: IMAGES[i], lambda i: IMAGES[i].numpy()])
@pytest.mark.parametrize("label", [int, np.int32, torch.tensor, np.array])
def test_items_of_a_dataset(image, label) -> None:
    items = [(image(i), label(int(LABELS[i]))) for i in range(5)]
    for pairs in (items, [list(pair) for pair in items]):
        for data in (
            from_dataset(Items(pairs, list(NAMES))),
            from_dataset(Items(pairs), 2, num_classes=3),
        ):
            assert data.shape == (3, 4, 6) and data.num_classes == 3 and len(data) == 5
            images, labels = data.fetch(torch.tensor([4, 1]))
            assert torch.equal(images, IMAGES[[4, 1]]) and labels.tolist() == [2, 0]
    plain = from_dataset(Items(items, NAMES), labels=False)
    assert plain.num_classes is None and plain.fetch(torch.tensor([1]))[1] is None
    bare = from_dataset(Items([pair[0] for pair in items]))
    images, labels = bare.fetch(torch.tensor([4, 1]))
    assert torch.equal(images, IMAGES[[4, 1]]) and labels is None and bare.num_classes is None


def test_names_come_from_the_dataset() -> None:
    assert from_dataset(LABELLED).class_names == NAMES
    assert from_dataset(Items(LABELLED.items), num_classes=7).class_names is None
    gray = Items([Image.new("L", (6, 4), i) for i in range(3)])
    assert from_dataset(gray).shape == (1, 4, 6)
    assert from_dataset(gray).fetch(torch.tensor([2]))[0].eq(2).all()
    tensors = from_dataset(TensorDataset(IMAGES, LABELS), num_classes=3)
    assert torch.equal(tensors.fetch(torch.arange(5))[1], LABELS)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(LABELLED.items)

    def __len__(self):
        return 5


@pytest.mark.parametrize("dataset", [Stream(), iter(LABELLED.items), 3])
def test_only_map_style_data_sets_are_taken(dataset) -> None:
    with pytest.raises(ValueError, match="^dataset=.*: must be map-style"):
        from_dataset(dataset)


@pytest.mark.parametrize(
    "item, message",
    [
        ((picture(0), 0, 0), r"Items\[0\]: has 3 parts; must be an image or \(image, label\)"),
        ({"image": picture(0)}, r"Items\[0\]: is dict; must be a picture of mode L or RGB"),
        (IMAGES[0].float(), r"Items\[0\]: is float32 \[3, 4, 6\]; .*ToTensor gives floats"),
        (IMAGES[0].permute(1, 2, 0), r"Items\[0\]: is uint8 \[4, 6, 3\]; must be"),
        (IMAGES[0, 0], r"Items\[0\]: is uint8 \[4, 6\]; must be"),
        (picture(0).convert("RGBA"), r"Items\[0\]: is mode RGBA; must be"),
        (picture(0).convert("P"), r"Items\[0\]: is mode P; must be"),
        ((picture(0), 3), r"Items\[0\]: has the label 3; must be an integer in 0..2"),
        ((picture(0), -1), r"Items\[0\]: has the label -1; must be an integer in 0..2"),
        ((picture(0), 1.0), r"Items\[0\]: has the label 1.0; must be an integer in 0..2"),
        ((picture(0), True), r"Items\[0\]: has the label True; must be an integer in 0..2"),
        ((picture(0), "ant"), r"Items\[0\]: has the label 'ant'; must be an integer in 0..2"),
    ],
)
def test_an_item_that_cannot_be_used_is_refused_first_or_later(item, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        from_dataset(Items([item], NAMES))
    later = from_dataset(Items([(picture(0), 0), item], NAMES))
    with pytest.raises(DataError, match="^" + message.replace("0", "1", 1)):
        later.fetch(torch.tensor([0, 1]))


def test_a_later_item_of_another_shape_or_without_a_label_is_refused() -> None:
    items = [
        (picture(0), 0),
        (picture(0).resize((4, 4)), 0),
        picture(0),
        (picture(0).convert("L"), 1),
    ]
    data = from_dataset(Items(items, NAMES))
    for position, message in (
        (1, r"has shape \[3, 4, 4\]; must be \[3, 4, 6\], as the first has"),
        (2, "has the label None; must be an integer in 0..2"),
        (3, r"has shape \[1, 4, 6\]; must be \[3, 4, 6\]"),
    ):
        with pytest.raises(DataError, match=rf"^Items\[{position}\]: {message}"):
            data.fetch(torch.tensor([0, position]))


def test_what_is_known_of_a_data_set_up_front_is_checked() -> None:
    with pytest.raises(DataError, match="^Items: is empty"):
        from_dataset(Items([]))
    with pytest.raises(DataError, match="^Items: images are 4x6; height and width must be mult"):
        from_dataset(LABELLED, 4)
    with pytest.raises(ValueError, match="^num_classes=None: Items has labels and no list"):
        from_dataset(Items(LABELLED.items))
    with pytest.raises(ValueError, match="^num_classes=0: must be at least 1"):
        from_dataset(Items(LABELLED.items), num_classes=0)
    with pytest.raises(ValueError, match="^class_names: 3 for 4 classes"):
        from_dataset(LABELLED, num_classes=4)
    with pytest.raises(ValueError, match="^num_classes=3: without labels there are no classes"):
        from_dataset(Items([picture(0)]), num_classes=3)
    with pytest.raises(ValueError, match="^multiple=0"):
        from_dataset(LABELLED, 0)
