"""Small training runs, and what they leave."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashddpm.data import ImageData
from flashddpm.training.config import TrainConfig
from flashddpm.training.trainer import Trainer


class Training:
    """Small runs, and what they leave."""

    STRIPES = torch.tensor([[255, 0] * 4, [0, 0, 255, 255] * 2], dtype=torch.uint8)
    PLAIN = ImageData(STRIPES[:, None, None].expand(2, 1, 8, 8).contiguous(), None, None)
    LABELLED = ImageData(PLAIN.images.repeat(3, 1, 1, 1), torch.tensor([0, 1] * 3), 2)
    TINY = TrainConfig(
        steps=6,
        batch_size=4,
        seed=3,
        learning_rate=5e-3,
        warmup_steps=2,
        ema_half_lives=(3, 20),
        num_train_timesteps=100,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
    )

    def trainer(self, out: Path, images: ImageData = LABELLED, **changes: Any) -> Trainer:
        return Trainer(dataclasses.replace(self.TINY, **changes), images, out, "cpu")

    def resumed(self, out: Path, images: ImageData = LABELLED, allow=(), **changes: Any) -> Trainer:
        fresh = self.trainer(out, images, **changes)
        fresh.resume(allow)
        return fresh

    @staticmethod
    def run(trainer: Trainer, **options: Any) -> Trainer:
        trainer.run(progress=False, **options)
        return trainer

    @staticmethod
    def state(trainer: Trainer) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        found = {"step": torch.tensor(trainer.step)}
        for name, p in trainer.stepper.params.items():
            found[f"model.{name}"] = p.detach()
            for half_life, average in trainer.stepper.ema.weights.items():
                found[f"ema-{half_life}.{name}"] = average[name]
            for key, value in trainer.stepper.optimizer.state[p].items():
                found[f"{key}.{name}"] = value
        return {name: value.clone() for name, value in found.items()}

    def assert_same(self, actual: Trainer, expected: dict[str, Tensor]) -> None:
        found = self.state(actual)
        assert sorted(found.keys() ^ expected.keys())[:4] == []
        for name, value in expected.items():
            assert found[name].dtype is value.dtype and found[name].stride() == value.stride(), name
            assert torch.equal(found[name], value), name

    @staticmethod
    def files(folder: Path) -> dict[str, bytes]:
        found = (file for file in folder.rglob("*") if file.is_file())
        return {str(file.relative_to(folder)): file.read_bytes() for file in found}

    @staticmethod
    def numbered(count: int) -> ImageData:
        """Images whose every pixel is their number."""
        images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
        return ImageData(images.contiguous(), torch.arange(count), count)


def on_one_thread(value: Any) -> Iterator[Any]:
    """Yield, with PyTorch on one thread meanwhile: small sums are faster, and always the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield value
    torch.set_num_threads(threads)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    """Runs that neither draw their loss nor wait for a disk, which take longer than the steps."""
    monkeypatch.setattr("flashddpm.training.trainer.plot_loss", lambda out: None)
    monkeypatch.setattr("os.fsync", lambda number: None)
    yield from on_one_thread(Training())


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run of 6 steps, uninterrupted: its folder and its last state."""
    out = tmp_path_factory.mktemp("whole")
    for made in on_one_thread(Training()):
        state = made.state(made.run(made.trainer(out), log_every=2))
    return out, state
