"""The command ``flashddpm sample``: it draws images and writes a labelled grid or a folder."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Option

from flashddpm.cli import exits
from flashddpm.cli.options import (
    AllowPickle,
    BatchSize,
    Clip,
    Device,
    Dtype,
    Eta,
    Guidance,
    NumSteps,
    Seeds,
    Sigmas,
    Solver,
    Spacing,
    VarianceType,
)
from flashddpm.cli.sample_folder import write_folder
from flashddpm.cli.sample_job import SampleJob, SampleOptions, prepare
from flashddpm.distributed import World
from flashddpm.io import images

log = logging.getLogger("flashddpm")


def sample(
    model_dir: Annotated[
        Path | None,
        typer.Argument(
            help="A model folder, or OWNER/NAME on the hub; by default the bundled one."
        ),
    ] = None,
    out: Annotated[
        Path, Option(help="A picture (grid.png), or a folder for one file an image.")
    ] = Path("samples.png"),
    num_images: Annotated[int | None, Option(help="How many images.  [default: 64]")] = None,
    seeds: Seeds = None,
    labels: Annotated[
        str | None,
        Option(help="3, Boot, or 0,1,2 (one an image), or none.  [default: in turn]"),
    ] = None,
    guidance: Guidance = 1.0,
    solver: Solver = None,
    num_steps: NumSteps = None,
    spacing: Spacing = None,
    respacing: Annotated[
        str | None,
        Option(help="Timesteps as OpenAI's scripts take them: 250, ddim50 or 10,20,30."),
    ] = None,
    sigmas: Sigmas = None,
    eta: Eta = 0.0,
    variance_type: VarianceType = None,
    clip: Clip = None,
    threshold: Annotated[
        float | None,
        Option(
            help="Dynamic thresholding: quantile of |x0| to clip to (.995, say), at most --clip, "
            "which must be above 1 (2, say); 0 for none.  [default: the model's]"
        ),
    ] = None,
    guidance_rescale: Annotated[
        float, Option(help="From 0 to 1: brings guided outputs back to their usual deviation.")
    ] = 0.0,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        Option(help="Guide where sigma is above the first and not above the second only."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    backend: Annotated[str, Option(help="auto, fused or reference.")] = "auto",
    compile: Annotated[str, Option(help="auto, on or off.")] = "auto",
    batch_size: BatchSize = 64,
    trajectory: Annotated[
        Path | None, Option(help="Also write the x0 previews as an animation (.gif).")
    ] = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Draw images and write them as one labelled grid, or as a folder with one file for each.

    Images that are finished in a folder are kept, so that the same command goes on after a kill;
    under torchrun each process draws its share of the batches.
    """
    plan = {
        "guidance": guidance,
        "solver": solver,
        "num_steps": num_steps,
        "spacing": spacing,
        "timesteps": respacing,
        "sigmas": sigmas,
        "eta": eta,
        "variance_type": variance_type,
        "clip": clip,
        "threshold": threshold,
        "guidance_rescale": guidance_rescale,
        "guidance_interval": guidance_interval,
    }
    options = SampleOptions(
        model_dir,
        out,
        num_images,
        seeds,
        labels,
        device,
        dtype,
        backend,
        compile,
        batch_size,
        trajectory,
        plan,
        allow_pickle,
    )
    try:
        line = run(options)
    except KeyboardInterrupt:
        if World.from_environment().rank:
            sys.exit(exits.INTERRUPTED)
        written = "nothing written" if out.suffix else f"{out} keeps what is finished"
        exits.fail(f"interrupted, {written}", exits.INTERRUPTED)
    if line:
        print(line)
    exits.leave_torchrun(0)


def run(options: SampleOptions) -> str:
    """Draw images and write them, as the options of the command ask for.

    Under torchrun all processes must call it.

    Args:
        options: the options of the command, as they were given; they are checked here.

    Returns:
        The line that sums up the run (images, steps, seconds); "" in all processes but the first.

    Raises:
        ValueError: if an option is not allowed.
        CheckpointError: if the model is missing or broken.
        NonFiniteError: if the network's output turns NaN or infinite.
        OSError: if a file cannot be written.
        ConnectionError: if not all processes of torchrun joined.
        SystemExit: if another process of torchrun failed (exit code 2).
    """
    world = World.from_environment()
    if world.rank:
        log.setLevel(logging.WARNING)
    with world.joined(options.device):
        with world.together():
            job = prepare(options, world)
        start = time.perf_counter()
        try:
            drawn = (_write_picture if options.out.suffix else write_folder)(job, world)
        except Exception:
            if world.size > 1:  # another process's bar may hold the line
                print(file=sys.stderr)
            raise
        total = sum(world.gather(drawn))
        seconds = time.perf_counter() - start
    if world.rank:
        return ""
    kept = len(job.seeds) - total
    return (
        f"{total} images, {job.num_steps} steps, {seconds:.1f} s, "
        f"{total / seconds:.1f} images/s, {job.sampler.device}, {job.sampler.backend}"
        + (f", {world.size} processes" if world.size > 1 else "")
        + (f", {kept} were there" if kept else "")
        + f" -> {options.out}"
    )


def _write_picture(job: SampleJob, world: World) -> int:
    """Write one picture of all images; return the number of images that this process drew."""
    shape = (len(job.seeds), *job.sampler.shape)
    frames: list[Any] = []
    mine = world.mine(job.parts)
    with world.together():
        x = torch.zeros(shape, device=job.sampler.device)
        for part in mine:
            x[part] = job.draw(part, not world.rank, job.frames(frames))
    x = world.add_up(x)
    with world.together():
        if not world.rank:
            images.save_grid(x.cpu(), job.options.out, **job.layout)
            if job.options.trajectory is not None:
                images.save_gif(frames, job.options.trajectory)
    return sum(len(job.seeds[part]) for part in mine)
