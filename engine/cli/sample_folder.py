"""The writer of a folder with a file for each image and a manifest, to go on after a kill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flashddpm.checkpoints.model_folder import fingerprint
from flashddpm.cli import manifest
from flashddpm.cli.sample_job import SampleJob
from flashddpm.distributed import World
from flashddpm.io import images


def write_folder(job: SampleJob, world: World) -> int:
    """Draw the images that are not in the folder yet, and write one PNG for each and the manifest.

    The process with rank 0 also writes the animation, if one is wanted. Under torchrun all
    processes must call it.

    Args:
        job: the checked options, with the model and the batches to draw.
        world: the processes of the run, and which of them this one is.

    Returns:
        The number of images that this process wrote.

    Raises:
        ValueError: if the model was changed while processes read it, if an option turns out to be
            not allowed, or if the folder has images of other settings, seeds or labels, or files
            that its manifest does not name.
        NonFiniteError: if the network's output turns NaN or infinite.
        OSError: if a file cannot be written.
        SystemExit: if another process of torchrun failed (exit code 2).
    """
    frames: list[Any] = []
    out = job.options.out
    with world.together():
        model = fingerprint(job.folder)
    models = world.gather(model)
    with world.together():
        if len(set(models)) > 1:
            raise ValueError(f"model_dir={str(job.folder)!r}: was changed while it was read")
        if not world.rank:
            final = manifest.merge(out, *_facts(job, world, model))
    # A bad option shows in the first batch, and then nothing is written by any process.
    drawn = _missing(job, world, frames)
    with world.together():
        first = next(drawn, None)
    with world.together():
        if not world.rank:
            manifest.sweep(out)
            manifest.write(out, final)
    written = 0
    for part, x in chain([] if first is None else [first], drawn):
        written += images.save_folder(x, out, job.seeds[part])
    world.gather(None)
    if not world.rank:
        manifest.write(out, final)
        if job.options.trajectory is not None:
            images.save_gif(frames, job.options.trajectory)
    return written


def _missing(job: SampleJob, world: World, frames: list[Any]) -> Iterator[tuple[slice, Tensor]]:
    """Yield each of this process's batches that has an image not in the folder, with its images.

    Such a batch is drawn as a whole, so that its images have the bits that they have in a first
    run. With an animation, all batches are drawn.
    """
    keep = job.frames(frames)
    todo = [
        part
        for part in world.mine(job.parts)
        if keep or any(not (job.options.out / f"{s}.png").exists() for s in job.seeds[part])
    ]
    alone = len(todo) == 1  # then the bar shows steps
    count = sum(len(job.seeds[part]) for part in todo)
    with tqdm(total=count, unit="image", disable=bool(world.rank) or len(todo) < 2) as bar:
        for part in todo:
            yield part, job.draw(part, alone and not world.rank, keep)
            bar.update(len(job.seeds[part]))


def _facts(job: SampleJob, world: World, model: str) -> tuple[dict[str, Any], ...]:
    """Return the settings, the run and the images that the manifest records."""
    sampler, options = job.sampler, job.options
    dtype = str(sampler.dtype).removeprefix("torch.")
    settings = {"model": model, "dtype": dtype, **options.plan}
    kind = sampler.device.type
    run = {
        "flashddpm": version("flashddpm"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(sampler.device) if kind == "cuda" else kind,
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "backend": sampler.backend,
        "compile": options.compile,
        "batch_size": options.batch_size,
        "world_size": world.size,
    }
    labels: Sequence[int | None] = job.labels or [None] * len(job.seeds)
    images = {}
    for number, part in enumerate(job.parts):
        for seed, label in zip(job.seeds[part], labels[part], strict=True):
            name, rank = f"{seed}.png", number % world.size
            images[name] = {"seed": seed, "label": label, "rank": rank}
    return settings, run, images
