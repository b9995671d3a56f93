"""The command ``flashddpm evaluate``: it measures a model and writes a page and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from flashddpm.cli.parsing import parse_seeds

Option = typer.Option
NUM_IMAGES = 1000


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, or OWNER/NAME on the hub.")],
    data: Annotated[
        Path, typer.Argument(help="What it was trained on: an IDX or image folder, or .npz.")
    ],
    out: Annotated[
        Path, Option(help="The page to write, with the numbers beside it as .json.")
    ] = Path("report.html"),
    metrics: Annotated[
        str, Option(help="Comma-separated. frechet, kernel and prc are of features.")
    ] = "bound,frechet,kernel,prc,neighbours",
    num_images: Annotated[int | None, Option(help="How many samples.  [default: 1000]")] = None,
    seeds: Seeds = None,
    guidance: Guidance = 1.0,
    solver: Solver = None,
    num_steps: NumSteps = None,
    spacing: Spacing = None,
    sigmas: Sigmas = None,
    eta: Eta = None,
    variance_type: VarianceType = None,
    clip: Clip = None,
    reference: Annotated[
        Path | None,
        Option(help="Real images to compare with.  [default: IDX test images in DATA, else DATA]"),
    ] = None,
    bound_images: Annotated[
        int | None, Option(help="Real images that the bound is of.  [default: 256 at most]")
    ] = None,
    bound_timesteps: Annotated[
        str | None, Option(help="A number, or all.  [default: 100 at most]")
    ] = None,
    features: Annotated[
        str,
        Option(
            help="auto, a classifier of DATA; or a TorchScript file, which is run as a program."
        ),
    ] = "auto",
    feature_input: Annotated[
        str, Option(help="What that file takes: uint8, or float (in [-1, 1]).")
    ] = "uint8",
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: BatchSize = 64,
    allow_pickle: AllowPickle = False,
) -> None:
    """Measure how good a model is, and write an HTML page and JSON about it.

    A bound on its likelihood; the distance of samples from real images, and the share of them that
    a classifier recognises; the training images that samples are nearest to. What cannot be
    measured is refused before any work is done. Needs flashddpm[evaluate].
    """
    from flashddpm.evaluation import report
    from flashddpm.evaluation.evaluate import evaluate as measure
    from flashddpm.evaluation.job import Settings, prepare

    plan = {
        "solver": solver,
        "num_steps": num_steps,
        "spacing": spacing,
        "sigmas": sigmas,
        "eta": eta,
        "variance_type": variance_type,
        "clip": clip,
    }
    settings = Settings(
        model,
        data,
        out,
        reference,
        tuple(name.strip() for name in metrics.split(",") if name.strip()),
        samples_of(seeds, num_images),
        plan,
        guidance,
        bound_images,
        timesteps_of(bound_timesteps),
        features,
        feature_input,
        device,
        dtype,
        batch_size,
        allow_pickle,
    )
    try:
        result, pictures = measure(prepare(settings))
    except KeyboardInterrupt:
        exits.fail("interrupted, nothing written", exits.INTERRUPTED)
    numbers = report.write(out, result, pictures)
    print(f"{report.text(result)}\n-> {out}, {numbers}")


def samples_of(seeds: str | None, num_images: int | None) -> list[int]:
    """Return the seeds of the samples that the options ask for, a list of ints.

    Args:
        seeds: the option --seeds: one seed ("7"), which is the first of them, several ("1,2,5"), a
            range ("0:64"), or None for those from 0.
        num_images: the option --num-images, the number of samples; None for as many as seeds are
            listed, or, beside one seed or none, 1,000.

    Raises:
        ValueError: if the seeds are not of this form or none, if a range has more than 1,000,000,
            if one is no 64-bit integer, if num_images is below 1, or if there are not as many
            seeds.
    """
    if num_images is None and (seeds is None or not set(seeds) & set(":,")):
        num_images = NUM_IMAGES
    return parse_seeds(seeds, num_images)


def timesteps_of(given: str | None) -> int | str | None:
    """Return the number of timesteps of the bound, "all", or None where the option is not given.

    Args:
        given: the option --bound-timesteps: a number, whose range is not checked here, "all" in
            lower case, or None.

    Raises:
        ValueError: if it is neither an integer nor "all".
    """
    if given is None or given == "all":
        return given
    try:
        return int(given)
    except ValueError:
        raise ValueError(f"bound_timesteps={given!r}: must be a number or all") from None
