"""The command line: ``flashddpm sample``, ``train``, ``convert`` and what describes them."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flashddpm.benchmarks.command import bench
from flashddpm.cli.convert import convert
from flashddpm.cli.evaluate import evaluate
from flashddpm.cli.options import (
    MULTISTEP_STEPS,
    AllowPickle,
    BatchSize,
    Clip,
    Device,
    Dtype,
    Guidance,
    NumSteps,
    Seeds,
    Sigmas,
    Solver,
    Spacing,
    VarianceType,
)
from flashddpm.cli.train import train
from flashddpm.errors import CompilationError

app = typer.Typer(
    help="Sample and train denoising diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

USAGE, INTERRUPTED = 2, 130
Option = typer.Option


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2, Ctrl-C is 130."""
    logging.basicConfig(format="flashddpm: %(message)s")
    logging.getLogger("flashddpm").setLevel(logging.INFO)
    try:
        app()
    except SystemExit as end:
        _leave_torchrun(end.code if isinstance(end.code, int) else 0)
        raise
    except (ValueError, FloatingPointError, OSError, MemoryError, CompilationError) as error:
        _fail(" ".join(str(error).split()), USAGE)


def _fail(message: str, code: int) -> NoReturn:
    print(f"flashddpm: error: {message}", file=sys.stderr)
    _leave_torchrun(code)
    sys.exit(code)


def _leave_torchrun(code: int) -> None:
    """End at once if torchrun started this: at exit gloo's threads abort a process now and then."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@app.command()
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
    eta: Annotated[float, Option(help="Of ddim: 0 deterministic, 1 as noisy as ddpm.")] = 0.0,
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
    """Draw images and write them as a labelled grid, or one by one.

    A folder's finished images are kept, so that the same command goes on after a kill; under
    torchrun each process draws its share of the batches.
    """
    from flashddpm.cli import sample as cli_sample
    from flashddpm.distributed import World

    options = {
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
    request = cli_sample.Request(
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
        options,
        allow_pickle,
    )
    try:
        line = cli_sample.run(request)
    except KeyboardInterrupt:
        if World.from_environment().rank:
            sys.exit(INTERRUPTED)
        written = "nothing written" if out.suffix else f"{out} keeps what is finished"
        _fail(f"interrupted, {written}", INTERRUPTED)
    if line:
        print(line)
    _leave_torchrun(0)


app.command()(train)
app.command()(convert)
app.command()(bench)
app.command()(evaluate)


@app.command()
def kernels(
    arch: Annotated[
        str | None, Option(help="80, 90 or 100 (sm_90), comma-separated.  [default: all]")
    ] = None,
    kernel: Annotated[
        str | None, Option(help="Names of kernels, comma-separated.  [default: all]")
    ] = None,
    json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
    verbose: Annotated[
        bool, Option("--verbose", help="Also accesses and opcodes of every variant.")
    ] = False,
) -> None:
    """Print a scorecard of the compiled kernels; no GPU is needed.

    Compiles all of them for three generations of GPUs, which takes about a minute the first time.
    The exit code is 1 where a gate fails.
    """
    from flashddpm import arguments

    try:
        from flashddpm.kernels.checks.compiled import ARCHITECTURES, INTERPRETED, KERNELS
        from flashddpm.kernels.checks.report import text
        from flashddpm.kernels.checks.scorecard import scorecard
    except ImportError as error:
        raise ValueError(f"kernels: Triton is needed to compile them ({error})") from None
    names = list(KERNELS) if kernel is None else [part.strip() for part in kernel.split(",")]
    known = list(map(str, ARCHITECTURES))
    archs = known if arch is None else [part.strip() for part in arch.split(",")]
    for name in names:
        arguments.one_of("kernel", name, tuple(KERNELS))
    for number in archs:
        arguments.one_of("arch", number, known)
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it")
    card = scorecard(dict.fromkeys(names), sorted({int(number) for number in archs}))
    print(card.json() if json else text(card, verbose))
    if card.faults:
        sys.exit(1)


@app.command()
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
    import flashddpm as fd
    from flashddpm import arguments
    from flashddpm.execution import compile_cache

    try:
        sizes = [int(part) for part in batch_size.split(",")]
    except ValueError:
        raise ValueError(f"batch_size={batch_size!r}: must be integers, such as 1,16,64") from None
    for size in sizes:
        arguments.integer("batch_size", size, 1)
    folder = fd.bundled() if model_dir is None else model_dir
    sampler = fd.Sampler.from_pretrained(folder, device, dtype, compile=True, tune=tune)
    if guided and sampler.conditioning.null_label is None:
        raise ValueError("guided: must not be given for a model without a null class")
    label = 0 if sampler.conditioning.num_classes else None
    for size in sizes:
        start = time.perf_counter()
        w, batch = 2.0 if guided else 1.0, max(size, 64)  # the bucket that sample() takes
        sampler.sample(range(size), label, w, num_steps=1, batch_size=batch)
        print(f"{size} images at a time: {time.perf_counter() - start:.1f} s")
    print(f"kept in {compile_cache.folder()}")


@app.command()
def info() -> None:
    """Show versions, devices and what ``auto`` would choose, and why."""
    import platform

    import numpy
    import torch

    import flashddpm as fd

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    print(
        f"flashddpm {fd.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, triton {triton_version}, numpy {numpy.__version__}"
    )
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    cuda = torch.cuda.is_available()
    for i in range(torch.cuda.device_count() if cuda else 0):
        card = torch.cuda.get_device_properties(i)
        print(
            f"cuda:{i}: {card.name}, sm_{card.major}{card.minor}, "
            f"{card.total_memory / 2**30:.0f} GiB"
        )
    if not cuda:
        print("cuda: no device is available")
    sampler = fd.Sampler.from_pretrained(fd.bundled())
    why = "a CUDA device is available" if cuda else "no CUDA device is available"
    print(f"device auto: {sampler.device} ({why})")
    print(f"dtype auto: {str(sampler.dtype).removeprefix('torch.')}")
    kind = "Triton kernels, captured step" if cuda else "PyTorch operations, noise drawn ahead"
    print(f"backend auto: {sampler.backend} ({kind})")
    chosen, reason = sampler.execution.auto_compile(64 * MULTISTEP_STEPS)
    print(f"compile auto: {'yes' if chosen else 'no'} for a sheet of 64 ({reason})")
