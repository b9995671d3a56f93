"""The measurement on images that are made so that its result is known, and its command."""

import gzip
import json
import sys

import pytest
import torch

from flashddpm import Conditioning, Sampler, UNet, UNetConfig, to_uint8
from flashddpm.benchmarks import quality
from flashddpm.checkpoint import save_model
from flashddpm.data import ImageData
from flashddpm.evaluation.classifier import Classifier, save_classifier, train_classifier

CLASSES, SIDE = 3, 8


def images(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, with a bright quadrant that tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    x = torch.randint(0, 100, (n, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    half = SIDE // 2
    for image, label in zip(x, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 120
    return x, labels


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(*images(600, 0), seed=0, epochs=3)


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, n, seed in (("train", 600, 0), ("t10k", 300, 1)):
        x, labels = images(n, seed)
        for kind, array in (("images-idx3", x[:, 0]), ("labels-idx1", labels.to(torch.uint8))):
            shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
            header = bytes([0, 0, 8, array.ndim]) + shape
            content = gzip.compress(header + array.numpy().tobytes(), 1)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(content)
    return folder


def test_measure_tells_good_images_from_bad(trained):
    test = ImageData(*images(300, 1), CLASSES)
    reference, _ = images(90, 0)
    good, wanted = images(90, 2)
    result = quality.measure(trained, good, wanted, reference, test)
    assert result["recognised"] == 1.0 and result["classifier_accuracy"] == 1.0
    assert result["images"] == 90 and result["test_images"] == 300
    wrong = quality.measure(trained, good, (wanted + 1) % CLASSES, reference, test)
    assert wrong["recognised"] == 0.0
    assert wrong["frechet_distance"] == result["frechet_distance"]
    same = quality.measure(trained, reference, wanted, reference, test)
    assert same["frechet_distance"] == same["frechet_distance_of_training_images"]
    noise = torch.randint(0, 256, good.shape, dtype=torch.uint8)
    bad = quality.measure(trained, noise, wanted, reference, test)
    assert bad["frechet_distance"] > 10 * result["frechet_distance"]


def test_fixed_draw_takes_as_many_of_each_class():
    labels = torch.tensor([0, 1, 2] * 20)
    drawn = quality.fixed_draw(labels, 5)
    assert labels[drawn].bincount().tolist() == [5, 5, 5] and len(drawn.unique()) == 15
    assert torch.equal(drawn, quality.fixed_draw(labels, 5))
    with pytest.raises(ValueError, match="class 0 has 20 images; 21 are needed"):
        quality.fixed_draw(labels, 21)


def test_draws_seeds_from_0_with_labels_in_turn(tmp_path):
    config = UNetConfig(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=CLASSES + 1,
    )
    torch.manual_seed(0)
    unet = UNet(config)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.3)
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 20}
    conditioning = Conditioning(CLASSES, CLASSES)
    save_model(tmp_path, config, unet.state_dict(), scheduler, conditioning)

    settings = quality.Settings("ddpm", num_steps=3, guidance=2.0, num_images=6, device="cpu")
    drawn, wanted = quality.draw_images(tmp_path, settings, CLASSES)
    assert wanted.tolist() == [0, 1, 2, 0, 1, 2]
    assert drawn.dtype is torch.uint8 and drawn.shape == (6, 1, SIDE, SIDE)
    x = Sampler.from_pretrained(tmp_path, device="cpu").sample(
        range(6), wanted, guidance=2.0, solver="ddpm", num_steps=3
    )
    assert torch.equal(drawn, to_uint8(x))


def run(monkeypatch, data_dir, *options: str) -> None:
    def draw(folder, settings, num_classes):
        assert num_classes == CLASSES
        return images(settings.num_images, 2)

    monkeypatch.setattr(quality, "draw_images", draw)
    quality.main([str(data_dir.parent), str(data_dir), "--epochs", "3", *options])


def test_command_writes_json_and_keeps_the_classifier(monkeypatch, data_dir, tmp_path, capsys):
    (tmp_path / "flashddpm.json").write_text('{"class_names": ["left", "right", "below"]}')
    out, classifier = tmp_path / "quality.json", tmp_path / "classifier.safetensors"
    options = ["--out", str(out), "--classifier", str(classifier), "--num-images", "90"]
    run(monkeypatch, data_dir, *options, "--num-steps", "7")
    first, text = json.loads(out.read_text()), capsys.readouterr().out
    assert first["recognised"] == 1.0 and first["num_steps"] == 7 and first["images"] == 90
    assert {"versions", "commit", "command", "threads", "frechet_distance"} <= set(first)
    assert "below" in text and f"{first['frechet_distance']:.3f}" in text

    monkeypatch.setattr(quality, "train_classifier", None)
    run(monkeypatch, data_dir, *options)
    second = json.loads(out.read_text())
    assert second["frechet_distance"] == first["frechet_distance"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--num-images", "64", "num_images=64"), ("--num-images", "91", "multiple of 3")],
)
def test_command_refuses_in_one_line(monkeypatch, data_dir, option, value, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run(monkeypatch, data_dir, option, value)


def test_classifier_is_the_bundled_one_or_a_new_one_unless_a_file_is_named(
    monkeypatch, data_dir, trained, tmp_path
):
    """Other data than Fashion-MNIST get a new one."""
    train = ImageData(*images(600, 0), CLASSES)
    asked = []
    monkeypatch.setattr(quality, "classifier_for", lambda *a, **k: asked.append(a) or ("", trained))
    assert quality.find_classifier(None, train, 1) is trained and len(asked) == 1
    path = tmp_path / "kept.safetensors"
    save_classifier(path, trained)
    found = quality.find_classifier(path, train, 1)
    assert torch.equal(found.last.weight, trained.last.weight) and len(asked) == 1


def test_command_needs_its_extra_before_any_work(monkeypatch, data_dir):
    monkeypatch.setitem(sys.modules, "torch_fidelity.version", None)
    monkeypatch.setattr(quality, "find_classifier", None)
    with pytest.raises(SystemExit, match=r"error: .*flashddpm\[evaluate\]"):
        run(monkeypatch, data_dir)
