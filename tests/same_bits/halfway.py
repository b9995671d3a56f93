"""What one version of flashddpm begins and another ends, by public names and commands only.

`begin` leaves a model, trajectories, a run, samples and an evaluation in the current folder, most
of them half done; each function of CONTINUED goes on from one of them there. What they yield, and
all else that is compared, are names with tensors or texts.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import flashddpm as fd

Values = Iterator[tuple[str, Tensor | str]]

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "num_class_embeds": 4,
}
TRAIN = (
    "--batch-size", 4, "--block-out-channels", "4,4", "--norm-num-groups", 2,
    "--attention-head-dim", 4, "--warmup-steps", 2, "--learning-rate", 0.005,
    "--num-train-timesteps", 50, "--device", "cpu",
)  # fmt: skip
SAMPLE = ("--num-images", 4, "--batch-size", 2, "--device", "cpu", "--compile", "off")
TRAJECTORIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dpmpp_2m_sde", {"spacing": "linspace", "threshold": 0.9, "clip": 1.5}),
    ("euler_ancestral", {"spacing": "linspace"}),
)
EVALUATE = (
    "model", "data.npz", "--out", "report/report.html", "--features", "rows.pt", "--device", "cpu",
    "--num-images", 24, "--num-steps", 3, "--bound-images", 6, "--bound-timesteps", 5,
)  # fmt: skip
TIMED = re.compile(r'((?:seconds|images_per_second|loader_wait)(?:"|&quot;): )[^,}\s]+')


def normal(name: str, *shape: int) -> Tensor:
    """Return normal numbers that follow from a name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def sampler(prediction_type: str = "v_prediction", **options: Any) -> fd.Sampler:
    """Return a sampler of three classes and a null class; no weight of its network is zero.

    Options are those of a Sampler, and TINY's.
    """
    config = {**TINY, **{name: options.pop(name) for name in TINY if name in options}}
    network = fd.UNet(fd.UNetConfig(**config)).eval().requires_grad_(False)
    fan_in = {name: math.prod(value.shape[1:]) for name, value in network.state_dict().items()}
    network.load_state_dict(
        {
            name: normal(name, *value.shape) / math.sqrt(max(fan_in[name], 4))
            for name, value in network.state_dict().items()
        }
    )
    return fd.Sampler(
        network,
        fd.NoiseSchedule.create("squaredcos_cap_v2", 100),
        shape=(1, 8, 8),
        prediction_type=prediction_type,
        conditioning=fd.Conditioning(3, 3, ("low", "middle", "high")),
        device="cpu",
        **{"compile": False, **options},
    )


def stored(folder: str, **options: Any) -> fd.Sampler:
    """Return the sampler of a model's folder."""
    return fd.Sampler.from_pretrained(folder, "cpu", **{"compile": False, **options})


def command(*words: Any) -> str:
    """Run the command line in this process; return what it prints."""
    line, printed = ["flashddpm", *map(str, words)], io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)  # training sets its own
    try:
        with mock.patch.object(sys, "argv", line), contextlib.redirect_stdout(printed):
            runpy.run_module("flashddpm", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(line)}: exit code {end.code}") from end
    finally:
        signal.signal(signal.SIGTERM, handler)
    return printed.getvalue()


def write_images() -> None:
    """Write data.npz: 96 images of three classes, which show as the brighter rows."""
    images, labels = np.random.default_rng(0).integers(0, 120, (96, 8, 8)), np.arange(96) % 3
    for image, label in zip(images, labels, strict=True):
        image[3 * label : 3 * label + 2] += 120
    np.savez_compressed("data.npz", images=images.astype(np.uint8), labels=labels)


def files(folder: str) -> Values:
    """Yield what is in the files of a folder: tensors, pixels, and texts without times."""
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield f"{path}", json.dumps(file.metadata(), sort_keys=True)
                yield from ((f"{path}: {name}", file.get_tensor(name)) for name in file.keys())
        elif path.suffix == ".png":
            yield f"{path}", torch.from_numpy(np.array(Image.open(path)))
        elif path.suffix in (".json", ".jsonl", ".html"):
            yield f"{path}", TIMED.sub(r"\1null", path.read_text(encoding="utf-8"))
        elif path.is_file():
            yield f"{path}", torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def write_features() -> None:
    """Write rows.pt, eight features of an image: the means of its rows."""
    rows = torch.jit.ScriptModule()
    rows.define("def forward(self, x: Tensor) -> Tensor:\n    return x.float().mean([1, 3])\n")
    rows.save("rows.pt")


def evaluate() -> None:
    """Evaluate the model, with a cache in the current folder."""
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(Path("cache").resolve())):
        command("evaluate", *EVALUATE)
    shutil.rmtree("cache/matplotlib", ignore_errors=True)  # its fonts, in any order


def begin() -> None:
    """Leave what can be gone on from in the current folder."""
    write_images()
    small = {"down_block_types": TINY["down_block_types"][1:], "block_out_channels": (4,)}
    drawing = sampler("epsilon", **small, up_block_types=TINY["up_block_types"][:1])
    drawing.save_pretrained("model")
    for solver, options in TRAJECTORIES:
        trajectory = drawing.trajectory([3, -4], [0, 2], [2.0, 1.0], solver, 6, **options)
        trajectory.step(3)
        trajectory.save(f"{solver}.safetensors")
    run = (*TRAIN, "--block-out-channels", 4, "--ema-half-lives", 3, "--keep", 1, "--steps", 3)
    command("train", "data.npz", "--out", "run", *run)
    command("sample", "model", "--out", "samples", *SAMPLE)
    for seed in (2, 3):
        Path(f"samples/{seed}.png").unlink()
    write_features()
    evaluate()


def model() -> Values:
    """Yield images of the model."""
    yield "images", stored("model").sample(range(3), [0, 1, 2], 2.0, "ddim", 4)


def trajectories() -> Values:
    """Yield where the trajectories are, and the images that they end in."""
    for solver, _ in TRAJECTORIES:
        trajectory = stored("model").resume(f"{solver}.safetensors")
        yield f"{solver} position", f"{trajectory.position} of {len(trajectory)}"
        yield solver, trajectory.run()


def run() -> Values:
    """Yield the files of the run, resumed."""
    command("train", "--out", "run", "--device", "cpu", "--resume", "--steps", 5)
    yield from files("run")


def samples() -> Values:
    """Yield the folder of samples, completed."""
    command("sample", "model", "--out", "samples", *SAMPLE)
    yield from files("samples")


def evaluation() -> Values:
    """Yield the report, made anew, and whether the features were read that were kept."""
    written = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.safetensors")}
    evaluate()
    kept = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.safetensors")}
    yield "features are read", str(written == kept != {})
    yield from files("report")


CONTINUED = (model, trajectories, run, samples, evaluation)
