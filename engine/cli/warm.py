"""The command ``flashddpm warm``: it compiles a model ahead, for later processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from flashddpm import arguments
from flashddpm.checkpoints.bundled import bundled
from flashddpm.cli.options import Device, Dtype
from flashddpm.execution import compile_cache
from flashddpm.sampling.sampler import Sampler


def warm(
    model_dir: Annotated[
        Path | None, typer.Argument(help="A model folder; by default the bundled model.")
    ] = None,
    batch_size: Annotated[
        str, Option(help="Images at a time, comma-separated: the bucket of each is compiled.")
    ] = "64",
    guided: Annotated[bool, Option("--guided", help="With two evaluations an image.")] = False,
    tune: Annotated[
        bool, Option("--tune", help="Try many kernels for each operation; takes minutes.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Compile a model ahead of its first use; later processes find the code in the user's cache."""
    try:
        sizes = [int(part) for part in batch_size.split(",")]
    except ValueError:
        raise ValueError(f"batch_size={batch_size!r}: must be integers, such as 1,16,64") from None
    for size in sizes:
        arguments.integer("batch_size", size, 1)
    folder = bundled() if model_dir is None else model_dir
    sampler = Sampler.from_pretrained(folder, device, dtype, compile=True, tune=tune)
    if guided and sampler.conditioning.null_label is None:
        raise ValueError("guided: must not be given for a model without a null class")
    label = 0 if sampler.conditioning.num_classes else None
    for size in sizes:
        start = time.perf_counter()
        w, batch = 2.0 if guided else 1.0, max(size, 64)  # the bucket that sample() takes
        sampler.sample(range(size), label, w, num_steps=1, batch_size=batch)
        print(f"{size} images at a time: {time.perf_counter() - start:.1f} s")
    print(f"kept in {compile_cache.folder()}")
