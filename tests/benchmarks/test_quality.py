"""Fréchet distances with known answers, and the measurement on images made so that it is known."""

import gzip
import json
import math

import pytest
import torch

from flashddpm import Conditioning, Sampler, UNet, UNetConfig, to_uint8
from flashddpm.benchmarks import quality
from flashddpm.checkpoint import save_model
from flashddpm.data import ImageData
from flashddpm.errors import CheckpointError, DataError

CLASSES, SIDE = 3, 8


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, n: int = 500, seed: int = 0):
    """Samples whose own mean and covariance are exactly these."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ x).T + mean


def random_covariance(d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


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
def trained() -> quality.Classifier:
    return quality.train_classifier(*images(600, 0), seed=0, epochs=3)


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


def test_frechet_distance_of_gaussians_with_diagonal_covariance():
    a, b = torch.tensor([[1.0, 4.0, 9.0], [4.0, 0.25, 9.0]]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    expected = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    left = gaussian(torch.zeros(3).double(), a.diag(), seed=1)
    right = gaussian(mean, b.diag(), n=300, seed=2)
    assert quality.frechet_distance(left, right) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_correlated_gaussians():
    """In two dimensions Tr M^(1/2) = (Tr M + 2 det(M)^(1/2))^(1/2): no eigenvalues needed."""
    a, b = random_covariance(2, 3), random_covariance(2, 4)
    assert not torch.allclose(a @ b, b @ a), "these must not commute"
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(a.trace() + b.trace()) - 2 * root
    zero = torch.zeros(2).double()
    left, right = gaussian(zero, a, seed=5), gaussian(zero, b, seed=6)
    assert quality.frechet_distance(left, right) == pytest.approx(expected, rel=1e-10)
    assert quality.frechet_distance(right, left) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_dead_features():
    x = gaussian(torch.zeros(7).double(), random_covariance(7, 0))
    x[:, 3] = 0
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    assert quality.frechet_distance(x, shuffled) == pytest.approx(0, abs=1e-9)
    assert quality.frechet_distance(x, x + 1) == pytest.approx(7, rel=1e-9)


def test_frechet_distance_refuses_what_it_cannot_measure():
    x = torch.randn(9, 8)
    assert quality.frechet_distance(x, torch.randn(20, 8)) > 0
    with pytest.raises(ValueError, match="features_b: 8 samples of 8 features.*at least 9"):
        quality.frechet_distance(x, x[:8])
    with pytest.raises(ValueError, match="features_b of shape"):
        quality.frechet_distance(x, x[:, :7])
    with pytest.raises(ValueError, match="features_a: must be finite"):
        quality.frechet_distance(x / 0, x)


def test_classifier_learns_and_is_a_function_of_its_seed(trained):
    test, labels = images(300, 1)
    predicted, features = quality.judge(trained, test)
    assert features.shape == (300, quality.FEATURES)
    assert quality.share(predicted, labels, CLASSES) == (1.0, [1.0] * CLASSES)
    before = torch.random.get_rng_state()
    few = images(256, 0)
    first, second = (quality.train_classifier(*few, seed=7, epochs=1) for _ in range(2))
    other = quality.train_classifier(*few, seed=8, epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.last.weight, second.last.weight)
    assert not torch.equal(first.last.weight, other.last.weight)


def test_share_counts_by_class():
    predicted, wanted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2])
    assert quality.share(predicted, wanted, 3) == (0.75, [1.0, 0.5, 1.0])


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


def test_files_that_do_not_fit_are_refused(data_dir, tmp_path):
    path = tmp_path / "classifier.safetensors"
    x, labels = images(30, 0)
    path.write_bytes(quality.save(quality.make_classifier(x, labels).state_dict()))
    quality.load_classifier(path, x, labels)
    with pytest.raises(CheckpointError, match="another classifier"):
        quality.load_classifier(path, x, labels + 1)
    (data_dir / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-images"):
        quality.find_test_images(data_dir)
