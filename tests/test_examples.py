"""The examples of docs/examples do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashddpm import kernels

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
TESTED_ELSEWHERE = {"foreign_kernel.py": "tests/testing"}


def test_every_example_is_tested():
    here = Path(__file__).read_text(encoding="utf-8")
    for path in FOLDER.glob("*.py"):
        if path.name not in TESTED_ELSEWHERE:
            assert f'load("{path.name}")' in here, f"{path.name} has no test"


def load(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, FOLDER / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_the_reference(monkeypatch):
    """Make the kernels run their reference, which the interpreter is too slow for."""
    if not torch.cuda.is_available() and kernels.HAS_TRITON:
        module = importlib.import_module("flashddpm.kernels.launch")
        monkeypatch.setattr(module, "INTERPRETED", False)


@pytest.fixture
def points(monkeypatch):
    """The example, of many small batches."""
    take_the_reference(monkeypatch)
    return load("points.py")


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|: 0 for equal distributions (Szekely & Rizzo 2013)."""
    a, b = a.flatten(1).double().cpu(), b.flatten(1).double().cpu()
    return (
        2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    ).item()


def gap(samples: torch.Tensor, data: torch.Tensor) -> float:
    """The mean distance of a sample to the nearest point of the data."""
    return torch.cdist(samples.flatten(1), data.flatten(1)).min(1).values.mean().item()


def test_points_learn_their_distribution(points):
    """Far nearer to the data than noise is, and than what an untrained network draws."""
    torch.manual_seed(0)
    network, data, unseen = (
        points.Network().to(points.DEVICE),
        points.moons(1000),
        points.moons(1000, 5),
    )
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(2)).to(data)
    before = points.sample(network, 1000, num_steps=50)
    points.train(network, data, 500)
    samples = points.sample(network, 1000, num_steps=50)
    for measure, margin in ((energy_distance, 4), (gap, 3)):
        floor = min(measure(noise, unseen), measure(before, unseen))
        assert measure(samples, unseen) * margin < floor
        assert measure(data, unseen) * 2 * margin < floor  # the measure tells what it should
    assert samples.isfinite().all() and len(samples.unique(dim=0)) == 1000


def test_points_draw_a_picture(points, tmp_path):
    points.main(["--out", str(tmp_path / "points.png"), "--steps", "3"])
    with Image.open(tmp_path / "points.png") as image:
        assert image.size == (800, 400)
        for side in (image.crop((0, 0, 400, 400)), image.crop((400, 0, 800, 400))):
            assert len(side.getcolors()) > 1, "nothing was drawn"


def trained_and_drawn(points):
    """Take one training step and two of sampling, of 4 points: gradients, weights and samples."""
    torch.manual_seed(0)
    network = points.Network(width=8)
    points.train(network, points.moons(64), steps=1, batch=4)
    found = {}
    for name, weights in network.named_parameters():
        found |= {name: weights.detach(), f"gradient of {name}": weights.grad}
    return found | {"samples": points.sample(network, 4, num_steps=2)}


@pytest.mark.skipif(
    torch.cuda.is_available() or not kernels.HAS_TRITON, reason="is for the interpreter"
)
def test_points_are_the_same_by_the_kernels_and_the_reference(monkeypatch):
    """Bit for bit: no sum over images reaches the weights, for a loss passes its gradient alone."""
    launched = set()
    for name in ("launch", "image_means", "advance"):
        module = importlib.import_module(f"flashddpm.kernels.{name}")
        launch = module.launch

        def launching(kernel, *arguments, launch=launch, **options):
            launched.add(kernel.__name__)
            return launch(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", launching)
    by_kernels = trained_and_drawn(load("points.py"))
    names = {"_philox", "_add_noise", "_diffusion_loss_fwd", "_diffusion_loss_bwd"}
    assert launched >= {f"{name}_kernel" for name in names | {"_denoise_step", "_advance"}}

    launched.clear()
    take_the_reference(monkeypatch)
    by_reference = trained_and_drawn(load("points.py"))
    assert not launched and by_kernels.keys() == by_reference.keys()
    for name, expected in by_reference.items():
        torch.testing.assert_close(by_kernels[name], expected, rtol=0, atol=0, msg=name)
    assert by_kernels["samples"].isfinite().all() and by_kernels["samples"].unique().numel() == 8
